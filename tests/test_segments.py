"""Cutting packed rows: which tokens begin a sample, and cu_seqlens whose size does not depend on the values."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from triton_attention_sink_hf.integrations.segments import (
    cu_seqlens_from_cuts,
    cuts_at_changes,
    cuts_from_positions,
    cuts_from_samples,
)


def starts(cuts: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in cuts]


@pytest.mark.parametrize(
    ("position_ids", "expected"),
    [
        ([[0, 1, 2, 0, 1, 0]], [[3, 5]]),
        ([[0, 0, 0]], [[1, 2]]),
        ([[5, 6, 9, 10]], [[2]]),
        ([[0, 1, 0, 1], [0, 1, 2, 3]], [[2], []]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_cuts_where_positions_do_not_rise_by_one(position_ids, expected, dtype):
    assert starts(cuts_from_positions(torch.tensor(position_ids, dtype=dtype))) == expected


@pytest.mark.parametrize(
    ("position_ids", "real", "expected"),
    [
        # one sample, padded left, right and between, with whatever the padding's positions are
        ([1, 1, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], []),
        ([0, 0, 0, 1, 2, 3], [0, 0, 1, 1, 1, 1], []),
        ([0, 1, 2, 3, 0, 0], [1, 1, 1, 1, 0, 0], []),
        ([0, 1, 2, 3, 4, 5], [1, 1, 0, 0, 1, 1], []),  # padding counts
        ([0, 1, 1, 1, 2, 3], [1, 1, 0, 0, 1, 1], []),  # it does not, as in cumsum(mask) - 1
        # several
        ([0, 1, 2, 0, 1, 0], [1, 1, 1, 1, 1, 0], [3]),
        ([1, 0, 1, 2, 0, 1], [0, 1, 1, 1, 1, 1], [4]),
        ([0, 1, 0, 0, 1, 2], [1, 1, 0, 1, 1, 1], [3]),
        ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0], []),
    ],
)
def test_cuts_beside_padding(position_ids, real, expected):
    assert starts(cuts_from_positions(torch.tensor([position_ids]), torch.tensor([real]) != 0)) == [expected]


def test_positions_of_one_row_stand_for_all_rows():
    real = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]) != 0
    assert starts(cuts_from_positions(torch.tensor([[0, 1, 0, 1]]), real)) == [[2], [2]]


@pytest.mark.parametrize(
    ("sample_ids", "expected"),
    [
        ([1, 1, 2, 2, 0], [2]),
        ([0, 3, 3, 7, 7], [3]),
        ([1, 1, 0, 2, 2], [3]),
        ([1, 1, 0, 0, 1], []),  # a mask of ones and zeros
        ([0, 0, 1, 1, 1], []),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4]),
    ],
)
def test_cuts_where_the_sample_number_changes(sample_ids, expected):
    assert starts(cuts_from_samples(torch.tensor([sample_ids]))) == [expected]


def test_cuts_between_tokens_and_padding():
    real = torch.tensor([[0, 0, 1, 1, 0], [1, 1, 1, 1, 1]]) != 0
    assert starts(cuts_at_changes(real)) == [[2, 4], []]


@pytest.mark.parametrize(
    ("cuts", "batch", "expected"),
    [
        ([[0, 0, 1, 0]], 1, [0, 2]),
        ([[1, 1, 1, 1]], 1, [0, 1, 2, 3]),
        ([[0, 0, 0, 0]], 1, [0]),
        ([[0, 0, 1, 0], [0, 1, 0, 0]], 2, [0, 2, 4, 5]),
        ([[0, 0, 1, 0]], 3, [0, 2, 4, 6, 8, 10]),
        ([[0]], 2, [0, 1]),
    ],
)
def test_starts_come_first_and_the_total_fills_up(cuts, batch, expected):
    cuts = torch.tensor(cuts) != 0
    total = batch * cuts.shape[1]
    found = cu_seqlens_from_cuts(cuts, batch)
    assert found.dtype == torch.int32
    assert found.tolist() == expected + [total] * (total + 1 - len(expected))


def test_random_cuts_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        batch, seqlen = torch.randint(1, 5, (), generator=generator), torch.randint(1, 40, (), generator=generator)
        cuts = torch.rand(int(batch), int(seqlen), generator=generator) < 0.2
        expected = [i for i in range(cuts.numel()) if i % seqlen == 0 or cuts.flatten()[i]]
        expected += [cuts.numel()] * (cuts.numel() + 1 - len(expected))
        assert cu_seqlens_from_cuts(cuts, int(batch)).tolist() == expected


def test_one_graph_serves_every_length():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=True, fullgraph=True)
    def cut(position_ids, real):
        cuts = cuts_from_positions(position_ids, real) | cuts_from_samples(real.int()) | cuts_at_changes(real)
        return cu_seqlens_from_cuts(cuts, position_ids.shape[0])

    for seqlen in (7, 12, 31, 64):
        positions, real = torch.arange(seqlen).expand(2, seqlen) % 5, torch.arange(seqlen).expand(2, seqlen) > 2
        found = cut(positions, real)
        cuts = cuts_from_positions(positions, real) | cuts_at_changes(real)
        assert torch.equal(found, cu_seqlens_from_cuts(cuts, 2))
    assert counter.frame_count == 1
    torch._dynamo.reset()
