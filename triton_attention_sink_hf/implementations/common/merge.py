"""Two parts of an attention joined by their lse, forward and backward: one pass over memory each."""

from __future__ import annotations

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .config import MERGE_HEADS, MERGE_ROWS
from .primitives import exp
from .problem import ceil_div, next_power_of_2
from .relaunch import Launch


@triton.jit
def _tile(seqlen, heads, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Rows of out (B, S, H, Dv), those of lse (B, H, S), and which exist: tokens by heads, so that both are read in
    whole sectors."""
    rows = tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * (ROWS // HEADS) + rows // HEADS
    h = tl.program_id(1) * HEADS + rows % HEADS
    return (b * seqlen + t) * heads + h, (b * heads + h) * seqlen + t, (t < seqlen) & (h < heads)


@triton.jit
def _merge_fwd_kernel(
    out_a_ptr, out_b_ptr, lse_a_ptr, lse_b_ptr, out_ptr, lse_ptr, seqlen, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row, statistic, valid = _tile(seqlen, heads, ROWS, HEADS)
    lse_a = tl.load(lse_a_ptr + statistic, mask=valid, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + statistic, mask=valid, other=float("-inf"))
    top = tl.maximum(lse_a, lse_b)
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    a, b = exp(lse_a - top), exp(lse_b - top)
    a, b = tl.where(lse_a == float("-inf"), 0.0, a), tl.where(lse_b == float("-inf"), 0.0, b)
    total = tl.where(empty, 1.0, a + b)
    tl.store(lse_ptr + statistic, tl.where(empty, float("-inf"), top + tl.log(total)), mask=valid)
    a, b = a / total, b / total
    d = tl.arange(0, BLOCK_DV)
    offsets, mask = row[:, None] * DV + d[None, :], valid[:, None] & (d < DV)[None, :]
    out_a = tl.load(out_a_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out_b = tl.load(out_b_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = a[:, None] * out_a + b[:, None] * out_b
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_bwd_kernel(
    out_a_ptr, out_b_ptr, lse_a_ptr, lse_b_ptr, lse_ptr, dout_ptr, dlse_ptr, dout_a_ptr, dout_b_ptr, dlse_a_ptr,
    dlse_b_ptr, seqlen, heads,
    HAS_DLSE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """With weights w_i = exp(lse_i - lse): dout_i = w_i dout and dlse_i = w_i (dout . (out_i - out) + dlse)."""
    row, statistic, valid = _tile(seqlen, heads, ROWS, HEADS)
    lse = tl.load(lse_ptr + statistic, mask=valid, other=float("-inf"))
    lse_a = tl.load(lse_a_ptr + statistic, mask=valid, other=float("-inf"))
    lse_b = tl.load(lse_b_ptr + statistic, mask=valid, other=float("-inf"))
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    a = tl.where(lse_a == float("-inf"), 0.0, exp(lse_a - shift))
    b = tl.where(lse_b == float("-inf"), 0.0, exp(lse_b - shift))
    d = tl.arange(0, BLOCK_DV)
    offsets, mask = row[:, None] * DV + d[None, :], valid[:, None] & (d < DV)[None, :]
    dout = tl.load(dout_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    along_a = tl.sum(dout * tl.load(out_a_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 1)
    along_b = tl.sum(dout * tl.load(out_b_ptr + offsets, mask=mask, other=0.0).to(tl.float32), 1)
    dlse = 0.0
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + statistic, mask=valid, other=0.0)
    # a + b = 1 but for rounding, so along_a - (a along_a + b along_b) = b (along_a - along_b), without cancellation
    difference = along_a - along_b
    tl.store(dlse_a_ptr + statistic, a * (b * difference + dlse), mask=valid)
    tl.store(dlse_b_ptr + statistic, b * (dlse - a * difference), mask=valid)
    tl.store(dout_a_ptr + offsets, (a[:, None] * dout).to(dout_a_ptr.dtype.element_ty), mask=mask)
    tl.store(dout_b_ptr + offsets, (b[:, None] * dout).to(dout_b_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=256)
def _launch(kernel, shape: tuple[int, ...], **constants) -> Launch:
    batch, seqlen, heads, dv = shape
    per_tile = min(next_power_of_2(heads), MERGE_HEADS)
    return Launch(
        kernel,
        (ceil_div(seqlen, MERGE_ROWS // per_tile), ceil_div(heads, per_tile), batch),
        seqlen=seqlen,
        heads=heads,
        DV=dv,
        BLOCK_DV=next_power_of_2(dv),
        ROWS=MERGE_ROWS,
        HEADS=per_tile,
        num_warps=4,
        **constants,
    )


class _Merge(Function):
    @staticmethod
    def forward(ctx, out_a: Tensor, out_b: Tensor, lse_a: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
        out_a, out_b, lse_a, lse_b = (x.contiguous() for x in (out_a, out_b, lse_a, lse_b))
        out, lse = out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)
        if out.numel():
            _launch(_merge_fwd_kernel, tuple(out.shape))(
                out_a_ptr=out_a, out_b_ptr=out_b, lse_a_ptr=lse_a, lse_b_ptr=lse_b, out_ptr=out, lse_ptr=lse
            )
        ctx.save_for_backward(out_a, out_b, lse_a, lse_b, lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor | None, dlse: Tensor | None):
        if dout is None and dlse is None:
            return None, None, None, None
        out_a, out_b, lse_a, lse_b, lse = ctx.saved_tensors
        dout = out_a.new_zeros(out_a.shape) if dout is None else dout.contiguous()
        dout_a, dout_b = dout.new_empty(dout.shape), dout.new_empty(dout.shape)
        dlse_a, dlse_b = lse.new_empty(lse.shape), lse.new_empty(lse.shape)
        if dout.numel():
            _launch(_merge_bwd_kernel, tuple(dout.shape), HAS_DLSE=dlse is not None)(
                out_a_ptr=out_a, out_b_ptr=out_b, lse_a_ptr=lse_a, lse_b_ptr=lse_b, lse_ptr=lse, dout_ptr=dout,
                dlse_ptr=None if dlse is None else dlse.contiguous(), dout_a_ptr=dout_a, dout_b_ptr=dout_b,
                dlse_a_ptr=dlse_a, dlse_b_ptr=dlse_b,
            )  # fmt: skip
        return dout_a, dout_b, dlse_a, dlse_b


merge = _Merge.apply  # (out_a, out_b (B, S, H, Dv), lse_a, lse_b (B, H, S) fp32) -> out, lse
