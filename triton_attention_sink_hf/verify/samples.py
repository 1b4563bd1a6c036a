"""Random samples of uneven lengths, long enough that the model's window matters."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHORTEST, LONGEST = 192, 1024  # bounds of the longest sample, whatever the window


def window_of(config) -> int | None:
    """The model's sliding window, None if no layer has one."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return window if used else None


def sample_lengths(config) -> list[int]:
    """Uneven lengths: the longest is 1.5 windows, so that the window matters, and one is a single token."""
    window = window_of(config) or 0
    longest = max(SHORTEST, min(window + window // 2 + 5, LONGEST))
    longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    return [max(longest // 5, 2), longest, 1, max(longest // 3, 2), 7, max(2 * longest // 3, 2)]


@dataclass(frozen=True)
class Samples:
    """Per sample, (length,): ids, and the weight of each log-prob in the loss. The last weight of a sample is 0."""

    ids: list[Tensor]
    weights: list[Tensor]


def random_samples(lengths: list[int], vocabulary: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    weights = [torch.randn(n, generator=generator) / math.sqrt(sum(lengths)) for n in lengths]
    for weight in weights:
        weight[-1] = 0.0
    return Samples(ids, weights)
