"""What runs after the products of the fused backward: dq in its own dtype."""

import triton
import triton.language as tl

from ..common.problem import Problem, ceil_div, strides
from ..common.relaunch import Launch
from .config import ROWWISE_ROWS
from .launch import padded

DQ_ROWS = 64  # of a tile of the buffer


@triton.jit
def _hopper_bwd_postprocess_kernel(
    buffer_ptr, dq_ptr, softmax_scale, seqlen_q, heads_q, dq_tiles, stride_dqb, stride_dqt, stride_dqh, stride_dqd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq (B, Sq, Hq, D) in its dtype and layout from ROWS rows of the fp32 buffer, a tile of it."""
    h = tl.program_id(0)
    tile = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = buffer_ptr + ((b * heads_q + h) * dq_tiles + tile) * (ROWS * BLOCK_D)
    dq = tl.load(start + tl.arange(0, ROWS * BLOCK_D)) * softmax_scale
    dq = tl.reshape(dq, [BLOCK_D // 64, 8, 4, 8, 4, 2, 2])  # 64 columns, group, warp, row, lane, half, pair
    dq = tl.reshape(tl.permute(dq, [2, 5, 3, 0, 1, 4, 6]), [ROWS, BLOCK_D])
    i = tile * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = (i < seqlen_q)[:, None] & (d < D)
    dq_base = dq_ptr + b * stride_dqb + h.to(tl.int64) * stride_dqh
    rows = i.to(tl.int64)[:, None]
    tl.store(dq_base + rows * stride_dqt + d * stride_dqd, dq.to(dq_ptr.dtype.element_ty), mask=inside)


def dq_buffer_shape(problem: Problem) -> tuple[int, int, int, int]:
    """(B, Hq, tiles, elements of a tile): tiles of 64 queries and all columns, in the order of a warpgroup's registers.

    There are as many as the preprocessing zeroes.
    """
    rows = ceil_div(problem.seqlen_q, ROWWISE_ROWS) * ROWWISE_ROWS
    return problem.batch, problem.heads_q, rows // DQ_ROWS, DQ_ROWS * padded(problem.call.q.shape[-1])


def postprocess_launch(problem: Problem, dq_strides) -> Launch:
    """The launch: dq from an fp32 buffer of dS K, ``dq_buffer_shape``."""
    d = problem.call.q.shape[-1]
    return Launch(
        _hopper_bwd_postprocess_kernel,
        (problem.heads_q, ceil_div(problem.seqlen_q, DQ_ROWS), problem.batch),
        softmax_scale=problem.call.softmax_scale,
        seqlen_q=problem.seqlen_q,
        heads_q=problem.heads_q,
        dq_tiles=dq_buffer_shape(problem)[2],
        **strides("dq", dq_strides),
        D=d,
        BLOCK_D=padded(d),
        ROWS=DQ_ROWS,
    )
