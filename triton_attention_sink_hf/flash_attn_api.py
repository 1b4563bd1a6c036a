"""``attention_sink`` under flash-attn's names and arguments, plus ``s_aux``: the sinks, as flash-attn 3 calls them.

Defaults are flash-attn's (``causal=False``). An argument that cannot be honoured raises; none is dropped.
"""

from __future__ import annotations

import functools
from importlib.util import find_spec

import torch
from torch import Tensor

from .call import traced
from .interface import attention_sink
from .validation import readable


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Attention of q (B, Sq, Hq, D) on k (B, Sk, Hkv, D) and v (B, Sk, Hkv, Dv): out (B, Sq, Hq, Dv).

    Args:
        s_aux: (Hq,) natural-log sink logits, or None.
        deterministic: True asks for bit-exact gradients; False leaves it to torch's global setting.
        Others: see ``attention_sink``.

    Raises:
        ValueError, TypeError: as ``attention_sink``; and for dropout, alibi_slopes and return_attn_probs.
    """
    _refuse(dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None), return_attn_probs=(return_attn_probs, False))
    return attention_sink(
        q, k, v, s_aux,
        causal=causal, window_size=_ints(window_size), softmax_scale=softmax_scale, softcap=softcap,
        deterministic=deterministic or None,
    )  # fmt: skip


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor | None = None,
    max_seqlen_k: int | Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    s_aux: Tensor | None = None,
) -> Tensor:
    """Packed rows q (Tq, Hq, D), k (Tk, Hkv, D), v (Tk, Hkv, Dv) with int32 cu_seqlens (N + 1,): out (Tq, Hq, Dv).

    ``max_seqlen_*`` are accepted but not needed. Raises as ``flash_attn_func``, and for a block_table.
    """
    _refuse(
        dropout_p=(dropout_p, 0.0), alibi_slopes=(alibi_slopes, None),
        return_attn_probs=(return_attn_probs, False), block_table=(block_table, None),
    )  # fmt: skip
    return attention_sink(
        q, k, v, s_aux,
        causal=causal, window_size=_ints(window_size), softmax_scale=softmax_scale, softcap=softcap,
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        deterministic=deterministic or None,
    )  # fmt: skip


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q (B, Sq, Hq, D) on the keys in use of a cache k_cache (B, Sc, Hkv, D), v_cache (B, Sc, Hkv, Dv).

    Given k (B, Snew, Hkv, D) and v (B, Snew, Hkv, Dv), they are first written **in place** into the slots behind
    ``cache_seqlens``, which the caller then advances by Snew; there is no synchronisation with the device.

    Args:
        cache_seqlens: keys in use before the call: int32 (B,), or an int for all rows. None = all Sc (without k, v).
        cache_batch_idx: int32 (B,), each row's place in caches of another batch size.
        cache_leftpad: int32 (B,), slots before a row's first key; they count in ``cache_seqlens``.
        block_table: int32 (B, n): the caches are pages (pages, page size, Hkv, D or Dv), any page size, and these are
            each row's, in order; Sc = n * page size.
        rotary_interleaved, num_splits: accepted without effect; rotary embeddings are refused.

    Returns:
        out (B, Sq, Hq, Dv); or (out, lse (B, Hq, Sq)) if ``return_softmax_lse``.

    Raises:
        ValueError, TypeError: as ``attention_sink``; for rotary_* and alibi_slopes; for k without v or without
            cache_seqlens; for cache_batch_idx beside a block_table. New keys that do not fit the cache raise IndexError
            on a CPU and fail a device-side assertion on a GPU.
    """
    _refuse(
        rotary_cos=(rotary_cos, None), rotary_sin=(rotary_sin, None), alibi_slopes=(alibi_slopes, None),
    )  # fmt: skip
    if cache_batch_idx is not None:
        if block_table is not None:
            raise ValueError("cache_batch_idx must be None where block_table is given, got a tensor")
        if cache_batch_idx.shape != q.shape[:1] or cache_batch_idx.dtype != torch.int32:
            raise ValueError(
                f"cache_batch_idx must be int32 (B,) = ({q.shape[0]},), got {tuple(cache_batch_idx.shape)} "
                f"{cache_batch_idx.dtype}"
            )
        block_table = cache_batch_idx[:, None]  # a row is a page
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((q.shape[0],), cache_seqlens, dtype=torch.int32, device=q.device)
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given or both be None, got one")
    if k is not None:
        if cache_seqlens is None:
            raise ValueError("cache_seqlens must be given where k and v are appended to the cache, got None")
        cache_seqlens = _append(k_cache, v_cache, k, v, cache_seqlens, block_table)
    return attention_sink(
        q, k_cache, v_cache, s_aux,
        causal=causal, window_size=_ints(window_size), softmax_scale=softmax_scale, softcap=softcap,
        seqused_k=cache_seqlens, leftpad_k=cache_leftpad, block_table=block_table, return_lse=return_softmax_lse,
    )  # fmt: skip


def _ints(window_size) -> object:
    """window_size as a tuple of ints. flash-attn's bindings take any sequence, tensor or array, and numpy's ints."""
    if hasattr(window_size, "tolist"):
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)):
        return window_size  # attention_sink says what it must be
    return tuple(side.item() if hasattr(side, "item") else side for side in window_size)


def _append(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None
) -> Tensor:
    """Write k and v into the caches behind ``cache_seqlens`` (B,); return the new number of keys in use (B,)."""
    batch = k_cache.shape[0] if block_table is None else block_table.shape[0]
    for name, new, cache in (("k", k, k_cache), ("v", v, v_cache)):
        if new.dim() != 4 or new.shape[0] != batch or new.shape[2:] != cache.shape[2:]:
            expected = (batch, "Snew", *cache.shape[2:])
            raise ValueError(f"{name} must be {expected} to fit {name}_cache, got {tuple(new.shape)}")
        if new.dtype != cache.dtype:
            raise TypeError(f"{name} must have {name}_cache's dtype {cache.dtype}, got {new.dtype}")
    if v.shape[1] != k.shape[1]:
        raise ValueError(f"v must have k's {k.shape[1]} new keys, got {v.shape[1]}")
    if cache_seqlens.dtype != torch.int32 or tuple(cache_seqlens.shape) != (k.shape[0],):
        raise ValueError(
            f"cache_seqlens must be an int or int32 (B,) = ({k.shape[0]},), got {tuple(cache_seqlens.shape)} "
            f"{cache_seqlens.dtype}"
        )
    tensors = (k_cache, v_cache, k, v)
    if k_cache.is_cuda and not traced(*tensors) and not any(x.requires_grad for x in tensors) and _has_triton():
        from .implementations.triton_decode.append import append_keys

        append_keys(*tensors, cache_seqlens, block_table)
        return cache_seqlens + k.shape[1]
    row = torch.arange(k.shape[0], device=k.device)[:, None]
    slot = cache_seqlens[:, None] + torch.arange(k.shape[1], device=k.device)
    if block_table is not None:
        page_size = k_cache.shape[1]
        row, slot = block_table[row, slot // page_size], slot % page_size
        if row.numel() and readable(row) and int(row.min()) < 0:  # which an index would count from the end
            raise IndexError(f"block_table must name a page for every new key, got {int(row.min())}")
    k_cache[row, slot] = k
    v_cache[row, slot] = v
    return cache_seqlens + k.shape[1]


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _refuse(**arguments: tuple[object, object]) -> None:
    """Raise for the first argument with an unsupported value. Each is name=(value, the only supported value)."""
    for name, (value, supported) in arguments.items():
        if value is supported or (not isinstance(value, Tensor) and value == supported):
            continue
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise ValueError(f"{name} must be {supported!r}, got {shown}: attention_sink has no such feature")
