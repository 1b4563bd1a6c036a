"""Forward for short causal windows: a tile's scores are all in registers at once.

Rows are tokens times the packed heads of one key head, so the group shares one window of keys. A tile of TOKENS
queries sees the BAND keys before it and its own TOKENS keys. So there is no online softmax and no rescaling. Programs
are persistent and prefetch their next queries into L2 while they compute.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..common.masks import query_interval
from ..common.primitives import LN2, LOG2E, join_sink, load_block, load_tile, matmul, store_tile
from ..common.problem import Problem, ceil_div, planned, strides, token_blocks, use_tma
from ..common.relaunch import Launch
from .config import band_size, forward_config, programs


@triton.jit
def place(tile, tiles, CHUNKS: tl.constexpr):
    """Tile number -> batch row, tile of queries, chunk of heads; chunks fastest, so that they share keys in L2."""
    rest = tile // CHUNKS
    return rest // tiles, rest % tiles, tile % CHUNKS


@triton.jit
def load_keys(
    ptr, start, seqlen_k, stride_t, stride_d,
    N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FROM_0: tl.constexpr, TO_END: tl.constexpr,
):  # fmt: skip
    """(N, D) keys from ``start``; 0 before key 0 and past the last, unless FROM_0 and TO_END say that none are there.

    In-tile offsets do not vary by tile.
    """
    n = tl.arange(0, N)
    inside = n < seqlen_k - start
    if TO_END:
        inside = n >= -start
    elif not FROM_0:
        inside = inside & (n >= -start)
    pointer = ptr + start.to(tl.int64) * stride_t
    return load_tile(pointer, n * stride_t, inside, stride_d, D, BLOCK_D, CHECK=not (FROM_0 and TO_END))


@triton.jit
def load_queries(
    tensor, b, token, head, seqlen_q, stride_b, stride_t, stride_h, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PACK: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """(TOKENS * PACK, D) rows: PACK heads of each token. ``tensor``: with TMA a descriptor of [1, TOKENS, PACK, D].

    EVEN: no row lies past the last.
    """
    if TMA:
        return load_block(tensor, b, token, head, TOKENS * PACK, BLOCK_D)
    else:
        rows = tl.arange(0, TOKENS * PACK)
        base = tensor + b.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
        offsets = rows // PACK * stride_t + rows % PACK * stride_h
        return load_tile(base, offsets, token + rows // PACK < seqlen_q, stride_d, D, BLOCK_D, CHECK=not EVEN)


@triton.jit
def store_queries(
    tensor, tile, b, token, head, seqlen_q, stride_b, stride_t, stride_h, stride_d,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, PACK: tl.constexpr, TMA: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """The counterpart of ``load_queries``."""
    if TMA:
        tensor.store([b, token, head, 0], tl.reshape(tile.to(tensor.dtype), [1, TOKENS, PACK, BLOCK_D]))
    else:
        rows = tl.arange(0, TOKENS * PACK)
        base = tensor + b.to(tl.int64) * stride_b + token.to(tl.int64) * stride_t + head.to(tl.int64) * stride_h
        offsets = rows // PACK * stride_t + rows % PACK * stride_h
        store_tile(base, offsets, token + rows // PACK < seqlen_q, stride_d, tile, D, BLOCK_D, CHECK=not EVEN)


@triton.jit
def prefetch(ptr, offsets):
    """Prefetch the lines at ``offsets`` (in elements) into L2."""
    addresses = (ptr + offsets).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def log2(x, NVIDIA: tl.constexpr):
    """On NVIDIA one instruction. Relative error 2^-22; absolute for x between 1/2 and 2."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(x)


class _Options(NamedTuple):
    """What is fixed when the kernel is compiled, for ``finish``."""

    stride_ot: int
    stride_od: int
    HAS_SINK: bool
    HEADS_Q: int
    DV: int
    BLOCK_DV: int
    PART: int
    PACK: int
    EVEN: bool
    NVIDIA: bool


@triton.jit
def finish(
    p_band, p_own, v_band, v_own, m, l, sink, out_ptr, lse_ptr, b, head, first, seqlen_q, stride_ob, stride_oh,
    OPTIONS: tl.constexpr,
):  # fmt: skip
    """Store out and lse of PART tokens from ``first``. m, l, sink: see ``join_sink``, which comes last, so that the
    largest P is exactly 1."""
    PART: tl.constexpr = OPTIONS.PART
    PACK: tl.constexpr = OPTIONS.PACK
    rows = tl.arange(0, PART * PACK)
    out = matmul(p_band, v_band)
    out = matmul(p_own, v_own, out)
    top, l, keys = join_sink(m, l, sink, OPTIONS.HAS_SINK)
    empty = l == 0.0
    log2_l = log2(tl.where(empty, 1.0, l), OPTIONS.NVIDIA)
    # l is 1 to a few hundred: exp2 is accurate to 1e-6, and cheaper than a division
    out = out * (keys * tl.exp2(-log2_l))[:, None]
    lse = tl.where(empty, float("-inf"), top + log2_l * LN2)
    store_queries(
        out_ptr, out, b, first, head, seqlen_q, stride_ob, OPTIONS.stride_ot, stride_oh, OPTIONS.stride_od,
        OPTIONS.DV, OPTIONS.BLOCK_DV, PART, PACK, TMA=False, EVEN=OPTIONS.EVEN,
    )  # fmt: skip
    i = first + rows // PACK
    heads = head + rows % PACK
    tl.store(lse_ptr + (b * OPTIONS.HEADS_Q + heads).to(tl.int64) * seqlen_q + i, lse, mask=i < seqlen_q)


@triton.jit
def keep_branch(x):
    """Keep the branch around this call: its side effect stops the compiler from turning the branch into selects."""
    tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _window_fwd_kernel(
    q_ptr, prefetch_ptr, k_ptr, v_ptr, sink_ptr, out_ptr, lse_ptr, ranges_ptr,
    softmax_scale, batch, seqlen_q, seqlen_k, left, right, n_tiles,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od,
    HAS_SINK: tl.constexpr, PACKED: tl.constexpr, HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, NVIDIA: tl.constexpr,
    OWN_LO: tl.constexpr, EVEN: tl.constexpr, TMA: tl.constexpr, BEGINS: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """q: a descriptor of (1, TOKENS / PARTS, PACK, D) blocks with TMA, else a pointer, as prefetch_ptr always is."""
    PART: tl.constexpr = TOKENS // PARTS
    ROWS: tl.constexpr = PART * PACK
    CHUNKS: tl.constexpr = HEADS_Q // PACK
    OPTIONS: tl.constexpr = _Options(
        stride_ot=stride_ot, stride_od=stride_od, HAS_SINK=HAS_SINK, HEADS_Q=HEADS_Q, DV=DV, BLOCK_DV=BLOCK_DV,
        PART=PART, PACK=PACK, EVEN=EVEN, NVIDIA=NVIDIA,
    )  # fmt: skip
    scale = softmax_scale * LOG2E
    tiles = tl.cdiv(seqlen_q, TOKENS)
    shift = 0  # packed rows attend to themselves
    if not PACKED:
        shift = seqlen_k - seqlen_q
    rows = tl.arange(0, ROWS)
    n_band = tl.arange(0, BAND)
    n_own = tl.arange(0, TOKENS)
    step = tl.num_programs(0)
    for number in tl.range(tl.program_id(0), n_tiles, step, num_stages=STAGES):
        b, tile, chunk = place(number, tiles, CHUNKS)
        head = chunk * PACK
        head_k = head // (HEADS_Q // HEADS_K)
        token = tile * TOKENS
        if NVIDIA:
            # shares a division with the next tile's loads; without a next tile, prefetch the last one's lines
            next_b, next_tile, next_chunk = place(number + step, tiles, CHUNKS)
            next_tile = tl.where(next_b < batch, next_tile, tiles - 1)
            next_b = tl.minimum(next_b, batch - 1)
            next_rows = tl.arange(0, TOKENS * PACK)
            next_token = tl.minimum(next_tile * TOKENS, seqlen_q - TOKENS)  # near the end, a few lines twice
            next_base = prefetch_ptr + next_b.to(tl.int64) * stride_qb + (next_chunk * PACK).to(tl.int64) * stride_qh
            prefetch(
                next_base + tl.maximum(next_token, 0).to(tl.int64) * stride_qt,
                tl.minimum(next_rows // PACK, seqlen_q - 1) * stride_qt + next_rows % PACK * stride_qh,
            )
        heads = head + rows % PACK
        sink = None
        if HAS_SINK:
            sink = tl.load(sink_ptr + heads).to(tl.float32)
        key = token + shift
        k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
        v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
        k_own = load_keys(k_base, key, seqlen_k, stride_kt, stride_kd, TOKENS, D, BLOCK_D, not OWN_LO, EVEN)
        v_own = load_keys(v_base, key, seqlen_k, stride_vt, stride_vd, TOKENS, DV, BLOCK_DV, not OWN_LO, EVEN)
        k_band = load_keys(k_base, key - BAND, seqlen_k, stride_kt, stride_kd, BAND, D, BLOCK_D, False, True)
        v_band = load_keys(v_base, key - BAND, seqlen_k, stride_vt, stride_vd, BAND, DV, BLOCK_DV, False, True)
        if BEGINS <= BAND:
            lo_last, hi_last = query_interval(
                token + TOKENS - 1, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED,
                HAS_SEQUSED=False,
            )  # fmt: skip
            rare = (lo_last - key > BEGINS - BAND) | (lo_last >= hi_last)
        for part in tl.static_range(PARTS):
            first = token + part * PART
            i = first + rows // PACK
            lo, hi = query_interval(
                i, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
            )
            # relative to the tile's own first key; rows that see nothing begin past every key
            hi = hi - key
            lo = tl.where(lo < hi + key, lo - key, BAND + TOKENS)
            q = load_queries(
                q_ptr, b, first, head, seqlen_q, stride_qb, stride_qt, stride_qh, stride_qd,
                D, BLOCK_D, PART, PACK, TMA, EVEN,
            )  # fmt: skip
            s_own = matmul(q, k_own.T)
            s_band = matmul(q, k_band.T)
            begin = lo + BAND
            if BEGINS <= BAND:
                if rare:
                    if NVIDIA:
                        keep_branch(key)
                    s_band = tl.where(n_band[None, :] >= begin[:, None], s_band, float("-inf"))
                # in all other tiles, columns past the first BEGINS are known at compile time to be seen
                begin = tl.minimum(begin, BEGINS)
            s_band = tl.where(n_band[None, :] >= begin[:, None], s_band, float("-inf"))
            own = n_own[None, :] < hi[:, None]
            if OWN_LO:
                own = own & (n_own[None, :] >= lo[:, None])
            s_own = tl.where(own, s_own, float("-inf"))
            top = tl.maximum(tl.max(s_band, 1), tl.max(s_own, 1)) * softmax_scale
            m = tl.where(top == float("-inf"), 0.0, top) * LOG2E
            p_band = tl.exp2(s_band * scale - m[:, None])
            p_own = tl.exp2(s_own * scale - m[:, None])
            l = tl.sum(p_band, 1) + tl.sum(p_own, 1)
            p_band, p_own = p_band.to(v_band.dtype), p_own.to(v_own.dtype)
            if LATE and part == PARTS - 1:
                # Triton moves a branch without results after the next tile's loads, which then overlap with it
                if first < seqlen_q:
                    finish(
                        p_band, p_own, v_band, v_own, m, l, sink, out_ptr, lse_ptr, b, head, first, seqlen_q,
                        stride_ob, stride_oh, OPTIONS,
                    )  # fmt: skip
            else:
                finish(
                    p_band, p_own, v_band, v_own, m, l, sink, out_ptr, lse_ptr, b, head, first, seqlen_q,
                    stride_ob, stride_oh, OPTIONS,
                )  # fmt: skip


@planned
def _plan(problem: Problem, out_strides, tma: bool) -> Launch:
    call, config = problem.call, forward_config(problem)
    n_tiles = ceil_div(problem.seqlen_q, config.tokens) * problem.batch * (problem.heads_q // problem.pack)
    q_blocks = token_blocks(call.q.shape, call.q.stride(), config.tokens // config.parts, problem.pack, problem.block_d)
    return Launch(
        _window_fwd_kernel,
        (min(n_tiles, programs(problem, config)),),
        {"q_ptr": q_blocks} if tma else {},
        **window_arguments(problem),
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("o", out_strides),
        n_tiles=n_tiles,
        TOKENS=config.tokens,
        PARTS=config.parts,
        BAND=band_size(problem),
        STAGES=config.num_stages,
        NVIDIA=problem.target.startswith("sm"),
        BEGINS=begins(problem, config.tokens),
        OWN_LO=starts_among_own(problem, config.tokens),
        EVEN=problem.seqlen_q % config.tokens == 0,
        TMA=tma,
        LATE=config.late,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call = problem.call
    launch = _plan(problem, out.stride(), use_tma(problem, call.q))
    launch(
        q_ptr=call.q,
        prefetch_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        sink_ptr=problem.sinks,
        out_ptr=out,
        lse_ptr=lse,
        ranges_ptr=problem.ranges,
    )


def window_arguments(problem: Problem) -> dict:
    """Arguments of every kernel of this backend but its tensors. Head counts are constexpr: a model has one pair."""
    sizes = problem.sizes()
    heads = {"HEADS_Q": sizes.pop("heads_q"), "HEADS_K": sizes.pop("heads_k")}
    return {**sizes, **heads}


def starts_among_own(problem: Problem, tokens: int) -> bool:
    """Whether a row's interval may begin among its own tile's keys: at a segment's start, in a very short window, or
    where there are more queries than keys."""
    mask = problem.call.mask
    return mask.packed or mask.left < tokens - 1 or problem.seqlen_q > problem.seqlen_k


def begins(problem: Problem, tokens: int) -> int:
    """Columns of the band in which a tile's rows begin, if no segment and no sequence starts nearby."""
    return tokens - 1 + band_size(problem) - problem.call.mask.left
