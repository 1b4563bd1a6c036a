"""The Hopper kernels' tiles of packed rows, and which scores they hide: interpreted, against plain loops."""

import random
from itertools import pairwise
from types import FunctionType, SimpleNamespace

import pytest
import torch
from cases import cu_seqlens

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this triton has no Gluon for Hopper")

from triton_attention_sink_hf.call import Call
from triton_attention_sink_hf.implementations.common.problem import Problem, ceil_div
from triton_attention_sink_hf.implementations.triton_hopper import vocabulary
from triton_attention_sink_hf.implementations.triton_hopper.tile_table import table_slots, tile_table
from triton_attention_sink_hf.masks import Mask

TILES = [64, 128, 192]
LENGTHS = [
    ((300,), 0),
    ((0, 1, 64, 65, 0, 127, 128, 129, 500, 0), 6),
    ((32,) * 70, 0),
    ((192, 384), 0),
    ((0, 0), 130),
    ((64, 128, 192) * 2, 0),  # tiles and cells coincide
    ((5, 400, 3, 7, 191, 1, 192, 63, 2, 130, 30), 40),
    ((1,) * 200, 200),
    ((17, 1000), 0),
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("lengths", "tail"), LENGTHS)
def test_long_segments_have_tiles_and_short_ones_share(lengths, tail, tile, causal):
    rows = sum(lengths) + tail
    cu = cu_seqlens(lengths)
    ranges = _ranges(cu, rows, causal)
    tiles = _tiles(ranges, rows, tile)
    assert set(tiles) == _expected([*cu.tolist(), rows], rows, tile) and len(set(tiles)) == len(tiles)
    assert _rows(tiles, tile) == list(range(rows))
    lo, hi = ranges[:rows], ranges[rows : 2 * rows]
    work = [int(hi[min(a + tile, b) - 1] - lo[a]) for a, b in tiles]
    assert work == sorted(work, reverse=True)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("lengths", "tail"), LENGTHS)
def test_the_number_of_entries_does_not_matter(lengths, tail, tile):
    """A Hugging Face row has T + 1 entries, most of them empty segments at its end."""
    rows, cu = sum(lengths) + tail, cu_seqlens(lengths)
    padded = torch.cat([cu, cu[-1:].expand(max(rows + 1 - cu.numel(), 0))])
    few, many = _ranges(cu, rows), _ranges(padded, rows)
    assert torch.equal(few, many)
    assert torch.equal(tile_table(few, rows, tile), tile_table(many, rows, tile))


@pytest.mark.parametrize("seed", range(6))
def test_rows_have_one_tile_whatever_cu_seqlens_hold(seed):
    """Values on a GPU are not checked: rows before the first segment, past the last and in overlapping ones, too."""
    pick = random.Random(seed)
    for values in [
        [0, 90, 30, 128], [-500, 20, -3, 128], [0, 2**31 - 1, -(2**31), 128], [50, 128], [90, 30], [200, 250],
        [-5, 128], *([pick.choice((pick.randrange(-9, 400), 0, 300)) for _ in range(9)] for _ in range(6)),
    ]:  # fmt: skip
        rows = pick.choice((1, 64, 128, 193, 300))
        ranges = _ranges(torch.tensor(values, dtype=torch.int32), rows)
        assert bool(((ranges >= 0) & (ranges <= rows)).all())
        for tile in TILES:
            assert _rows(_tiles(ranges, rows, tile), tile) == list(range(rows)), values


MASKS = {"causal": (-1, 0), "bidirectional": (-1, -1), "window": (70, 0), "both sides": (30, 50), "left": (90, -1)}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_what_programs_hide(mask, cross):
    """Blocks and warpgroups compute exactly the scores that the mask shows, each once, also in shared tiles."""
    pick = random.Random(f"{mask} {cross}")
    for _ in range(6):
        lengths_q, lengths_k = (
            [pick.choice((0, 1, pick.randrange(1, 40), pick.randrange(60, 300))) for _ in range(7)] for _ in range(2)
        )
        cu_q = cu_seqlens(tuple(lengths_q))
        cu_k = cu_seqlens(tuple(lengths_k)) if cross else cu_q
        n_q, n_k = (int(cu[-1]) + pick.choice((1, 70)) for cu in (cu_q, cu_k))
        if not cross:
            n_k = n_q
        q, k = (torch.empty(1, n, 1, 16) for n in (n_q, n_k))
        left, right = MASKS[mask]
        description = Mask(left, right, cu_q, cu_k)
        ranges = Problem(Call(q, k, k, None, description, 1.0, 0.0, False)).ranges
        expected = description.dense(n_q, n_k, q.device)[0]
        for tile, step in ((192, 128), (128, 128), (128, 64)):  # forward; wide backward, dq
            seen = _seen_by_queries(ranges, n_q, n_k, left, right, tile, step)
            assert torch.equal(seen, expected.int()), (tile, step, lengths_q, lengths_k)
        for tile in (128, 64):  # fused backward; wide backward, dk and dv
            seen = _seen_by_keys(ranges[4 * n_q :], n_q, n_k, left, right, tile, 64)
            assert torch.equal(seen, expected.int()), (tile, lengths_q, lengths_k)


def _seen_by_queries(ranges, n_q: int, n_k: int, left: int, right: int, tile: int, step: int):
    """(n_q, n_k): how often a program computes a score that it does not hide. As the consumers of queries do."""
    queries = _interpreted_tiles(ranges, n_q, n_k, left, right, tile)
    seen = torch.zeros(n_q, n_k + 2 * step, dtype=torch.int32)
    for first, end in _tiles(ranges, n_q, tile):
        start, n = queries.block_range(first, end, step, 1)
        for token in range(first, first + tile, 64):
            stop, edge, full = queries.own_blocks(token, end, start, n, 64, step)
            rows = torch.arange(token, token + 64)
            lo, hi = queries.interval(rows, end)
            written = rows < end
            for block in range(stop):
                j = start + block * step + torch.arange(step)
                visible = (j >= lo[:, None]) & (j < hi[:, None])
                if edge <= block < edge + full:
                    visible = torch.ones_like(visible)
                seen[rows[written], j[0] : j[-1] + 1] += visible[written].int()
    assert not seen[:, n_k:].any()
    return seen[:, :n_k]


def _seen_by_keys(ranges, n_q: int, n_k: int, left: int, right: int, tile: int, step: int):
    """The same, as the consumers of keys do: by ``seeing`` and ``apply_mask``."""
    tiles = _interpreted_tiles(ranges, n_k, n_q, right, left, tile)
    seen = torch.zeros(n_k, n_q + 2 * step, dtype=torch.int32)
    for key, end in _tiles(ranges, n_k, tile):
        start, n = tiles.block_range(key, end, step, 4)
        for first in range(key, key + tile, 64):
            lo, hi, edge, full = tiles.seeing(first, end, start, n, 64, step, None)
            keys = torch.arange(first, first + 64)
            for block in range(n):
                s = tiles.apply_mask(torch.zeros(64, step), block, start, lo, hi, edge, full, step, None)
                visible, i = s == 0, start + block * step
                assert not visible[keys >= end].any()
                seen[keys[keys < end], i : i + step] += visible[keys < end].int()
    assert not seen[:, n_q:].any()
    return seen[:, :n_q].T


@pytest.mark.parametrize("way", ["item_of_round", "balanced_item"])
def test_persistent_programs_take_every_tile_once(way):
    pick = random.Random(way)
    for _ in range(300):
        section, sections, count = pick.choice((1, 2, 8, 16)), pick.choice((1, 2, 3, 4, 8)), pick.randrange(60)
        total = section * sections
        programs = min(count * total, pick.choice((132, 4, pick.randrange(1, 140))))
        taken = [item for p in range(programs) for item in _items_of_program(way, p, programs, count, section, total)]
        assert sorted(taken) == [(j, head) for j in range(count) for head in range(total)]


@pytest.mark.parametrize(("batch", "seqlen"), [(8, 2048), (2, 8192), (1, 8192), (4, 4096), (1, 32768)])
def test_persistent_programs_have_equal_work(batch, seqlen):
    """64 causal heads on an H100, in sections of 16 MiB of keys: no program has 2 % more than the average."""
    count, total, section = ceil_div(seqlen, 192), 64 * batch, 8
    while total % (section * 2) == 0 and section // 4 * seqlen <= 65536:
        section *= 2
    work = [
        sum(ceil_div(min(192 * (count - j), seqlen), 128) + 1.5 for j, _ in items)
        for items in (_items_of_program("balanced_item", p, 132, count, section, total) for p in range(132))
    ]
    assert max(work) < 1.02 * sum(work) / len(work)


def _items_of_program(way: str, program: int, programs: int, count: int, section: int, total: int) -> list:
    """(tile, head) of each round of one persistent program; tile 0 is the heaviest."""
    gl = SimpleNamespace(
        minimum=min, maximum=max, where=lambda condition, a, b: a if condition else b,
        program_id=lambda axis: program, num_programs=lambda axis: programs,
    )  # fmt: skip
    scope = {"gl": gl}
    scope["_turn"] = FunctionType(vocabulary._turn.fn.__code__, scope)
    names = ("item", "_tile_of_section", "item_of_round", "balanced_item")
    methods = {name: FunctionType(getattr(vocabulary.Tiles, name).fn.__code__, scope) for name in names}
    tiles = type("Tiles", (SimpleNamespace,), methods)(
        rows=count, PACKED=False, LAST_FIRST=False, TILE=1, section=section, total=total
    )
    found, state = [], (0, 0)
    for r in range(len(range(program, count * total, programs))):
        if way == "balanced_item":
            first, _, head, *state = tiles.balanced_item(r, *state, count)
        else:
            first, _, head = tiles.item_of_round(r, count)
        found.append((first, head))
    return found


class _Pointer:
    """An address of int32 in a tensor."""

    def __init__(self, values, offset=0):
        self.values, self.offset = values, offset

    def __add__(self, offset):
        return _Pointer(self.values, self.offset + offset)


def _both(elementwise, scalars):
    def function(a, b):
        if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
            return elementwise(torch.as_tensor(a), torch.as_tensor(b))
        return scalars(a, b)

    return function


def _load(pointer):
    value = pointer.values[pointer.offset]
    return value if value.dim() else int(value)


def _where(condition, a, b):
    return torch.where(condition, a, b) if isinstance(condition, torch.Tensor) else (a if condition else b)


def _interpreted_tiles(ranges, rows: int, others: int, before: int, after: int, tile: int):
    """``Tiles`` of packed rows as plain Python: Gluon has no interpreter, and what its methods use is little."""
    gl = SimpleNamespace(
        minimum=_both(torch.minimum, min), maximum=_both(torch.maximum, max), load=_load, where=_where,
        arange=lambda start, end, layout: torch.arange(start, end),
    )  # fmt: skip
    names = ("interval", "block_range", "own_blocks", "seeing", "apply_mask")
    scope = {"gl": gl, "float": float}
    methods = {name: FunctionType(getattr(vocabulary.Tiles, name).fn.__code__, scope) for name in names}
    tiles = type("Tiles", (SimpleNamespace,), methods)
    return tiles(
        ranges_ptr=_Pointer(ranges), rows=rows, others=others, before=before, after=after, TILE=tile,
        HAS_BEFORE=before >= 0, HAS_AFTER=after >= 0, PACKED=True,
    )  # fmt: skip


def _ranges(cu, rows: int, causal: bool = True):
    q = torch.empty(1, rows, 1, 16)
    return Problem(Call(q, q, q, None, Mask(-1, 0 if causal else -1, cu, cu), 1.0, 0.0, False)).ranges


def _tiles(ranges, rows: int, tile: int) -> list[tuple[int, int]]:
    """First row and end of the rows of each tile, in the table's order."""
    table, slots = tile_table(ranges, rows, tile), table_slots(rows, tile)
    assert table.shape == (1 + 2 * slots,)
    count, first, end = int(table[0]), table[1 : 1 + slots].tolist(), table[1 + slots :].tolist()
    assert all(pair == (rows, rows) for pair in zip(first[count:], end[count:], strict=True))
    return list(zip(first[:count], end[:count], strict=True))


def _rows(tiles: list[tuple[int, int]], tile: int) -> list[int]:
    return sorted(row for first, end in tiles for row in range(first, min(first + tile, end)))


def _expected(bounds: list[int], rows: int, tile: int) -> set[tuple[int, int]]:
    long = [(a, b) for a, b in pairwise(bounds) if b - a >= tile]
    tiles = {(first, b) for a, b in long for first in range(a, b, tile)}
    short = set(range(rows)) - {row for a, b in long for row in range(a, b)}
    for cell in range(ceil_div(rows, tile)):
        inside = short & set(range(cell * tile, (cell + 1) * tile))
        if inside:
            assert max(inside) - min(inside) + 1 == len(inside)
            tiles.add((min(inside), max(inside) + 1))
    return tiles
