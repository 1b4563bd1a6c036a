"""FlashAttention-4 as a backend: what it is asked for, and how. A stand-in on a CPU; the library itself on a GPU."""

import functools
import sys
import types
from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from cases import Case, call, cu_seqlens, make_inputs, run

pytest.importorskip("triton", reason="triton is not installed")

from triton_attention_sink_hf import Mask, attention_sink, explain, reference_attention
from triton_attention_sink_hf.call import Call, Memo, _memo
from triton_attention_sink_hf.implementations import fastest, flash_attention_4, unsupported_reason
from triton_attention_sink_hf.implementations.flash_attention_4 import config

NAME, BF16 = "flash_attention_4", torch.bfloat16
CASES = {
    "window": Case(70, window=(9, 0), batch=2),
    "full": Case(70, dlse=True, layout="bhsd"),
    "bidirectional": Case(70, causal=False, window=(5, 3)),
    "one side": Case(70, causal=False, window=(-1, 3), dlse=True),
    "more keys": Case(50, 70, window=(20, 0)),
    "packed": Case(70, lengths_q=(30, 0, 33), dlse=True),
    "packed window": Case(70, lengths_q=(7, 60), window=(9, 0), sinks=None, dlse=True),
    "softcap": Case(70, softcap=3.0),
    "scale, no sink": Case(70, sinks=None, softmax_scale=0.3),
    "frozen sinks": Case(70, sinks="frozen"),
    "fp64 sinks": Case(70, sink_dtype=torch.float64),
}


class Attention(torch.autograd.Function):
    """The reference, with gradients that autograd takes for constants."""

    @staticmethod
    def forward(ctx, options, q, k, v, sinks):
        ctx.options, ctx.inputs = options, [q, k, v, sinks]
        return Attention.compute(options, q, k, v, sinks)

    @staticmethod
    def compute(options, q, k, v, sinks):
        mask, scale, softcap = options
        return reference_attention(q, k, v, sinks, mask, softmax_scale=scale, softcap=softcap)

    @staticmethod
    def backward(ctx, dout, dlse):
        inputs = [None if x is None else x.detach().requires_grad_() for x in ctx.inputs]
        with torch.enable_grad():
            outputs = Attention.compute(ctx.options, *inputs)
        found = torch.autograd.grad(outputs, [x for x in inputs if x is not None], (dout, dlse))
        return None, *found, *(None,) * (4 - len(found))


def dense(
    q, k, v, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0,
    deterministic=False, return_lse=False, cu=None,
):  # fmt: skip
    assert return_lse and (learnable_sink is None or learnable_sink.dtype != torch.float64)
    left, right = (-1 if side is None else side for side in window_size)
    mask = Mask(left, 0 if causal else right, cu, cu)
    return Attention.apply((mask, softmax_scale, softcap), q, k, v, learnable_sink)


def packed(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, softmax_scale=None, causal=False, window_size=(None, None),
    learnable_sink=None, softcap=0.0, deterministic=False, return_lse=False,
):  # fmt: skip
    assert cu_seqlens_q is cu_seqlens_k and cu_seqlens_q[-1] == len(q)  # else rows were left unwritten
    options = (softmax_scale, causal, window_size, learnable_sink, softcap, deterministic, return_lse)
    out, lse = dense(q[None], k[None], v[None], *options, cu=cu_seqlens_q)
    return out[0], lse[0]


@pytest.fixture
def card(monkeypatch):
    """Pretends an architecture, and that a stand-in of FlashAttention-4 (None: nothing) is installed."""

    def pretend(target, dense=dense, packed=packed):
        module = types.ModuleType("flash_attn.cute")
        module.flash_attn_func, module.flash_attn_varlen_func = dense, packed
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.cute", None if dense is None else module)
        monkeypatch.setattr(flash_attention_4, "target_name", lambda device: target)
        forget()

    def forget():
        flash_attention_4._functions.cache_clear()
        flash_attention_4._absent.cache_clear()
        _memo.cache_clear()

    yield pretend
    forget()


def a_call(seqlen=512, head_dim=64, dtype=BF16, mask=None, scale=0.125, softcap=0.0, device="meta", **changes):
    shape = (1, seqlen, 4, head_dim)
    q, k = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
    made = Call(q, k, k, torch.zeros(4, device=device), mask or Mask(-1, 0), scale, softcap, False, Memo())
    return replace(made, **changes)


@pytest.mark.parametrize("name", CASES)
def test_it_is_called_as_the_mathematics_wants(card, name):
    card("sm90")
    case = replace(CASES[name], dtype=BF16)
    inputs = make_inputs(case)
    got, want = (run(case, inputs, implementation) for implementation in (NAME, "reference"))
    assert got.keys() == want.keys()
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_deterministic_gradients_are_asked_for(card):
    asked = []

    @functools.wraps(dense)
    def note(*args, deterministic=False, **options):
        asked.append(deterministic)
        return dense(*args, **options)

    card("sm90", note)
    case = Case(70, dtype=BF16)
    for wanted in (True, False):
        run(case, make_inputs(case), NAME, deterministic=wanted)
    assert asked == [True, False]


CU = cu_seqlens((300, 212))
PADDING, USED = torch.ones(1, 512, dtype=torch.bool), torch.tensor([5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("target", "changes", "reason"),
    [
        ("sm80", {}, "serves sm90, sm100, sm103, the cards on which it has sinks, got sm80"),
        ("sm120", {}, "got sm120"),
        ("gfx942", {}, "got gfx942"),
        ("sm90", {"memo": None}, "trace"),
        ("sm90", {"mask": Mask(-1, 0, key_padding_mask=PADDING)}, "without key_padding_mask"),
        ("sm90", {"mask": Mask(-1, 0, seqused_k=USED)}, "without key_padding_mask and seqused_k"),
        ("sm90", {"scale": -1.0}, "positive softmax_scale, got -1.0"),
        ("sm90", {"dtype": torch.float32}, "bfloat16 or float16, got torch.float32"),
        ("sm90", {"seqlen": 0}, "without queries or keys"),
        ("sm90", {"head_dim": 36}, r"multiples of 8, got \(36, 36\)"),
        ("sm90", {"head_dim": 264}, r"head dimensions up to 256, got \(264, 264\)"),
        ("sm100", {"head_dim": 192}, r"up to 128, \(192, 128\) and \(256, 256\) on sm100, got \(192, 192\)"),
        ("sm100", {"head_dim": 256}, "no gradient of sinks for head dimension 256 on sm100"),
        ("sm90", {"k": torch.zeros(1, 500, 4, 64, dtype=BF16)}, "more queries than keys"),
        ("sm90", {"mask": Mask(-1, 0, CU, CU.clone())}, "one cu_seqlens"),
        ("sm90", {"mask": Mask(-1, 0, *[cu_seqlens((1,) * 512)] * 2)}, "513 entries are many for 512 rows"),
    ],
)
def test_what_it_is_not_asked_for(card, target, changes, reason):
    card(target)
    with pytest.raises(AssertionError, match=reason):
        assert unsupported_reason(NAME, a_call(**changes)) is None, unsupported_reason(NAME, a_call(**changes))


@pytest.mark.parametrize(
    ("target", "changes"),
    [
        *((target, {}) for target in config.TARGETS),
        ("sm90", {"head_dim": 256}),
        ("sm100", {"head_dim": 256, "sinks": None}),
        ("sm100", {"mask": Mask(-1, 0, CU, CU), "softcap": 5.0, "dtype": torch.float16}),
        ("sm90", {"mask": Mask(-1, -1), "k": torch.zeros(1, 500, 4, 64, dtype=BF16)}),
    ],
)
def test_what_it_is_asked_for(card, target, changes):
    card(target)
    assert unsupported_reason(NAME, a_call(**changes)) is None


def test_auto_takes_it_where_nothing_here_is_tuned(card):
    for target in config.UNTUNED:
        card(target)
        assert fastest(a_call()) == NAME
        assert fastest(a_call(dtype=torch.float32)) != NAME  # unsupported
        assert fastest(a_call(), in_operator=True) != NAME


def test_auto_takes_it_on_hopper_for_measured_calls_alone(card, monkeypatch):
    card("sm90")
    assert fastest(a_call()) != NAME
    monkeypatch.setattr(config, "FASTER", (config.Measured("sm90", (64, 64), False, False, 512, "a.json"),))
    assert fastest(a_call()) == NAME
    others = ({"seqlen": 511}, {"head_dim": 128}, {"mask": Mask(9, 0)}, {"mask": Mask(-1, -1)}, {"softcap": 1.0})
    for changes in (*others, {"mask": Mask(-1, 0, CU, CU)}):
        assert fastest(a_call(**changes)) != NAME, changes


def test_what_auto_leaves_alone_is_not_imported(card):
    card("sm90")
    for name in ("flash_attn.cute", "flash_attn"):
        del sys.modules[name]
    fastest(a_call())
    assert "flash_attn" not in sys.modules


def test_every_measured_class_names_a_committed_result():
    from processes import ROOT

    assert all((ROOT / "benchmarks" / "results" / faster.source).is_file() for faster in config.FASTER)


def test_absent_or_too_old_is_a_reason(card):
    card("sm90", None)
    assert "must be installed (pip install --pre flash-attn-4)" in unsupported_reason(NAME, a_call())
    card("sm90", lambda q, k, v, causal=False, learnable_sink=None: None)
    assert "<lambda> has no deterministic, return_lse, softcap" in unsupported_reason(NAME, a_call())
    card("sm100", None)
    assert fastest(a_call()) != NAME


def test_explain_names_it(card):
    q = torch.zeros(1, 70, 4, 64, dtype=BF16)
    card("sm90")
    assert explain(q, q, q).reasons[NAME] is None
    card("sm80")
    assert "got sm80" in explain(q, q, q).reasons[NAME]


def test_what_all_kernels_refuse_is_refused(card):
    from torch.autograd import forward_ad

    card("sm90")
    q = torch.randn(1, 70, 2, 16, dtype=BF16, requires_grad=True)
    out = attention_sink(q, q, q, implementation=NAME)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        attention_sink(forward_ad.make_dual(q, q), q, q, implementation=NAME)
    with pytest.raises(ValueError, match="has no operator that"):
        torch.func.vmap(lambda x: attention_sink(x, x, x, implementation=NAME))(q[None].detach())


GPU_CASES = {
    "gpt-oss window": Case(2048, heads=(64, 8), head_dim=64, window=(127, 0)),
    "gpt-oss full": Case(2048, heads=(64, 8), head_dim=64),
    "gpt-oss packed": Case(
        4096, heads=(64, 8), head_dim=64, lengths_q=(0, 1, 15, 16, 17, 127, 128, 129, 0, 1200, 63, 700, 64, 1503)
    ),
    "packed window, lse": Case(
        3000, heads=(16, 2), head_dim=64, lengths_q=(2000, 800, 1, 199), window=(127, 0), dlse=True
    ),
    "llama": Case(1024, batch=2, heads=(32, 8), head_dim=128, sinks=None, layout="bhsd"),
    "lse": Case(700, heads=(32, 8), head_dim=128, dlse=True),
    "more keys": Case(333, 600, heads=(8, 2), head_dim=64, batch=2, layout="sliced"),
    "d256": Case(900, heads=(16, 4), head_dim=256, window=(500, 0)),
    "bidirectional": Case(768, heads=(8, 2), head_dim=64, causal=False, window=(100, 30)),
    "softcap": Case(700, heads=(32, 8), head_dim=128, softcap=15.0),
    "bf16 sinks": Case(700, heads=(8, 2), head_dim=64, sink_dtype=BF16),
}


@pytest.fixture
def library():
    reason = flash_attention_4._absent()
    if reason:
        pytest.skip(reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", GPU_CASES)
def test_exactness_of_the_library(library, poisoned_empty, name, dtype):
    case = replace(GPU_CASES[name], dtype=dtype)
    inputs = make_inputs(case, "cuda")
    try:
        results = run(case, inputs, NAME)
    except ValueError as error:
        pytest.skip(f"{error}")  # the card: sinks of head dimension 256 on Blackwell
    assert_within_budget(case, inputs, results, rounded_delta=True)


@pytest.mark.gpu
def test_deterministic_gradients_of_the_library_repeat(library):
    case = replace(GPU_CASES["gpt-oss packed"], dtype=BF16)
    inputs = make_inputs(case, "cuda")
    first, second = (run(case, inputs, NAME, deterministic=True) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.gpu
def test_the_library_can_be_called_without_a_gradient(library):
    case = replace(GPU_CASES["gpt-oss packed"], dtype=BF16)
    inputs = make_inputs(case, "cuda")
    with torch.no_grad():
        out, lse = call(case, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks, NAME)
    assert not out.requires_grad
    assert_within_budget(case, inputs, {"out": out, "lse": lse})
