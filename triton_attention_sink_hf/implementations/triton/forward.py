"""Portable forward: one program per (batch row, tile of query tokens, heads of one key head), online softmax."""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.key_ranges import query_side_tensors
from ..common.masks import query_interval, query_tile_bounds, tile_plan
from ..common.primitives import factor_and_lse, load_tile, matmul, row_offsets, scaled, store_tile
from ..common.problem import Problem, ceil_div, planned, strides
from ..common.relaunch import Launch
from .config import forward_config


class _Options(NamedTuple):
    """What is fixed when the kernel is compiled, for ``_attend``."""

    stride_kt: int
    stride_kd: int
    stride_vt: int
    stride_vd: int
    PRESCALE: bool
    HAS_SOFTCAP: bool
    HAS_PADDING: bool
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_N: int


@triton.jit
def _attend(
    acc, l, m, q, k_ptr, v_ptr, padding_ptr, n0, end, lo, hi, softmax_scale, softcap, stride_pt,
    MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys [n0, n0 + BLOCK_N), in base 2. Keys from ``end`` on are not read."""
    D: tl.constexpr = OPTIONS.D
    DV: tl.constexpr = OPTIONS.DV
    BLOCK_N: tl.constexpr = OPTIONS.BLOCK_N
    cols = tl.arange(0, BLOCK_N)
    j = n0 + cols
    k_tile = k_ptr + n0.to(tl.int64) * OPTIONS.stride_kt
    k = load_tile(k_tile, cols * OPTIONS.stride_kt, j < end, OPTIONS.stride_kd, D, OPTIONS.BLOCK_D, CHECK=MASKED)
    s = matmul(q, k.T)
    EXACT: tl.constexpr = q.dtype == tl.float32
    s, scale = scaled(s, softmax_scale, softcap, OPTIONS.PRESCALE, OPTIONS.HAS_SOFTCAP, EXACT)
    if MASKED:
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        if OPTIONS.HAS_PADDING:
            real = tl.load(padding_ptr + j.to(tl.int64) * stride_pt, mask=j < end, other=0)
            visible = visible & (real != 0)[None, :]
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    shift = m_new
    if MASKED:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing yet
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v_tile = v_ptr + n0.to(tl.int64) * OPTIONS.stride_vt
    v = load_tile(v_tile, cols * OPTIONS.stride_vt, j < end, OPTIONS.stride_vd, DV, OPTIONS.BLOCK_DV, CHECK=MASKED)
    acc = matmul(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l, m_new


@triton.jit
def _attn_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, out_ptr, lse_ptr, ranges_ptr, padding_ptr, seqused_ptr,
    softmax_scale, softcap, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od, stride_pb, stride_pt,
    HAS_SINK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr,
    HAS_SEQUSED: tl.constexpr, HAS_PADDING: tl.constexpr, PRESCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // PACK
    OPTIONS: tl.constexpr = _Options(
        stride_kt=stride_kt, stride_kd=stride_kd, stride_vt=stride_vt, stride_vd=stride_vd,
        PRESCALE=PRESCALE, HAS_SOFTCAP=HAS_SOFTCAP, HAS_PADDING=HAS_PADDING,
        D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    chunks = heads_q // PACK
    tiles = tl.cdiv(seqlen_q, TOKENS)
    # last query tiles first, because causal ones see most keys; heads of one tile run side by side and share keys in L2
    tile = tiles - 1 - tl.program_id(0) // (chunks * batch)
    rest = tl.program_id(0) % (chunks * batch)
    b = rest // chunks
    head = rest % chunks * PACK
    head_k = head // (heads_q // heads_k)
    token = tile * TOKENS

    rows = tl.arange(0, BLOCK_M)
    i = token + rows // PACK
    heads = head + rows % PACK
    valid = i < seqlen_q
    lo, hi = query_interval(
        i, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
        HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED, HAS_KEY_RANGES,
    )  # fmt: skip
    lo_first, hi_first, lo_last, hi_last = query_tile_bounds(
        lo, hi, token, TOKENS, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
        HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED, HAS_KEY_RANGES,
    )  # fmt: skip
    edges, before, skip, full = tile_plan(lo_first, hi_first, lo_last, hi_last, BLOCK_N, ALL_EDGE=HAS_PADDING)

    q_base = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_rows = row_offsets(rows, token, stride_qt, stride_qh, PACK)
    q = load_tile(q_base, q_rows, valid, stride_qd, D, BLOCK_D, CHECK=True)
    k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
    v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
    padding_base = padding_ptr
    if HAS_PADDING:
        padding_base = padding_ptr + b.to(tl.int64) * stride_pb

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for e in tl.range(0, edges, num_stages=STAGES):
        n0 = lo_first + tl.where(e < before, e, e + skip) * BLOCK_N
        acc, l, m = _attend(
            acc, l, m, q, k_base, v_base, padding_base, n0, hi_last, lo, hi, softmax_scale, softcap, stride_pt,
            True, OPTIONS,
        )  # fmt: skip
    for f in tl.range(0, full, num_stages=STAGES):
        n0 = lo_first + (before + f) * BLOCK_N
        acc, l, m = _attend(
            acc, l, m, q, k_base, v_base, padding_base, n0, hi_last, lo, hi, softmax_scale, softcap, stride_pt,
            False, OPTIONS,
        )  # fmt: skip

    sink = None
    if HAS_SINK:
        sink = tl.load(sink_ptr + heads).to(tl.float32)
    factor, lse = factor_and_lse(m, l, sink, HAS_SINK)
    out = acc * factor[:, None]
    out_base = out_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    store_tile(out_base, row_offsets(rows, token, stride_ot, stride_oh, PACK), valid, stride_od, out, DV, BLOCK_DV)
    tl.store(lse_ptr + (b * heads_q + heads).to(tl.int64) * seqlen_q + i, lse, mask=valid)


@planned
def _plan(problem: Problem, out_strides) -> Launch:
    call, config = problem.call, forward_config(problem)
    tiles = ceil_div(problem.seqlen_q, config.block_m // problem.pack)
    return Launch(
        _attn_fwd_kernel,
        (tiles * problem.batch * (problem.heads_q // problem.pack),),
        **problem.mask_arguments(),
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("o", out_strides),
        HAS_KEY_RANGES=call.mask.key_ranges is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call = problem.call
    launch = _plan(problem, out.stride())
    launch(
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        sink_ptr=problem.sinks,
        out_ptr=out,
        lse_ptr=lse,
        **query_side_tensors(problem, problem.mask_tensors()),
    )
