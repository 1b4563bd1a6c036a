"""The oracle against Hugging Face's eager gpt-oss attention, gradcheck, and an explicit loop over the mask's rules."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import Case, make_inputs

from triton_attention_sink_hf import Mask, attention_sink, reference_attention

FP64 = torch.float64


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2), (8, 1)])
def test_equals_eager_gpt_oss(heads, window):
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    B, S, D = 2, 23, 16
    q = torch.randn(B, heads[0], S, D, dtype=FP64, requires_grad=True)
    k, v = (torch.randn(B, heads[1], S, D, dtype=FP64, requires_grad=True) for _ in range(2))
    sinks = torch.linspace(-10, 20, heads[0], dtype=FP64, requires_grad=True)
    hidden = torch.ones(S, S, dtype=torch.bool).triu(1)
    if window is not None:
        hidden |= torch.ones(S, S, dtype=torch.bool).tril(-window)
    attention_mask = torch.zeros(1, 1, S, S, dtype=FP64).masked_fill(hidden, float("-inf"))
    module = SimpleNamespace(sinks=sinks, num_key_value_groups=heads[0] // heads[1], training=False)
    want, _ = gpt_oss.eager_attention_forward(module, q, k, v, attention_mask, scaling=D**-0.5, dropout=0.0)
    got = attention_sink(
        *(x.transpose(1, 2) for x in (q, k, v)), sinks,
        window_size=(-1 if window is None else window - 1, 0), implementation="reference",
    )  # fmt: skip
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    dout = torch.randn_like(want)
    leaves = (q, k, v, sinks)
    expected = torch.autograd.grad(want, leaves, dout)
    for a, b in zip(torch.autograd.grad(got, leaves, dout), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize(
    "case",
    [
        Case(5, heads=(2, 1), head_dim=16),
        Case(6, 4, heads=(2, 1), head_dim=16, sinks=None, window=(2, 0)),
        Case(6, heads=(2, 2), head_dim=(16, 24), lengths_q=(2, 0, 3), causal=False),
        Case(3, 5, batch=2, heads=(1, 1), head_dim=16, padding="left", used=(5, 4)),
    ],
    ids=["causal", "blind rows", "packed", "padding"],
)
def test_gradcheck(case, softcap):
    inputs = make_inputs(case)
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    if inputs.sinks is not None:
        leaves.append(torch.linspace(-1, 2, case.heads[0], dtype=FP64, requires_grad=True))

    def function(q, k, v, sinks=None):
        out, lse = reference_attention(q, k, v, sinks, inputs.mask, softmax_scale=0.3, softcap=softcap)
        return out, lse.masked_fill(lse == float("-inf"), 0.0)

    assert torch.autograd.gradcheck(function, leaves)


def _slow_dense(mask: Mask, batch: int, seqlen_q: int, seqlen_k: int) -> torch.Tensor:
    """The rules, key by key: written from the contract and not from ``Mask.dense``."""
    visible = torch.zeros(batch, seqlen_q, seqlen_k, dtype=torch.bool)
    for b in range(batch):
        if mask.cu_seqlens_q is None:
            used = seqlen_k if mask.seqused_k is None else int(mask.seqused_k[b])
            segments = [(0, seqlen_q, 0, used)]
        else:
            q_ends, k_ends = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
            segments = list(zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False))
        for q_start, q_end, k_start, k_end in segments:
            for i in range(q_start, q_end):
                distance_to_end = q_end - i
                position = k_end - distance_to_end  # the last query stands at the last key
                for j in range(k_start, k_end):
                    if mask.left >= 0 and position - j > mask.left:
                        continue
                    if mask.right >= 0 and j - position > mask.right:
                        continue
                    if mask.key_padding_mask is not None and not mask.key_padding_mask[b, j]:
                        continue
                    visible[b, i, j] = True
    return visible


@pytest.mark.parametrize("sides", [(-1, 0), (-1, -1), (0, 0), (3, 0), (3, 2), (-1, 2), (2, -1), (50, 50)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(9, batch=2),
        Case(5, 12),
        Case(12, 5),
        Case(1, 7),
        Case(12, lengths_q=(0, 1, 4, 0, 5)),
        Case(12, 15, lengths_q=(3, 0, 4, 5), lengths_k=(1, 4, 0, 8)),
        Case(7, 9, batch=3, padding="left"),
        Case(7, 9, batch=3, padding="holes"),
        Case(4, 9, batch=3, used=(9, 0, 5)),
        Case(4, 9, batch=2, used=(7, 3), padding="right"),
    ],
    ids=["square", "Sq < Sk", "Sq > Sk", "one query", "packed", "packed Sq != Sk", "left", "holes", "used", "both"],
)
def test_dense_mask_follows_the_rules(case, sides):
    mask = make_inputs(case).mask
    mask = Mask(*sides, mask.cu_seqlens_q, mask.cu_seqlens_k, mask.key_padding_mask, mask.seqused_k)
    seqlen_k = case.seqlen_k or case.seqlen_q
    want = _slow_dense(mask, case.batch, case.seqlen_q, seqlen_k)
    got = mask.dense(case.seqlen_q, seqlen_k, torch.device("cpu")).expand_as(want)
    assert torch.equal(got, want)


def test_rows_that_see_nothing():
    q, k = torch.randn(1, 3, 2, 16, dtype=FP64, requires_grad=True), torch.randn(1, 1, 2, 16, dtype=FP64)
    sinks = torch.tensor([0.5, -2.0], dtype=FP64, requires_grad=True)
    out, lse = attention_sink(q, k, k, sinks, return_lse=True)
    assert not out[:, :2].any()
    torch.testing.assert_close(lse[0, :, :2], sinks[:, None].expand(2, 2))
    dq, dsinks = torch.autograd.grad(lse[:, :, :2].sum(), (q, sinks))
    assert not dq.any()
    torch.testing.assert_close(dsinks, torch.full((2,), 2.0, dtype=FP64))
    out, lse = attention_sink(q, k, k, return_lse=True)
    assert not out[:, :2].any() and bool((lse[:, :, :2] == float("-inf")).all())
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert bool(dq.isfinite().all())


def test_formula_of_one_row():
    """lse = log(sum exp(x) + exp(s)) and out = sum exp(x - lse) v, by hand."""
    q = torch.full((1, 1, 1, 16), 0.25, dtype=FP64)
    k = torch.stack([torch.full((16,), value, dtype=FP64) for value in (1.0, -2.0)])[None, :, None]
    v = torch.stack([torch.full((16,), value, dtype=FP64) for value in (3.0, 5.0)])[None, :, None]
    out, lse = attention_sink(q, k, v, torch.tensor([0.7]), softmax_scale=0.5, return_lse=True)
    x = [0.5 * 16 * 0.25 * 1.0, 0.5 * 16 * 0.25 * -2.0]
    z = math.exp(x[0]) + math.exp(x[1]) + math.exp(float(torch.tensor(0.7)))
    assert lse.item() == pytest.approx(math.log(z), rel=1e-12)
    assert out[0, 0, 0, 0].item() == pytest.approx((3.0 * math.exp(x[0]) + 5.0 * math.exp(x[1])) / z, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype):
    inputs = make_inputs(Case(8, dtype=dtype))
    out, lse = attention_sink(inputs.q, inputs.k, inputs.v, inputs.sinks, return_lse=True, implementation="reference")
    assert out.dtype == dtype and lse.dtype == torch.float32


@pytest.mark.parametrize(
    "case",
    [
        Case(4, heads=(2, 1), head_dim=2),
        Case(4, 2, heads=(2, 1), head_dim=2, softcap=2.0),
        Case(4, sinks=None, heads=(1, 1), head_dim=2),
    ],
    ids=["plain", "rows without a key", "no sinks"],
)
def test_second_derivatives(case):
    """By finite differences of the first ones, through out and lse."""
    inputs = make_inputs(replace(case, dtype=torch.float64))
    leaves = [x.double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks) if x is not None]

    def attend(q, k, v, sinks=None):
        out, lse = reference_attention(q, k, v, sinks, inputs.mask, softmax_scale=0.7, softcap=case.softcap)
        return out.sin(), lse.masked_fill(lse == float("-inf"), 0.0).sin()

    assert torch.autograd.gradgradcheck(attend, leaves)
