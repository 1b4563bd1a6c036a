"""verl's Ulysses sequence parallelism: recognised, so that it cannot be silently wrong."""

from __future__ import annotations

import sys

import torch


@torch.compiler.assume_constant_result
def ulysses_world_size() -> int:
    """Size of verl's Ulysses group, 1 if there is none. Looks at verl only if the process has loaded it already."""
    ulysses = sys.modules.get("verl.utils.ulysses")
    group = ulysses.get_ulysses_sequence_parallel_group() if ulysses is not None else None
    return torch.distributed.get_world_size(group) if group is not None else 1


def refuse_sequence_parallel() -> None:
    """Raise NotImplementedError where a layer's rows are sharded over ranks, which it would take for whole ones."""
    size = ulysses_world_size()
    if size > 1:
        raise NotImplementedError(
            f"ulysses_sequence_parallel_size must be 1 with attn_implementation triton_attention_sink, got {size}: "
            "verl shards the sequence by replacing transformers' attention function, which a registered one bypasses"
        )
