"""What the Gluon kernels share: which rows of the other side a row sees, masks, stores, opaque values."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def interval(
    i, end, ranges_ptr, n_own, n_other, before, after,
    HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """[lo, hi) of the other side's rows for rows ``i``; rows from ``end`` on are as the last one before."""
    i = gl.minimum(i, end - 1)
    if PACKED:
        return gl.load(ranges_ptr + i), gl.load(ranges_ptr + n_own + i)
    lo = i * 0
    hi = i * 0 + n_other
    if HAS_BEFORE:
        lo = gl.minimum(gl.maximum(i + (n_other - n_own - before), 0), n_other)
    if HAS_AFTER:
        hi = gl.maximum(gl.minimum(i + (n_other - n_own + after + 1), n_other), 0)
    return lo, hi


@gluon.jit
def block_range(
    first, end, ranges_ptr, n_own, n_other, before, after,
    TILE: gl.constexpr, STEP: gl.constexpr, ALIGN: gl.constexpr,
    HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """(start, n): n blocks of STEP rows from ``start`` on cover the intervals of rows [first, first + TILE).

    At least one block, so that every tile runs the same pipeline. ``start`` is a multiple of ALIGN.
    """
    lo, _ = interval(first, end, ranges_ptr, n_own, n_other, before, after, HAS_BEFORE, HAS_AFTER, PACKED)
    _, hi = interval(first + TILE - 1, end, ranges_ptr, n_own, n_other, before, after, HAS_BEFORE, HAS_AFTER, PACKED)
    start = lo // ALIGN * ALIGN
    return start, gl.maximum((hi - start + STEP - 1) // STEP, 1)


@gluon.jit
def own_blocks(
    first, end, start, n, ranges_ptr, n_own, n_other, before, after, ROWS: gl.constexpr, STEP: gl.constexpr,
    HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """What ROWS of a tile's rows need of its n blocks: (stop, edge, full).

    Blocks from ``stop`` on lie outside the intervals of all these rows; blocks edge to edge + full lie in the intervals
    of all of them and need no mask. Without rows before ``end``, stop = 0.
    """
    _, hi_first = interval(first, end, ranges_ptr, n_own, n_other, before, after, HAS_BEFORE, HAS_AFTER, PACKED)
    lo_last, hi_last = interval(
        first + ROWS - 1, end, ranges_ptr, n_own, n_other, before, after, HAS_BEFORE, HAS_AFTER, PACKED
    )
    stop = gl.minimum((hi_last - start + STEP - 1) // STEP, n)
    edge = gl.minimum((lo_last - start + STEP - 1) // STEP, n)
    full = gl.maximum(gl.minimum((hi_first - start) // STEP, n) - edge, 0)
    return gl.where(first < end, stop, 0), edge, full


@gluon.jit
def seeing_queries(
    key, end, start, blocks, sizes, KEYS: gl.constexpr, STEP: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Of KEYS keys from ``key`` on: the interval of queries that see each, and ``own_blocks``' edge and full."""
    ranges_ptr, _table_ptr, seqlen_q, seqlen_k, _heads_k, _group, left, right, _slots, _tiles, _heads, _section = sizes
    _stop, edge, full = own_blocks(
        key, end, start, blocks, ranges_ptr, seqlen_k, seqlen_q, right, left, KEYS, STEP, HAS_RIGHT, HAS_LEFT, PACKED
    )
    keys = key + gl.arange(0, KEYS, layout=layout)
    lo, hi = interval(keys, end, ranges_ptr, seqlen_k, seqlen_q, right, left, HAS_RIGHT, HAS_LEFT, PACKED)
    if PACKED:  # keys of the next segment lie in the tile: no query sees them, in any block
        hi = gl.where(keys < end, hi, 0)
        if key + KEYS > end:
            full = 0
    return lo, hi, edge, full


@gluon.jit
def hide(
    s, i, start, lo, hi, edge, full, STEP: gl.constexpr, HAS_LO: gl.constexpr, HAS_HI: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """Transposed scores (keys, STEP) of block i of queries, -inf where the key is not seen."""
    if (i < edge) | (i >= edge + full):
        m = start + i * STEP + gl.arange(0, STEP, layout=layout)
        if HAS_LO:
            s = gl.where(lo[:, None] <= m[None, :], s, float("-inf"))
        if HAS_HI:
            s = gl.where(m[None, :] < hi[:, None], s, float("-inf"))
    return s


@gluon.jit
def store_rows(
    ptr, x, first, end, b, head, stride_b, stride_t: gl.constexpr, stride_h, D: gl.constexpr, BLOCK_D: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """64 rows from ``first`` on of one head; those from ``end`` on and columns past D are not written."""
    rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, layout))
    base = ptr + b.to(gl.int64) * stride_b + head.to(gl.int64) * stride_h
    inside = (rows < end)[:, None] & (d < D)[None, :]
    gl.store(base + rows.to(gl.int64)[:, None] * stride_t + d[None, :], x.to(ptr.dtype.element_ty), mask=inside)


@gluon.jit
def opaque(x):
    """x, from which the compilers compute no addresses ahead: they would keep a dozen of them in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def opaque_zero():
    """0, unknown to the compilers: added to the index of an operand in shared memory, anew in every loop or branch.

    Triton 3.6's ptxas else computes what it needs to address the operand in the first of them alone, and uses it in the
    next one too, also where the first was skipped. ``tests/sass.py`` finds such kernels.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
