"""What kernels derive of cu_seqlens: once for all layers where the values cannot change, otherwise in every call."""

from types import SimpleNamespace

import pytest
import torch
from cases import cu_seqlens

from triton_attention_sink_hf import attention_sink
from triton_attention_sink_hf.implementations.common import relaunch
from triton_attention_sink_hf.integrations.mask_function import attention_mask
from triton_attention_sink_hf.masks import constant
from triton_attention_sink_hf.ops import attention_forward

LENGTHS = (5, 1, 10)


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched."""
    names, launch = [], relaunch.Launch.__call__

    def watched(self, **tensors):
        names.append(self.kernel.fn.__name__)
        return launch(self, **tensors)

    monkeypatch.setattr(relaunch.Launch, "__call__", watched)
    return names


def _layers(cu, windows, cu_k=None):
    """Forward and backward of a layer for each window; the gradient of the first layer's input."""
    x = torch.randn(sum(LENGTHS), 2, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = x
    for window in windows:
        y = attention_sink(
            y, y, y, window_size=(window, 0), implementation="triton", cu_seqlens_q=cu,
            cu_seqlens_k=cu if cu_k is None else cu_k,
        )  # fmt: skip
    y.sum().backward()
    return x.grad


def test_layers_share_the_ranges_of_constant_cuts(launched):
    want = _layers(cu_seqlens(LENGTHS), (-1, 3, -1, 3))
    assert launched.count("_segment_range_kernel") == 8  # every layer, forward and backward
    launched.clear()
    got = _layers(constant(cu_seqlens(LENGTHS)), (-1, 3, -1, 3))
    assert launched.count("_segment_range_kernel") == 2  # one for each window
    assert torch.equal(got, want)


def test_cuts_of_a_user_are_read_in_every_call(launched):
    cu = cu_seqlens(LENGTHS)
    first = _layers(cu, (-1,))
    cu[1] = 3
    second = _layers(cu, (-1,))
    assert launched.count("_segment_range_kernel") == 4
    assert not torch.equal(first, second)


def test_queries_and_keys_with_cuts_of_their_own_share_nothing(launched):
    _layers(constant(cu_seqlens(LENGTHS)), (-1, -1), cu_k=constant(cu_seqlens(LENGTHS)))
    assert launched.count("_segment_range_kernel") == 4


def test_saved_tensors_that_come_back_as_copies_share_nothing_but_are_right(launched):
    want = _layers(cu_seqlens(LENGTHS), (-1, 3))
    launched.clear()
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda x: x):
        got = _layers(constant(cu_seqlens(LENGTHS)), (-1, 3))
    assert launched.count("_segment_range_kernel") == 4
    assert torch.equal(got, want)


def test_the_operator_shares_nothing(launched):
    """torch.compile may run it in a CUDA graph's memory."""
    x, cu = torch.randn(1, sum(LENGTHS), 2, 16), constant(cu_seqlens(LENGTHS))
    for _ in range(2):
        attention_forward(x, x, x, None, cu, cu, *(None,) * 5, -1, 0, 0.25, 0.0, False, "triton")
    assert launched.count("_segment_range_kernel") == 2


@pytest.mark.parametrize("capturing", (False, True))
def test_the_mask_function_makes_constant_cuts_unless_a_graph_is_recorded(launched, monkeypatch, capturing):
    if capturing:
        monkeypatch.setattr("triton_attention_sink_hf.integrations.forward_mask.is_recorded", lambda x: True)
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    mask = attention_mask(1, sum(LENGTHS), q_length=sum(LENGTHS), device="cpu", config=SimpleNamespace())
    q = torch.randn(1, sum(LENGTHS), 2, 16)
    cu, _padding, _used = mask.visibility(q, q, positions)
    _layers(cu, (-1, -1))
    assert launched.count("_segment_range_kernel") == (4 if capturing else 1)
