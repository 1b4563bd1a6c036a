"""Stands in for flash_attn 2 and flash_attn.cute (4). Their references and helpers come from the checkout."""

from __future__ import annotations

from types import SimpleNamespace

import served
import torch
from torch import Tensor

from triton_attention_sink_hf import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

# --- flash-attn 2: the package's functions of the same names --------------------------------------------------------


def with_probs(function):
    """``function`` for callers that ask for (out, lse, probabilities), of which the tests use out, without dropout."""

    def call(*args, return_attn_probs: bool = False, **kwargs):
        out = function(*args, **kwargs)
        return (out, None, None) if return_attn_probs else out

    return call


def packed(function, values: int):
    """``function`` for callers with k and v (2 ``values``), or q, k and v (3), stacked before the heads."""
    if values == 2:
        return lambda q, kv, *args, **kwargs: function(q, *kv.unbind(-3), *args, **kwargs)
    return lambda qkv, *args, **kwargs: function(*qkv.unbind(-3), *args, **kwargs)


def varlen_qkvpacked(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args, **kwargs):
    return with_probs(flash_attn_varlen_func)(
        *qkv.unbind(-3), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs
    )


FLASH_ATTN_2 = {
    "flash_attn_func": with_probs(flash_attn_func),
    "flash_attn_kvpacked_func": packed(with_probs(flash_attn_func), 2),
    "flash_attn_qkvpacked_func": packed(with_probs(flash_attn_func), 3),
    "flash_attn_varlen_func": with_probs(flash_attn_varlen_func),
    "flash_attn_varlen_kvpacked_func": packed(with_probs(flash_attn_varlen_func), 2),
    "flash_attn_varlen_qkvpacked_func": varlen_qkvpacked,
    "flash_attn_with_kvcache": flash_attn_with_kvcache,
}

# --- flash-attn 4 ---------------------------------------------------------------------------------------------------


def cute_func(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float | None = None, causal: bool = False,
    window_size: tuple = (None, None), learnable_sink: Tensor | None = None, softcap: float = 0.0,
    num_splits: int = 1, pack_gqa: bool | None = None, deterministic: bool = False, return_lse: bool = False, **others,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flash_attn.cute.flash_attn_func. num_splits and pack_gqa choose among its kernels."""
    served.refuse(**others)
    return attended(q, k, v, learnable_sink, causal, window_size, softmax_scale, softcap, deterministic)


def cute_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    seqused_q: Tensor | None = None, seqused_k: Tensor | None = None, page_table: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, min_seqlen_k: int | None = None,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple = (None, None),
    learnable_sink: Tensor | None = None, softcap: float = 0.0, num_splits: int = 1, pack_gqa: bool | None = None,
    deterministic: bool = False, return_lse: bool = False, scheduler_metadata: object = None,
    disable_scheduler_metadata: bool = False, **others,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """flash_attn.cute.flash_attn_varlen_func. q and k may each be packed (cu_seqlens) or dense (seqused).

    Both packed, and dense with dense q in use to its end, are calls of attention_sink; else the dense rows are packed.
    """
    served.refuse(**others)
    options = (learnable_sink, causal, window_size, softmax_scale, softcap, deterministic)
    if cu_seqlens_q is None and cu_seqlens_k is None and seqused_q is None:
        return attended(q, k, v, *options, seqused_k=seqused_k, block_table=page_table)
    if page_table is not None:
        k, v = (pages[page_table.long()].flatten(1, 2) for pages in (k, v))
    real_q = None
    if cu_seqlens_q is None:
        q, real_q, cu_seqlens_q = rows_in_use(q, seqused_q)
    if cu_seqlens_k is None:
        v = rows_in_use(v, seqused_k)[0]
        k, _, cu_seqlens_k = rows_in_use(k, seqused_k)
    out, lse = attended(q, k, v, *options, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    if real_q is None:
        return out, lse
    dense_out, dense_lse = out.new_zeros(*real_q.shape, *out.shape[1:]), lse.new_zeros(*real_q.shape, lse.shape[0])
    dense_out[real_q], dense_lse[real_q] = out, lse.T
    return dense_out, dense_lse.transpose(1, 2)


def rows_in_use(x: Tensor, seqused: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of dense rows x (B, S, ...): those in use (T, ...), which they are (B, S), and their cu_seqlens (B + 1,)."""
    batch, seqlen = x.shape[:2]
    used = torch.full((batch,), seqlen, device=x.device) if seqused is None else seqused
    real = torch.arange(seqlen, device=x.device) < used[:, None]
    return x[real], real, torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).int()


def attended(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, causal: bool, window_size: tuple,
    softmax_scale: float | None, softcap: float, deterministic: bool, **rows,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, lse) of attention_sink. A side of ``window_size`` is None (all) or negative (not as far as the query)."""
    left, right = window_size
    if causal:
        right = 0
    if min(left or 0, right or 0) < 0:
        rows["key_ranges"] = ranges(q, k, left, right, rows)
        causal, left, right = False, None, None
    return served.attention_sink(
        q, k, v, sinks, causal=causal, window_size=tuple(-1 if side is None else side for side in (left, right)),
        softmax_scale=softmax_scale, softcap=softcap, deterministic=deterministic or None, return_lse=True, **rows,
    )  # fmt: skip


def ranges(q: Tensor, k: Tensor, left: int | None, right: int | None, rows: dict) -> Tensor:
    """The keys from ``left`` before each query's position to ``right`` behind it, as attention_sink's key_ranges."""
    cu_q, cu_k = rows.get("cu_seqlens_q"), rows.get("cu_seqlens_k")
    if cu_q is None:
        keys = k.shape[1] if rows.get("seqused_k") is None else rows["seqused_k"][:, None]
        at = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2]) + keys - q.shape[1]
        first, last = torch.zeros_like(at), torch.zeros_like(at) + keys
    else:
        row = torch.arange(q.shape[0], device=q.device)
        sample = (torch.searchsorted(cu_q, row.to(cu_q.dtype), right=True) - 1).clamp(0, len(cu_q) - 2)
        first, last = cu_k[sample], cu_k[sample + 1]
        at = row - cu_q[sample + 1] + last
    if left is not None:
        first = torch.maximum(first, at - left)
    if right is not None:
        last = torch.minimum(last, at + right + 1)
    return torch.stack([first, torch.maximum(first, last)], -1).int()


def private(name: str):
    """A function of flash-attn's that is no part of its interface."""

    def call(*args, **kwargs):
        raise NotImplementedError(f"{name} is private to flash-attn: attention_sink has no counterpart")

    return call


CUTE = {
    "flash_attn_func": cute_func,
    "flash_attn_varlen_func": cute_varlen_func,
    # what a schedule holds is its kernels' business; None is what the tests find in one for these calls
    "get_scheduler_metadata": lambda **call: SimpleNamespace(
        tile_count_semaphore=None, cu_total_m_blocks=call.get("cu_seqlens_q"), num_m_blocks_ptr=None
    ),
    **{
        name: private(name)
        for name in ("_flash_attn_fwd", "_flash_attn_bwd", "_flash_attn_bwd_sparse_mla", "_flash_attn_fwd_combine",
                     "flash_attn_combine")
    },
}  # fmt: skip

MODULES = {
    "flash_attn": FLASH_ATTN_2,
    "flash_attn.flash_attn_interface": {
        **FLASH_ATTN_2,
        "USE_TRITON_ROCM": False,
        "_get_block_size_n": private("_get_block_size_n"),
        "_flash_attn_varlen_forward": private("_flash_attn_varlen_forward"),
    },
    "flash_attn.cute": CUTE,
    "flash_attn.cute.interface": CUTE,
    "flash_attn.cute.cache_utils": {"JITCache": type("JITCache", (), {}), "get_jit_cache": private("get_jit_cache")},
}
