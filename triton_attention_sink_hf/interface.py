"""``attention_sink``: the one public function. It validates, chooses an implementation, and calls it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from .call import Call, Tensors, memo_of, traced
from .implementations import CACHES, KERNELS, REFERENCE, fastest, unsupported_reason
from .reference import reference_attention
from .token_sinks import join_token_sinks
from .tracing import constant_result
from .validation import check_options, check_tensors, check_token_sinks, readable


@dataclass(frozen=True)
class Explanation:
    """Which implementation serves a call, and why each of the others does not.

    Attributes:
        implementation: the name that ``implementation="auto"`` takes.
        reasons: name -> None if it could serve the call, else the reason why not; in the order that "auto" asks.
    """

    implementation: str
    reasons: dict[str, str | None]

    def __str__(self) -> str:
        lines = [f"{self.implementation} serves this call"]
        lines += [f"  {name}: {reason or 'supported'}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@overload
def attention_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    key_padding_mask: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    leftpad_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    key_ranges: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[False] = ...,
    implementation: str = ...,
) -> Tensor: ...
@overload
def attention_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    key_padding_mask: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    leftpad_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    key_ranges: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: Literal[True],
    implementation: str = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def attention_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    softmax_scale: float | None = ...,
    softcap: float = ...,
    cu_seqlens_q: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    max_seqlen_q: int | None = ...,
    max_seqlen_k: int | None = ...,
    key_padding_mask: Tensor | None = ...,
    seqused_k: Tensor | None = ...,
    leftpad_k: Tensor | None = ...,
    block_table: Tensor | None = ...,
    key_ranges: Tensor | None = ...,
    deterministic: bool | None = ...,
    return_lse: bool,
    implementation: str = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def attention_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    key_ranges: Tensor | None = None,
    deterministic: bool | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention with one learned sink logit per query head, differentiable in q, k, v, sinks and through lse.

    For a query row with visible scores x_j = softmax_scale * q.k_j and sink logit s (natural log, unscaled):
    lse = log(sum_j exp(x_j) + exp(s)) and out = sum_j exp(x_j - lse) v_j. A row that sees no key gives out = 0 and
    lse = s (-inf without a sink).

    Args:
        q: (B, Sq, Hq, D), or packed (Tq, Hq, D) with ``cu_seqlens_*``; bf16, fp16, fp32 (fp64: reference only).
        k: (B, Sk, Hkv, D) or (Tk, Hkv, D); Hq is a multiple of Hkv. Any strides.
        v: (B, Sk, Hkv, Dv) or (Tk, Hkv, Dv). D and Dv: from 1 to 512; multiples of 8 from 16 to 256 are fast.
            Packed q, k and v may all have a leading dimension of 1. Then the results have it too.
        sinks: (Hq,), any floating dtype; None = no sink. Or one per token, of lse's shape, (B, Hq, Sq) or packed
            (Hq, Tq): two more elementwise passes over out and lse.
        causal: hide keys after the query's position; aligned bottom-right if Sq != Sk.
        window_size: (left, right) keys beside the query's position, -1 = unlimited.
            Hugging Face's ``sliding_window=W`` is ``(W - 1, 0)``.
        softmax_scale: factor on the scores; default D ** -0.5.
        softcap: c > 0 replaces a score x by c * tanh(x / c).
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), first row of each packed segment, starting at 0. Rows past the
            last entry see nothing.
        max_seqlen_q, max_seqlen_k: accepted for flash-attn's callers; the kernels do not need them.
        key_padding_mask: bool (B, Sk), or packed (Tk,); True = real key.
        seqused_k: int32 (B,), keys in use of a longer cache; causality is aligned to them.
        leftpad_k: int32 (B,), hidden slots at the start of a cache, which count in seqused_k and in positions.
        block_table: int32 (B, n): k (pages, page size, Hkv, D) and v are pages, and these are each row's, in order.
            Entries for pages without a key in use may hold anything.
        key_ranges: int32 (B, Sq, 2), or packed (Tq, 2): the keys [first, last) that each query may see of those that
            causality, window, segments and padding leave it. Rows of k (packed: of the whole packed k; with a
            block_table: slots), clamped to those there are. Any order; an empty range sees nothing.
        deterministic: None follows ``torch.are_deterministic_algorithms_enabled()``.
        return_lse: also return lse, (B, Hq, Sq) or packed (Hq, Tq), fp32, natural log, sink included.
        implementation: "auto" (the fastest that supports the call) or a name, which then runs or raises.

    Returns:
        out (B, Sq, Hq, Dv) or (Tq, Hq, Dv) in q's dtype; or (out, lse).

    Raises:
        ValueError, TypeError: an argument that cannot be honoured, before any kernel starts.
    """
    q, k, v = follow_autocast(q, k, v)
    sinks, token_sinks = _split_sinks(sinks)
    tensors = (
        q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k, leftpad_k, block_table, key_ranges,
    )  # fmt: skip
    call = _prepare(tensors, (max_seqlen_q, max_seqlen_k), causal, window_size, softmax_scale, softcap, deterministic)
    check_token_sinks(token_sinks, call)
    if (block_table is not None or leftpad_k is not None) and not _read_in_place(call, implementation):
        k, v, key_padding_mask = _plain_cache(call)
        return attention_sink(
            q, k, v, sinks if token_sinks is None else token_sinks,
            causal=causal, window_size=window_size, softmax_scale=softmax_scale, softcap=softcap,
            key_padding_mask=key_padding_mask, seqused_k=seqused_k, key_ranges=key_ranges, deterministic=deterministic,
            return_lse=return_lse, implementation=implementation,
        )  # fmt: skip
    name = _choose(call, implementation)
    if name == REFERENCE:
        if implementation == "auto" and q.device.type not in ("cpu", "meta"):
            _warn_of_reference(q.device.type, unsupported_reason(KERNELS[-1], call))
        out, lse = reference_attention(
            call.q, call.k, call.v, sinks, call.mask, softmax_scale=call.softmax_scale, softcap=call.softcap
        )
    else:
        from .ops import attention_op

        out, lse = attention_op(call, name)
    if call.mask.packed and q.dim() == 3:
        out, lse = out.squeeze(0), lse.squeeze(0)
    if token_sinks is not None:
        out, lse = join_token_sinks(out, lse, token_sinks)
    return (out, lse) if return_lse else out


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    key_padding_mask: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    key_ranges: Tensor | None = None,
    deterministic: bool | None = None,
) -> Explanation:
    """Say which implementation ``attention_sink`` would take for these arguments, and why. Runs nothing."""
    q, k, v = follow_autocast(q, k, v)
    sinks, token_sinks = _split_sinks(sinks)
    tensors = (
        q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k, leftpad_k, block_table, key_ranges,
    )  # fmt: skip
    call = _prepare(tensors, (max_seqlen_q, max_seqlen_k), causal, window_size, softmax_scale, softcap, deterministic)
    check_token_sinks(token_sinks, call)
    reasons = {name: unsupported_reason(name, call) for name in (*KERNELS, REFERENCE)}
    return Explanation(fastest(call), reasons)


def _split_sinks(sinks: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Sinks per head, which kernels take, and sinks by token, which none does; one of them is None."""
    return (None, sinks) if isinstance(sinks, Tensor) and sinks.dim() > 1 else (sinks, None)


def _prepare(tensors: Tensors, max_seqlens: tuple, causal, window_size, softmax_scale, softcap, deterministic) -> Call:
    """Check the arguments, fill in the defaults, and give packed rows a batch dimension of 1.

    Args:
        tensors: in the order of ``Call.tensors``. max_seqlens: of queries and keys.
    """
    # On every call: 1, 1.0 and True hash alike, so the memo cannot tell them apart.
    check_options(causal, window_size, softmax_scale, softcap, deterministic)
    left, right = window_size[0], 0 if causal else window_size[1]
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    options = (left, right, softmax_scale, softcap, deterministic)
    memo = None
    if not traced(*tensors):
        memo = memo_of(tensors, (options, type(max_seqlens[0]), type(max_seqlens[1])))
    call = Call.join(tensors, options, memo)
    mask, packed = call.mask, call.mask.cu_seqlens_q is not None
    values = mask.cu_seqlens_q if packed else mask.seqused_k
    if values is None:
        values = mask.leftpad_k if call.block_table is None else call.block_table
    if memo is None or not memo.checked or (values is not None and readable(values)):
        check_tensors(call, max_seqlens)
        if memo is not None:
            memo.checked = True
    call.softmax_scale = float(call.q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    call.softcap = float(softcap)
    if packed:
        if call.q.dim() == 3:
            call.q, call.k, call.v = call.q.unsqueeze(0), call.k.unsqueeze(0), call.v.unsqueeze(0)
        if mask.key_padding_mask is not None:
            mask.key_padding_mask = mask.key_padding_mask.unsqueeze(0)
        if mask.key_ranges is not None:
            mask.key_ranges = mask.key_ranges.unsqueeze(0)
    return call


def follow_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Follow torch.autocast as scaled_dot_product_attention does: fp32, fp16 and bf16 go to the autocast dtype."""
    for x in tensors:
        if not isinstance(x, Tensor):
            return tensors
    device = tensors[0].device.type
    # torch.amp.is_autocast_available would say which devices know autocast, but torch 2.11 cannot compile it
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    lower = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(x.to(dtype) if x.dtype in lower else x for x in tensors)


def _choose(call: Call, implementation: str) -> str:
    """A name; or "auto", where the operator is to choose among the kernels."""
    if not isinstance(implementation, str):
        raise TypeError(f"implementation must be a str, got {implementation!r}")
    if call.memo is None:
        return _find(call, implementation)
    name = call.memo.implementations.get(implementation)
    if name is None:
        name = call.memo.implementations[implementation] = _find(call, implementation)
    return name


def _read_in_place(call: Call, implementation: str) -> bool:
    """Whether a kernel reads the call's pages and left padding. It has no gradient."""
    tensors = (call.q, call.k, call.v, call.sinks)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    return implementation in ("auto", CACHES) and _choose(call, implementation) == CACHES


def _plain_cache(call: Call) -> tuple[Tensor, Tensor, Tensor | None]:
    """k, v (B, Sk, Hkv, D) and key_padding_mask (B, Sk) that say what pages and left padding do, for the
    implementations that know neither. Differentiable. Slots that hold no key, perhaps NaN, become 0."""
    k, v, real = call.k, call.v, call.mask.key_padding_mask
    if call.block_table is not None:
        table = call.block_table.long().clamp(0, max(k.shape[0] - 1, 0))
        k, v = k[table].flatten(1, 2), v[table].flatten(1, 2)
    slot = torch.arange(k.shape[1], device=k.device)
    kept = torch.ones(k.shape[0], k.shape[1], dtype=torch.bool, device=k.device)
    if call.mask.leftpad_k is not None:
        kept = slot >= call.mask.leftpad_k[:, None]
        real = kept if real is None else real & kept
    if call.mask.seqused_k is not None:
        kept = kept & (slot < call.mask.seqused_k[:, None])
    k, v = (x.where(kept[:, :, None, None], 0.0) for x in (k, v))
    return k, v, real


_WARNED = set()


@constant_result
def _warn_of_reference(device: str, reason: str) -> None:
    """Once for each reason."""
    if (device, reason) in _WARNED:
        return
    _WARNED.add((device, reason))
    warnings.warn(
        f"no kernel of attention_sink serves a call on {device}: {reason}. The reference does, whose memory and time "
        "grow with Sq * Sk. implementation='triton' makes this an error; explain(...) gives every kernel's reason",
        stacklevel=3,
    )


def _find(call: Call, implementation: str) -> str:
    names = (*KERNELS, REFERENCE)
    if implementation == "auto":
        if call.memo is not None:
            return fastest(call)
        if call.block_table is not None or call.mask.leftpad_k is not None:
            return CACHES if unsupported_reason(CACHES, call, automatic=True) is None else REFERENCE
        # Traced: the operator chooses, since sizes that are compared here would become guards, and more graphs.
        return "auto" if unsupported_reason(KERNELS[-1], call, automatic=True) is None else REFERENCE
    if implementation not in names:
        raise ValueError(f"implementation must be one of {('auto', *names)}, got {implementation!r}")
    reason = unsupported_reason(implementation, call)
    if reason is not None:
        raise ValueError(f"implementation must be one that supports this call, got {implementation!r}: {reason}")
    return implementation
