"""``merge_attention``: attention over disjoint sets of keys, joined exactly by their lse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .call import traced


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from attention over each set.

    lse = log(sum_i exp(lse_i)) and out = sum_i exp(lse_i - lse) out_i, in fp32 and differentiable through both. A part
    that sees no key (lse_i = -inf) adds nothing; where no part does, out = 0 and lse = -inf. Give a sink to exactly one
    of the parts, because each sink is one more logit.

    Args:
        outs: (B, S, H, Dv) or packed (T, H, Dv), of one shape and dtype; as ``attention_sink`` returns them.
        lses: (B, H, S) or packed (H, T), fp32 (fp64 for fp64 parts), with ``return_lse=True``.

    Returns:
        out in the parts' dtype, and lse.

    Raises:
        ValueError, TypeError: parts that do not fit each other.
    """
    _check(outs, lses)
    packed = outs[0].dim() == 3
    if len(outs) == 2 and outs[0].is_cuda and outs[0].dtype != torch.float64 and not traced(*outs, *lses):
        from .implementations import load_merge

        merge = load_merge()
        if merge is not None:
            if not packed:
                return merge(*outs, *lses)
            out, lse = merge(*(x.unsqueeze(0) for x in (*outs, *lses)))
            return out.squeeze(0), lse.squeeze(0)
    stacked = torch.stack(tuple(lses))
    # the shift by the maximum cancels, so it carries no gradient
    top = stacked.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(stacked - top)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (top + torch.log(total)).masked_fill(empty, float("-inf"))
    weights = (weights / total).transpose(-1, -2).unsqueeze(-1)  # rows before heads, as outs have them
    out = sum(weight * x.to(weight.dtype) for weight, x in zip(weights, outs, strict=True))
    return out.to(outs[0].dtype), lse


def _check(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> None:
    if not outs or len(outs) != len(lses):
        raise ValueError(f"outs and lses must be of one length, at least 1, got {len(outs)} and {len(lses)}")
    for name, parts in (("outs", outs), ("lses", lses)):
        for x in parts:
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be tensors, got {type(x).__name__}")
    shape, dtype = outs[0].shape, outs[0].dtype
    if len(shape) not in (3, 4):
        raise ValueError(f"outs must be (B, S, H, Dv) or (T, H, Dv), got shape {tuple(shape)}")
    wanted = (*shape[:-3], shape[-2], shape[-3])
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for out, lse in zip(outs, lses, strict=True):
        if out.shape != shape or out.dtype != dtype:
            raise ValueError(f"outs must be {tuple(shape)} {dtype} as the first, got {tuple(out.shape)} {out.dtype}")
        if lse.shape != wanted or lse.dtype != lse_dtype:
            raise ValueError(f"lses must be {wanted} {lse_dtype}, got {tuple(lse.shape)} {lse.dtype}")
