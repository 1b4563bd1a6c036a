"""The mask function for transformers: which keys no query may see, and how that travels to the layers.

What passes as the model's attention mask from here to the layers has four dimensions, (B, 1, 1, Sk), because models and
``generate`` hand a 4-D mask on untouched but reinterpret a 2-D one, and a dtype that no model's own mask has:

* None: nothing to hide beyond causality and window, as ``is_causal`` and ``sliding_window`` say them.
* uint8 for a causal, int8 for a bidirectional pattern: 1 = real key, 0 = padding. The dtype overrides ``is_causal``,
  which some models work out for sdpa and set to False wherever there is a mask.
* int32, causal, for a cache longer than its contents: the number of keys in use in each visible slot, 0 in a hidden
  one. The number is a value, not a shape, so that a compiled decode step serves every length.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from .segments import is_capturing, once

# Parts of transformers' mask patterns that the arguments of attention_forward already say.
_KNOWN_PATTERNS = {
    "and_masks", "causal_mask_function", "sliding_window_overlay", "bidirectional_mask_function",
    "sliding_window_bidirectional_overlay", "packed_sequence_mask_function", "remap_positions_for_packed_sequence",
}  # fmt: skip


def attention_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """The keys hidden from every query, in the encoding of this file's docstring; transformers' mask interface.

    Args:
        q_length: queries, at positions ``q_offset`` and on (a tensor for static caches).
        kv_length: key slots, at positions ``kv_offset`` and on.
        cache_position: (q_length,), in place of q_length and q_offset in transformers 4.57.
        mask_function: transformers' description of the pattern; all but causal, bidirectional, sliding and packed
            are refused.
        attention_mask: 2-D padding mask over all positions so far, nonzero = real.

    Raises:
        ValueError: a pattern that the attention function could not honour; a model that would not call it.
    """
    _refuse_own_attention(kwargs.get("config"))
    _refuse_pattern(mask_function, kwargs)
    bidirectional = "allow_is_bidirectional_skip" in kwargs  # only those patterns are created with it
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    elif device is None and attention_mask is not None:
        device = attention_mask.device
    # Keys in use, where they can be fewer than the slots; a bidirectional pattern counts on the padding mask alone.
    used = None
    if kv_length != q_length and not bidirectional:
        used = q_offset + q_length - kv_offset
        if not isinstance(used, Tensor) and used == kv_length:
            used = None
    real = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length] != 0
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))
        if used is None and kv_length == q_length and _all_real(real):
            real = None
    if used is None:
        return None if real is None else real.to(torch.int8 if bidirectional else torch.uint8)[:, None, None, :]
    visible = (torch.arange(kv_length, device=device) < used).expand(batch_size, kv_length)
    if real is not None:
        visible = visible & real
    return (visible * used).to(torch.int32)[:, None, None, :]


def is_encoded(mask) -> bool:
    """Whether this is something that attention_mask() returned."""
    return (
        isinstance(mask, Tensor)
        and mask.dim() == 4
        and mask.shape[1] == mask.shape[2] == 1
        and mask.dtype in (torch.uint8, torch.int8, torch.int32)
    )


def is_causal_pattern(mask: Tensor) -> bool:
    """Whether an encoded mask stands for a causal pattern rather than a bidirectional one."""
    return mask.dtype != torch.int8


def hidden_keys(mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """key_padding_mask (B, Sk) and seqused_k (B,) on q's device, from what the model hands on as its attention mask.

    Raises:
        TypeError, ValueError: a mask that is neither an encoding of ours nor a 2-D padding mask.
    """
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a 2-D tensor or None, got {type(mask).__name__}")
    if is_encoded(mask):
        return once(mask, ("hidden keys", q.device), lambda: _decode(mask[:, 0, 0].to(q.device)))
    if mask.dim() == 2 and not mask.is_floating_point():
        if mask.dtype == torch.bool and mask.device == q.device:
            return mask, None
        return once(mask, ("real keys", q.device), lambda: (mask.to(q.device) != 0, None))
    raise ValueError(
        f"attention_mask must be a 2-D bool or integer padding mask (B, S), got {tuple(mask.shape)} {mask.dtype}: pass "
        "position_ids that restart for packed rows, or use attn_implementation='eager' for a dense mask"
    )


def _decode(slots: Tensor) -> tuple[Tensor, Tensor | None]:
    return slots != 0, slots.amax(-1) if slots.dtype == torch.int32 else None


def _all_real(real: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or is_capturing(real)) and bool(real.all())


def _refuse_own_attention(config) -> None:
    """Raise for a model that takes its mask from us but computes attention itself: it would misread the encoding."""
    if config is not None and not _calls_attention_functions(type(config).__module__):
        raise ValueError(
            f"attn_implementation must be 'eager' for models of {type(config).__name__}, got "
            "'triton_attention_sink': they compute attention themselves and call no attention function"
        )


@torch.compiler.assume_constant_result
def _calls_attention_functions(configuration: str) -> bool:
    """Whether the model file beside a configuration file of transformers knows its attention functions."""
    modeling = sys.modules.get(configuration.replace(".configuration_", ".modeling_"))
    if modeling is None or not configuration.startswith("transformers.models."):
        return True  # code of others may reach them in other ways
    return hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def _refuse_pattern(mask_function, kwargs) -> None:
    """Raise for transformers' mask patterns that would be lost: chunks, blocks of images, user-supplied functions."""
    config, local_size = kwargs.get("config"), kwargs.get("local_size")
    chunk_size = getattr(config, "attention_chunk_size", None)
    unknown = None
    if kwargs.get("use_vmap"):
        unknown = "a custom mask function"
    elif local_size is not None and local_size == chunk_size and local_size != getattr(config, "sliding_window", None):
        unknown = "chunked attention"
    elif not torch.compiler.is_compiling():  # which cannot look into a closure
        unknown = next((name for name in _pattern_names(mask_function) if name not in _KNOWN_PATTERNS), None)
    if unknown is not None:
        raise ValueError(
            f"the model's mask must be causal, bidirectional, sliding or padded, got {unknown}: use "
            "attn_implementation='eager' (or 'sdpa' where the model has no sinks)"
        )


def _pattern_names(mask_function) -> list[str]:
    """Names of the functions of transformers.masking_utils that a pattern is composed of."""
    names, todo = [], [mask_function] if mask_function is not None else []
    while todo:
        function = todo.pop()
        names.append(getattr(function, "__qualname__", repr(function)).split(".")[0])
        for cell in getattr(function, "__closure__", None) or ():
            content = cell.cell_contents
            todo += [x for x in (content if isinstance(content, tuple) else (content,)) if callable(x)]
    return names
