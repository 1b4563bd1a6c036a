"""Sinks that differ by token, from attention without a sink and its lse. No kernel knows of them."""

from __future__ import annotations

import torch
from torch import Tensor


def join_token_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse of attention, as if sinks had been in its softmax: a sink scales its row by sigmoid(lse - sink).

    exp(x_j - lse') = exp(x_j - lse) exp(lse - lse'), with lse' = logaddexp(lse, sink). Exact, and differentiable in all
    three.

    Args:
        out: (B, Sq, Hq, Dv) or packed (Tq, Hq, Dv). lse: (B, Hq, Sq) or (Hq, Tq), natural log.
        sinks: lse's shape, any floating dtype, natural-log logits; -inf = no sink.

    Returns:
        out in its dtype, lse in its dtype.
    """
    finite = sinks.to(lse.dtype).clamp_min(torch.finfo(lse.dtype).min)  # -inf minus -inf would be NaN
    kept = torch.sigmoid(lse - finite).transpose(-1, -2).unsqueeze(-1)
    joined = torch.where(sinks == float("-inf"), lse, torch.logaddexp(lse, finite))
    return (out * kept).to(out.dtype), joined
