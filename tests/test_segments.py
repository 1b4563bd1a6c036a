"""Cutting packed rows: the starts found, the static size, and what is remembered between the layers of a forward."""

import gc

import pytest
import torch

from triton_attention_sink_hf.integrations import segments
from triton_attention_sink_hf.integrations.segments import cu_seqlens_from_position_ids, once


def cut(position_ids, batch=None, seqlen=None):
    position_ids = torch.as_tensor(position_ids)
    batch = position_ids.shape[0] if batch is None else batch
    return cu_seqlens_from_position_ids(position_ids, batch, seqlen or position_ids.shape[-1], "cpu")


@pytest.mark.parametrize(
    "position_ids, starts",
    [
        ([[0, 1, 2, 0, 1, 0]], [0, 3, 5]),
        ([[0, 0, 0]], [0, 1, 2]),
        ([[5, 6, 9, 10]], [0, 2]),
        ([[0, 1, 0, 1], [0, 1, 2, 3]], [0, 2, 4]),
        ([[0, 1, 2, 3], [7, 8, 0, 1]], [0, 4, 6]),
        # A sequence cannot go on in the next row of the batch, however its positions run.
        ([[0, 1, 0, 1], [2, 3, 4, 5]], [0, 2, 4]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_starts(position_ids, starts, dtype):
    position_ids = torch.tensor(position_ids, dtype=dtype)
    total = position_ids.numel()
    cu = cut(position_ids)
    assert cu.dtype == torch.int32
    assert cu.tolist() == starts + [total] * (total + 1 - len(starts))


def test_one_row_of_positions_for_all_rows_of_the_batch():
    expected = [0, 2, 4, 6] + [8] * 5
    assert cut([[0, 1, 0, 1]], batch=2).tolist() == expected
    assert cut([0, 1, 0, 1], batch=2).tolist() == expected


@pytest.mark.parametrize("positions", [torch.arange(6)[None], torch.arange(6).expand(3, 6) + 4, torch.arange(6)])
def test_unpacked_positions_on_a_cpu_give_none(positions):
    assert cut(positions, batch=max(1, positions.dim() * 3 - 3)) is None


def test_unpacked_positions_whose_values_are_unknown_give_one_segment_a_row():
    """As on a GPU, where looking would wait for the device."""
    compiled = torch.compile(lambda p: cut(p), backend="eager", fullgraph=True)
    assert compiled(torch.arange(3).expand(2, 3)).tolist() == [0, 3, 6, 6, 6, 6, 6]
    assert compiled(torch.tensor([[0, 1, 0], [0, 0, 1]])).tolist() == [0, 2, 3, 4, 6, 6, 6]
    torch._dynamo.reset()


@pytest.mark.parametrize("positions", [None, torch.zeros(3, 2, 4), torch.zeros(4, 2, 4, dtype=torch.long)])
def test_nothing_to_read_segments_from(positions):
    assert cu_seqlens_from_position_ids(positions, 2, 4, "cpu") is None


def test_one_query_is_one_segment():
    assert cut([[5], [7]]) is None


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (5,)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"position_ids must be \(B, S\) = \(2, 4\) or \(1, 4\), got"):
        cut(torch.zeros(shape), batch=2, seqlen=4)


def test_derived_once_while_the_tensor_is_the_same():
    positions = torch.tensor([[0, 1, 0, 1]])
    first = cut(positions)
    assert cut(positions) is first
    assert cut(positions.clone()) is not first
    assert cu_seqlens_from_position_ids(positions, 2, 4, "cpu").numel() == 9  # another batch, another answer
    assert cut(positions) is first


@pytest.mark.parametrize("change", [lambda p: p.copy_(torch.tensor([[0, 0, 1, 2]])), lambda p: p[:, 1:].sub_(1)])
def test_an_in_place_change_is_seen(change):
    positions = torch.tensor([[0, 1, 0, 1]])
    assert cut(positions).tolist() == [0, 2, 4, 4, 4]
    change(positions)
    assert cut(positions).tolist()[1] == 1


def test_the_memory_dies_with_the_tensor():
    before = len(segments._DERIVED)
    positions = torch.tensor([[0, 1, 0, 1]])
    cut(positions)
    assert len(segments._DERIVED) == before + 1
    del positions
    gc.collect()
    assert len(segments._DERIVED) == before


def test_inference_tensors_are_not_remembered():
    with torch.inference_mode():
        positions = torch.tensor([[0, 1, 0, 1]])
        assert cut(positions).tolist() == [0, 2, 4, 4, 4]
        positions[0, 1] = 0
        assert cut(positions).tolist() == [0, 1, 2, 4, 4]


def test_nothing_is_remembered_while_a_graph_is_captured(monkeypatch):
    tensor, calls = torch.zeros(1), []
    once(tensor, "key", lambda: calls.append(0))
    once(tensor, "key", lambda: calls.append(0))
    assert len(calls) == 1
    monkeypatch.setattr(segments, "is_capturing", lambda tensor: True)
    once(tensor, "key", lambda: calls.append(0))
    once(tensor, "key", lambda: calls.append(0))
    assert len(calls) == 3
