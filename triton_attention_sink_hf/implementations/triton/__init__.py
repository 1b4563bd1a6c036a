"""Portable Triton: every feature of the interface, every GPU that Triton compiles for, and its interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from triton import knobs
except ImportError as error:
    raise ImportError(f"triton must be installed, 3.4 or newer, for the Triton kernels ({error})") from error

from ...call import Call
from ...masks import MAX_ROWS
from ..common.config import MAX_PACK
from ..common.problem import Problem
from .backward import launch_backward
from .forward import launch_forward

_INTERPRETED = knobs.runtime.interpret  # Triton decides when it meets a kernel, which was at the imports above
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def supports(call: Call) -> str | None:
    """Why these kernels cannot serve ``call``; None if they can."""
    if call.block_table is not None or call.mask.leftpad_k is not None:
        return "only triton_decode reads block_table and leftpad_k; the others are given a gathered cache and a mask"
    return limits(call)


def limits(call: Call) -> str | None:
    """What no Triton kernel of any backend takes, or None."""
    q = call.q
    if q.dtype not in _DTYPES:
        return f"the Triton kernels take bfloat16, float16 or float32, got {q.dtype}"
    if q.device.type != "cuda" and not (_INTERPRETED and q.device.type == "cpu"):
        return f"the Triton kernels need a GPU (or TRITON_INTERPRET=1 on a CPU), got device {q.device}"
    for name, x, heads in (("q", q, MAX_PACK), ("k", call.k, 0), ("v", call.v, 0)):
        # offsets inside a tile are 32-bit: at most 128 tokens, 512 columns, for q MAX_PACK heads
        _, token, head, column = x.stride()
        if token * 128 + head * heads + column * 512 >= 2**31:
            return f"{name}'s strides must span less than 2 ** 31 elements in a tile, got {tuple(x.stride())}"
        if x.shape[1] >= MAX_ROWS:  # so that positions beside the longest window are 32-bit
            return f"{name} must have less than 2 ** 30 rows, got {x.shape[1]}"
    return None


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
        launch_backward(Problem(call), out, lse, dout, dlse, dq, dk, dv, dsinks)
        return
    for gradient in (dq, dk, dv):
        if gradient is not None:
            gradient.zero_()
    if dsinks is not None:  # no keys: out = 0 and lse = sink, so only dlse reaches it
        dsinks.copy_(dlse.sum((0, 2)) if dlse is not None else torch.zeros_like(dsinks))
