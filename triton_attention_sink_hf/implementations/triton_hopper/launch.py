"""What the launchers share: tensor maps, kernel arguments, sections of heads."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..common.problem import Problem, ceil_div, multiprocessors, next_power_of_2, strides
from ..common.relaunch import Blocks, Launch
from .config import ForwardConfig
from .tile_table import table_slots

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


def forward_launch(
    kernel, problem: Problem, config: ForwardConfig, tile: int, out_strides, blocks: dict[str, Blocks], **constants
) -> Launch:
    """The launch of persistent programs, each of which takes tiles of ``tile`` queries.

    Args:
        blocks, constants: what the kernel takes beside q, k, v and the numbers that every forward takes.
    """
    call = problem.call
    q, k, v = call.q, call.k, call.v
    heads = problem.batch * problem.heads_q
    bytes_per_key = (k.shape[-1] + v.shape[-1]) * k.element_size()
    slots = table_slots(problem.seqlen_q, tile)
    tiles = slots if call.mask.packed else ceil_div(problem.seqlen_q, tile)
    return Launch(
        kernel,
        (min(tiles * heads, multiprocessors(q.device)),),
        {
            "q_desc": row_blocks(q.shape, q.stride(), q.dtype, 64),
            "k_desc": row_blocks(k.shape, k.stride(), k.dtype, config.block_n),
            "v_desc": row_blocks(v.shape, v.stride(), v.dtype, config.block_n),
            **blocks,
        },
        **call_constants(problem),
        heads_q=problem.heads_q,
        slots=slots,
        tiles=tiles,
        heads=heads,
        section=section_of_heads(problem, problem.heads_q, config.l2_bytes // bytes_per_key),
        **strides("o", out_strides),
        BLOCK_N=config.block_n,
        STAGES=config.stages,
        Q_BUFFERS=config.q_buffers,
        HAS_SINK=call.sinks is not None,
        CONSUMER_REGISTERS=config.registers[0],
        PRODUCER_REGISTERS=config.registers[1],
        **constants,
    )
