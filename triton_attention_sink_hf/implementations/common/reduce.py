"""Sums of per-tile partial results in a fixed order."""

from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from .config import SUM_COLUMNS, SUM_ROWS
from .relaunch import Launch


@triton.jit
def _sum_rows_kernel(parts_ptr, sum_ptr, n_rows, n_columns, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row = tl.arange(0, BLOCK_ROWS)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for first in range(0, n_rows, BLOCK_ROWS):
        inside = (first + row < n_rows)[:, None] & (column < n_columns)[None, :]
        offsets = (first + row).to(tl.int64)[:, None] * n_columns + column[None, :]
        total += tl.load(parts_ptr + offsets, mask=inside, other=0.0)
    tl.store(sum_ptr + column, tl.sum(total, 0), mask=column < n_columns)


@lru_cache(maxsize=256)
def _launch(rows: int, columns: int) -> Launch:
    return Launch(
        _sum_rows_kernel,
        (-(-columns // SUM_COLUMNS),),
        n_rows=rows,
        n_columns=columns,
        BLOCK_ROWS=SUM_ROWS,
        BLOCK_COLUMNS=SUM_COLUMNS,
        num_warps=4,
    )


def sum_rows(parts: Tensor, out: Tensor) -> None:
    """out (n,) = parts (rows, n) summed over rows, fp32, contiguous; the same bits every time."""
    _launch(*parts.shape)(parts_ptr=parts, sum_ptr=out)
