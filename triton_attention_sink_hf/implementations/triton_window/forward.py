"""Forward for short causal windows: a tile's whole key range is in registers at once.

Rows are tokens times the packed heads of one key head, so one window of keys serves the group. A tile of TOKENS
queries sees the BAND keys before it and its own TOKENS keys: no online softmax, no rescaling. Programs are persistent
and fetch their next queries into L2 while they compute.
"""

import triton
import triton.language as tl

from ..triton.launch import Problem, strides
from ..triton.masks import query_interval
from ..triton.primitives import LN2, LOG2E, load_tile, matmul, row_offsets, store_tile
from .config import band_size, forward_config, programs


@triton.jit
def place(tile, tiles, chunks):
    """Tile number -> batch row, tile of queries, chunk of heads; chunks fastest, so that they share keys in L2."""
    rest = tile // chunks
    return rest // tiles, rest % tiles, tile % chunks


@triton.jit
def load_keys(ptr, j, seqlen_k, stride_t, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(keys, D) tile; 0 for keys outside the sequence, which the caller masks."""
    return load_tile(ptr, j.to(tl.int64) * stride_t, (j >= 0) & (j < seqlen_k), stride_d, D, BLOCK_D, CHECK=True)


@triton.jit
def within(j, lo, count):
    """lo <= j < lo + count for (rows, keys), as one unsigned comparison."""
    return (j[None, :] - lo[:, None]).to(tl.uint32, bitcast=True) < count[:, None]


@triton.jit
def prefetch(ptr, offsets):
    """Ask L2 for the lines at ``offsets`` (elements); nothing is returned."""
    addresses = (ptr + offsets).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [addresses], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _window_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, out_ptr, lse_ptr, ranges_ptr,
    softmax_scale, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right, n_tiles,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od,
    HAS_SINK: tl.constexpr, PACKED: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PACK: tl.constexpr,
    TOKENS: tl.constexpr, PARTS: tl.constexpr, BAND: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    PART: tl.constexpr = TOKENS // PARTS
    ROWS: tl.constexpr = PART * PACK
    HALF: tl.constexpr = BAND // 2
    scale = softmax_scale * LOG2E
    chunks = heads_q // PACK
    tiles = tl.cdiv(seqlen_q, TOKENS)
    shift = 0  # packed rows attend to themselves
    if not PACKED:
        shift = seqlen_k - seqlen_q
    rows = tl.arange(0, ROWS)
    step = tl.num_programs(0)
    for number in tl.range(tl.program_id(0), n_tiles, step, num_stages=STAGES):
        b, tile, chunk = place(number, tiles, chunks)
        head = chunk * PACK
        head_k = head // (heads_q // heads_k)
        token = tile * TOKENS
        if PREFETCH:
            next_b, next_tile, next_chunk = place(tl.minimum(number + step, n_tiles - 1), tiles, chunks)
            next_rows = tl.arange(0, TOKENS * PACK)
            next_token = tl.minimum(next_tile * TOKENS + next_rows // PACK, seqlen_q - 1)
            prefetch(
                q_ptr + next_b.to(tl.int64) * stride_qb,
                next_token.to(tl.int64) * stride_qt + (next_chunk * PACK + next_rows % PACK).to(tl.int64) * stride_qh,
            )
        heads = head + rows % PACK
        if HAS_SINK:
            sink = tl.load(sink_ptr + heads).to(tl.float32) * LOG2E
        j_own = token + shift + tl.arange(0, TOKENS)
        j_near = token + shift - HALF + tl.arange(0, HALF)
        j_far = j_near - HALF
        k_base = k_ptr + b.to(tl.int64) * stride_kb + head_k.to(tl.int64) * stride_kh
        v_base = v_ptr + b.to(tl.int64) * stride_vb + head_k.to(tl.int64) * stride_vh
        k_own = load_keys(k_base, j_own, seqlen_k, stride_kt, stride_kd, D, BLOCK_D)
        v_own = load_keys(v_base, j_own, seqlen_k, stride_vt, stride_vd, DV, BLOCK_DV)
        k_far = load_keys(k_base, j_far, seqlen_k, stride_kt, stride_kd, D, BLOCK_D)
        k_near = load_keys(k_base, j_near, seqlen_k, stride_kt, stride_kd, D, BLOCK_D)
        v_far = load_keys(v_base, j_far, seqlen_k, stride_vt, stride_vd, DV, BLOCK_DV)
        v_near = load_keys(v_base, j_near, seqlen_k, stride_vt, stride_vd, DV, BLOCK_DV)
        q_base = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
        out_base = out_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        for part in tl.static_range(PARTS):
            first = token + part * PART
            i = first + rows // PACK
            valid = i < seqlen_q
            lo, hi = query_interval(
                i, b, ranges_ptr, None, seqlen_q, seqlen_k, left, right, True, True, PACKED, HAS_SEQUSED=False
            )
            count = (hi - lo).to(tl.uint32, bitcast=True)
            q_rows = row_offsets(rows, first, stride_qt, stride_qh, PACK)
            q = load_tile(q_base, q_rows, valid, stride_qd, D, BLOCK_D, CHECK=True)
            s_far = tl.where(within(j_far, lo, count), matmul(q, k_far.T), float("-inf"))
            s_near = tl.where(within(j_near, lo, count), matmul(q, k_near.T), float("-inf"))
            s_own = tl.where(within(j_own, lo, count), matmul(q, k_own.T), float("-inf"))
            m = tl.maximum(tl.max(tl.maximum(s_far, s_near), 1), tl.max(s_own, 1)) * scale
            if HAS_SINK:
                m = tl.maximum(m, sink)
            m = tl.where(m == float("-inf"), 0.0, m)
            p_far = tl.exp2(s_far * scale - m[:, None])
            p_near = tl.exp2(s_near * scale - m[:, None])
            p_own = tl.exp2(s_own * scale - m[:, None])
            l = tl.sum(p_far + p_near, 1) + tl.sum(p_own, 1)
            if HAS_SINK:
                l += tl.exp2(sink - m)
            out = matmul(p_far.to(v_far.dtype), v_far)
            out = matmul(p_near.to(v_near.dtype), v_near, out)
            out = matmul(p_own.to(v_own.dtype), v_own, out)
            empty = l == 0.0
            out = out * (1.0 / tl.where(empty, 1.0, l))[:, None]
            lse = tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2)
            store_tile(
                out_base, row_offsets(rows, first, stride_ot, stride_oh, PACK), valid, stride_od, out, DV, BLOCK_DV
            )
            tl.store(lse_ptr + (b * heads_q + heads).to(tl.int64) * seqlen_q + i, lse, mask=valid)


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call, config = problem.call, forward_config(problem)
    n_tiles = triton.cdiv(problem.seqlen_q, config.tokens) * problem.batch * (problem.heads_q // problem.pack)
    _window_fwd_kernel[(min(n_tiles, programs(problem, config)),)](
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        sink_ptr=call.sinks,
        out_ptr=out,
        lse_ptr=lse,
        n_tiles=n_tiles,
        **window_arguments(problem),
        **strides("q", call.q),
        **strides("k", call.k),
        **strides("v", call.v),
        **strides("o", out),
        TOKENS=config.tokens,
        PARTS=config.parts,
        STAGES=config.num_stages,
        PREFETCH=problem.target.startswith("sm"),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def window_arguments(problem: Problem) -> dict:
    """What every kernel of this backend takes beside its tensors."""
    return {
        **problem.sizes(),
        "BAND": band_size(problem),
    }
