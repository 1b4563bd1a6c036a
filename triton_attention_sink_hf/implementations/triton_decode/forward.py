"""Split-KV forward: one program per (share of the keys, batch row, heads of one key head, tile of query tokens).

Each program reads its keys once, for all query heads that share them. It writes maximum, sum and accumulator in fp32;
``reduce.py`` joins them. Where one program sees all keys of its rows, it writes the result itself.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..common.masks import interval
from ..common.primitives import factor_and_lse, load_tile, matmul, row_offsets, scaled, store_tile
from ..common.problem import Problem, ceil_div, planned, strides
from ..common.relaunch import Launch
from .config import block_m, decode_config, pack, splits
from .reduce import reduce_splits


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
    PAGE: int


@triton.jit
def _row_bounds(b, seqused_ptr, leftpad_ptr, seqlen_k, HAS_SEQUSED: tl.constexpr, HAS_LEFTPAD: tl.constexpr):
    """First key and number of key slots in use of batch row b, within the tensor whatever the lengths hold."""
    used = seqlen_k
    start = 0
    if HAS_SEQUSED:
        used = tl.maximum(tl.minimum(tl.load(seqused_ptr + b), seqlen_k), 0)
    if HAS_LEFTPAD:
        start = tl.maximum(tl.minimum(tl.load(leftpad_ptr + b), used), 0)
    return start, used


@triton.jit
def _key_rows(table_ptr, n0, cols, inside, pages, stride_b, stride_t, PAGE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Element offsets of keys n0 + cols, as one number and the rest: pages are looked up once if they hold whole tiles,
    else key by key."""
    base = n0.to(tl.int64) * stride_t
    rows = cols * stride_t
    if PAGE > 0:
        if PAGE % BLOCK_N == 0:
            page = tl.load(table_ptr + n0 // PAGE)
            page = tl.maximum(tl.minimum(page, pages - 1), 0)
            base = page.to(tl.int64) * stride_b + (n0 % PAGE).to(tl.int64) * stride_t
        else:
            j = n0 + cols
            page = tl.load(table_ptr + j // PAGE, mask=inside, other=0)
            page = tl.maximum(tl.minimum(page, pages - 1), 0)
            base = n0.to(tl.int64) * 0
            rows = page.to(tl.int64) * stride_b + (j % PAGE).to(tl.int64) * stride_t
    return base, rows


@triton.jit
def _attend(
    acc, l, m, q, k_ptr, v_ptr, padding_ptr, table_ptr, n0, first, end, lo, hi, softmax_scale, softcap, pages,
    stride_kb, stride_vb, stride_pt, OPTIONS: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over keys [n0, n0 + BLOCK_N), in base 2. Reads none outside [first, end)."""
    PAGE: tl.constexpr = OPTIONS.PAGE
    BLOCK_N: tl.constexpr = OPTIONS.BLOCK_N
    cols = tl.arange(0, BLOCK_N)
    j = n0 + cols
    inside = (j >= first) & (j < end)
    k_base, k_rows = _key_rows(table_ptr, n0, cols, inside, pages, stride_kb, OPTIONS.stride_kt, PAGE, BLOCK_N)
    v_base, v_rows = _key_rows(table_ptr, n0, cols, inside, pages, stride_vb, OPTIONS.stride_vt, PAGE, BLOCK_N)
    k = load_tile(k_ptr + k_base, k_rows, inside, OPTIONS.stride_kd, OPTIONS.D, OPTIONS.BLOCK_D, CHECK=True)
    s = matmul(q, k.T)  # [rows, keys]
    EXACT: tl.constexpr = q.dtype == tl.float32
    s, scale = scaled(s, softmax_scale, softcap, OPTIONS.PRESCALE, OPTIONS.HAS_SOFTCAP, EXACT)
    visible = (j[None, :] >= lo[:, None]) & (j[None, :] < hi[:, None])
    if OPTIONS.HAS_PADDING:
        real = tl.load(padding_ptr + j.to(tl.int64) * stride_pt, mask=inside, other=0)
        visible = visible & (real != 0)[None, :]
    s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows that have seen nothing yet
    p = tl.exp2(s * scale - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v = load_tile(v_ptr + v_base, v_rows, inside, OPTIONS.stride_vd, OPTIONS.DV, OPTIONS.BLOCK_DV, CHECK=True)
    acc = matmul(p.to(v.dtype), v, acc * alpha[:, None])
    return acc, l, m_new


# Sizes that grow from call to call must not select another compiled kernel.
@triton.jit(do_not_specialize=["batch", "seqlen_k", "n_splits", "pages", "stride_tb"])
def _decode_fwd_kernel(
    q_ptr, k_ptr, v_ptr, sink_ptr, out_ptr, lse_ptr, m_ptr, l_ptr, acc_ptr,
    padding_ptr, seqused_ptr, leftpad_ptr, table_ptr,
    softmax_scale, softcap, batch, seqlen_q, seqlen_k, heads_q, heads_k, left, right, n_splits, pages,
    stride_qb, stride_qt, stride_qh, stride_qd, stride_kb, stride_kt, stride_kh, stride_kd,
    stride_vb, stride_vt, stride_vh, stride_vd, stride_ob, stride_ot, stride_oh, stride_od,
    stride_pb, stride_pt, stride_tb,
    HAS_SINK: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr,
    HAS_SEQUSED: tl.constexpr, HAS_LEFTPAD: tl.constexpr, HAS_PADDING: tl.constexpr, PRESCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PACK: tl.constexpr, PAGE: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    TOKENS: tl.constexpr = BLOCK_M // PACK
    OPTIONS: tl.constexpr = _Options(
        stride_kt=stride_kt, stride_kd=stride_kd, stride_vt=stride_vt, stride_vd=stride_vd,
        PRESCALE=PRESCALE, HAS_SOFTCAP=HAS_SOFTCAP, HAS_PADDING=HAS_PADDING,
        D=D, DV=DV, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, BLOCK_N=BLOCK_N, PAGE=PAGE,
    )  # fmt: skip
    # heads run side by side: their keys of one token are neighbours in memory
    chunks = heads_q // PACK
    head = tl.program_id(0) % chunks * PACK
    head_k = head // (heads_q // heads_k)
    b = tl.program_id(0) // chunks % batch
    token = tl.program_id(0) // (chunks * batch) * TOKENS
    split = tl.program_id(1)

    rows = tl.arange(0, BLOCK_M)
    i = token + rows // PACK
    heads = head + rows % PACK
    valid = (rows < TOKENS * PACK) & (i < seqlen_q)
    start, used = _row_bounds(b, seqused_ptr, leftpad_ptr, seqlen_k, HAS_SEQUSED, HAS_LEFTPAD)
    shift = used - seqlen_q
    last = tl.minimum(token + TOKENS, seqlen_q) - 1
    lo, hi = interval(tl.minimum(i, last), shift, left, right, start, used, HAS_LEFT, HAS_RIGHT)
    first, _ = interval(token, shift, left, right, start, used, HAS_LEFT, HAS_RIGHT)
    _, end = interval(last, shift, left, right, start, used, HAS_LEFT, HAS_RIGHT)
    origin = first
    if PAGE > 0:
        origin = first // BLOCK_N * BLOCK_N  # so that a tile lies in one page where pages hold whole tiles
    # this program's share of the row's tiles, by the row's own length
    tiles = tl.cdiv(tl.maximum(end - origin, 0), BLOCK_N)
    share = tl.cdiv(tiles, n_splits)

    q_base = q_ptr + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    q_rows = row_offsets(rows, token, stride_qt, stride_qh, PACK)
    q = load_tile(q_base, q_rows, valid, stride_qd, D, BLOCK_D, CHECK=True)
    k_base = k_ptr + head_k.to(tl.int64) * stride_kh
    v_base = v_ptr + head_k.to(tl.int64) * stride_vh
    table_base, padding_base = table_ptr, padding_ptr
    if PAGE > 0:
        table_base = table_ptr + b.to(tl.int64) * stride_tb
    else:
        k_base += b.to(tl.int64) * stride_kb
        v_base += b.to(tl.int64) * stride_vb
    if HAS_PADDING:
        padding_base = padding_ptr + b.to(tl.int64) * stride_pb

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for t in tl.range(split * share, tl.minimum((split + 1) * share, tiles), num_stages=STAGES):
        acc, l, m = _attend(
            acc, l, m, q, k_base, v_base, padding_base, table_base, origin + t * BLOCK_N, first, end, lo, hi,
            softmax_scale, softcap, pages, stride_kb, stride_vb, stride_pt, OPTIONS,
        )  # fmt: skip

    row = (b * heads_q + heads).to(tl.int64) * seqlen_q + i
    if SPLIT:
        part = row * n_splits + split
        tl.store(m_ptr + part, m, mask=valid)
        tl.store(l_ptr + part, l, mask=valid)
        store_tile(acc_ptr, part * DV, valid & (l > 0.0), 1, acc, DV, BLOCK_DV)
    else:
        sink = None
        if HAS_SINK:
            sink = tl.load(sink_ptr + heads, mask=valid, other=0.0).to(tl.float32)
        factor, lse = factor_and_lse(m, l, sink, HAS_SINK)
        out_base = out_ptr + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh
        out_rows = row_offsets(rows, token, stride_ot, stride_oh, PACK)
        store_tile(out_base, out_rows, valid, stride_od, acc * factor[:, None], DV, BLOCK_DV)
        tl.store(lse_ptr + row, lse, mask=valid)


def _table(problem: Problem) -> torch.Tensor | None:
    """The block_table with the entries of a row side by side."""
    table = problem.call.block_table
    return table if table is None or table.stride(1) == 1 else table.contiguous()


@planned
def _plan(problem: Problem, out_strides) -> tuple[Launch, int]:
    """The launch and its number of splits."""
    call, config = problem.call, decode_config(problem)
    table, heads, rows = _table(problem), pack(problem, config), block_m(problem, config)
    n_splits = splits(problem, config)
    tiles = ceil_div(problem.seqlen_q, rows // heads)
    launch = Launch(
        _decode_fwd_kernel,
        (tiles * problem.batch * (problem.heads_q // heads), n_splits),
        **{**problem.mask_arguments(), "PACK": heads},
        **strides("q", call.q.stride()),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("o", out_strides),
        stride_tb=0 if table is None else table.stride(0),
        n_splits=n_splits,
        pages=call.k.shape[0],
        HAS_LEFTPAD=call.mask.leftpad_k is not None,
        PAGE=0 if table is None else call.k.shape[1],
        SPLIT=n_splits > 1,
        BLOCK_M=rows,
        BLOCK_N=config.block_n,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return launch, n_splits


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call, mask = problem.call, problem.call.mask
    launch, n_splits = _plan(problem, out.stride())
    m = l = acc = None
    if n_splits > 1:
        parts = lse.numel() * n_splits
        workspace = torch.empty(parts * (out.shape[-1] + 2), dtype=torch.float32, device=out.device)
        acc, m, l = workspace.split((parts * out.shape[-1], parts, parts))
    launch(
        q_ptr=call.q,
        k_ptr=call.k,
        v_ptr=call.v,
        sink_ptr=problem.sinks,
        out_ptr=out,
        lse_ptr=lse,
        m_ptr=m,
        l_ptr=l,
        acc_ptr=acc,
        padding_ptr=None if mask.key_padding_mask is None else mask.key_padding_mask.view(torch.uint8),
        seqused_ptr=None if mask.seqused_k is None else mask.seqused_k.contiguous(),
        leftpad_ptr=None if mask.leftpad_k is None else mask.leftpad_k.contiguous(),
        table_ptr=_table(problem),
    )
    if n_splits > 1:
        reduce_splits(problem, m, l, acc, out, lse, n_splits)
