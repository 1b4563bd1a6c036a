"""transformers' continuous batching (``generate_batch``): one row of many requests, keys in a paged cache.

A layer gets the queries of all requests in one packed row, ``cu_seq_lens_q`` and ``cu_seq_lens_k``, and one of:

- ``cache``, in versions that ask for a name with the prefix ``paged|``: the attention function updates it;
- keys that the cache has gathered already, past ones included, in later ones;
- there also ``block_table``, ``k_cache`` and ``v_cache``, if each request has one new token: it is written to its page.
  transformers 5.24 offers this to names with "flash" alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..flash_attn_api import flash_attn_with_kvcache
from ..interface import attention_sink

PREFIX = "paged|"  # before the name of a model that batches, in transformers 5.10


def is_continuous_batch(kwargs: dict) -> bool:
    """Whether a layer's keywords are those of continuous batching: only its cache has indices to write at."""
    return kwargs.get("write_index") is not None or kwargs.get("k_cache") is not None


def batch_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: Tensor | dict[str, Tensor],
    kwargs: dict,
    *,
    sinks: Tensor | None,
    window_size: tuple[int, int],
    **options,
) -> Tensor:
    """out (1, T, Hq, Dv), causal.

    Args:
        query: (1, Hq, T, D). key, value: (1, Hkv, T or Tk, D or Dv), the new tokens' or, gathered, all.
        cu_seq_lens_k: one for each kind of layer, or this layer's.
        kwargs: what else the layer was given; read: cache, read_index, write_index, block_table, k_cache, v_cache.
        options: ``softmax_scale`` and ``softcap``.
    """
    cache = kwargs.get("cache")
    if cache is not None and window_size[0] >= 0:
        raise NotImplementedError(
            "continuous batching of layers with a sliding window needs a later transformers (5.24 was tested): this "
            "one's cache hands out keys that are one token too old, past the window. Use generate()"
        )
    if sinks is not None and sinks.dim() > 1:
        raise NotImplementedError(
            "sinks must be one per head in continuous batching, got one per token: use generate()"
        )
    if isinstance(cu_seq_lens_k, dict):
        cu_seq_lens_k = cu_seq_lens_k["full_attention"]
    cu_q, cu_k = cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32)
    if kwargs.get("block_table") is not None:
        return _decode(query, key, value, cu_k, kwargs, sinks, window_size, options)
    if cache is not None:
        key, value = cache.update(
            key_states=key,
            value_states=value,
            layer_idx=module.layer_idx,
            read_index=kwargs["read_index"],
            write_index=kwargs["write_index"],
        )
    else:
        key, value = (x.squeeze(0).transpose(0, 1) for x in (key, value))
    out = attention_sink(
        query.squeeze(0).transpose(0, 1), key, value, sinks,
        window_size=window_size, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options,
    )  # fmt: skip
    return out.unsqueeze(0)


def _decode(query, key, value, cu_k: Tensor, kwargs: dict, sinks, window_size, options) -> Tensor:
    """One new token of each request: written to its page, then attention on the request's pages."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (query, key, value))  # (requests, 1, heads, D)
    n = q.shape[0]
    out = flash_attn_with_kvcache(
        q, kwargs["k_cache"], kwargs["v_cache"], k, v, cache_seqlens=cu_k[1 : n + 1] - cu_k[:n] - 1,
        block_table=kwargs["block_table"][:n], causal=True, window_size=window_size, s_aux=sinks, **options,
    )  # fmt: skip
    return out.transpose(0, 1)
