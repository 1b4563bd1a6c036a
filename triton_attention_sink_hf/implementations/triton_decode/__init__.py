"""Triton kernels for few queries on a long cache: decoding. They are memory-bound.

The keys of a batch row are split over programs, whose partial results a second kernel joins in a fixed order.
"""

from __future__ import annotations

from torch import Tensor

from ...call import Call
from .. import triton as portable
from ..common.problem import Problem
from .config import MAX_QUERIES
from .forward import launch_forward


def supports(call: Call) -> str | None:
    """Why these kernels cannot serve ``call``; None if they can."""
    if call.mask.packed:
        return "the decode kernels take no packed rows (cu_seqlens): pass a batch of them, or a block_table"
    if call.mask.key_ranges is not None:
        return "only the portable triton kernels and the reference take key_ranges"
    return portable.limits(call)


def slower_reason(call: Call) -> str | None:
    """Why "auto" leaves ``call`` to another backend, which it cannot do with pages or left padding."""
    if call.block_table is not None or call.mask.leftpad_k is not None:
        return None
    if call.q.shape[1] > MAX_QUERIES:
        return f"the decode kernels are made for at most {MAX_QUERIES} queries a row, got {call.q.shape[1]}"
    return None


def run_forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) fp32."""
    if out.numel():
        launch_forward(Problem(call), out, lse)


# What the forward saves is what the portable forward saves.
run_backward = portable.run_backward
