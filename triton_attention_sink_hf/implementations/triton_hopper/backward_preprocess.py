"""What runs before the products of the fused and the wide backward: lse in base 2, delta and dsink of every row."""

import triton
import triton.language as tl
from triton.experimental.gluon import language as gl

from ..common.primitives import LOG2E, exp
from ..common.problem import Problem, ceil_div, dlse_arguments, next_power_of_2, strides
from ..common.relaunch import Blocks, Launch
from .config import ROWWISE_ROWS
from .launch import copy_blocks, padded


@triton.jit
def _hopper_bwd_preprocess_kernel(
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, sink_ptr, buffer_ptr, statistics_ptr, dsink_ptr,
    seqlen_q, padded_q, heads_q, tiles,
    stride_ob, stride_ot, stride_oh, stride_od, stride_dob, stride_dot, stride_doh, stride_dod,
    stride_dlb, stride_dlh, stride_dlt,
    HAS_SINK: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_BUFFER: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """statistics (2, B Hq, padded_q): lse in base 2 (inf where P must be 0) and delta; dsink's parts; zeros for dq."""
    h = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    i = tile * ROWS + tl.arange(0, ROWS)
    valid = i < seqlen_q
    rows = i.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_DV)[None, :]
    inside = valid[:, None] & (d < DV)
    out_base = out_ptr + b * stride_ob + h.to(tl.int64) * stride_oh
    out = tl.load(out_base + rows * stride_ot + d * stride_od, mask=inside, other=0.0).to(tl.float32)
    dout_base = dout_ptr + b * stride_dob + h.to(tl.int64) * stride_doh
    dout = tl.load(dout_base + rows * stride_dot + d * stride_dod, mask=inside, other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if HAS_DLSE:
        dlse_base = dlse_ptr + b * stride_dlb + h.to(tl.int64) * stride_dlh
        delta -= tl.load(dlse_base + i.to(tl.int64) * stride_dlt, mask=valid, other=0.0)
    head = b * heads_q + h
    lse = tl.load(lse_ptr + head * seqlen_q + i, mask=valid, other=float("-inf"))
    base_2 = lse * LOG2E  # overflows to -inf for the lowest sinks, which are the lse of rows that see no key
    statistics = statistics_ptr + head * padded_q + i
    tl.store(statistics, tl.where(base_2 == float("-inf"), float("inf"), base_2))
    tl.store(statistics + tl.num_programs(2).to(tl.int64) * heads_q * padded_q, delta)
    if HAS_BUFFER:
        zeros = tl.zeros([ROWS * BLOCK_D], tl.float32)
        tl.store(buffer_ptr + (head * padded_q + tile * ROWS) * BLOCK_D + tl.arange(0, ROWS * BLOCK_D), zeros)
    if HAS_SINK:
        p_sink = tl.where(lse == float("-inf"), 0.0, exp(tl.load(sink_ptr + h).to(tl.float32) - lse))
        tl.store(dsink_ptr + (b * tiles + tile) * heads_q + h, -tl.sum(p_sink * delta, 0))


def preprocess_launch(problem: Problem, out_strides, dout_strides, dlse_strides, has_buffer: bool) -> Launch:
    """The launch; with ``has_buffer`` it zeroes an fp32 buffer for dq, ``dq_buffer_shape``."""
    call, tiles = problem.call, ceil_div(problem.seqlen_q, ROWWISE_ROWS)
    return Launch(
        _hopper_bwd_preprocess_kernel,
        (problem.heads_q, tiles, problem.batch),
        seqlen_q=problem.seqlen_q,
        padded_q=tiles * ROWWISE_ROWS,
        heads_q=problem.heads_q,
        tiles=tiles,
        **strides("o", out_strides),
        **strides("do", dout_strides),
        **dlse_arguments(dlse_strides),
        HAS_SINK=call.sinks is not None,
        HAS_BUFFER=has_buffer,
        DV=call.v.shape[-1],
        BLOCK_D=padded(call.q.shape[-1]),
        BLOCK_DV=next_power_of_2(call.v.shape[-1]),
        ROWS=ROWWISE_ROWS,
    )


_ROW = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)


def statistics_blocks(problem: Problem, rows: int) -> Blocks:
    """Blocks of (1, rows) of lse or of delta, (B Hq, padded Sq)."""
    padded_q = ceil_div(problem.seqlen_q, ROWWISE_ROWS) * ROWWISE_ROWS
    return copy_blocks([problem.batch * problem.heads_q, padded_q], [padded_q, 1], [1, rows], _ROW)


def new_statistics(problem: Problem, like, has_sinks: bool) -> tuple:
    """Empty fp32 statistics (2, B Hq, padded Sq) and parts of dsink (B tiles, Hq), or None for these."""
    tiles = ceil_div(problem.seqlen_q, ROWWISE_ROWS)
    statistics = like.new_empty(2, problem.batch * problem.heads_q, tiles * ROWWISE_ROWS)
    return statistics, like.new_empty(problem.batch * tiles, problem.heads_q) if has_sinks else None
