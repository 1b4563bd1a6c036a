"""What both directions share on the host: descriptors, sections of heads, the order of packed tiles."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..triton.launch import Problem, ceil_div, next_power_of_2
from .schedule import _tile_order_kernel

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@functools.cache
def _shared_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, columns], _DTYPES[dtype])


def padded(d: int) -> int:
    """Columns of a tile for head dimension d: the copy engine fills up with zeros."""
    return max(next_power_of_2(d), 64)


def rows_descriptor(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Blocks of (1, 1, rows, columns) of a BSHD tensor seen as BHSD; what lies outside reads as 0, is not written."""
    b, t, h, d = x.shape
    stride_b, stride_t, stride_h, stride_d = x.stride()
    block = [1, 1, rows, columns or padded(d)]
    layout = _shared_layout(rows, block[3], x.dtype)
    return TensorDescriptor(x, [b, h, t, d], [stride_b, stride_h, stride_t, stride_d], block, layout)


def section_of_heads(problem: Problem, heads: int, budget: int) -> int:
    """How many of B * ``heads`` to work on side by side: a power of two times a group whose K and V take ``budget``
    bytes of L2 at most, and a divisor of them all."""
    call, total = problem.call, problem.batch * heads
    per_key_head = problem.seqlen_k * (call.k.shape[-1] + call.v.shape[-1]) * call.k.element_size()
    group = heads // problem.heads_k
    section = group
    while total % (section * 2) == 0 and section * 2 // group * per_key_head <= budget:
        section *= 2
    return section


def tile_order(ranges: Tensor, rows: int, tile: int) -> Tensor:
    """int32 tiles of packed rows, most visible scores first, without a host synchronisation."""
    tiles = ceil_div(rows, tile)
    order = torch.empty(tiles, dtype=torch.int32, device=ranges.device)
    block = 128
    _tile_order_kernel[(ceil_div(tiles, block),)](
        ranges_ptr=ranges, order_ptr=order, n_own=rows, tiles=tiles, TILE=tile, BLOCK=block
    )
    return order


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
