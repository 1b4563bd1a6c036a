"""What runs after the products of the fused backward: dq in its own dtype."""

import triton
import triton.language as tl

from ..common.problem import Problem, ceil_div, strides
from ..common.relaunch import Launch
from .config import ROWWISE_ROWS
from .launch import padded


@triton.jit
def _hopper_bwd_postprocess_kernel(
    buffer_ptr, dq_ptr, softmax_scale, seqlen_q, heads_q, stride_dqb, stride_dqt, stride_dqh, stride_dqd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq (B, Sq, Hq, D) in its dtype and layout from the fp32 buffer."""
    h = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    rows = i.to(tl.int64)[:, None]
    inside = (i < seqlen_q)[:, None] & (d < D)
    dq = tl.load(buffer_ptr + ((b * seqlen_q + rows) * heads_q + h) * D + d, mask=inside) * softmax_scale
    dq_base = dq_ptr + b * stride_dqb + h.to(tl.int64) * stride_dqh
    tl.store(dq_base + rows * stride_dqt + d * stride_dqd, dq.to(dq_ptr.dtype.element_ty), mask=inside)


def postprocess_launch(problem: Problem, dq_strides) -> Launch:
    """The launch: dq from an fp32 buffer (B, Sq, Hq, D) of dS K."""
    d = problem.call.q.shape[-1]
    return Launch(
        _hopper_bwd_postprocess_kernel,
        (problem.heads_q, ceil_div(problem.seqlen_q, ROWWISE_ROWS), problem.batch),
        softmax_scale=problem.call.softmax_scale,
        seqlen_q=problem.seqlen_q,
        heads_q=problem.heads_q,
        **strides("dq", dq_strides),
        D=d,
        BLOCK_D=padded(d),
        ROWS=ROWWISE_ROWS,
    )
