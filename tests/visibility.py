"""Masks that no single interval a query describes, dense: for the oracle alone."""

from __future__ import annotations

import torch
from torch import Tensor

from triton_attention_sink_hf import Mask, SharedPrefixes


class Visible(Mask):
    """bool (B or 1, Sq, Sk), True = the query sees the key."""

    def __init__(self, visible: Tensor):
        super().__init__()
        self.visible = visible

    def dense(self, seqlen_q, seqlen_k, device):
        return self.visible


def first_and_window(position: Tensor, start: Tensor, n: int, left: int, seqlen_k: int) -> Tensor:
    """bool (..., Sq, Sk): causal, in the window or among the first n. position (..., Sq), start (..., 1)."""
    j = torch.arange(seqlen_k, device=position.device)
    position, start = position[..., None], start[..., None]
    return (j <= position) & (j >= start) & ((j >= position - left) | (j < start + n))


def first_and_window_of_segments(cu_q: Tensor, cu_k: Tensor, rows: tuple[int, int], n: int, left: int) -> Tensor:
    """The same for packed rows: bool (1, Tq, Tk)."""
    visible = torch.zeros(*rows, dtype=torch.bool, device=cu_q.device)
    start = torch.zeros(1, dtype=torch.int64, device=cu_q.device)
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        position = torch.arange(d - c - (b - a), d - c, device=cu_q.device)
        visible[a:b, c:d] = first_and_window(position, start, n, left, d - c)
    return visible[None]


def path_of(tree: SharedPrefixes, segment: int) -> tuple[Tensor, Tensor]:
    """Rows of a segment, and those of its whole sample."""
    starts = torch.tensor([0, *tree.lengths]).cumsum(0)
    rows = torch.arange(starts[segment], starts[segment + 1])
    prefix = tree.prefix_of[segment]
    return rows, rows if prefix < 0 else torch.cat([torch.arange(starts[prefix], starts[prefix + 1]), rows])


def tree_visible(tree: SharedPrefixes, left: int, device: str) -> Tensor:
    """bool (1, T, T); left -1 = all."""
    visible = torch.zeros(tree.total, tree.total, dtype=torch.bool)
    for segment in range(len(tree.lengths)):
        rows, path = path_of(tree, segment)
        place = torch.arange(len(path))
        own = place[len(path) - len(rows) :, None]
        visible[rows[:, None], path] = (place <= own) & (left < 0 or place >= own - left)
    return visible[None].to(device)
