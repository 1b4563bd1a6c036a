"""Other attentions that are right for packed gpt-oss rows, each as a function that transformers calls for every layer.

Eager and FlexAttention are transformers' own code plus a mask that cuts the samples, made from ``position_ids`` once
per forward; gpt-oss in transformers gives them none. FlashAttention-4 is transformers' own too. It needs no mask,
because it takes the samples' ends from the keywords for packed rows. Nothing here uses this package.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
from actor_step import FLASH_ATTENTION_4
from torch import Tensor

YARDSTICK = "eager by sample"
FLASH = "FlashAttention-4"
NAMES = {"ours": "triton_attention_sink", "eager": "bench_dense", "FlexAttention": "bench_blocks"}
NAMES[FLASH] = FLASH_ATTENTION_4
NAMES[YARDSTICK] = "bench_by_key_head"


def register() -> None:
    """Make NAMES known to transformers. No name may contain flex, flash or sdpa: transformers would rewrite it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    import triton_attention_sink_hf  # noqa: F401  registers its own

    for name, function in {"eager": dense, "FlexAttention": blocks, YARDSTICK: by_key_head}.items():
        AttentionInterface.register(NAMES[name], function)
        AttentionMaskInterface.register(NAMES[name], lambda *args, **kwargs: None)


def missing() -> list[str]:
    """The names that cannot be used here. Packages must be on sys.path before anything imports transformers."""
    try:
        from transformers.utils import is_flash_attn_4_available

        flash = is_flash_attn_4_available()
    except ImportError:  # transformers before 5.10
        flash = False
    # transformers' FlexAttention refuses sinks on a CPU
    return ([] if flash else [FLASH]) + ([] if torch.cuda.is_available() else ["FlexAttention"])


_masks: dict = {}


def once_per_forward(kind: str, window: int | None, position_ids: Tensor, make: Callable):
    """make(), remembered as long as the layers get the same position_ids object."""
    known = _masks.get((kind, window))
    if known is None or known[0] is not position_ids:
        known = _masks[kind, window] = (position_ids, make())
    return known[1]


def visible(position_ids: Tensor, window: int | None) -> Callable:
    """(query index, key index) -> whether the key is in the query's sample, not after it, and within the window."""
    sample = (position_ids[0] == 0).cumsum(0)

    def rule(q, k):
        near = (k <= q) & (sample[q] == sample[k])
        return near if window is None else near & (q - k < window)

    return rule


def dense_mask(position_ids: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """(1, 1, T, T), 0 where visible and the dtype's minimum elsewhere."""
    index = torch.arange(position_ids.shape[1], device=position_ids.device)
    seen = visible(position_ids, window)(index[:, None], index[None, :])
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


def dense(module, query, key, value, attention_mask, scaling, sliding_window=None, position_ids=None, **kwargs):
    """transformers' own eager gpt-oss attention, with a mask that cuts the samples. Memory: T squared, per head."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, value = cast(query, key, value)
    mask = once_per_forward(
        "dense", sliding_window, position_ids, lambda: dense_mask(position_ids, sliding_window, query.dtype)
    )
    return eager_attention_forward(module, query, key, value, mask, scaling)


def by_key_head(module, query, key, value, attention_mask, scaling, sliding_window=None, s_aux=None, **kwargs):
    """The same for one key head and its query heads at a time, recomputed in the backward: memory of one head."""
    from torch.utils.checkpoint import checkpoint
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    query, key, value = cast(query, key, value)
    position_ids, group = kwargs["position_ids"], module.num_key_value_groups
    mask = once_per_forward(
        "head", sliding_window, position_ids, lambda: dense_mask(position_ids, sliding_window, query.dtype)
    )

    def one(q, k, v, sinks):
        part = SimpleNamespace(num_key_value_groups=group, sinks=sinks, training=False)
        return eager_attention_forward(part, q, k, v, mask, scaling)[0]

    outs = [
        checkpoint(
            one,
            query[:, g * group : (g + 1) * group],
            key[:, g : g + 1],
            value[:, g : g + 1],
            s_aux[g * group : (g + 1) * group],
            use_reentrant=False,
        )
        for g in range(key.shape[1])
    ]
    return torch.cat(outs, dim=2), None


def blocks(module, query, key, value, attention_mask, scaling, sliding_window=None, position_ids=None, **kwargs):
    """transformers' own FlexAttention with sinks, with a block mask that cuts the samples."""
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import flex_attention_forward

    def make():
        rule, length = visible(position_ids, sliding_window), position_ids.shape[1]
        return create_block_mask(lambda b, h, q, k: rule(q, k), 1, None, length, length, query.device, _compile=True)

    query, key, value = cast(query, key, value)
    mask = once_per_forward("blocks", sliding_window, position_ids, make)
    return flex_attention_forward(module, query, key, value, mask, scaling, s_aux=kwargs["s_aux"].to(query.dtype))


def cast(*tensors: Tensor) -> list[Tensor]:
    """To autocast's dtype where it is on: rotary embeddings leave fp32 behind."""
    device = tensors[0].device.type
    on = torch.is_autocast_enabled(device)
    return [x.to(torch.get_autocast_dtype(device)) if on else x for x in tensors]


def forget() -> None:
    """Drop the masks of the last forward."""
    _masks.clear()
