"""When the Hopper kernels serve a call, and what serves it when they cannot. The card is a pretence; nothing runs."""

import importlib
import sys
from dataclasses import replace

import pytest
import torch
from cases import Case, cu_seqlens, make_inputs

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this triton has no Gluon for Hopper")

from triton_attention_sink_hf import explain, implementations
from triton_attention_sink_hf.call import Call
from triton_attention_sink_hf.implementations import triton_hopper, unsupported_reason
from triton_attention_sink_hf.implementations.common import problem as common_problem
from triton_attention_sink_hf.implementations.common.problem import Problem
from triton_attention_sink_hf.implementations.triton_hopper import backward_window
from triton_attention_sink_hf.implementations.triton_hopper.config import WINDOW
from triton_attention_sink_hf.masks import Mask

BF16 = torch.bfloat16


@pytest.fixture
def hopper_card(monkeypatch):
    monkeypatch.setattr(triton_hopper, "target_name", lambda device: "sm90")


def _call(seqlen=512, head_dim=64, dtype=BF16, mask=None, scale=0.125, softcap=0.0, deterministic=False):
    inputs = make_inputs(Case(seqlen, heads=(4, 2), head_dim=head_dim, dtype=dtype))
    return Call(inputs.q, inputs.k, inputs.v, inputs.sinks, mask or Mask(-1, 0), scale, softcap, deterministic)


def test_what_it_serves(hopper_card):
    cu = cu_seqlens((300, 212))
    for call in (
        _call(),
        _call(dtype=torch.float16),
        _call(head_dim=(192, 128)),
        _call(head_dim=(192, 128), deterministic=True),
        _call(mask=Mask(-1, -1)),
        _call(mask=Mask(127, 0)),
        _call(mask=Mask(-1, 0, cu, cu)),
    ):
        assert triton_hopper.supports(call) is None
        assert triton_hopper.slower_reason(call) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"deterministic": True}, "in no fixed order"),
        ({"mask": Mask(-1, 0, key_padding_mask=torch.ones(1, 512, dtype=torch.bool))}, "key_padding_mask"),
        ({"mask": Mask(-1, 0, seqused_k=torch.tensor([5], dtype=torch.int32))}, "seqused_k"),
        ({"softcap": 5.0}, "no softcap"),
        ({"scale": -1.0}, "positive softmax_scale"),
        ({"dtype": torch.float32}, "bfloat16 or float16"),
        ({"head_dim": 32}, "above 32"),
        ({"head_dim": 512}, "up to 256"),
    ],
    ids=lambda x: None if isinstance(x, dict) else x.replace(" ", "-"),
)
def test_what_it_does_not_serve(hopper_card, changes, reason):
    assert reason in triton_hopper.supports(_call(**changes))


@pytest.mark.parametrize("dims", [(36, 64), (64, 36), (100, 100), (33, 33)], ids=str)
def test_head_dimensions_that_are_no_multiple_of_8(hopper_card, dims):
    """Also if q, k and v are slices of wider rows, which TMA could address: it cannot address out and the gradients."""
    call = _call()
    q, k, v = (torch.zeros(1, 512, 4, 128, dtype=BF16)[..., :size] for size in (dims[0], *dims))
    assert "multiples of 8" in triton_hopper.supports(replace(call, q=q, k=k, v=v))


def test_memory_that_the_copy_engine_cannot_address(hopper_card):
    call = _call()
    wide = torch.zeros(1, 512, 4, 65, dtype=BF16)
    for q in (wide[..., :64], wide[..., ::2], torch.zeros(512 * 256 + 1, dtype=BF16)[1:].view(1, 512, 4, 64)):
        assert "q must be 16-byte aligned" in triton_hopper.supports(replace(call, q=q))
    expanded = call.k[:, :, :1].expand(-1, -1, 2, -1)
    assert "k must be 16-byte aligned" in triton_hopper.supports(replace(call, k=expanded))


def test_auto_leaves_to_others_what_they_do_faster(hopper_card):
    call = _call(seqlen=1)
    assert unsupported_reason("triton_hopper", call) is None
    assert "fewer than 64 queries" in triton_hopper.slower_reason(call)


@pytest.mark.parametrize("head_dim", [64, 128, (192, 128), 256])
@pytest.mark.parametrize("lengths", [(4096,), (1024,) * 4, (300,) * 13, (32,) * 128, (1, 4000, 7)])
def test_the_number_of_entries_does_not_choose(hopper_card, monkeypatch, lengths, head_dim):
    """A Hugging Face row has T + 1 entries, whatever its samples; they get the same kernels as N + 1."""
    monkeypatch.setattr(triton_hopper.portable, "supports", lambda call: None)  # else it wants a GPU
    total, (d, dv) = sum(lengths), head_dim if isinstance(head_dim, tuple) else (head_dim, head_dim)
    q, k, v = (torch.empty(total, h, size, dtype=BF16, device="meta") for h, size in ((8, d), (2, d), (2, dv)))
    answers = []
    for entries in (len(lengths) + 1, total + 1):
        cu = torch.empty(entries, dtype=torch.int32, device="meta")
        answers.append(str(explain(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)))
    assert answers[0] == answers[1]
    assert answers[0].startswith("triton_hopper serves this call")


def test_another_card_is_a_reason():
    inputs = make_inputs(Case(128, dtype=BF16))
    explanation = explain(inputs.q, inputs.k, inputs.v)
    assert "need sm90, got cpu" in explanation.reasons["triton_hopper"]


def test_a_triton_that_it_was_not_compiled_with_falls_back(monkeypatch):
    config = importlib.import_module("triton_attention_sink_hf.implementations.triton_hopper.config")
    monkeypatch.setattr(config, "triton_version", lambda: (9, 9))
    monkeypatch.delattr(implementations, "triton_hopper")
    monkeypatch.delitem(sys.modules, "triton_attention_sink_hf.implementations.triton_hopper")
    implementations.load.cache_clear()
    try:
        reason = unsupported_reason("triton_hopper", _call())
        assert "triton must be 3.6 to 3.9" in reason and "got 9.9" in reason
        assert unsupported_reason("triton", _call()) is None
    finally:
        implementations.load.cache_clear()


def _window_call(seqlen=2048, batch=1, heads=(16, 2), head_dim=64, left=127):
    inputs = make_inputs(Case(seqlen, batch=batch, heads=heads, head_dim=head_dim, dtype=BF16))
    return Call(inputs.q, inputs.k, inputs.v, inputs.sinks, Mask(left, 0), 0.125, 0.0, True)


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"left": 128}, True),
        ({"left": 64}, False),
        ({"heads": (16, 4)}, True),
        ({"heads": (16, 1)}, True),
        ({"heads": (12, 2)}, False),
        ({"heads": (4, 2)}, False),
        ({"head_dim": (40, 64)}, True),
        ({"head_dim": 128}, False),
        ({"head_dim": 32}, False),
        ({"head_dim": (36, 64)}, False),
        ({"seqlen": 1000}, False),
        ({"seqlen": 128, "batch": 8}, True),
        ({"seqlen": 32, "batch": 64}, False),
    ],
    ids=str,
)
def test_the_window_backward_in_one_kernel(changes, served, monkeypatch):
    problem = Problem(_window_call(**changes))
    q, k, v = problem.call.q, problem.call.k, problem.call.v
    out, dq, dk = q.new_empty(*q.shape[:3], v.shape[-1]), torch.empty_like(q), torch.empty_like(k)
    assert not backward_window.supports(problem, out, out, None, dq, dk)  # on the CPU
    monkeypatch.setattr(common_problem, "target_name", lambda device: "sm90")
    assert backward_window.supports(problem, out, out, None, dq, dk) == served
    assert not backward_window.supports(problem, out, out.transpose(2, 3), None, dq, dk)
    assert not backward_window.supports(problem, out, out, out.new_empty(q.shape[0], q.shape[2], q.shape[1]), dq, dk)
    assert not backward_window.supports(problem, out, out, None, dq, None)


@pytest.mark.parametrize("programs", [1, 78, 132])
@pytest.mark.parametrize("heads", [1, 8, 24, 512])
@pytest.mark.parametrize("seqlen", [64, 100, 1024, 5000, 32768, 540_000])
def test_chunks(seqlen, heads, programs):
    """Whole tiles; whoever has most to do has at most twice an equal share of it, halo and rounding not counted."""
    length = backward_window.chunk_length(seqlen, heads, programs)
    assert length % WINDOW.tile == 0 and 0 < length < seqlen + WINDOW.tile
    rounds = -(-heads * -(-seqlen // length) // programs)
    extra = WINDOW.halo + 2 * WINDOW.tile
    assert rounds * length <= max(2 * heads * seqlen / programs, seqlen / max(1, programs // heads)) + rounds * extra
