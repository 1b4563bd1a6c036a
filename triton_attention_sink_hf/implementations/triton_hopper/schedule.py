"""Which tile a program takes, and which keys or queries its rows see: Gluon's side of ``triton/masks.py``."""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def work_item(t, tiles, section, order_ptr, LAST_FIRST: gl.constexpr, PACKED: gl.constexpr):
    """(tile, head of the batch) of item t: in a section of heads, whose keys fit L2, heavy tiles come first."""
    per_section = tiles * section
    s = t // per_section
    r = t - s * per_section
    j = r // section
    tile = j
    if PACKED:
        tile = gl.load(order_ptr + j)
    elif LAST_FIRST:
        tile = tiles - 1 - j
    return tile, s * section + r - j * section


@gluon.jit
def interval(
    i, ranges_ptr, n_own, n_other, before, after,
    HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """[lo, hi) of the other side's rows for rows ``i``; rows past the last are as the last one."""
    i = gl.minimum(i, n_own - 1)
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
def block_plan(
    first, ranges_ptr, n_own, n_other, before, after,
    TILE: gl.constexpr, STEP: gl.constexpr, ALIGNED: gl.constexpr,
    HAS_BEFORE: gl.constexpr, HAS_AFTER: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Blocks of STEP rows that cover the intervals of rows [first, first + TILE): (start, n, edge, full).

    Blocks edge to edge + full lie in the intervals of all rows and need no mask. At least one block, so that every
    tile runs the same pipeline. ALIGNED: start is a multiple of STEP.
    """
    lo_first, hi_first = interval(first, ranges_ptr, n_own, n_other, before, after, HAS_BEFORE, HAS_AFTER, PACKED)
    lo_last, hi_last = interval(
        first + TILE - 1, ranges_ptr, n_own, n_other, before, after, HAS_BEFORE, HAS_AFTER, PACKED
    )
    start = lo_first
    if ALIGNED:
        start = lo_first // STEP * STEP
    n = gl.maximum((hi_last - start + STEP - 1) // STEP, 1)
    edge = gl.minimum((lo_last - start + STEP - 1) // STEP, n)
    full = gl.maximum(gl.minimum((hi_first - start) // STEP, n) - edge, 0)
    return start, n, edge, full


@triton.jit
def _tile_order_kernel(ranges_ptr, order_ptr, n_own, tiles, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """order[rank] = tile, most work first: each program ranks BLOCK tiles by counting those before them."""
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    work = _tile_work(ranges_ptr, mine, n_own, TILE)
    rank = tl.zeros([BLOCK], tl.int32)
    for first in range(0, tiles, BLOCK):
        other = first + tl.arange(0, BLOCK)
        theirs = _tile_work(ranges_ptr, other, n_own, TILE)
        more = theirs[None, :] > work[:, None]
        earlier = (theirs[None, :] == work[:, None]) & (other[None, :] < mine[:, None])
        rank += tl.sum(((more | earlier) & (other < tiles)[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + rank, mine, mask=mine < tiles)


@triton.jit
def _tile_work(ranges_ptr, tile, n_own, TILE: tl.constexpr):
    lo = tl.load(ranges_ptr + tl.minimum(tile * TILE, n_own - 1))
    hi = tl.load(ranges_ptr + n_own + tl.minimum(tile * TILE + TILE - 1, n_own - 1))
    return hi - lo
