"""The tile table of packed rows, which the Hopper kernels follow: interpreted, against a loop."""

from itertools import pairwise

import pytest
import torch
from cases import cu_seqlens

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this triton has no Gluon for Hopper")

from triton_attention_sink_hf.call import Call
from triton_attention_sink_hf.implementations.triton.launch import Problem
from triton_attention_sink_hf.implementations.triton_hopper.launch import table_slots, tile_table
from triton_attention_sink_hf.masks import Mask


@pytest.mark.parametrize("tile", [64, 128, 192])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "tail"),
    [((300,), 0), ((0, 1, 64, 65, 0, 127, 128, 129, 500, 0), 6), ((32,) * 70, 0), ((192, 384), 0), ((0, 0), 130)],
)
def test_every_row_is_in_one_tile_and_heavy_tiles_come_first(lengths, tail, tile, causal):
    rows = sum(lengths) + tail
    cu, ranges = _ranges(cu_seqlens(lengths), rows, causal)
    table = tile_table(cu, ranges, rows, tile)
    slots = table_slots(rows, len(lengths), tile)
    assert table.shape == (1 + 2 * slots,)
    count, first, end = int(table[0]), table[1 : 1 + slots].tolist(), table[1 + slots :].tolist()

    bounds = [*cu.tolist(), rows]
    expected = {(start, stop) for a, stop in pairwise(bounds) for start in range(a, stop, tile)}
    assert set(zip(first[:count], end[:count], strict=True)) == expected and count == len(expected)
    assert all(pair == (rows, rows) for pair in zip(first[count:], end[count:], strict=True))
    lo, hi = ranges[:rows], ranges[rows : 2 * rows]
    work = [int(hi[min(a + tile, b) - 1] - lo[a]) for a, b in zip(first[:count], end[:count], strict=True)]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("values", [[0, 90, 30, 128], [-500, 20, -3, 128], [0, 2**31 - 1, -(2**31), 128]])
def test_wrong_cu_seqlens_give_rows_that_exist(values):
    rows = 128
    cu, ranges = _ranges(torch.tensor(values, dtype=torch.int32), rows, causal=True)
    table = tile_table(cu, ranges, rows, 64)
    assert bool(((table[1:] >= 0) & (table[1:] <= rows)).all())


@pytest.mark.parametrize("values", [[50, 128], [90, 30], [200, 250], [-5, 128]])
def test_rows_before_the_first_segment_have_tiles(values):
    rows, tile = 300, 64
    cu, ranges = _ranges(torch.tensor(values, dtype=torch.int32), rows, causal=True)
    table, slots = tile_table(cu, ranges, rows, tile), table_slots(rows, 1, tile)
    firsts, ends = table[1 : 1 + slots].tolist(), table[1 + slots :].tolist()
    written = {row for a, b in zip(firsts, ends, strict=True) for row in range(a, min(a + tile, b))}
    assert written == set(range(rows))


def _ranges(cu, rows: int, causal: bool):
    q = torch.empty(1, rows, 1, 16)
    return cu, Problem(Call(q, q, q, None, Mask(-1, 0 if causal else -1, cu, cu), 1.0, 0.0, False)).ranges
