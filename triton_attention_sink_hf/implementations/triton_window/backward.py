"""Backward for short causal windows: two kernels, deterministic, without reading ``out``.

dq: whole rows of P and dP are in registers, so delta = rowsum(P dP) is computed there in fp32. It is stored as (batch,
token, head), the order in which the second kernel reads it.
dk, dv: one program per tile of keys. The products accumulate onto -lse / scale (-inf where masked) and -delta, so that
neither the mask nor the subtraction costs anything after them.
"""

import triton
import triton.language as tl

from ..common.masks import key_interval, query_interval
from ..common.primitives import LOG2E, exp, matmul, store_tile
from ..common.problem import Problem, ceil_div, dlse_arguments, planned, strides, token_blocks, use_tma
from ..common.reduce import sum_rows
from ..common.relaunch import Launch
from .config import band_size, dkv_config, dq_config, programs
from .forward import load_keys, load_queries, place, starts_among_own, store_queries, window_arguments


@triton.jit
def _window_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, lse_ptr, dout_ptr, dlse_ptr, dq_ptr, statistics_ptr, dsink_ptr, ranges_ptr,
    softmax_scale, batch, seqlen_q, seqlen_k, left, right, n_tiles,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_dob, stride_dot, stride_doh, stride_dod,
    stride_dqb, stride_dqt, stride_dqh, stride_dqd, stride_dlb, stride_dlh, stride_dlt,
    HAS_SINK: tl.constexpr, HAS_DLSE: tl.constexpr, PACKED: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    TOKENS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, OWN_LO: tl.constexpr, EVEN: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """q, dout, dq: descriptors of (1, TOKENS, PACK, D) blocks with TMA, else pointers."""
    ROWS: tl.constexpr = TOKENS * PACK
    CHUNKS: tl.constexpr = HEADS_Q // PACK
    scale = softmax_scale * LOG2E
    tiles = tl.cdiv(seqlen_q, TOKENS)
    shift = 0  # packed rows attend to themselves
    if not PACKED:
        shift = seqlen_k - seqlen_q
    rows = tl.arange(0, ROWS)
    n_band = tl.arange(0, BAND)
    n_own = tl.arange(0, TOKENS)
    for number in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), num_stages=STAGES):
        b, tile, chunk = place(number, tiles, CHUNKS)
        head = chunk * PACK
        head_k = head // (HEADS_Q // HEADS_K)
        token = tile * TOKENS
        key = token + shift
        heads = head + rows % PACK
        i = token + rows // PACK
        valid = i < seqlen_q
        q = load_queries(
            q_ptr, b, token, head, seqlen_q, stride_qb, stride_qt, stride_qh, stride_qd,
            D, BLOCK_D, TOKENS, PACK, TMA, EVEN,
        )  # fmt: skip
        dout = load_queries(
            dout_ptr, b, token, head, seqlen_q, stride_dob, stride_dot, stride_doh, stride_dod,
            DV, BLOCK_DV, TOKENS, PACK, TMA, EVEN,
        )  # fmt: skip
        lse_rows = (b * HEADS_Q + heads).to(tl.int64) * seqlen_q + i
        lse = tl.load(lse_ptr + lse_rows, mask=valid, other=0.0)
        lse2 = lse * LOG2E
        lo, hi = query_interval(
            i, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
        )
        # relative to the tile's own first key; rows that see nothing begin past every key
        hi = hi - key
        lo = tl.where(lo < hi + key, lo - key, BAND + TOKENS)
        k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
        v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
        k_band = load_keys(k_base, key - BAND, seqlen_k, stride_kt, stride_kd, BAND, D, BLOCK_D, False, True)
        k_own = load_keys(k_base, key, seqlen_k, stride_kt, stride_kd, TOKENS, D, BLOCK_D, not OWN_LO, EVEN)
        v_band = load_keys(v_base, key - BAND, seqlen_k, stride_vt, stride_vd, BAND, DV, BLOCK_DV, False, True)
        v_own = load_keys(v_base, key, seqlen_k, stride_vt, stride_vd, TOKENS, DV, BLOCK_DV, not OWN_LO, EVEN)
        s_band = matmul(q, k_band.T)
        s_own = matmul(q, k_own.T)
        p_band = tl.exp2(s_band * scale - lse2[:, None])
        p_band = tl.where(n_band[None, :] >= lo[:, None] + BAND, p_band, 0.0)
        own = n_own[None, :] < hi[:, None]
        if OWN_LO:
            own = own & (n_own[None, :] >= lo[:, None])
        p_own = tl.where(own, tl.exp2(s_own * scale - lse2[:, None]), 0.0)
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
        store_queries(
            dq_ptr, dq * softmax_scale, b, token, head, seqlen_q, stride_dqb, stride_dqt, stride_dqh, stride_dqd,
            D, BLOCK_D, TOKENS, PACK, TMA, EVEN,
        )  # fmt: skip
        statistic = statistics_ptr + (b * seqlen_q + token).to(tl.int64) * (2 * HEADS_Q) + head
        statistic_rows = rows // PACK * (2 * HEADS_Q) + rows % PACK
        tl.store(statistic + statistic_rows, lse2 * (-1.0 / scale), mask=valid)
        tl.store(statistic + HEADS_Q + statistic_rows, -delta, mask=valid)
        if HAS_SINK:
            p_sink = exp(tl.load(sink_ptr + heads).to(tl.float32) - lse)
            p_sink = tl.where(lse == float("-inf"), 0.0, p_sink)  # a sink of -inf and no key
            part = tl.where(valid, -p_sink * delta, 0.0)
            part = tl.sum(tl.reshape(part, [TOKENS, PACK]), 0)
            tl.store(dsink_ptr + (b * tiles + tile).to(tl.int64) * HEADS_Q + head + tl.arange(0, PACK), part)


@triton.jit
def _window_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, statistics_ptr, dout_ptr, dk_ptr, dv_ptr, ranges_ptr,
    softmax_scale, batch, seqlen_q, seqlen_k, left, right,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_dob, stride_dot, stride_doh, stride_dod,
    stride_dkb, stride_dkt, stride_dkh, stride_dkd, stride_dvb, stride_dvt, stride_dvh, stride_dvd,
    PACKED: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    TOKENS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, ONE_SIDED: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TOKENS * PACK
    GROUP: tl.constexpr = HEADS_Q // HEADS_K
    scale = softmax_scale * LOG2E
    rest = tl.program_id(0) // HEADS_K
    head_k = tl.program_id(0) % HEADS_K
    tiles = tl.cdiv(seqlen_k, KEYS)
    b = rest // tiles
    key = rest % tiles * KEYS
    n = tl.arange(0, KEYS)
    valid = key + n < seqlen_k
    lo, hi = key_interval(
        key + n, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
    )
    start, _ = key_interval(
        key, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
    )
    diagonal_end, end = key_interval(
        key + KEYS - 1, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
    )
    # Steps are aligned, and each program starts at the step whose number is 0 mod steps. Neighbours, whose ranges
    # overlap, then read the same queries at about the same time.
    first_step = start // TOKENS
    steps = tl.maximum(tl.cdiv(end, TOKENS) - first_step, 0)
    turn = first_step % tl.maximum(steps, 1)

    k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
    k = load_keys(k_base, key, seqlen_k, stride_kt, stride_kd, KEYS, D, BLOCK_D, True, False)
    v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
    v = load_keys(v_base, key, seqlen_k, stride_vt, stride_vd, KEYS, DV, BLOCK_DV, True, False)
    dk = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    rows = tl.arange(0, ROWS)
    statistic_rows = rows // PACK * (2 * HEADS_Q) + rows % PACK
    count = (hi - lo).to(tl.uint32, bitcast=True)
    for chunk in range(0, GROUP // PACK):
        head = head_k * GROUP + chunk * PACK
        for e in tl.range(0, steps, num_stages=STAGES):
            e = e - turn
            token = (first_step + tl.where(e < 0, e + steps, e)) * TOKENS
            q = load_queries(
                q_ptr, b, token, head, seqlen_q, stride_qb, stride_qt, stride_qh, stride_qd,
                D, BLOCK_D, TOKENS, PACK, False, EVEN,
            )  # fmt: skip
            dout = load_queries(
                dout_ptr, b, token, head, seqlen_q, stride_dob, stride_dot, stride_doh, stride_dod,
                DV, BLOCK_DV, TOKENS, PACK, False, EVEN,
            )  # fmt: skip
            i = token + rows // PACK
            statistic = statistics_ptr + (b * seqlen_q + token).to(tl.int64) * (2 * HEADS_Q) + head
            if EVEN:
                start_s = tl.load(statistic + statistic_rows)
                start_dp = tl.load(statistic + HEADS_Q + statistic_rows)
            else:
                start_s = tl.load(statistic + statistic_rows, mask=i < seqlen_q, other=0.0)
                start_dp = tl.load(statistic + HEADS_Q + statistic_rows, mask=i < seqlen_q, other=0.0)
            if ONE_SIDED:
                near = token < diagonal_end
                visible = tl.where(near, i, -i)[None, :] >= tl.where(near, lo, 1 - hi)[:, None]
            else:
                visible = (i[None, :] - lo[:, None]).to(tl.uint32, bitcast=True) < count[:, None]
            p = tl.exp2(matmul(k, q.T, tl.where(visible, start_s[None, :], float("-inf"))) * scale)
            dv = matmul(p.to(dout.dtype), dout, dv)
            dp = matmul(v, dout.T, tl.broadcast_to(start_dp[None, :], [KEYS, ROWS]))
            dk = matmul((p * dp).to(q.dtype), q, dk)
    dk_base = dk_ptr + b.to(tl.int64) * stride_dkb + head_k.to(tl.int64) * stride_dkh + key.to(tl.int64) * stride_dkt
    store_tile(dk_base, n * stride_dkt, valid, stride_dkd, dk * softmax_scale, D, BLOCK_D)
    dv_base = dv_ptr + b.to(tl.int64) * stride_dvb + head_k.to(tl.int64) * stride_dvh + key.to(tl.int64) * stride_dvt
    store_tile(dv_base, n * stride_dvt, valid, stride_dvd, dv, DV, BLOCK_DV)


@planned
def _dq_plan(problem: Problem, dout_strides, dq_strides, dlse_strides, tma: bool) -> tuple[Launch, int]:
    """The launch, rows of partial sums of dsink."""
    call, config = problem.call, dq_config(problem)
    tiles = ceil_div(problem.seqlen_q, config.tokens) * problem.batch
    n_tiles = tiles * (problem.heads_q // problem.pack)
    shape, out_shape = call.q.shape, (*call.q.shape[:3], call.v.shape[-1])
    blocks = {
        "q_ptr": token_blocks(shape, call.q.stride(), config.tokens, problem.pack, problem.block_d),
        "dout_ptr": token_blocks(out_shape, dout_strides, config.tokens, problem.pack, problem.block_dv),
        "dq_ptr": token_blocks(shape, dq_strides, config.tokens, problem.pack, problem.block_d),
    }
    launch = Launch(
        _window_bwd_dq_kernel,
        (min(n_tiles, programs(problem, config)),),
        blocks if tma else {},
        **window_arguments(problem),
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("do", dout_strides),
        **strides("dq", dq_strides),
        **dlse_arguments(dlse_strides),
        n_tiles=n_tiles,
        TOKENS=config.tokens,
        BAND=band_size(problem),
        STAGES=config.num_stages,
        OWN_LO=starts_among_own(problem, config.tokens),
        EVEN=problem.seqlen_q % config.tokens == 0,
        TMA=tma,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return launch, tiles


@planned
def _dkv_plan(problem: Problem, dout_strides, dk_strides, dv_strides) -> Launch:
    call, config = problem.call, dkv_config(problem)
    arguments = window_arguments(problem)
    del arguments["HAS_SINK"]
    # A step then touches either the diagonal or the window's far edge, so one comparison is enough.
    one_sided = not call.mask.packed and call.mask.left >= config.keys + config.tokens
    return Launch(
        _window_bwd_dkv_kernel,
        (ceil_div(problem.seqlen_k, config.keys) * problem.batch * problem.heads_k,),
        **arguments,
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("do", dout_strides),
        **strides("dk", dk_strides),
        **strides("dv", dv_strides),
        TOKENS=config.tokens,
        KEYS=config.keys,
        STAGES=config.num_stages,
        ONE_SIDED=one_sided,
        EVEN=problem.seqlen_q % config.tokens == 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq, and dk, dv, dsinks unless None. dlse (B, Hq, Sq) or None. Every element is written; out is not read."""
    call, ranges = problem.call, problem.ranges
    tma = use_tma(problem, call.q, dout, dq)
    dlse_strides = None if dlse is None else dlse.stride()
    launch, parts = _dq_plan(problem, dout.stride(), dq.stride(), dlse_strides, tma)
    statistics = lse.new_empty(problem.batch, problem.seqlen_q, 2, problem.heads_q)
    dsink_parts = None if dsinks is None else lse.new_empty(parts, problem.heads_q)
    launch(
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        sink_ptr=problem.sinks,
        lse_ptr=lse,
        dout_ptr=dout,
        dlse_ptr=dlse,
        dq_ptr=dq,
        statistics_ptr=statistics,
        dsink_ptr=dsink_parts,
        ranges_ptr=ranges,
    )
    if dk is not None:
        launch = _dkv_plan(problem, dout.stride(), dk.stride(), dv.stride())
        launch(
            q_ptr=call.q,
            k_ptr=call.k,
            v_ptr=call.v,
            statistics_ptr=statistics,
            dout_ptr=dout,
            dk_ptr=dk,
            dv_ptr=dv,
            ranges_ptr=ranges,
        )
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
