"""Join the partial results of a row's splits, in the order of its keys, and the sink, once."""

import triton
import triton.language as tl

from ..common.primitives import factor_and_lse
from ..common.problem import Problem, next_power_of_2, padded, planned, strides
from ..common.relaunch import Launch
from .config import MAX_REDUCE


@triton.jit(do_not_specialize=["n_splits"])
def _decode_reduce_kernel(
    m_ptr, l_ptr, acc_ptr, sink_ptr, out_ptr, lse_ptr, seqlen_q, heads_q, n_splits,
    stride_ob, stride_ot, stride_oh, stride_od,
    HAS_SINK: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program per row of lse (B, Hq, Sq)."""
    row = tl.program_id(0)
    i = row % seqlen_q
    head = row // seqlen_q % heads_q
    b = row // (seqlen_q * heads_q)
    d = tl.arange(0, BLOCK_DV)
    s = tl.arange(0, BLOCK_S)
    top = float("-inf")
    total = 0.0
    out = tl.zeros([BLOCK_DV], tl.float32)
    for first in range(0, n_splits, BLOCK_S):
        part = row.to(tl.int64) * n_splits + first + s
        m = tl.load(m_ptr + part, mask=first + s < n_splits, other=float("-inf"))
        l = tl.load(l_ptr + part, mask=first + s < n_splits, other=0.0)
        # [splits, columns]; splits without keys wrote none
        acc = tl.load(acc_ptr + part[:, None] * DV + d[None, :], mask=(l > 0.0)[:, None] & (d < DV)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(m, 0))
        shift = tl.where(new == float("-inf"), 0.0, new)
        weight = tl.exp2(m - shift)
        alpha = tl.exp2(top - shift)
        total = total * alpha + tl.sum(l * weight, 0)
        out = out * alpha + tl.sum(acc * weight[:, None], 0)
        top = new
    sink = None
    if HAS_SINK:
        sink = tl.load(sink_ptr + head).to(tl.float32)
    factor, lse = factor_and_lse(top, total, sink, HAS_SINK)
    out_row = b.to(tl.int64) * stride_ob + i.to(tl.int64) * stride_ot + head.to(tl.int64) * stride_oh
    tl.store(out_ptr + out_row + d * stride_od, (out * factor).to(out_ptr.dtype.element_ty), mask=d < DV)
    tl.store(lse_ptr + row, lse)


@planned
def _plan(problem: Problem, out_strides, n_splits: int) -> Launch:
    dv = problem.call.v.shape[-1]
    block_s = min(next_power_of_2(n_splits), MAX_REDUCE if padded(dv) <= 256 else MAX_REDUCE // 2)
    return Launch(
        _decode_reduce_kernel,
        (problem.batch * problem.heads_q * problem.seqlen_q,),
        seqlen_q=problem.seqlen_q,
        heads_q=problem.heads_q,
        n_splits=n_splits,
        **strides("o", out_strides),
        HAS_SINK=problem.call.sinks is not None,
        DV=dv,
        BLOCK_DV=padded(dv),
        BLOCK_S=block_s,
        num_warps=4 if block_s * padded(dv) > 512 else 1,
    )


def reduce_splits(problem: Problem, m, l, acc, out, lse, n_splits: int) -> None:
    """Write out and lse from m, l (B, Hq, Sq, n_splits) and acc (B, Hq, Sq, n_splits, Dv), fp32."""
    launch = _plan(problem, out.stride(), n_splits)
    launch(m_ptr=m, l_ptr=l, acc_ptr=acc, sink_ptr=problem.sinks, out_ptr=out, lse_ptr=lse)
