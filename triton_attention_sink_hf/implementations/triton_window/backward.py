"""Backward for short causal windows in two kernels, deterministic, without reading ``out``.

dq: the whole row of P and dP is in registers, so delta = rowsum(P dP) is taken there in fp32. It is left for the second
kernel in the order (batch, token, head), which is the order in which that one reads it.
dk, dv: one program per tile of keys. -lse / scale (-inf where hidden) and -delta are what the products start from, so
that neither the mask nor the subtraction costs anything after them.
"""

import torch
import triton
import triton.language as tl

from ..triton.launch import Problem, strides
from ..triton.masks import key_interval, query_interval
from ..triton.primitives import LOG2E, load_tile, matmul, row_offsets, store_tile
from .config import dkv_config, dq_config, programs
from .forward import load_keys, place, window_arguments, within


@triton.jit
def _window_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, delta_ptr, dsink_ptr, ranges_ptr,
    softmax_scale, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right, n_tiles,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_dob, stride_dot, stride_doh, stride_dod,
    stride_dqb, stride_dqt, stride_dqh, stride_dqd, stride_dlb, stride_dlh, stride_dlt,
    HAS_SINK: tl.constexpr, HAS_DLSE: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    TOKENS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * PACK
    scale = softmax_scale * LOG2E
    chunks = heads_q // PACK
    tiles = tl.cdiv(seqlen_q, TOKENS)
    shift = 0  # packed rows attend to themselves
    if not PACKED:
        shift = seqlen_k - seqlen_q
    rows = tl.arange(0, ROWS)
    for number in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        b, tile, chunk = place(number, tiles, chunks)
        head = chunk * PACK
        head_k = head // (heads_q // heads_k)
        token = tile * TOKENS
        heads = head + rows % PACK
        i = token + rows // PACK
        valid = i < seqlen_q
        q_base = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        q_rows = row_offsets(rows, token, stride_qt, stride_qh, PACK)
        q = load_tile(q_base, q_rows, valid, stride_qd, D, BLOCK_D, CHECK=True)
        dout_base = dout_ptr + b.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
        dout_rows = row_offsets(rows, token, stride_dot, stride_doh, PACK)
        dout = load_tile(dout_base, dout_rows, valid, stride_dod, DV, BLOCK_DV, CHECK=True)
        lse_rows = (b * heads_q + heads).to(tl.int64) * seqlen_q + i
        lse2 = tl.load(lse_ptr + lse_rows, mask=valid, other=0.0) * LOG2E
        lo, hi = query_interval(
            i, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
        )
        count = (hi - lo).to(tl.uint32, bitcast=True)
        j_own = token + shift + tl.arange(0, TOKENS)
        j_band = token + shift - BAND + tl.arange(0, BAND)
        k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
        v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
        k_band = load_keys(k_base, j_band, seqlen_k, stride_kt, stride_kd, D, BLOCK_D)
        k_own = load_keys(k_base, j_own, seqlen_k, stride_kt, stride_kd, D, BLOCK_D)
        v_band = load_keys(v_base, j_band, seqlen_k, stride_vt, stride_vd, DV, BLOCK_DV)
        v_own = load_keys(v_base, j_own, seqlen_k, stride_vt, stride_vd, DV, BLOCK_DV)
        s_band = matmul(q, k_band.T)
        s_own = matmul(q, k_own.T)
        p_band = tl.where(within(j_band, lo, count), tl.exp2(s_band * scale - lse2[:, None]), 0.0)
        p_own = tl.where(within(j_own, lo, count), tl.exp2(s_own * scale - lse2[:, None]), 0.0)
        dp_band = matmul(dout, v_band.T)
        dp_own = matmul(dout, v_own.T)
        delta = tl.sum(p_band * dp_band, 1) + tl.sum(p_own * dp_own, 1)
        if HAS_DLSE:
            dlse_rows = b.to(tl.int64) * stride_dlb + heads.to(tl.int64) * stride_dlh + i.to(tl.int64) * stride_dlt
            delta -= tl.load(dlse_ptr + dlse_rows, mask=valid, other=0.0)
        ds_band = p_band * (dp_band - delta[:, None])
        ds_own = p_own * (dp_own - delta[:, None])
        dq = matmul(ds_band.to(k_band.dtype), k_band)
        dq = matmul(ds_own.to(k_own.dtype), k_own, dq)
        dq_base = dq_ptr + b.to(tl.int64) * stride_dqb + head.to(tl.int64) * stride_dqh
        dq_rows = row_offsets(rows, token, stride_dqt, stride_dqh, PACK)
        store_tile(dq_base, dq_rows, valid, stride_dqd, dq * softmax_scale, D, BLOCK_D)
        tl.store(delta_ptr + (b.to(tl.int64) * seqlen_q + i) * heads_q + heads, delta, mask=valid)
        if HAS_SINK:
            sink = tl.load(sink_ptr + heads).to(tl.float32) * LOG2E
            part = tl.where(valid, -tl.exp2(sink - lse2) * delta, 0.0)
            part = tl.sum(tl.reshape(part, [TOKENS, PACK]), 0)
            tl.store(dsink_ptr + (b.to(tl.int64) * tiles + tile) * heads_q + head + tl.arange(0, PACK), part)


@triton.jit
def _window_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dout_ptr, dk_ptr, dv_ptr, ranges_ptr,
    softmax_scale, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_dob, stride_dot, stride_doh, stride_dod,
    stride_dkb, stride_dkt, stride_dkh, stride_dkd, stride_dvb, stride_dvt, stride_dvh, stride_dvd,
    PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    BAND: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * PACK
    scale = softmax_scale * LOG2E
    to_scores = -1.0 / softmax_scale
    tile = tl.program_id(0) // (heads_k * batch)
    rest = tl.program_id(0) % (heads_k * batch)
    b = rest // heads_k
    head_k = rest % heads_k
    group = heads_q // heads_k
    j = tile * KEYS + tl.arange(0, KEYS)
    valid = j < seqlen_k
    lo, hi = key_interval(
        j, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
    )
    count = (hi - lo).to(tl.uint32, bitcast=True)
    start, _ = key_interval(
        tile * KEYS, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
    )
    _, end = key_interval(
        tile * KEYS + KEYS - 1, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED,
        HAS_SEQUSED=False,
    )  # fmt: skip
    # Steps are aligned, and each program starts where (number of the step) mod n is 0: neighbours, whose ranges overlap,
    # then read the same queries at about the same time.
    start_step = start // TOKENS
    n = tl.maximum(tl.cdiv(end, TOKENS) - start_step, 0)

    k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
    k = load_tile(k_base, j.to(tl.int64) * stride_kt, valid, stride_kd, D, BLOCK_D, CHECK=True)
    v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
    v = load_tile(v_base, j.to(tl.int64) * stride_vt, valid, stride_vd, DV, BLOCK_DV, CHECK=True)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    rows = tl.arange(0, ROWS)
    for chunk in range(0, group // PACK):
        head = head_k * group + chunk * PACK
        q_base = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        dout_base = dout_ptr + b.to(tl.int64) * stride_dob + head.to(tl.int64) * stride_doh
        lse_base = lse_ptr + (b * heads_q + head).to(tl.int64) * seqlen_q
        delta_base = delta_ptr + b.to(tl.int64) * seqlen_q * heads_q + head
        for e in tl.range(0, n, num_stages=STAGES):
            token = (start_step + (e + n - start_step % n) % n) * TOKENS
            i = token + rows // PACK
            in_range = i < seqlen_q
            q_rows = rows // PACK * stride_qt + rows % PACK * stride_qh
            q = load_tile(q_base + token.to(tl.int64) * stride_qt, q_rows, in_range, stride_qd, D, BLOCK_D, CHECK=True)
            dout_rows = rows // PACK * stride_dot + rows % PACK * stride_doh
            dout = load_tile(
                dout_base + token.to(tl.int64) * stride_dot, dout_rows, in_range, stride_dod, DV, BLOCK_DV, CHECK=True
            )
            lse = tl.load(lse_base + (rows % PACK).to(tl.int64) * seqlen_q + i, mask=in_range, other=0.0)
            delta = tl.load(delta_base + i.to(tl.int64) * heads_q + rows % PACK, mask=in_range, other=0.0)
            s = tl.where(within(i, lo, count), (lse * to_scores)[None, :], float("-inf"))
            p = tl.exp2(matmul(k, q.T, s) * scale)
            dv = matmul(p.to(dout.dtype), dout, dv)
            dp = matmul(v, dout.T, tl.broadcast_to(-delta[None, :], [KEYS, ROWS]))
            dk = matmul((p * dp).to(q.dtype), q, dk)
    dk_base = dk_ptr + b.to(tl.int64) * stride_dkb + head_k.to(tl.int64) * stride_dkh
    store_tile(dk_base, j.to(tl.int64) * stride_dkt, valid, stride_dkd, dk * softmax_scale, D, BLOCK_D)
    dv_base = dv_ptr + b.to(tl.int64) * stride_dvb + head_k.to(tl.int64) * stride_dvh
    store_tile(dv_base, j.to(tl.int64) * stride_dvt, valid, stride_dvd, dv, DV, BLOCK_DV)


def launch_backward(problem: Problem, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq, and dk, dv, dsinks unless None. dlse (B, Hq, Sq) or None. Every element is written."""
    call, shared = problem.call, window_arguments(problem)
    config = dq_config(problem)
    tiles = triton.cdiv(problem.seqlen_q, config.tokens) * problem.batch
    n_tiles = tiles * (problem.heads_q // problem.pack)
    delta = lse.new_empty(problem.batch, problem.seqlen_q, problem.heads_q)
    dsink_parts = None if dsinks is None else lse.new_empty(tiles, problem.heads_q)
    dlse_strides = (0, 0, 0) if dlse is None else dlse.stride()
    _window_bwd_dq_kernel[(min(n_tiles, programs(problem, config)),)](
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        sink_ptr=call.sinks,
        lse_ptr=lse,
        dout_ptr=dout,
        dlse_ptr=dlse,
        dq_ptr=dq,
        delta_ptr=delta,
        dsink_ptr=dsink_parts,
        n_tiles=n_tiles,
        **shared,
        **strides("q", call.q),
        **strides("k", call.k),
        **strides("v", call.v),
        **strides("do", dout),
        **strides("dq", dq),
        stride_dlb=dlse_strides[0],
        stride_dlh=dlse_strides[1],
        stride_dlt=dlse_strides[2],
        HAS_DLSE=dlse is not None,
        TOKENS=config.tokens,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if dk is not None:
        config = dkv_config(problem)
        shared.pop("HAS_SINK")
        _window_bwd_dkv_kernel[(triton.cdiv(problem.seqlen_k, config.keys) * problem.batch * problem.heads_k,)](
            q_ptr=call.q,
            k_ptr=call.k,
            v_ptr=call.v,
            lse_ptr=lse,
            delta_ptr=delta,
            dout_ptr=dout,
            dk_ptr=dk,
            dv_ptr=dv,
            **shared,
            **strides("q", call.q),
            **strides("k", call.k),
            **strides("v", call.v),
            **strides("do", dout),
            **strides("dk", dk),
            **strides("dv", dv),
            TOKENS=config.tokens,
            KEYS=config.keys,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if dsinks is not None:
        torch.sum(dsink_parts, 0, out=dsinks)
