"""Blocks of tokens that see each other in both directions inside a causal mask: images, and the prefix of a prefix-LM.

With a block's tokens side by side, causality or window and a token's own block overlap in the token itself, so what it
sees is one interval of keys. Block numbers are integer (B, S), negative = none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .segments import cuts_at_changes

NONE, SERVED, SCATTERED = range(3)


def kind_of_blocks(blocks: Tensor) -> Tensor:
    """NONE, SERVED or, if a number has tokens in two places of a row, SCATTERED; an integer tensor ()."""
    inside = blocks >= 0
    begins = inside & _begins(blocks)
    place = torch.arange(blocks.shape[1], device=blocks.device)
    numbers = torch.where(begins, blocks, -1 - place).sort(dim=1).values
    scattered = (numbers.diff(dim=1) == 0).any()
    return inside.any().int() + scattered.int()


def key_ranges_of_blocks(blocks: Tensor, left: int, windowed: bool = False) -> Tensor:
    """int32 (B, S, 2): the keys [first, last) that each token of a causal row sees, with ``left`` keys before it (-1 =
    all) and all of its block, or if ``windowed`` the block's keys from its window on."""
    seqlen = blocks.shape[1]
    place = torch.arange(seqlen, device=blocks.device).expand(blocks.shape)
    begins = _begins(blocks)
    start = torch.where(begins, place, 0).cummax(1).values
    next_start = torch.where(begins, place, seqlen).flip(1).cummin(1).values.flip(1)  # from this token on
    end = torch.nn.functional.pad(next_start[:, 1:], (0, 1), value=seqlen)
    first = torch.zeros_like(place) if left < 0 else (place - left).clamp_min(0)
    inside = blocks >= 0
    if not windowed:
        first = torch.where(inside, torch.minimum(first, start), first)
    last = torch.where(inside, end, place + 1)
    return torch.stack([first, last], -1).to(torch.int32)


def _begins(blocks: Tensor) -> Tensor:
    """bool (B, S): the tokens whose number is not that of the token before."""
    first = torch.arange(blocks.shape[1], device=blocks.device) == 0
    return cuts_at_changes(blocks) | first
