"""The table of the tiles of packed rows: its kernel and its launch."""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from ..common.problem import MAX_PLANS, Problem, ceil_div
from ..common.relaunch import Launch
from .config import TABLE


@triton.jit(do_not_specialize=["n_rows", "slots"])
def _tile_table_kernel(
    table_ptr, ranges_ptr, n_rows, slots, TILE: tl.constexpr, BLOCK: tl.constexpr, OTHERS: tl.constexpr
):  # fmt: skip
    """table (1 + 2 slots): how many tiles there are, then their first rows, then the ends of their rows.

    Heaviest first: each program ranks BLOCK tiles by counting the heavier ones, OTHERS at a time.
    """
    mine = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first, end, work = _slot_tile(mine, ranges_ptr, n_rows, TILE)
    rank = tl.zeros([BLOCK], tl.int32)
    count = tl.zeros([OTHERS], tl.int32)
    for start in range(0, slots, OTHERS):
        other = start + tl.arange(0, OTHERS)
        _, _, theirs = _slot_tile(other, ranges_ptr, n_rows, TILE)
        before = (theirs[None, :] > work[:, None]) | (
            (theirs[None, :] == work[:, None]) & (other[None, :] < mine[:, None])
        )
        rank += tl.sum(before.to(tl.int32), 1)
        count += (theirs > 0).to(tl.int32)
    tl.store(table_ptr + 1 + rank, first, mask=mine < slots)
    tl.store(table_ptr + 1 + slots + rank, end, mask=mine < slots)
    if tl.program_id(0) == 0:
        tl.store(table_ptr, tl.sum(count, 0))


@triton.jit
def _slot_tile(slot, ranges_ptr, n_rows, TILE: tl.constexpr):
    """First row, end and work of the tile in a slot; n_rows, n_rows and 0 if there is none, as in slots past the last.

    Three slots for TILE rows, a cell: what its first and last row say of their segments finds its tiles. Slot 0: the
    tile that begins in the cell, of a segment of at least TILE rows that began before. 1: the cell's rows of shorter
    segments, together. 2: the first tile of such a longer segment that begins in the cell; there cannot be two.
    """
    cell_start = slot // 3 * TILE
    kind = slot % 3
    cell_end = tl.minimum(cell_start + TILE, n_rows)
    real = cell_start < n_rows
    ptr = ranges_ptr + 2 * n_rows
    left_start = tl.load(ptr + cell_start, mask=real, other=0)
    left_end = tl.load(ptr + n_rows + cell_start, mask=real, other=0)
    right_start = tl.load(ptr + cell_end - 1, mask=real, other=0)
    right_end = tl.load(ptr + n_rows + cell_end - 1, mask=real, other=0)
    runs_on = (left_end - left_start >= TILE) & (left_start < cell_start)
    begins = (right_end - right_start >= TILE) & (right_start >= cell_start)
    tiles_before = (cell_start - left_start + TILE - 1) // TILE
    short_start = tl.where(runs_on, tl.minimum(left_end, cell_end), cell_start)
    short_end = tl.where(begins, right_start, cell_end)
    first = tl.where(kind == 0, left_start + tiles_before * TILE, tl.where(kind == 1, short_start, right_start))
    end = tl.where(kind == 0, left_end, tl.where(kind == 1, short_end, right_end))
    filled = real & (first < end) & ((kind == 1) | ((kind == 0) & runs_on) | ((kind == 2) & begins))
    lo = tl.load(ranges_ptr + first, mask=filled, other=0)
    hi = tl.load(ranges_ptr + n_rows + tl.minimum(first + TILE, end) - 1, mask=filled, other=0)
    work = tl.where(filled, tl.maximum(hi - lo, 0) + 1, 0)
    return tl.where(filled, first, n_rows), tl.where(filled, end, n_rows), work


def table_slots(rows: int, tile: int) -> int:
    """Upper bound of the tiles of packed rows, for any number of segments."""
    return 3 * ceil_div(rows, tile)


def packed_tensors(problem: Problem, tile: int, unused: Tensor, of_keys: bool = False) -> dict[str, Tensor]:
    """ranges_ptr and table_ptr of one side's tiles.

    ``unused`` where rows are not packed, because warp_specialize passes no None.
    """
    ranges, rows = problem.ranges, problem.seqlen_q
    if ranges is None:
        return {"ranges_ptr": unused, "table_ptr": unused}
    if of_keys:
        ranges, rows = ranges[4 * rows :], problem.seqlen_k
    table = problem.derived(("table", of_keys, tile), lambda: tile_table(ranges, rows, tile))
    return {"ranges_ptr": ranges, "table_ptr": table}


def tile_table(ranges: Tensor, rows: int, tile: int) -> Tensor:
    """The tiles of packed rows, heaviest (most visible scores) first, without a host synchronisation.

    Segments of ``tile`` rows or more have tiles of their own, from their first row on. Shorter ones share tiles.

    Args:
        ranges: ``Problem.ranges`` of the side that has the rows.

    Returns:
        int32 (1 + 2 slots): the number of tiles, their first rows, the ends of their rows (a tile ends there or after
        ``tile`` rows).
    """
    table = ranges.new_empty(1 + 2 * table_slots(rows, tile))
    _table_launch(rows, tile)(table_ptr=table, ranges_ptr=ranges)
    return table


@functools.lru_cache(MAX_PLANS)
def _table_launch(rows: int, tile: int) -> Launch:
    slots = table_slots(rows, tile)
    return Launch(
        _tile_table_kernel,
        (ceil_div(slots, TABLE.block),),
        n_rows=rows,
        slots=slots,
        TILE=tile,
        BLOCK=TABLE.block,
        OTHERS=TABLE.others,
        num_warps=TABLE.num_warps,
    )
