"""Where packed rows are cut: ``cu_seqlens`` from ``position_ids``, once per forward, without a device synchronisation.

Every layer of a forward is handed the same ``position_ids`` object, so what is derived from it is kept beside it for
as long as it lives (``once``).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")
_DERIVED = WeakTensorKeyDictionary()  # tensor -> {key: (tensor's version, derived value)}


def cu_seqlens_from_position_ids(position_ids: Tensor | None, batch: int, seqlen: int, device) -> Tensor | None:
    """First row of each packed segment of ``batch * seqlen`` flattened rows, or None where nothing is packed.

    A segment starts at the beginning of a row of the batch and wherever ``diff(position_ids) != 1``.

    Args:
        position_ids: integer (B, S), (1, S) shared by all rows, or (S,). None, or the (3, B, S) positions of a
            multimodal rotary embedding, which say nothing about packing: nothing is packed.
        batch, seqlen: B and S of the query.
        device: where the result is needed.

    Returns:
        int32 (B * S + 1,): the N starts, then B * S in the remaining entries (empty segments), so that the size does
        not depend on the values and nothing waits for the device. On a CPU, whose values are free to read, None if
        no row has more than one segment.

    Raises:
        ValueError: a 2-D ``position_ids`` of another shape.
    """
    if position_ids is None or position_ids.dim() > 2 or seqlen < 2:
        return None
    if position_ids.shape[-1] != seqlen or (position_ids.dim() == 2 and position_ids.shape[0] not in (1, batch)):
        raise ValueError(
            f"position_ids must be (B, S) = ({batch}, {seqlen}) or (1, {seqlen}), got {tuple(position_ids.shape)}"
        )
    key = ("cu_seqlens", batch, seqlen, torch.device(device))
    return once(position_ids, key, lambda: _cut(position_ids, batch, seqlen, device))


def _cut(position_ids: Tensor, batch: int, seqlen: int, device) -> Tensor | None:
    rows = position_ids.reshape(-1, seqlen)
    restarts = rows.diff(dim=-1) != 1
    if restarts.device.type == "cpu" and not torch.compiler.is_compiling() and not restarts.any():
        return None
    starts = torch.nn.functional.pad(restarts, (1, 0), value=True).expand(batch, seqlen).reshape(-1)
    total = batch * seqlen
    row = torch.arange(total, device=rows.device, dtype=torch.int32)
    # Rows that start nothing sort behind those that do: the starts come out in order, then the padding.
    first_rows = row.masked_fill(~starts, total).sort().values
    return torch.nn.functional.pad(first_rows, (0, 1), value=total).to(device)


def once(tensor: Tensor, key: Hashable, derive: Callable[[], T]) -> T:
    """``derive()``, remembered for this tensor object and ``key`` until the tensor changes in place or dies.

    The value must not be ``tensor`` or a view of it, which would keep it alive. Under torch.compile the graph
    itself removes the repetition; during CUDA-graph capture everything is derived inside the graph, as a value from
    outside would go stale when the graph is replayed on new data; inference tensors have no version to compare.
    """
    if torch.compiler.is_compiling() or tensor.is_inference() or is_capturing(tensor):
        return derive()
    known = _DERIVED.setdefault(tensor, {})
    version = tensor._version
    if key not in known or known[key][0] != version:
        known[key] = (version, derive())
    return known[key][1]


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor is being captured into a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
