"""key_ranges, merged parts, first keys and shared prefixes on a GPU, at the shapes of models, against fp64."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from cases import Case, cu_seqlens, differentiated, make_inputs, run
from visibility import Visible, first_and_window, first_and_window_of_segments, tree_visible

from triton_attention_sink_hf import (
    SharedPrefixes,
    explain,
    first_keys_attention,
    merge_attention,
    ops,
    shared_prefix_attention,
)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

BF16, FP32 = torch.bfloat16, torch.float32
GPT_OSS = {"heads": (64, 8), "head_dim": 64}
LENGTHS = (0, 1, 15, 129, 700, 64, 300)
RANGES = {
    "random": Case(900, 1100, ranges="random", causal=False, heads=(8, 2), head_dim=64, batch=2, dlse=True),
    "blocks": Case(1500, ranges="blocks", causal=False, **GPT_OSS),
    "blocks window": Case(1500, ranges="blocks", causal=False, window=(127, -1), layout="bhsd", **GPT_OSS),
    "prefix": Case(1000, ranges="prefix", causal=False, heads=(32, 8), head_dim=128, sinks=None),
    "packed": Case(1300, ranges="random", lengths_q=LENGTHS, heads=(16, 4), head_dim=64, dlse=True),
    "packed d128": Case(1300, ranges="random", lengths_q=LENGTHS, causal=False, heads=(8, 1), head_dim=128),
    "d256 softcap": Case(500, ranges="blocks", causal=False, heads=(8, 4), head_dim=256, softcap=15.0),
    "d192/128 padding": Case(400, ranges="random", batch=2, padding="left", heads=(16, 1), head_dim=(192, 128)),
    "odd used": Case(333, 200, ranges="random", batch=2, used=(200, 77), heads=(21, 3), head_dim=(40, 80)),
}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", RANGES)
def test_key_ranges(name, dtype):
    case = replace(RANGES[name], dtype=dtype)
    inputs = make_inputs(case, "cuda")
    results = run(case, inputs, "auto")
    assert_within_budget(case, inputs, results)
    again = run(case, inputs, "triton")
    for key, value in results.items():
        assert torch.equal(value, again[key]), key


def test_auto_takes_the_portable_kernels_for_key_ranges():
    inputs = make_inputs(replace(RANGES["blocks"], dtype=BF16), "cuda")
    found = explain(inputs.q, inputs.k, inputs.v, causal=False, key_ranges=inputs.mask.key_ranges)
    assert found.implementation == "triton"
    assert "key_ranges" in found.reasons["triton_hopper"] + found.reasons["triton_window"]


@pytest.mark.parametrize("packed", [False, True])
def test_the_merge_kernel_is_the_formula(packed):
    """bf16 parts of odd sizes, rows that see one part or none: one rounding from the formula in fp64."""
    shape, generator = (301, 20, 72) if packed else (3, 101, 20, 72), torch.Generator("cuda").manual_seed(0)

    def normal(*size):
        return torch.randn(size, device="cuda", generator=generator)

    outs = [normal(*shape).to(BF16).requires_grad_() for _ in range(2)]
    lses = [3.0 * normal(*shape[:-3], 20, shape[-3]) for _ in range(2)]
    lses[0][..., 3:5], lses[1][..., 4:9] = float("-inf"), float("-inf")
    lses = [x.requires_grad_() for x in lses]
    gradients = normal(*shape), normal(*lses[0].shape)
    gradients[1][..., 4] = 0.0
    exact = [x.detach().double().requires_grad_() for x in (*outs, *lses)]
    want = merge_attention(exact[:2], exact[2:])
    got = merge_attention(outs, lses)
    dwant = torch.autograd.grad(want, exact, [x.double() for x in gradients])
    dgot = torch.autograd.grad(got, (*outs, *lses), (gradients[0].to(BF16), gradients[1]))
    limits = (2**-8, 1e-6, 2**-8, 2**-8, 5e-3, 5e-3)  # dout is rounded before it reaches the kernel
    for a, b, limit in zip((*got, *dgot), (*want, *dwant), limits, strict=True):
        empty = b == float("-inf")
        assert torch.equal(a == float("-inf"), empty)
        assert (a.double() - b).masked_fill(empty, 0).norm() <= limit * b.masked_fill(empty, 0).norm()


@contextmanager
def no_waits():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check(case: Case, visible: torch.Tensor, attend) -> None:
    """``attend(q, k, v, sinks)`` -> out, lse of BSHD tensors: within the budget of one softmax over ``visible``.

    dsinks is held to eager's whose delta comes from the rounded out, since that of a merged part does. The second run
    does not wait for the device.
    """
    inputs = replace(make_inputs(case, "cuda"), mask=Visible(visible))
    differentiated(case, inputs, attend)
    with no_waits():
        got = differentiated(case, inputs, attend)
    assert_within_budget(case, inputs, got, rounded_delta=True)


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("n", [4, 100])
def test_first_keys(n, dtype):
    case = Case(1500, batch=2, causal=False, dtype=dtype, dlse=True, **GPT_OSS)
    position = torch.arange(1500, device="cuda")[None]
    visible = first_and_window(position, torch.zeros_like(position[:, :1]), n, 127, 1500)
    options = dict(first_keys=n, window_size=(127, 0), return_lse=True)
    check(case, visible, lambda *x: first_keys_attention(*x, **options))


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
def test_first_keys_of_packed_segments(dtype):
    case, cu = Case(1300, causal=False, dtype=dtype, dlse=True, **GPT_OSS), cu_seqlens(LENGTHS, "cuda")
    visible = first_and_window_of_segments(cu, cu, (1300, 1300), 5, 127)

    def attend(q, k, v, sinks):
        found = first_keys_attention(
            q[0], k[0], v[0], sinks, first_keys=5, window_size=(127, 0), cu_seqlens_q=cu, cu_seqlens_k=cu,
            return_lse=True,
        )  # fmt: skip
        return tuple(x[None] for x in found)

    check(case, visible, attend)


GROUPS = SharedPrefixes((500, 130, 0, 77, 260, 40, 3, 129), (-1, 0, 0, 0, 0, -1, 5, 5))
TREES = {
    "full": (GROUPS, -1, GPT_OSS),
    "window 128": (GROUPS, 127, GPT_OSS),
    "window of all": (GROUPS, 5000, GPT_OSS),
    "window past a prompt": (SharedPrefixes((100, 300, 200), (-1, 0, 0)), 255, {"heads": (8, 2), "head_dim": 64}),
    "full d128": (GROUPS, -1, {"heads": (32, 8), "head_dim": 128}),
    "window 128 d128": (GROUPS, 127, {"heads": (32, 8), "head_dim": 128}),
    "window 128 d40, softcap": (GROUPS, 127, {"heads": (6, 3), "head_dim": (40, 24), "softcap": 9.0}),
    "many branches": (SharedPrefixes((700, *(16,) * 32), (-1, *(0,) * 32)), 127, GPT_OSS),
}


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("name", TREES)
def test_shared_prefixes(name, dtype):
    tree, left, options = TREES[name]
    case = Case(tree.total, causal=False, dtype=dtype, dlse=True, **options)

    def attend(q, k, v, sinks):
        found = shared_prefix_attention(
            q[0], k[0], v[0], sinks, tree=tree, window_size=(left, 0), softcap=case.softcap, return_lse=True
        )
        return tuple(x[None] for x in found)

    check(case, tree_visible(tree, left, "cuda"), attend)


@pytest.mark.parametrize(("window", "want"), [(-1, ["triton_hopper"] * 2), (127, ["triton_window", "triton"])])
def test_a_tree_takes_the_fast_kernels(window, want, monkeypatch):
    """Hopper's kernels serve both parts of full attention, the window's kernels their part."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels for Hopper are tested on Hopper")
    tree, names, attend = SharedPrefixes((600, 300, 300), (-1, 0, 0)), [], ops.attention_op
    monkeypatch.setattr(ops, "attention_op", lambda call, name: (names.append(name), attend(call, name))[1])
    q, k = (torch.zeros(tree.total, heads, 64, device="cuda", dtype=BF16) for heads in (64, 8))
    shared_prefix_attention(q, k, k, tree=tree, window_size=(window, 0))
    assert names == want
