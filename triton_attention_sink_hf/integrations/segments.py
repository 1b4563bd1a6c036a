"""Where packed rows are cut: from positions or sample numbers to ``cu_seqlens``, without a device synchronisation.

Cuts are bool (B, S) or (1, S), True where a token begins a new sample. Sizes never depend on values, and no size
becomes a constant of a torch.compile graph.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cuts_from_positions(position_ids: Tensor, real: Tensor | None = None) -> Tensor:
    """Cuts where positions do not continue.

    Args:
        position_ids: integer (B, S) or (1, S). Without padding, a sample continues where they rise by 1.
        real: bool (B, S), True = token, False = padding, whose positions are ignored. A token then continues the sample
            of the last token before it if positions rose by 1 (padding not counted) or by their distance (counted).
    """
    if real is None:
        return _after_first(position_ids.diff(dim=-1) != 1)
    last, found = _last_real(real)
    positions = position_ids.expand(real.shape)
    rise = positions[:, 1:] - positions.gather(1, last)
    place = torch.arange(1, real.shape[1], device=real.device)
    return _after_first(real[:, 1:] & found & (rise != 1) & (rise != place - last))


def cuts_from_samples(sample_ids: Tensor) -> Tensor:
    """Cuts where a token's sample number differs from that of the last token before it; 0 is padding.

    A mask of ones and zeros has no cuts. Args: sample_ids: integer (B, S).
    """
    real = sample_ids != 0
    last, found = _last_real(real)
    return _after_first(real[:, 1:] & found & (sample_ids[:, 1:] != sample_ids.gather(1, last)))


def cuts_at_changes(values: Tensor) -> Tensor:
    """Cuts where neighbours differ: between tokens and padding, or consecutive samples' numbers; values: (B, S)."""
    return _after_first(values[:, 1:] != values[:, :-1])


def cu_seqlens_from_cuts(cuts: Tensor, batch: int) -> Tensor:
    """int32 (B * S + 1,): the N first rows of the segments of the flattened rows, then B * S (empty segments).

    Args:
        cuts: bool (B, S) or (1, S). The first token of each row always begins a segment.
    """
    seqlen = cuts.shape[1]
    first = torch.arange(seqlen, device=cuts.device) == 0
    starts = (cuts | first).expand(batch, seqlen).reshape(-1)
    row = torch.arange(batch * seqlen, device=cuts.device)
    total = row[-1:] + 1  # as a tensor: as a number it would become a constant of a graph
    # the n-th start goes to entry n - 1; all other rows write the total into the last entry
    entry = torch.where(starts, starts.cumsum(0) - 1, total)
    start = torch.where(starts, row, total)
    return total.expand(row.shape[0] + 1).scatter(0, entry, start).to(torch.int32)


def _last_real(real: Tensor) -> tuple[Tensor, Tensor]:
    """For tokens 1 to S - 1: the index of the last real token before it (0 if there is none), and whether there is one;
    int64 and bool (B, S - 1)."""
    place = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, place, -1).cummax(dim=1).values[:, :-1]
    return last.clamp_min(0), last >= 0


def _after_first(cuts: Tensor) -> Tensor:
    return torch.nn.functional.pad(cuts, (1, 0))
