"""Portable backward: a dq kernel, then a dk, dv kernel. Deterministic, no atomics; the workspace is two fp32 per row.

dq: one program per tile of query rows. It also computes delta = rowsum(dout * out) - dlse, stores it for the second
kernel, and leaves per-tile sums of the sink's gradient.
dk, dv: one program per tile of keys. It loops over the queries of the whole group of heads, so grouped heads need
neither atomics nor copies.

With P = exp(x - lse), dP = dout v^T: dS = P (dP - delta), dq = scale dS k, dk = scale dS^T q, dv = P^T dout, and
dsink = -sum over rows of exp(sink - lse) delta.

Over 400 lines: both kernels share the formula, their steps and a launch.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common.key_ranges import key_side_tensors, query_side_tensors
from ..common.masks import key_interval, key_tile_bounds, query_interval, query_tile_bounds, tile_plan
from ..common.old_triton import known_hints
from ..common.primitives import LOG2E, add_product, cap, exp, load_block, load_tile, matmul, row_offsets, store_tile
from ..common.problem import Problem, ceil_div, dlse_arguments, planned, strides, token_blocks, use_tma
from ..common.reduce import sum_rows
from ..common.relaunch import Blocks, Launch
from .config import MIN_TMA_PACK, dkv_config, dq_config


@triton.jit
def _probabilities(
    s, lse, softmax_scale, softcap, PRESCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """P = exp(x - lse) and the softcap's dx/ds, from raw scores; lse is broadcast to s.

    EXACT, for fp32 inputs, subtracts before it changes the base, so that lse is not rounded in base 2.
    """
    slope = 1.0
    if PRESCALE or EXACT:
        x = s * softmax_scale
        if HAS_SOFTCAP:
            x = cap(x, softcap)
            slope = 1.0 - (x / softcap) * (x / softcap)
        return tl.exp2((x - lse) * LOG2E), slope
    return tl.exp2(s * (softmax_scale * LOG2E) - lse * LOG2E), slope


class _DqOptions(NamedTuple):
    """What is fixed when the kernel is compiled, for ``_dq_step``."""

    stride_kt: int
    stride_kd: int
    stride_vt: int
    stride_vd: int
    HAS_SINK: bool
    PRESCALE: bool
    HAS_SOFTCAP: bool
    HAS_PADDING: bool
    TMA: bool
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_N: int


@triton.jit
def _dq_step(
    dq, row_sum, queries, keys, b, head_k, padding_ptr, n0, end, lo, hi, softmax_scale, softcap, stride_pt,
    MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add the part of keys [n0, n0 + BLOCK_N), up to ``end``."""
    q, dout, lse, delta = queries
    k_ptr, v_ptr, k_desc, v_desc = keys
    BLOCK_N: tl.constexpr = OPTIONS.BLOCK_N
    BLOCK_D: tl.constexpr = OPTIONS.BLOCK_D
    BLOCK_DV: tl.constexpr = OPTIONS.BLOCK_DV
    cols = tl.arange(0, BLOCK_N)
    j = n0 + cols
    BLOCKS: tl.constexpr = OPTIONS.TMA and not MASKED  # what lies past ``end`` may hold anything
    if BLOCKS:
        k = load_block(k_desc, b, n0, head_k, BLOCK_N, BLOCK_D)
        v = load_block(v_desc, b, n0, head_k, BLOCK_N, BLOCK_DV)
    else:
        k_tile, v_tile = k_ptr + n0.to(tl.int64) * OPTIONS.stride_kt, v_ptr + n0.to(tl.int64) * OPTIONS.stride_vt
        k = load_tile(k_tile, cols * OPTIONS.stride_kt, j < end, OPTIONS.stride_kd, OPTIONS.D, BLOCK_D, CHECK=MASKED)
        v = load_tile(v_tile, cols * OPTIONS.stride_vt, j < end, OPTIONS.stride_vd, OPTIONS.DV, BLOCK_DV, CHECK=MASKED)
    EXACT: tl.constexpr = q.dtype == tl.float32
    s = matmul(q, k.T)
    p, slope = _probabilities(s, lse[:, None], softmax_scale, softcap, OPTIONS.PRESCALE, OPTIONS.HAS_SOFTCAP, EXACT)
    if MASKED:
        visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
        if OPTIONS.HAS_PADDING:
            real = tl.load(padding_ptr + j.to(tl.int64) * stride_pt, mask=j < end, other=0)
            visible = visible & (real != 0)[None, :]
        p = tl.where(visible, p, 0.0)
    ds = p * (matmul(dout, v.T) - delta[:, None])
    if OPTIONS.HAS_SINK:
        row_sum += tl.sum(ds, 1)
    if OPTIONS.HAS_SOFTCAP:
        ds = ds * slope
    return matmul(ds.to(k.dtype), k, dq), row_sum


@known_hints
@triton.jit
def _attn_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, k_desc, v_desc, sink_ptr, out_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, statistics_ptr,
    dsink_ptr, ranges_ptr, padding_ptr, seqused_ptr,
    softmax_scale, softcap, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od,
    stride_dob, stride_dot, stride_doh, stride_dod, stride_dqb, stride_dqt, stride_dqh, stride_dqd,
    stride_dlb, stride_dlh, stride_dlt, stride_st, stride_sh, stride_sp, stride_pb, stride_pt,
    HAS_SINK: tl.constexpr, HAS_DLSE: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr, HAS_PADDING: tl.constexpr, PRESCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, HAS_KEY_RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // PACK
    OPTIONS: tl.constexpr = _DqOptions(
        stride_kt=stride_kt, stride_kd=stride_kd, stride_vt=stride_vt, stride_vd=stride_vd, HAS_SINK=HAS_SINK,
        PRESCALE=PRESCALE, HAS_SOFTCAP=HAS_SOFTCAP, HAS_PADDING=HAS_PADDING, TMA=TMA,
        D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_N=BLOCK_N,
    )  # fmt: skip
    # disable LICM: hoisted values would spill
    NO_LICM: tl.constexpr = TMA and (PACKED or BLOCK_D >= 128)
    chunks = heads_q // PACK
    tiles = tl.cdiv(seqlen_q, TOKENS)
    tile = tiles - 1 - tl.program_id(0) // (chunks * batch)  # as in the forward
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
    dout_base = dout_ptr + b.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
    dout_rows = row_offsets(rows, token, stride_dot, stride_doh, PACK)
    dout = load_tile(dout_base, dout_rows, valid, stride_dod, DV, BLOCK_DV, CHECK=True)
    out_base = out_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
    out_rows = row_offsets(rows, token, stride_ot, stride_oh, PACK)
    out = load_tile(out_base, out_rows, valid, stride_od, DV, BLOCK_DV, CHECK=True)
    statistic = (b * heads_q + heads).to(tl.int64) * seqlen_q + i
    lse = tl.load(lse_ptr + statistic, mask=valid, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    if HAS_DLSE:
        dlse_rows = b.to(tl.int64) * stride_dlb + heads.to(tl.int64) * stride_dlh + i.to(tl.int64) * stride_dlt
        dlse = tl.load(dlse_ptr + dlse_rows, mask=valid, other=0.0)
        delta -= dlse
    statistics = statistics_ptr + (b * heads_q).to(tl.int64) * 2 * seqlen_q
    statistics += row_offsets(rows, token, stride_st, stride_sh, PACK) + head.to(tl.int64) * stride_sh
    tl.store(statistics, lse, mask=valid)
    tl.store(statistics + stride_sp, delta, mask=valid)

    k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
    v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
    padding_base = padding_ptr
    if HAS_PADDING:
        padding_base = padding_ptr + b.to(tl.int64) * stride_pb
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for e in tl.range(0, edges, num_stages=STAGES, disable_licm=NO_LICM):
        n0 = lo_first + tl.where(e < before, e, e + skip) * BLOCK_N
        dq, row_sum = _dq_step(
            dq, row_sum, (q, dout, lse, delta), (k_base, v_base, k_desc, v_desc), b, head_k, padding_base,
            n0, hi_last, lo, hi, softmax_scale, softcap, stride_pt, True, OPTIONS,
        )  # fmt: skip
    for f in tl.range(0, full, num_stages=STAGES, disable_licm=NO_LICM):
        n0 = lo_first + (before + f) * BLOCK_N
        dq, row_sum = _dq_step(
            dq, row_sum, (q, dout, lse, delta), (k_base, v_base, k_desc, v_desc), b, head_k, padding_base,
            n0, hi_last, lo, hi, softmax_scale, softcap, stride_pt, False, OPTIONS,
        )  # fmt: skip

    dq_base = dq_ptr + b.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
    dq_rows = row_offsets(rows, token, stride_dqt, stride_dqh, PACK)
    store_tile(dq_base, dq_rows, valid, stride_dqd, dq * softmax_scale, D, BLOCK_D)
    if HAS_SINK:
        # delta above comes from the rounded out. rowsum(dS) = rowsum(P dP) - delta (1 - p_sink) with fp32 P and dP,
        # so the sink's gradient can use the delta of the unrounded out.
        p_sink = exp(tl.load(sink_ptr + heads).to(tl.float32) - lse)
        p_sink = tl.where(lse == float("-inf"), 0.0, p_sink)  # a sink of -inf and no key
        exact_delta = row_sum + delta * (1.0 - p_sink)
        if HAS_DLSE:
            exact_delta -= dlse
        part = tl.where(valid, -p_sink * exact_delta, 0.0)
        part = tl.sum(tl.reshape(part, [TOKENS, PACK]), 0)
        tl.store(dsink_ptr + (b.to(tl.int64) * tiles + tile) * heads_q + head + tl.arange(0, PACK), part)


class _DkvOptions(NamedTuple):
    """What is fixed when the kernel is compiled, for ``_dkv_step``. WHOLE: no packed rows are cut short."""

    stride_qt: int
    stride_qd: int
    stride_dot: int
    stride_dod: int
    stride_st: int
    PRESCALE: bool
    HAS_SOFTCAP: bool
    TMA: bool
    WHOLE: bool
    HAS_KEY_RANGES: bool
    D: int
    DV: int
    BLOCK_D: int
    BLOCK_DV: int
    BLOCK_M: int
    PACK: int


@triton.jit
def _dkv_step(
    dk, dv, dk_rest, dv_rest, k, v, j, pointers, descs, head_strides, b, head, t0, end, lo, hi, softmax_scale, softcap,
    MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):  # fmt: skip
    """Add the part of query rows from token t0 on, up to ``end``; scores are transposed (keys, rows)."""
    q_ptr, dout_ptr, statistics_ptr, first_ptr, last_ptr = pointers
    q_desc, dout_desc, statistics_desc = descs
    stride_qh, stride_doh, stride_sh, stride_sp = head_strides
    BLOCK_M: tl.constexpr = OPTIONS.BLOCK_M
    BLOCK_D: tl.constexpr = OPTIONS.BLOCK_D
    BLOCK_DV: tl.constexpr = OPTIONS.BLOCK_DV
    PACK: tl.constexpr = OPTIONS.PACK
    TMA: tl.constexpr = OPTIONS.TMA
    rows = tl.arange(0, BLOCK_M)
    i = t0 + rows // PACK
    valid = i < end
    # rows past ``end`` are real unless packed rows are cut short
    BLOCKS: tl.constexpr = TMA and (OPTIONS.WHOLE or not MASKED)
    if BLOCKS:
        q = load_block(q_desc, b, t0, head, BLOCK_M, BLOCK_D)
        dout = load_block(dout_desc, b, t0, head, BLOCK_M, BLOCK_DV)
    else:
        q_tile, dout_tile = q_ptr + t0.to(tl.int64) * OPTIONS.stride_qt, dout_ptr + t0.to(tl.int64) * OPTIONS.stride_dot
        CHECK: tl.constexpr = MASKED and not TMA
        tokens = rows // PACK
        if TMA:
            tokens = tl.minimum(tokens, end - 1 - t0)  # re-read the last row, masked below: saves registers
        q_rows = tokens * OPTIONS.stride_qt + rows % PACK * stride_qh
        q = load_tile(q_tile, q_rows, valid, OPTIONS.stride_qd, OPTIONS.D, BLOCK_D, CHECK=CHECK)
        dout_rows = tokens * OPTIONS.stride_dot + rows % PACK * stride_doh
        dout = load_tile(dout_tile, dout_rows, valid, OPTIONS.stride_dod, OPTIONS.DV, BLOCK_DV, CHECK=CHECK)
    if TMA:
        lse = tl.reshape(statistics_desc.load([b, t0, 0, head]), [BLOCK_M])
        delta = tl.reshape(statistics_desc.load([b, t0, 1, head]), [BLOCK_M])
        if not BLOCKS:
            delta = tl.where(valid, delta, 0.0)  # past ``end`` it may be anything; so may lse, but P is masked
    else:
        statistics = statistics_ptr + t0.to(tl.int64) * OPTIONS.stride_st
        statistics += rows // PACK * OPTIONS.stride_st + rows % PACK * stride_sh
        if MASKED:
            lse = tl.load(statistics, mask=valid, other=0.0)
            delta = tl.load(statistics + stride_sp, mask=valid, other=0.0)
        else:
            lse = tl.load(statistics)
            delta = tl.load(statistics + stride_sp)
    EXACT: tl.constexpr = q.dtype == tl.float32
    s = matmul(k, q.T)
    p, slope = _probabilities(s, lse[None, :], softmax_scale, softcap, OPTIONS.PRESCALE, OPTIONS.HAS_SOFTCAP, EXACT)
    if MASKED:
        if OPTIONS.HAS_KEY_RANGES:
            first = tl.load(first_ptr + i, mask=valid, other=0)
            last = tl.load(last_ptr + i, mask=valid, other=0)
            visible = (j[:, None] >= first[None, :]) & (j[:, None] < last[None, :])
        else:
            visible = (i[None, :] >= lo[:, None]) & (i[None, :] < hi[:, None])
        p = tl.where(visible, p, 0.0)
    dv, dv_rest = add_product(dv, dv_rest, p.to(dout.dtype), dout, EXACT)
    ds = p * (matmul(v, dout.T) - delta[None, :])
    if OPTIONS.HAS_SOFTCAP:
        ds = ds * slope
    dk, dk_rest = add_product(dk, dk_rest, ds.to(q.dtype), q, EXACT)
    return dk, dv, dk_rest, dv_rest


@known_hints
@triton.jit
def _attn_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, q_desc, dout_desc, statistics_desc, statistics_ptr, dout_ptr, dk_ptr, dv_ptr,
    ranges_ptr, padding_ptr, seqused_ptr, query_ranges_ptr, key_tiles_ptr,
    softmax_scale, softcap, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_dob, stride_dot, stride_doh, stride_dod,
    stride_dkb, stride_dkt, stride_dkh, stride_dkd, stride_dvb, stride_dvt, stride_dvh, stride_dvd,
    stride_st, stride_sh, stride_sp, stride_pb, stride_pt,
    HAS_SINK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr,
    HAS_SEQUSED: tl.constexpr, HAS_PADDING: tl.constexpr, PRESCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_KEY_RANGES: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // PACK
    OPTIONS: tl.constexpr = _DkvOptions(
        stride_qt=stride_qt, stride_qd=stride_qd, stride_dot=stride_dot, stride_dod=stride_dod, stride_st=stride_st,
        PRESCALE=PRESCALE, HAS_SOFTCAP=HAS_SOFTCAP, TMA=TMA, WHOLE=not PACKED, HAS_KEY_RANGES=HAS_KEY_RANGES,
        D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_M=BLOCK_M, PACK=PACK,
    )  # fmt: skip
    # disable LICM: hoisted values would spill
    NO_LICM: tl.constexpr = TMA and (PACKED or BLOCK_D >= 128)
    # the first key tiles first: under causality most queries see them
    tile = tl.program_id(0) // (heads_k * batch)
    rest = tl.program_id(0) % (heads_k * batch)
    b = rest // heads_k
    head_k = rest % heads_k
    group = heads_q // heads_k
    key = tile * BLOCK_N

    cols = tl.arange(0, BLOCK_N)
    j = key + cols
    valid = j < seqlen_k
    lo, hi = key_interval(
        j, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED
    )
    first_ptr, last_ptr = query_ranges_ptr, query_ranges_ptr
    if HAS_KEY_RANGES:
        first_ptr = query_ranges_ptr + b.to(tl.int64) * 2 * seqlen_q
        last_ptr = first_ptr + seqlen_q
        key_tile = key_tiles_ptr + (b.to(tl.int64) * tl.cdiv(seqlen_k, BLOCK_N) + tile) * 2
        lo_first, hi_last = tl.load(key_tile), tl.load(key_tile + 1)
        hi_first, lo_last = hi_last, lo_first
    else:
        lo_first, hi_first, lo_last, hi_last = key_tile_bounds(
            key, BLOCK_N, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
            HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED,
        )  # fmt: skip
    edges, before, skip, full = tile_plan(lo_first, hi_first, lo_last, hi_last, TOKENS, ALL_EDGE=HAS_KEY_RANGES)

    # keys that no query sees (unused cache slots, rows past the last segment) may hold anything and are not read
    seen = valid & (lo < hi)
    k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
    k = load_tile(k_base, j.to(tl.int64) * stride_kt, seen, stride_kd, D, BLOCK_D, CHECK=True)
    v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
    v = load_tile(v_base, j.to(tl.int64) * stride_vt, seen, stride_vd, DV, BLOCK_DV, CHECK=True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dk_rest, dv_rest = 0.0, 0.0
    if k.dtype == tl.float32:
        dk_rest, dv_rest = tl.zeros_like(dk), tl.zeros_like(dv)
    for chunk in range(0, group // PACK):
        head = head_k * group + chunk * PACK
        q_base = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        dout_base = dout_ptr + b.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
        statistics = statistics_ptr + (b * heads_q).to(tl.int64) * 2 * seqlen_q + head.to(tl.int64) * stride_sh
        for e in tl.range(0, edges, num_stages=STAGES, disable_licm=NO_LICM):
            t0 = lo_first + tl.where(e < before, e, e + skip) * TOKENS
            dk, dv, dk_rest, dv_rest = _dkv_step(
                dk, dv, dk_rest, dv_rest, k, v, j, (q_base, dout_base, statistics, first_ptr, last_ptr),
                (q_desc, dout_desc, statistics_desc), (stride_qh, stride_doh, stride_sh, stride_sp),
                b, head, t0, hi_last, lo, hi, softmax_scale, softcap,
                True, OPTIONS,
            )  # fmt: skip
        for f in tl.range(0, full, num_stages=STAGES, disable_licm=NO_LICM):
            t0 = lo_first + (before + f) * TOKENS
            dk, dv, dk_rest, dv_rest = _dkv_step(
                dk, dv, dk_rest, dv_rest, k, v, j, (q_base, dout_base, statistics, first_ptr, last_ptr),
                (q_desc, dout_desc, statistics_desc), (stride_qh, stride_doh, stride_sh, stride_sp),
                b, head, t0, hi_last, lo, hi, softmax_scale, softcap,
                False, OPTIONS,
            )  # fmt: skip
    dk = dk * softmax_scale
    if HAS_PADDING:
        # a masked key affects no other key's gradient, so the mask is applied here instead of in the loop
        padding_rows = b.to(tl.int64) * stride_pb + j.to(tl.int64) * stride_pt
        real = tl.load(padding_ptr + padding_rows, mask=valid, other=0) != 0
        dk = tl.where(real[:, None], dk, 0.0)
        dv = tl.where(real[:, None], dv, 0.0)
    dk_base = dk_ptr + b.to(tl.int64) * stride_dkb + head_k.to(tl.int64) * stride_dkh
    store_tile(dk_base, j.to(tl.int64) * stride_dkt, valid, stride_dkd, dk, D, BLOCK_D)
    dv_base = dv_ptr + b.to(tl.int64) * stride_dvb + head_k.to(tl.int64) * stride_dvh
    store_tile(dv_base, j.to(tl.int64) * stride_dvt, valid, stride_dvd, dv, DV, BLOCK_DV)


@planned
def _dq_plan(problem: Problem, out_strides, dout_strides, dq_strides, dlse_strides, aligned: bool) -> tuple:
    """The launch, rows of partial sums of dsink, whether it takes descriptors."""
    call, config = problem.call, dq_config(problem)
    tiles = ceil_div(problem.seqlen_q, config.block_m // problem.pack) * problem.batch
    tma = aligned and config.tma
    blocks = {
        "k_desc": token_blocks(call.k.shape, call.k.stride(), config.block_n, 1, problem.block_d),
        "v_desc": token_blocks(call.v.shape, call.v.stride(), config.block_n, 1, problem.block_dv),
    }
    launch = Launch(
        _attn_bwd_dq_kernel,
        (tiles * (problem.heads_q // problem.pack),),
        blocks if tma else {},
        **problem.mask_arguments(),
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("o", out_strides),
        **strides("do", dout_strides),
        **strides("dq", dq_strides),
        **dlse_arguments(dlse_strides),
        **statistics_strides(problem),
        HAS_KEY_RANGES=call.mask.key_ranges is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        TMA=tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return launch, tiles, tma


@planned
def _dkv_plan(problem: Problem, dout_strides, dk_strides, dv_strides, aligned: bool) -> tuple:
    """The launch, whether it takes descriptors, keys of a tile."""
    call, config = problem.call, dkv_config(problem)
    tma = aligned and config.tma and problem.pack >= MIN_TMA_PACK
    tokens, out_shape = config.block_m // problem.pack, (*call.q.shape[:3], call.v.shape[-1])
    blocks = {
        "q_desc": token_blocks(call.q.shape, call.q.stride(), tokens, problem.pack, problem.block_d),
        "dout_desc": token_blocks(out_shape, dout_strides, tokens, problem.pack, problem.block_dv),
        "statistics_desc": statistics_blocks(problem, tokens),
    }
    launch = Launch(
        _attn_bwd_dkv_kernel,
        (ceil_div(problem.seqlen_k, config.block_n) * problem.batch * problem.heads_k,),
        blocks if tma else {},
        **problem.mask_arguments(),
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("do", dout_strides),
        **strides("dk", dk_strides),
        **strides("dv", dv_strides),
        **statistics_strides(problem),
        HAS_KEY_RANGES=call.mask.key_ranges is not None,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        TMA=tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return launch, tma, config.block_n


def statistics_strides(problem: Problem) -> dict:
    """Strides of lse and delta, 2 B Sq Hq fp32, as the second kernel reads them.

    The packed heads of a token are contiguous, so that a tile's rows are few wide loads. Without packing, tokens are.
    """
    if problem.pack > 1:
        return {
            "stride_st": tl.constexpr(2 * problem.heads_q),
            "stride_sh": tl.constexpr(1),
            "stride_sp": problem.heads_q,
        }
    return {"stride_st": tl.constexpr(1), "stride_sh": 2 * problem.seqlen_q, "stride_sp": problem.seqlen_q}


def statistics_blocks(problem: Problem, tokens: int) -> Blocks:
    """Blocks of (1, tokens, 1, packed heads) of (B, Sq, 2, Hq): lse and delta of a tile's rows."""
    shape = (problem.batch, problem.seqlen_q, 2, problem.heads_q)
    stride = (2 * problem.seqlen_q * problem.heads_q, 2 * problem.heads_q, problem.heads_q, 1)
    block_shape = [1, tokens, 1, problem.pack]
    return Blocks(TensorDescriptor, {"shape": shape, "strides": stride, "block_shape": block_shape})


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq, and dk, dv, dsinks unless None. dlse (B, Hq, Sq) or None. Every element is written."""
    call, mask_tensors = problem.call, problem.mask_tensors()
    query_side = query_side_tensors(problem, mask_tensors)
    dlse_strides = None if dlse is None else dlse.stride()
    aligned = use_tma(problem, call.q, call.k, call.v, dout)
    launch, parts, tma = _dq_plan(problem, out.stride(), dout.stride(), dq.stride(), dlse_strides, aligned)
    statistics = lse.new_empty(2 * lse.numel())
    dsink_parts = None if dsinks is None else lse.new_empty(parts, problem.heads_q)
    launch(
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        k_desc=call.k if tma else None,
        v_desc=call.v if tma else None,
        sink_ptr=problem.sinks,
        out_ptr=out,
        lse_ptr=lse,
        dout_ptr=dout,
        dlse_ptr=dlse,
        dq_ptr=dq,
        statistics_ptr=statistics,
        dsink_ptr=dsink_parts,
        **query_side,
    )
    if dk is not None:
        launch, tma, tile = _dkv_plan(problem, dout.stride(), dk.stride(), dv.stride(), aligned)
        launch(
            q_ptr=call.q,
            k_ptr=call.k,
            v_ptr=call.v,
            q_desc=call.q if tma else None,
            dout_desc=dout if tma else None,
            statistics_desc=statistics if tma else None,
            statistics_ptr=statistics,
            dout_ptr=dout,
            dk_ptr=dk,
            dv_ptr=dv,
            **key_side_tensors(problem, mask_tensors, query_side["ranges_ptr"], tile),
        )
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
