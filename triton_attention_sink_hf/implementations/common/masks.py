"""Visibility on the device: every query row sees one interval of keys, every key is seen by one interval of queries.

Causality, windows, packed segments and used cache lengths all give intervals [lo, hi) whose ends do not decrease from
row to row. So the first and the last row of a tile bound its loop, and tiles inside all rows' intervals need no mask.
Only a padding mask is looked up key by key. ``key_ranges`` (``key_ranges.py``) gives each query any interval: there all
rows of a tile bound its loop.
"""

import triton
import triton.language as tl


@triton.jit
def interval(i, shift, before, after, start, end, HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr):
    """[lo, hi) within [start, end): positions from ``i + shift - before`` to ``i + shift + after``."""
    lo = i * 0 + start
    hi = i * 0 + end
    if HAS_BEFORE:
        lo = tl.minimum(tl.maximum(i + shift - before, start), end)
    if HAS_AFTER:
        hi = tl.maximum(tl.minimum(i + shift + after + 1, end), start)
    return lo, hi


@triton.jit
def query_interval(
    i, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr,
    HAS_KEY_RANGES: tl.constexpr = False,
):  # fmt: skip
    """Keys [lo, hi) that query rows ``i`` see. Rows past the last see what the last one sees."""
    i = tl.minimum(i, seqlen_q - 1)
    if HAS_KEY_RANGES:
        ptr = ranges_ptr + b.to(tl.int64) * 2 * seqlen_q
        return tl.load(ptr + i), tl.load(ptr + seqlen_q + i)
    if PACKED:
        return tl.load(ranges_ptr + i), tl.load(ranges_ptr + seqlen_q + i)
    used = seqlen_k
    if HAS_SEQUSED:
        used = tl.maximum(tl.minimum(tl.load(seqused_ptr + b), seqlen_k), 0)
    return interval(i, used - seqlen_q, left, right, 0, used, HAS_LEFT, HAS_RIGHT)


@triton.jit
def key_interval(
    j, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr,
):  # fmt: skip
    """Queries [lo, hi) that see keys ``j``; keys past the last are seen as the last one is."""
    j = tl.minimum(j, seqlen_k - 1)
    if PACKED:
        ptr = ranges_ptr + 4 * seqlen_q
        return tl.load(ptr + j), tl.load(ptr + seqlen_k + j)
    if HAS_SEQUSED:
        used = tl.maximum(tl.minimum(tl.load(seqused_ptr + b), seqlen_k), 0)
        lo, hi = interval(j, seqlen_q - used, right, left, 0, seqlen_q, HAS_RIGHT, HAS_LEFT)
        return tl.where(j < used, lo, seqlen_q), tl.where(j < used, hi, seqlen_q)
    return interval(j, seqlen_q - seqlen_k, right, left, 0, seqlen_q, HAS_RIGHT, HAS_LEFT)


@triton.jit
def query_tile_bounds(
    lo, hi, first, TOKENS: tl.constexpr, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr,
    HAS_KEY_RANGES: tl.constexpr,
):  # fmt: skip
    """What ``tile_plan`` takes of TOKENS queries from ``first`` on, whose rows' intervals are lo and hi.

    The intervals of the first and of the last; with key_ranges, where empty ones are [0, 0), the least and the greatest
    ends of all.
    """
    if HAS_KEY_RANGES:
        return tl.min(tl.where(lo < hi, lo, 2**30), 0), tl.min(hi, 0), tl.max(lo, 0), tl.max(hi, 0)
    lo_first, hi_first = query_interval(
        first, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED
    )
    lo_last, hi_last = query_interval(
        first + TOKENS - 1, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
        HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED,
    )  # fmt: skip
    return lo_first, hi_first, lo_last, hi_last


@triton.jit
def key_tile_bounds(
    first, KEYS: tl.constexpr, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr,
):  # fmt: skip
    """The same of KEYS keys from ``first`` on, without key_ranges."""
    lo_first, hi_first = key_interval(
        first, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED
    )
    lo_last, hi_last = key_interval(
        first + KEYS - 1, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
        HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED,
    )  # fmt: skip
    return lo_first, hi_first, lo_last, hi_last


@triton.jit
def tile_plan(lo_first, hi_first, lo_last, hi_last, STEP: tl.constexpr, ALL_EDGE: tl.constexpr):
    """Tiles of STEP positions from ``lo_first`` that cover the intervals of a tile's rows.

    Returns (edges, before, skip, full): ``full`` tiles, numbers ``before`` to ``before + full``, lie in the intervals
    of all rows and need no mask. The ``edges`` others do: edge e is tile e if e < before, else tile e + skip.
    """
    n = tl.cdiv(tl.maximum(hi_last - lo_first, 0), STEP)
    if ALL_EDGE:
        return n, n, 0, 0
    before = tl.minimum(tl.cdiv(tl.maximum(lo_last - lo_first, 0), STEP), n)
    full = tl.maximum(tl.minimum((hi_first - lo_first) // STEP, n) - before, 0)
    return n - full, before, full, full


@triton.jit
def _segment_ranges(
    ranges_ptr, cu_own_ptr, cu_other_ptr, n_segments, n_own, n_other, before, after, search_steps,
    HAS_BEFORE: tl.constexpr, HAS_AFTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ranges (4, n_own), for each row of the own side of packed segments: lo and hi among the other side's rows, start
    and end of its segment.

    Whatever cu_seqlens hold, lo and hi lie in [0, n_other], and the segments cut [0, n_own): rows before the first
    belong to it, rows past the last form one more. These see nothing.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # the first segment that ends after row i, by bisection: the same one for all rows between the ends it compared with
    low = tl.zeros([BLOCK], tl.int32)
    high = tl.zeros([BLOCK], tl.int32) + n_segments
    own_start = tl.zeros([BLOCK], tl.int32)
    own_stop = tl.zeros([BLOCK], tl.int32) + n_own
    for _ in range(search_steps):
        middle = (low + high) // 2
        unsure = low < high
        ends = tl.load(cu_own_ptr + middle + 1, mask=unsure, other=0)
        ends_before = unsure & (ends <= i)
        ends_after = unsure & (ends > i)
        low = tl.where(ends_before, middle + 1, low)
        high = tl.where(ends_after, middle, high)
        own_start = tl.where(ends_before, tl.maximum(ends, own_start), own_start)
        own_stop = tl.where(ends_after, tl.minimum(ends, own_stop), own_stop)
    inside = low < n_segments
    segment = tl.minimum(low, n_segments - 1)
    own_end = tl.load(cu_own_ptr + segment + 1)
    other_end = tl.load(cu_other_ptr + segment + 1)
    start = tl.minimum(tl.maximum(tl.load(cu_other_ptr + segment), 0), n_other)
    end = tl.minimum(tl.maximum(other_end, start), n_other)
    lo, hi = interval(i, other_end - own_end, before, after, start, end, HAS_BEFORE, HAS_AFTER)
    own = i < n_own
    tl.store(ranges_ptr + i, tl.where(inside, lo, end), mask=own)
    tl.store(ranges_ptr + n_own + i, tl.where(inside, hi, end), mask=own)
    tl.store(ranges_ptr + 2 * n_own + i, own_start, mask=own)
    tl.store(ranges_ptr + 3 * n_own + i, own_stop, mask=own)


@triton.jit
def _segment_range_kernel(
    ranges_ptr, cu_q_ptr, cu_k_ptr, n_segments, seqlen_q, seqlen_k, left, right, search_steps,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ranges: (4, Tq) of the queries, then (4, Tk) of the keys; program_id(1) picks the side."""
    if tl.program_id(1) == 0:
        _segment_ranges(
            ranges_ptr, cu_q_ptr, cu_k_ptr, n_segments, seqlen_q, seqlen_k, left, right, search_steps,
            HAS_LEFT, HAS_RIGHT, BLOCK,
        )  # fmt: skip
    else:
        _segment_ranges(
            ranges_ptr + 4 * seqlen_q, cu_k_ptr, cu_q_ptr, n_segments, seqlen_k, seqlen_q, right, left, search_steps,
            HAS_RIGHT, HAS_LEFT, BLOCK,
        )  # fmt: skip
