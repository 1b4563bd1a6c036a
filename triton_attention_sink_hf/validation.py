"""Checks that hold for every implementation. They only raise; limits of one backend live in its ``supports``."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from .call import Call

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
MAX_HEAD_DIM = 512
CHECK_VARIABLE = "TRITON_ATTENTION_SINK_CHECK"


def check_options(
    causal: bool,
    window_size: tuple[int, int],
    softmax_scale: float | None,
    softcap: float,
    deterministic: bool | None,
) -> None:
    """Raise TypeError or ValueError, "NAME must be X, got Y", for an option that no implementation could honour."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic must be a bool, got {deterministic!r}")
    check_window(window_size)
    if softmax_scale is not None:
        _check_number("softmax_scale", softmax_scale)
    _check_number("softcap", softcap)
    if softcap < 0:
        raise ValueError(f"softcap must be >= 0, got {softcap}")


def check_tensors(call: Call, max_seqlens: tuple[int | Tensor | None, int | Tensor | None]) -> None:
    """The same for the tensors: how they are laid out, and where they are ``readable`` the values of a mask.

    ``call``: packed rows as they were given, perhaps without a batch dimension. ``max_seqlens``: of queries and keys.
    """
    (
        q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k, leftpad_k, block_table, key_ranges,
    ) = call.tensors()  # fmt: skip
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed and all(isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] == 1 for x in (q, k, v)):
        q, k, v = q[0], k[0], v[0]
    check_qkv(q, k, v, packed, paged=block_table is not None)
    device = q.device
    if sinks is not None:
        heads = q.shape[-2]
        _check_logits(sinks, device)
        if sinks.shape != (heads,):
            hint = _layout_hint(q, k) if sinks.shape == (q.shape[-3],) else ""
            raise ValueError(f"sinks must be (Hq,) = ({heads},), got {tuple(sinks.shape)}{hint}")
    if packed:
        for name, value in (("seqused_k", seqused_k), ("leftpad_k", leftpad_k), ("block_table", block_table)):
            if value is not None:
                raise ValueError(f"{name} must be None for packed rows (cu_seqlens_q, cu_seqlens_k), got a tensor")
        _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, *max_seqlens)
    if block_table is not None:
        _check_block_table(block_table, q, k)
        if key_padding_mask is not None:
            raise ValueError("key_padding_mask must be None where block_table is given, got a mask: use leftpad_k")
    if key_padding_mask is not None:
        _check_tensor("key_padding_mask", key_padding_mask, device)
        if key_padding_mask.dtype != torch.bool:
            raise TypeError(f"key_padding_mask must be torch.bool (True = real token), got {key_padding_mask.dtype}")
        if key_padding_mask.shape != k.shape[:-2]:
            wanted = f"(T,) = ({k.shape[0]},)" if packed else f"(B, Sk) = ({k.shape[0]}, {k.shape[1]})"
            swapped = not packed and tuple(key_padding_mask.shape) == (k.shape[0], k.shape[2])
            hint = _layout_hint(q, k) if swapped else ""
            raise ValueError(f"key_padding_mask must be {wanted}, got {tuple(key_padding_mask.shape)}{hint}")
    if key_ranges is not None:
        _check_int32("key_ranges", key_ranges, device)
        if key_ranges.shape != (*q.shape[:-2], 2):
            wanted = "(Tq, 2)" if packed else "(B, Sq, 2)"
            raise ValueError(f"key_ranges must be {wanted} = {(*q.shape[:-2], 2)}, got {tuple(key_ranges.shape)}")
    for name, lengths in (("seqused_k", seqused_k), ("leftpad_k", leftpad_k)):
        if lengths is None:
            continue
        batch, seqlen_k = q.shape[0], call.seqlen_k
        _check_int32_vector(name, lengths, device)
        if lengths.shape[0] != batch:
            raise ValueError(f"{name} must be (B,) = ({batch},), got {tuple(lengths.shape)}")
        if batch and readable(lengths):
            low, high = int(lengths.min()), int(lengths.max())
            if low < 0 or high > seqlen_k:
                raise ValueError(f"{name} must be between 0 and Sk = {seqlen_k}, got {low}..{high}")
    if block_table is not None and readable(block_table):
        _check_pages(call)


def check_token_sinks(sinks: Tensor | None, call: Call) -> None:
    """The same for sinks by token, which are no part of ``call``; packed rows have their batch dimension of 1."""
    if sinks is None:
        return
    _check_logits(sinks, call.q.device)
    batch, seqlen, heads = call.q.shape[:3]
    shape, layout = ((heads, seqlen), "(Hq, Tq)") if call.mask.packed else ((batch, heads, seqlen), "(B, Hq, Sq)")
    if sinks.shape != shape:
        raise ValueError(f"sinks must be (Hq,) = ({heads},) or {layout} = {shape}, got {tuple(sinks.shape)}")


def _check_logits(sinks: object, device: torch.device) -> None:
    _check_tensor("sinks", sinks, device)
    if not sinks.is_floating_point():
        raise TypeError(f"sinks must be a floating dtype, got {sinks.dtype}")


def _check_tensor(name: str, value: object, device: torch.device | None = None) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if hasattr(value, "placements"):  # not imported for an isinstance: torch.distributed.tensor is large
        raise TypeError(
            f"{name} must be a plain tensor, got a DTensor with placements {value.placements}: pass this rank's part "
            "(to_local()), or full_tensor() and see to its gradient, which ranks do not share"
        )
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on q's device {device}, got {value.device}")


def check_qkv(q: Tensor, k: Tensor, v: Tensor, packed: bool, paged: bool = False) -> None:
    """The part of ``check_tensors`` that concerns q, k and v alone: dtypes, devices, shapes, heads."""
    _check_tensor("q", q)
    dtype, device, dims = q.dtype, q.device, 3 if packed else 4
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not q:
            _check_tensor(name, x, device)
        if x.dtype not in DTYPES:
            raise TypeError(f"{name} must be bfloat16, float16, float32 or float64, got {x.dtype}")
        if x.dtype != dtype:
            raise TypeError(f"{name} must have q's dtype {dtype}, got {x.dtype}")
        if x.dim() != dims:
            layout = "(T, H, D) or (1, T, H, D) with cu_seqlens" if packed else "(B, S, H, D)"
            raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    for name, size in (("q", q_shape[-1]), ("v", v_shape[-1])):
        if size < 1 or size > MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head dimension must be from 1 to {MAX_HEAD_DIM}, got {size}")
    if k_shape[-1] != q_shape[-1]:
        raise ValueError(f"k's head dimension must be q's {q_shape[-1]}, got {k_shape[-1]}")
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(f"v must be {tuple(k_shape[:-1])} + (Dv,) as k, got {tuple(v_shape)}")
    if not packed and not paged and k_shape[0] != q_shape[0]:
        raise ValueError(f"k's batch must be q's {q_shape[0]}, got {k_shape[0]}")
    heads_q, heads_k = q_shape[-2], k_shape[-2]
    if heads_q == 0 or heads_k == 0 or heads_q % heads_k:
        hint = _layout_hint(q, k) if q_shape[-3] < heads_q else ""
        raise ValueError(f"q's heads must be a multiple of k's heads, got {heads_q} and {heads_k}{hint}")


def _check_block_table(block_table: object, q: Tensor, k: Tensor) -> None:
    _check_int32("block_table", block_table, q.device)
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise ValueError(f"block_table must be (B, n) with B = {q.shape[0]}, got {tuple(block_table.shape)}")
    if block_table.numel() and not k.shape[0]:
        raise ValueError(f"k must have pages where block_table names some, got shape {tuple(k.shape)}")


def _check_pages(call: Call) -> None:
    """Entries for pages without a key in use may hold anything."""
    mask, pages, page_size = call.mask, *call.k.shape[:2]
    first = torch.arange(call.block_table.shape[1], device=call.q.device) * page_size
    in_use = torch.ones_like(call.block_table, dtype=torch.bool)
    if mask.seqused_k is not None:
        in_use &= first < mask.seqused_k[:, None]
    if mask.leftpad_k is not None:
        in_use &= first + page_size > mask.leftpad_k[:, None]
    named = call.block_table[in_use]
    if named.numel() and (int(named.min()) < 0 or int(named.max()) >= pages):
        raise ValueError(
            f"block_table must name pages from 0 to {pages - 1} where keys are in use, got "
            f"{int(named.min())}..{int(named.max())}"
        )


def _layout_hint(q: Tensor, k: Tensor) -> str:
    """What an error adds if the shapes would make sense with heads before tokens, as scaled_dot_product_attention has
    them."""
    heads_q, heads_k = q.shape[-3], k.shape[-3]
    if heads_q == 0 or heads_k == 0 or heads_q % heads_k:
        return ""
    if q.dim() == 3:
        return f"; q {tuple(q.shape)} looks like (H, T, D), and must be (T, H, D): transpose(0, 1)"
    return f"; q {tuple(q.shape)} looks like (B, H, S, D), and must be (B, S, H, D): transpose(1, 2)"


def check_window(window_size: tuple[int, int]) -> None:
    """Raise unless ``window_size`` is a pair of ints >= -1."""
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
    for side in window_size:
        if isinstance(side, bool) or not isinstance(side, (int, torch.SymInt)):
            raise TypeError(f"window_size must be a pair of ints, got {window_size!r}")
        if side < -1:
            raise ValueError(f"window_size must be >= -1 on both sides (-1 = unlimited), got {window_size!r}")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if isinstance(value, (int, float)) and not -math.inf < value < math.inf:  # torch.compile cannot trace math.isfinite
        raise ValueError(f"{name} must be finite, got {value}")


def _check_int32(name: str, value: object, device: torch.device) -> None:
    _check_tensor(name, value, device)
    if value.dtype != torch.int32:
        raise TypeError(f"{name} must be torch.int32, got {value.dtype}")


def _check_int32_vector(name: str, value: object, device: torch.device) -> None:
    _check_int32(name, value, device)
    if value.dim() != 1:
        raise ValueError(f"{name} must have one dimension, got shape {tuple(value.shape)}")


def _check_cu_seqlens(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) -> None:
    sides = (("q", cu_seqlens_q, q.shape[0], max_seqlen_q), ("k", cu_seqlens_k, k.shape[0], max_seqlen_k))
    for side, cu, total, max_seqlen in sides:
        name = f"cu_seqlens_{side}"
        if cu is None:
            raise ValueError(f"{name} must be given when the other cu_seqlens is, got None")
        _check_int32_vector(name, cu, q.device)
        if cu.numel() < 2:
            raise ValueError(f"{name} must be (N + 1,) with N >= 1, got {tuple(cu.shape)}")
        if max_seqlen is not None and (
            isinstance(max_seqlen, bool) or not isinstance(max_seqlen, (int, torch.SymInt, Tensor))
        ):
            raise TypeError(f"max_seqlen_{side} must be an int, got {max_seqlen!r}")
        if not readable(cu):
            continue
        lengths = cu.diff()
        if int(cu[0]) != 0:
            raise ValueError(f"{name} must start at 0, got {int(cu[0])}")
        if bool((lengths < 0).any()):
            raise ValueError(f"{name} must not decrease, got {cu.tolist()[:16]}")
        if int(cu[-1]) > total:
            hint = _layout_hint(q, k) if int(cu[-1]) == (q if side == "q" else k).shape[1] else ""
            raise ValueError(f"{name} must end at or before T = {total}, got {int(cu[-1])}{hint}")
        if max_seqlen is not None and int(max_seqlen) < int(lengths.max()):
            raise ValueError(f"max_seqlen_{side} must be >= the longest segment {int(lengths.max())}, got {max_seqlen}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must have cu_seqlens_q's shape {tuple(cu_seqlens_q.shape)}, got {tuple(cu_seqlens_k.shape)}"
        )


def readable(x: Tensor) -> bool:
    """Whether reading x's values costs no device synchronisation, or the user asked for the checks anyway."""
    if torch.compiler.is_compiling():
        return False
    return x.device.type == "cpu" or os.environ.get(CHECK_VARIABLE) == "1"
