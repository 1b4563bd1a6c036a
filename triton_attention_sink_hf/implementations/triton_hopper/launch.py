"""What the launchers share: tensor maps, kernel arguments, sections of heads."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common.problem import Problem, next_power_of_2
from ..common.relaunch import Blocks

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@functools.cache
def _shared_layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for(list(block), _DTYPES[dtype])


def padded(d: int) -> int:
    """Columns of a tile for head dimension d. TMA fills the rest with zeros."""
    return max(next_power_of_2(d), 64)


def copy_blocks(shape: list[int], strides: list[int], block: list[int], layout: gl.NVMMASharedLayout) -> Blocks:
    """Blocks that TMA copies. Outside the tensor they read as 0 and are not written."""
    fields = {"shape": shape, "strides": strides, "block_shape": block, "layout": layout, "padding": "zero"}
    return Blocks(TensorDescriptor, fields)


def row_blocks(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, rows: int, columns: int | None = None
) -> Blocks:
    """Blocks of (1, 1, rows, columns) of a BSHD tensor seen as BHSD.

    TMA must be able to address it: strides and address are multiples of 16 bytes, the last stride is 1.
    """
    b, t, h, d = shape
    stride_b, stride_t, stride_h, stride_d = stride
    block = (1, 1, rows, columns or padded(d))
    strides = [stride_b, stride_h, stride_t, stride_d]
    return copy_blocks([b, h, t, d], strides, list(block), _shared_layout(block, dtype))


def token_blocks(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, tokens: int, heads: int
) -> Blocks:
    """Blocks of (1, tokens, heads, padded D) of a BSHD tensor that TMA can address."""
    block = (1, tokens, heads, padded(shape[-1]))
    return copy_blocks(list(shape), list(stride), list(block), _shared_layout(block, dtype))


def call_constants(problem: Problem) -> dict:
    """Arguments that the call determines, the same for forward and backward."""
    call, mask = problem.call, problem.call.mask
    return {
        "softmax_scale": call.softmax_scale,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "group": problem.heads_q // problem.heads_k,
        "left": mask.left,
        "right": mask.right,
        "HAS_LEFT": mask.left >= 0,
        "HAS_RIGHT": mask.right >= 0,
        "PACKED": mask.packed,
        "DV": call.v.shape[-1],
        "BLOCK_D": padded(call.q.shape[-1]),
        "BLOCK_DV": padded(call.v.shape[-1]),
        "num_warps": 4,
    }


def section_of_heads(problem: Problem, heads: int, keys: int) -> int:
    """How many of the B * ``heads`` heads to work on side by side, so that their keys stay in L2.

    A divisor of B * heads: a power of two groups, whose key heads hold at most ``keys`` keys together.
    """
    total, group = problem.batch * heads, heads // problem.heads_k
    section = group
    while total % (section * 2) == 0 and section * 2 // group * problem.seqlen_k <= keys:
        section *= 2
    return section
