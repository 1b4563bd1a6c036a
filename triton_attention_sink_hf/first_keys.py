"""``first_keys_attention``: a causal window, and beside it the first keys of each row (StreamingLLM)."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import attention_sink
from .merge import merge_attention
from .validation import check_window


def first_keys_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    first_keys: int,
    window_size: tuple[int, int],
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact causal attention to a window and to the first keys of a row or packed segment, each key counted once.

    Two calls of ``attention_sink``, merged by their lse: the window, with the sinks, by its own kernels, and the first
    keys that lie before the window. Differentiable in q, k, v, sinks and through lse.

    Args:
        first_keys: n >= 0 keys at the start that every query sees beside its window, if they are not after it. They are
            counted from the first slot that ``leftpad_k`` leaves, and from there on from the first real key of
            ``key_padding_mask``; padding among them is counted and stays hidden.
        window_size: (left, 0), left >= 0.
        All others: see ``attention_sink``.

    Raises:
        ValueError, TypeError: an argument that cannot be honoured.
    """
    if isinstance(first_keys, bool) or not isinstance(first_keys, int):
        raise TypeError(f"first_keys must be an int, got {first_keys!r}")
    if first_keys < 0:
        raise ValueError(f"first_keys must be >= 0, got {first_keys}")
    check_window(window_size)
    left, right = window_size
    if left < 0 or right != 0:
        raise ValueError(f"window_size must be (left, 0) with left >= 0, got {window_size!r}")
    options = dict(
        softmax_scale=softmax_scale, softcap=softcap, deterministic=deterministic, implementation=implementation
    )
    masks = dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, key_padding_mask=key_padding_mask, seqused_k=seqused_k,
        leftpad_k=leftpad_k,
    )  # fmt: skip
    window = attention_sink(q, k, v, sinks, window_size=(left, 0), return_lse=True, **masks, **options)
    if all(x is None for x in masks.values()):
        # Keys before a window are those up to left + 1 before the query: a right edge, once k ends after them.
        seqlen = k.shape[1]
        n = min(first_keys, seqlen - left - 1)
        parts = n > 0
        if parts:
            edge = (-1, seqlen - n - left - 1)
            first = attention_sink(q, k[:, :n], v[:, :n], causal=False, window_size=edge, return_lse=True, **options)
    else:
        parts = first_keys > 0
        if parts:
            ranges = _ranges_before_windows(q, k, first_keys, left, **masks)
            first = attention_sink(q, k, v, causal=False, key_ranges=ranges, return_lse=True, **masks, **options)
    out, lse = merge_attention(*zip(window, first, strict=True)) if parts else window
    return (out, lse) if return_lse else out


def _ranges_before_windows(
    q: Tensor, k: Tensor, n: int, left: int, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k, leftpad_k
) -> Tensor:
    """key_ranges, int32 (B, Sq, 2) or packed (Tq, 2): the first ``n`` keys, up to each query's window."""
    rows_q, rows_k = q.shape[-3], k.shape[-3]
    i = torch.arange(rows_q, device=q.device, dtype=torch.int32)
    if cu_seqlens_q is not None:
        segment = torch.searchsorted(cu_seqlens_q[1:].contiguous(), i, right=True).clamp_max(cu_seqlens_q.shape[0] - 2)
        start = cu_seqlens_k[segment]
        position = i + cu_seqlens_k[segment + 1] - cu_seqlens_q[segment + 1]
    else:
        used = rows_k if seqused_k is None else seqused_k[:, None]
        position = (i + used - rows_q).expand(q.shape[0], rows_q)
        start = torch.zeros_like(position) if leftpad_k is None else leftpad_k[:, None].expand(position.shape)
    if key_padding_mask is not None:
        j = torch.arange(rows_k, device=q.device, dtype=torch.int32)
        real = torch.where(key_padding_mask, j, rows_k)
        next_real = real.flip(-1).cummin(-1).values.flip(-1)  # the first real key from each on
        next_real = torch.nn.functional.pad(next_real, (0, 1), value=rows_k)
        start = next_real.gather(-1, start.long())
    return torch.stack([start, torch.minimum(start + n, position - left)], -1).to(torch.int32)
