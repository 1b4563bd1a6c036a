"""Triton kernels for short causal windows (gpt-oss: 128), dense or packed. They are memory-bound."""

from __future__ import annotations

import functools
from types import ModuleType

import torch
from torch import Tensor

from ...call import Call
from .. import triton as portable
from ..common.problem import Problem, target_name
from .backward import launch_backward
from .config import MAX_LEFT, TARGETS
from .forward import launch_forward


def supports(call: Call) -> str | None:
    """Why these kernels cannot serve ``call``; None if they can."""
    mask = call.mask
    if mask.key_ranges is not None:
        return "only the portable triton kernels and the reference take key_ranges"
    if not 0 <= mask.left <= MAX_LEFT or mask.right != 0:
        return f"the window kernels take causal windows of at most {MAX_LEFT + 1} keys, got {(mask.left, mask.right)}"
    if mask.key_padding_mask is not None or mask.seqused_k is not None:
        return "the window kernels take neither key_padding_mask nor seqused_k"
    if mask.packed and (mask.cu_seqlens_q is not mask.cu_seqlens_k or call.q.shape[1] != call.k.shape[1]):
        return "the window kernels take packed rows only with one cu_seqlens for queries and keys"
    if call.softcap > 0.0 or call.softmax_scale <= 0.0:
        return "the window kernels take a positive softmax_scale and no softcap"
    if call.q.dtype not in (torch.bfloat16, torch.float16):
        return f"the window kernels take bfloat16 or float16, got {call.q.dtype}"
    for size in (call.q.shape[-1], call.v.shape[-1]):
        if size < 16 or size > 128 or size % 8:
            return f"the window kernels take head dimensions that are multiples of 8 from 16 to 128, got {size}"
    target = target_name(call.q.device)
    if target not in TARGETS:
        return (
            f"the window kernels are configured for {TARGETS[0]}, got {target}; the portable kernels serve windows too"
        )
    return portable.supports(call)


def run_forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) fp32."""
    if out.numel():
        launch_forward(Problem(call), out, lse)


def run_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    dsinks: Tensor | None,
) -> None:
    """Write dq, and dk, dv, dsinks (Hq,) where given, in their inputs' dtypes."""
    if out.numel() and call.k.numel():
        problem, hopper = Problem(call), _hopper_backward()
        if hopper is not None and hopper.supports(problem, out, dout, dlse, dq, dk):
            hopper.launch_backward(problem, out, lse, dout, dlse, dq, dk, dv, dsinks)
        else:
            launch_backward(problem, out, lse, dout, dlse, dq, dk, dv, dsinks)
    else:
        portable.run_backward(call, out, lse, dout, dlse, dq, dk, dv, dsinks)


@functools.cache
def _hopper_backward() -> ModuleType | None:
    """The backward in one Gluon kernel; None if the installed Triton's Gluon is not supported."""
    try:
        from ..triton_hopper import backward_window
    except ImportError:
        return None
    return backward_window
