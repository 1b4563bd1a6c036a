"""``key_ranges`` on the device: any interval of keys for each query.

They are intersected once with what else the mask says, so that kernels read one interval a query as they read those of
packed rows. Intervals in any order give a key no interval of queries. A tile of keys loops over all queries from the
first to the last that sees any of it, with a mask; a small kernel finds the two.

Cost: a tile of queries loops over the keys from the first to the last that any of its rows sees. To find the queries of
a tile of keys, 8 bytes are read for each query that the rest of the mask lets see it, once for all heads: below 1 % of
the time of attention without key_ranges.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .config import RANGES_BLOCK, SCAN_BLOCK
from .masks import key_tile_bounds, query_interval
from .problem import Problem, ceil_div, planned
from .relaunch import Launch


@triton.jit
def _intersect_ranges_kernel(
    query_ranges_ptr, key_ranges_ptr, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
    stride_b, stride_t, stride_end,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """query_ranges (B, 2, Sq): first and last keys of key_ranges (B, Sq, 2) among those that the rest of the mask
    shows, with last excluded; [0, 0) where none is left."""
    b = tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < seqlen_q
    lo, hi = query_interval(
        i, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED
    )
    given = key_ranges_ptr + b.to(tl.int64) * stride_b + i.to(tl.int64) * stride_t
    lo = tl.maximum(lo, tl.load(given, mask=inside, other=0))
    hi = tl.minimum(hi, tl.load(given + stride_end, mask=inside, other=0))
    seen = lo < hi
    row = query_ranges_ptr + b.to(tl.int64) * 2 * seqlen_q + i
    tl.store(row, tl.where(seen, lo, 0), mask=inside)
    tl.store(row + seqlen_q, tl.where(seen, hi, 0), mask=inside)


@triton.jit
def _key_tile_queries_kernel(
    key_tiles_ptr, query_ranges_ptr, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, PACKED: tl.constexpr, HAS_SEQUSED: tl.constexpr,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """key_tiles (B, tiles, 2): the first query that sees a key of a tile of TILE keys, and the last one plus 1."""
    tile, b = tl.program_id(0), tl.program_id(1)
    key = tile * TILE
    lo, _, _, hi = key_tile_bounds(
        key, TILE, b, ranges_ptr, seqused_ptr, seqlen_q, seqlen_k, left, right,
        HAS_LEFT, HAS_RIGHT, PACKED, HAS_SEQUSED,
    )  # fmt: skip
    query_ranges = query_ranges_ptr + b.to(tl.int64) * 2 * seqlen_q
    first = tl.full([BLOCK], 2**30, tl.int32)
    last = tl.zeros([BLOCK], tl.int32)
    for start in range(lo, hi, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < hi
        row_lo = tl.load(query_ranges + i, mask=inside, other=0)
        row_hi = tl.load(query_ranges + seqlen_q + i, mask=inside, other=0)
        sees = (row_lo < key + TILE) & (row_hi > key)
        first = tl.where(sees, tl.minimum(first, i), first)
        last = tl.where(sees, i + 1, last)
    found = key_tiles_ptr + (b.to(tl.int64) * tl.num_programs(0) + tile) * 2
    tl.store(found, tl.min(first, 0))
    tl.store(found + 1, tl.max(last, 0))


@planned
def _intersect_plan(problem: Problem) -> Launch:
    ranges = problem.call.mask.key_ranges
    return Launch(
        _intersect_ranges_kernel,
        (ceil_div(problem.seqlen_q, RANGES_BLOCK), problem.batch),
        **_interval_arguments(problem),
        stride_b=ranges.stride(0),
        stride_t=ranges.stride(1),
        stride_end=ranges.stride(2),
        BLOCK=RANGES_BLOCK,
    )


@planned
def _key_tiles_plan(problem: Problem, tile: int) -> Launch:
    return Launch(
        _key_tile_queries_kernel,
        (ceil_div(problem.seqlen_k, tile), problem.batch),
        **_interval_arguments(problem),
        TILE=tile,
        BLOCK=SCAN_BLOCK,
    )


def _interval_arguments(problem: Problem) -> dict:
    mask = problem.call.mask
    return {
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "left": mask.left,
        "right": mask.right,
        "HAS_LEFT": mask.left >= 0,
        "HAS_RIGHT": mask.right >= 0,
        "PACKED": mask.packed,
        "HAS_SEQUSED": mask.seqused_k is not None,
    }


def query_side_tensors(problem: Problem, tensors: dict) -> dict:
    """``tensors``, the problem's ``mask_tensors``, for kernels that loop over keys.

    With key_ranges ``ranges_ptr`` is int32 (B, 2, Sq), the keys [lo, hi) that each query sees.
    """
    key_ranges = problem.call.mask.key_ranges
    if key_ranges is None:
        return tensors
    found = key_ranges.new_empty(problem.batch, 2, problem.seqlen_q)
    _intersect_plan(problem)(
        query_ranges_ptr=found,
        key_ranges_ptr=key_ranges,
        ranges_ptr=tensors["ranges_ptr"],
        seqused_ptr=tensors["seqused_ptr"],
    )
    return {**tensors, "ranges_ptr": found}


def key_side_tensors(problem: Problem, tensors: dict, query_ranges: Tensor, tile: int) -> dict:
    """The same for kernels that loop over queries, with two more, None without key_ranges.

    These are ``query_ranges``, of ``query_side_tensors``, and int32 (B, tiles, 2), the queries [first, last) of each
    tile of ``tile`` keys.
    """
    if problem.call.mask.key_ranges is None:
        return {**tensors, "query_ranges_ptr": None, "key_tiles_ptr": None}
    found = query_ranges.new_empty(problem.batch, ceil_div(problem.seqlen_k, tile), 2)
    _key_tiles_plan(problem, tile)(
        key_tiles_ptr=found,
        query_ranges_ptr=query_ranges,
        ranges_ptr=tensors["ranges_ptr"],
        seqused_ptr=tensors["seqused_ptr"],
    )
    return {**tensors, "query_ranges_ptr": query_ranges, "key_tiles_ptr": found}
