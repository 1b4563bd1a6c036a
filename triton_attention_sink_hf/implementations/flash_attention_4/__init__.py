"""FlashAttention-4 (``pip install flash-attn-4``) by its public functions, which bring their own autograd.

Nothing of it is imported before a call that it could serve.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ...call import Call
from ..common.problem import target_name
from . import config

_ARGUMENTS = {
    "softmax_scale", "causal", "window_size", "learnable_sink", "softcap", "deterministic", "return_lse",
}  # fmt: skip
_SINK_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def supports(call: Call) -> str | None:
    """Why FlashAttention-4 cannot serve ``call``; None if it can."""
    q, k, mask = call.q, call.k, call.mask
    target = target_name(q.device)
    if target not in config.TARGETS:
        return f"FlashAttention-4 serves {', '.join(config.TARGETS)}, the cards on which it has sinks, got {target}"
    if call.memo is None:
        return "FlashAttention-4 has no operator that torch.compile and dispatch modes could trace"
    if call.block_table is not None or mask.leftpad_k is not None:
        return "only triton_decode reads block_table and leftpad_k; the others are given a gathered cache and a mask"
    if mask.key_ranges is not None:
        return "only the portable triton kernels and the reference take key_ranges"
    if mask.key_padding_mask is not None or mask.seqused_k is not None:
        return "FlashAttention-4 is called here without key_padding_mask and seqused_k"
    if call.softmax_scale <= 0.0:
        return f"FlashAttention-4 takes a positive softmax_scale, got {call.softmax_scale}"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"FlashAttention-4 takes bfloat16 or float16, got {q.dtype}"
    if not q.numel() or not k.numel():
        return "FlashAttention-4 is not asked for calls without queries or keys"
    return _shape_reason(call, target) or _absent()


def _shape_reason(call: Call, target: str) -> str | None:
    q, k, mask = call.q, call.k, call.mask
    dims = q.shape[-1], call.v.shape[-1]
    if any(size % 8 for size in dims):
        return f"FlashAttention-4 takes head dimensions that are multiples of 8, got {dims}"
    if max(dims) > 256:
        return f"FlashAttention-4 takes head dimensions up to 256, got {dims}"
    if target != "sm90" and max(dims) > 128 and dims not in ((192, 128), (256, 256)):
        return f"FlashAttention-4 takes head dimensions up to 128, (192, 128) and (256, 256) on {target}, got {dims}"
    if target != "sm90" and dims == (256, 256) and call.sinks is not None:
        return f"FlashAttention-4 has no gradient of sinks for head dimension 256 on {target}"
    if not mask.packed:
        if mask.right >= 0 and q.shape[1] > k.shape[1]:
            return "FlashAttention-4 is not asked for queries that see no key: more queries than keys"
        return None
    if mask.cu_seqlens_q is not mask.cu_seqlens_k or q.shape[1] != k.shape[1]:
        return "FlashAttention-4 is called for packed rows only with one cu_seqlens for queries and keys"
    entries, rows = mask.cu_seqlens_q.numel(), q.shape[1]
    if entries * config.ROWS_PER_ENTRY > max(rows, config.FREE_ROWS):
        return f"FlashAttention-4's workspace grows with cu_seqlens: {entries} entries are many for {rows} rows"
    return None


def slower_reason(call: Call) -> str | None:
    """Why "auto" leaves ``call`` to the kernels of this package; None if it takes FlashAttention-4."""
    q, mask, target = call.q, call.mask, target_name(call.q.device)
    if target in config.UNTUNED:
        return None
    for faster in config.FASTER:
        same = (target, (q.shape[-1], call.v.shape[-1]), mask.left >= 0, mask.packed) == (
            faster.target, faster.head_dims, faster.window, faster.packed,
        )  # fmt: skip
        if same and mask.right == 0 and not call.softcap and q.shape[1] >= faster.min_queries:
            return None
    return f"no measurement says that FlashAttention-4 is faster for such calls on {target}"


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) fp32; both differentiable, once."""
    dense, packed = _functions()
    mask, sinks = call.mask, call.sinks
    left, right = (None if side < 0 else side for side in (mask.left, mask.right))
    causal = right == 0
    options = {
        "softmax_scale": call.softmax_scale,
        "causal": causal,
        "window_size": (None, None) if causal and left is None else (left, right),
        "learnable_sink": sinks if sinks is None or sinks.dtype in _SINK_DTYPES else sinks.float(),
        "softcap": call.softcap,
        "deterministic": call.deterministic,
        "return_lse": True,
    }
    if not mask.packed:
        return dense(call.q, call.k, call.v, **options)
    # Rows past the last entry would be left unwritten. They become one more sample, and then see nothing.
    rows, cu = call.q.shape[1], mask.cu_seqlens_q
    cu_and_rest = torch.cat([cu, cu.new_full((1,), rows)])
    out, lse = packed(
        *(x.squeeze(0) for x in (call.q, call.k, call.v)), cu_seqlens_q=cu_and_rest, cu_seqlens_k=cu_and_rest, **options
    )
    own = torch.arange(rows, device=cu.device) < cu[-1]
    nothing = lse.new_tensor(float("-inf")) if sinks is None else sinks.to(lse.dtype)[:, None]
    return torch.where(own[:, None, None], out, 0).unsqueeze(0), torch.where(own, lse, nothing).unsqueeze(0)


@lru_cache
def _functions() -> tuple[Callable, Callable]:
    """flash_attn_func and flash_attn_varlen_func.

    Raises:
        ImportError: not installed, or a release without what ``attention`` needs.
    """
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    for function in (flash_attn_func, flash_attn_varlen_func):
        missing = _ARGUMENTS - inspect.signature(function).parameters.keys()
        if missing:
            raise ImportError(f"{function.__name__} has no {', '.join(sorted(missing))}")
    return flash_attn_func, flash_attn_varlen_func


@lru_cache
def _absent() -> str | None:
    """Why it cannot be called in this process; None if it can."""
    try:
        _functions()
    except Exception as error:  # the libraries below it raise what they like
        return f"FlashAttention-4 must be installed (pip install --pre flash-attn-4): {error}"
    return None
