"""``attention_mask``, the mask function that is registered with transformers.

transformers calls it once per forward for each kind of layer, and tells it what no layer is told: whether the pattern
is causal, its window, the padding, how many keys there are, and where a packed row is cut. The answer is a
``ForwardMask``, which transformers hands to every layer's ``attention_forward``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .forward_mask import ForwardMask, current_forward, is_recorded
from .patterns import check_pattern, refuse_own_attention
from .segments import cuts_at_changes
from .sequence_parallel import active_group, in_backward


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
) -> ForwardMask:
    """transformers' mask interface.

    Args:
        q_length: queries, at positions ``q_offset`` and on (a tensor for static caches).
        kv_length: key slots, at positions ``kv_offset`` and on.
        cache_position: (q_length,), in place of q_length and q_offset in transformers 4.57.
        mask_function: transformers' description of the pattern; all but causal, bidirectional, sliding, packed and
            blocks (images, prefixes) are refused.
        attention_mask: 2-D padding mask over all positions so far, nonzero = real; or what an earlier call returned.

    Raises:
        ValueError: a pattern that the attention function could not honour; a model that would not call it.
    """
    if isinstance(attention_mask, ForwardMask):  # made ahead of the forward, as generate does
        return attention_mask
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts it up in place
    arguments = dict(
        batch_size=batch_size, kv_length=kv_length, q_length=q_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, cache_position=cache_position, device=device,
        **kwargs,
    )  # fmt: skip
    refuse_own_attention(kwargs.get("config"))
    pattern = check_pattern(mask_function, kwargs)
    packed, blocks = pattern.packed, pattern.blocks
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
    cuts = None
    if isinstance(packed, Tensor):
        cuts = cuts_at_changes(packed)
    elif packed and attention_mask is None and kv_length == q_length:
        cuts = _packed_cuts(mask_function, batch_size, q_length, device, bidirectional)
    group = active_group()
    mask = ForwardMask(
        (batch_size, 1, q_length, kv_length),
        device,
        causal=not bidirectional,
        window=_window(kwargs.get("local_size") if pattern.window is None else pattern.window, bidirectional),
        real=real,
        cuts=cuts,
        used=used,
        dtype=kwargs.get("dtype", torch.float32),
        group=group,
        has_group=group is not None or torch.compiler.is_compiling() or not in_backward(),
        forward=current_forward(),
        arguments={name: value for name, value in arguments.items() if value is not None},
    )
    if blocks is not None:
        mask.set_blocks(blocks[:, :kv_length], windowed=pattern.window is not None)
    mask.forward.masks += 1
    kinds = getattr(kwargs.get("config"), "layer_types", None) or (None,)
    if mask.forward.masks >= len(set(kinds)) and not (real is not None and is_recorded(real)):
        mask.forward.read()  # here rather than in the first layer
    return mask


def _window(local_size: int | None, bidirectional: bool) -> tuple[int, int]:
    """Keys beside a query's own position. A causal window of W holds the query and W - 1 keys before it, a
    bidirectional one W keys on each side."""
    if local_size is None:
        return -1, -1
    if local_size < 1:
        raise ValueError(f"sliding_window must be at least 1, got {local_size}")
    return (local_size, local_size) if bidirectional else (local_size - 1, 0)


def _packed_cuts(mask_function, batch: int, seqlen: int, device, bidirectional: bool) -> Tensor:
    """bool (B, S): the tokens that do not see the token before them."""
    rows = torch.arange(batch, device=device)[:, None]
    i = torch.arange(seqlen, device=device)[None, :]
    head = torch.zeros((), dtype=torch.int64, device=device)
    if torch.compiler.is_compiling() and not bidirectional:  # where a pattern cannot be taken apart
        ahead = mask_function(rows, head, (i - 1).clamp_min(0), i) & (i > 0)
        torch._assert_async(~ahead.any(), "the model's mask must be causal, got tokens that see the one after them")
    return ~mask_function(rows, head, i, (i - 1).clamp_min(0)).expand(batch, seqlen)
