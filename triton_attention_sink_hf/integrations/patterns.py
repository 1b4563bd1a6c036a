"""Which mask pattern transformers asks for, read from the arguments of its mask interface. The rest is refused.

A refusal is decided and raised in one frame. When tracing raises, dynamo runs that frame eagerly and compiles the
frames that it calls, so what one frame decides and another raises could come out differently.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ..tracing import constant_result

# The parts of transformers' patterns that are served.
_CAUSAL_OR_FULL = {"causal_mask_function", "bidirectional_mask_function", "and_masks"}
_WINDOW = {"sliding_window_overlay", "sliding_window_bidirectional_overlay"}
_PACKED = {"packed_sequence_mask_function", "remap_positions_for_packed_sequence"}
# Served if their values show that they have no effect.
_BLOCKS = {"or_masks", "blockwise_overlay"}
BLOCKS = "blocks of tokens that see each other in both directions (images)"
_UNION = "tokens that see each other in both directions inside a causal mask (images, prefixes)"
_CHUNKS = "chunked attention (attention_chunk_size)"
_WHAT = {"or_masks": _UNION, "or_mask": _UNION, "blockwise_overlay": BLOCKS, "chunked_overlay": _CHUNKS}


def refuse_pattern(what: str) -> None:
    raise ValueError(
        f"the model's mask must be causal, bidirectional, sliding or padded, got {what}: use "
        "attn_implementation='eager' (or 'sdpa' where the model has no sinks)"
    )


class Pattern(NamedTuple):
    """What a pattern may add to causality and window.

    Attributes:
        packed: whether it may be packed, or the sample number (B, S) of each token if the pattern has it.
        blocks: the block numbers (B, S), negative = none; None without blocks.
        window: W, of which a token sees the W - 1 keys before it, of its own block too; None: the window is in
            ``local_size`` and does not hide a block.
    """

    packed: bool | Tensor = False
    blocks: Tensor | None = None
    window: int | None = None


def check_pattern(mask_function, kwargs: dict) -> Pattern:
    """What the pattern may add to causality and window: packing, and blocks.

    Args:
        mask_function: transformers' description of the pattern, or None.
        kwargs: what came with it.

    Raises:
        ValueError: a pattern that one interval of keys a query cannot express.
    """
    if kwargs.get("use_vmap"):
        blocks = None if torch.compiler.is_compiling() else _windowed_blocks(mask_function)
        if blocks is not None:
            return blocks
        refuse_pattern("a mask function of the user's or of the model's own (or_mask_function, and_mask_function)")
    config, local_size = kwargs.get("config"), kwargs.get("local_size")
    chunk, window = getattr(config, "attention_chunk_size", None), getattr(config, "sliding_window", None)
    if local_size is not None and local_size == chunk and local_size != window:
        refuse_pattern(_CHUNKS)
    if mask_function is None:
        return Pattern()
    if torch.compiler.is_compiling():  # the name of a function can be traced, its closure cannot
        name = mask_function.__name__
        if name not in ("causal_mask_function", "bidirectional_mask_function", "and_mask"):
            refuse_pattern(_WHAT.get(name, f"a mask made by {name}"))
        if local_size is not None and local_size == chunk:
            refuse_pattern("a window that may be chunked attention: attention_chunk_size equals sliding_window")
        return Pattern(name == "and_mask")
    parts = _parts(mask_function)
    for name in parts:
        if name not in _CAUSAL_OR_FULL | _WINDOW | _PACKED | _BLOCKS:
            refuse_pattern(_WHAT.get(name, f"a mask made by {name}"))
    blocks = parts.get("blockwise_overlay")
    if "or_masks" in parts and not isinstance(blocks, Tensor):
        refuse_pattern(_UNION)
    samples = parts.get("packed_sequence_mask_function")
    return Pattern(samples if isinstance(samples, Tensor) else not _PACKED.isdisjoint(parts), blocks)


def refuse_own_attention(config) -> None:
    """Raise for a model that asks for this mask but computes attention in its own code."""
    if config is not None and not _calls_attention_functions(type(config).__module__):
        raise ValueError(
            f"attn_implementation must be 'eager' for models of {type(config).__name__}, got "
            "'triton_attention_sink': they compute attention themselves and call no attention function"
        )


@constant_result
def _calls_attention_functions(configuration: str) -> bool:
    """Whether the model file beside a configuration file of transformers knows its attention functions."""
    modeling = sys.modules.get(configuration.replace(".configuration_", ".modeling_"))
    if modeling is None or not configuration.startswith("transformers.models."):
        return True  # code outside transformers may call them in other ways
    return hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def _windowed_blocks(mask_function) -> Pattern | None:
    """Of Gemma 3's sliding layers in transformers 5.24: a window of causality or blocks. None for other patterns."""
    union, window = _members(mask_function, "and_masks", "or_masks", "sliding_window_overlay")
    causal, blocks = _members(union, "or_masks", "causal_mask_function", "blockwise_overlay")
    if causal is None:
        return None
    numbers, size = (function.__closure__[0].cell_contents for function in (blocks, window))
    return Pattern(blocks=numbers, window=size) if isinstance(numbers, Tensor) and isinstance(size, int) else None


def _members(function, name: str, *names: str) -> tuple:
    """The functions of these names that ``function``, of that name, joins; None in their places for any other."""
    if _name(function) != name:
        return (None,) * len(names)
    members = function.__closure__[0].cell_contents
    if not isinstance(members, tuple) or tuple(map(_name, members)) != names:
        return (None,) * len(names)
    return members


def _name(function) -> str:
    return getattr(function, "__qualname__", repr(function)).split(".")[0]


def _parts(mask_function) -> dict[str, object]:
    """The functions of transformers.masking_utils that compose a pattern: name -> tensor in its closure, or None."""
    parts, todo = {}, [mask_function]
    while todo:
        function = todo.pop()
        name = _name(function)
        parts.setdefault(name, None)
        for cell in getattr(function, "__closure__", None) or ():
            content = cell.cell_contents
            if isinstance(content, Tensor):
                parts[name] = content
            todo += [x for x in (content if isinstance(content, tuple) else (content,)) if callable(x)]
    return parts
