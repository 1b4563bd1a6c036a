"""The oracle: eager attention with sinks, any floating dtype (fp64 included), differentiable by plain autograd.

It builds the whole score matrix, so its memory grows with Sq * Sk. It is what the kernels are tested against and
what runs on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import Mask


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, mask: Mask, *, softmax_scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Exact attention with a sink in the softmax denominator.

    For a row with visible scores x_j and sink logit s (natural log, not scaled):
    lse = log(sum_j exp(x_j) + exp(s)), out = sum_j exp(x_j - lse) v_j.

    Args:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv). Packed rows: B = 1 and ``mask.cu_seqlens_*``.
        sinks: (Hq,) or None.
        mask: which keys a query sees.
        softmax_scale: factor on q.k. softcap: c > 0 replaces a score x by c * tanh(x / c).

    Returns:
        out (B, Sq, Hq, Dv) in q's dtype and lse (B, Hq, Sq), fp64 for fp64 inputs, else fp32. Both contiguous.
    """
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        with torch.autocast(q.device.type, enabled=False):  # which would round the scores
            return reference_attention(q, k, v, sinks, mask, softmax_scale=softmax_scale, softcap=softcap)
    B, Sq, Hq, _ = q.shape
    Sk, Hkv, Dv = v.shape[1:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    grouped = q.to(dtype).unflatten(2, (Hkv, Hq // Hkv))
    scores = torch.einsum("bihgd,bjhd->bhgij", grouped, k.to(dtype)).reshape(B, Hq, Sq, Sk) * softmax_scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask.dense(Sq, Sk, q.device)[:, None], float("-inf"))
    if sinks is not None:
        sink_column = sinks.to(dtype)[None, :, None, None].expand(B, Hq, Sq, 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    elif Sk == 0:
        scores = scores.new_full((B, Hq, Sq, 1), float("-inf"))
    # The shift by the maximum cancels, so it carries no gradient. A row without any finite logit keeps Z = 0.
    m = scores.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == float("-inf"), 0.0)
    weights = torch.exp(scores - m)
    z = weights.sum(-1, keepdim=True)
    empty = z == 0
    z = z.masked_fill(empty, 1.0)
    lse = (m + torch.log(z)).masked_fill(empty, float("-inf")).squeeze(-1)
    p = (weights / z)[..., :Sk].reshape(B, Hkv, Hq // Hkv, Sq, Sk)
    out = torch.einsum("bhgij,bjhd->bihgd", p, v.to(dtype)).reshape(B, Sq, Hq, Dv)
    # parts of one tensor, as of one kernel: a loss through either reaches every input, with zeros if need be
    out, lse = torch.cat([out, lse.transpose(1, 2)[..., None]], -1).split([Dv, 1], -1)
    return out.to(q.dtype).contiguous(), lse.squeeze(-1).transpose(1, 2).contiguous()
