"""Attention with sinks written out twice more, without autograd and without the package: to hold the reference to.

``by_rows`` loops over batch rows, queries and heads in fp64, and decides one key at a time whether a query sees it.
``by_formula`` computes all rows at once, the gradients by the formulas of the backward. In fp64 it is the oracle of
random calls on a GPU, in fp32 with rounded operands their yardstick, each in some forty launches.
"""

from __future__ import annotations

import math

import torch
from cases import Case, Inputs
from torch import Tensor

from triton_attention_sink_hf import Mask

CHUNK = 2**25  # scores at once


def sees(mask: Mask, row: int, i: int, j: int, seqlen_q: int, seqlen_k: int) -> bool:
    """Whether query i of a batch row sees key j."""
    if mask.key_padding_mask is not None and not mask.key_padding_mask[row, j]:
        return False
    end_q, first_k, end_k = seqlen_q, 0, seqlen_k
    if mask.cu_seqlens_q is not None:
        cu_q, cu_k = mask.cu_seqlens_q.tolist(), mask.cu_seqlens_k.tolist()
        inside = [n for n in range(len(cu_q) - 1) if cu_q[n] <= i < cu_q[n + 1]]
        if not inside:
            return False
        end_q, first_k, end_k = cu_q[inside[0] + 1], cu_k[inside[0]], cu_k[inside[0] + 1]
    if mask.seqused_k is not None:
        end_k = int(mask.seqused_k[row])
    if not first_k <= j < end_k:
        return False
    if mask.leftpad_k is not None and j < int(mask.leftpad_k[row]):
        return False
    if mask.key_ranges is not None:
        first, last = mask.key_ranges[row, i].tolist()
        if not first <= j < last:
            return False
    distance = (end_k - 1 - j) - (end_q - 1 - i)  # the last query stands at the last key
    return (mask.left < 0 or distance <= mask.left) and (mask.right < 0 or -distance <= mask.right)


def by_rows(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """out, lse and the gradients in fp64, row by row."""
    q, k, v, dout = (x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout))
    batch, seqlen_q, heads = q.shape[:3]
    seqlen_k, group = k.shape[1], heads // k.shape[2]
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    out, lse = torch.zeros_like(dout, memory_format=torch.contiguous_format), dout.new_zeros(batch, heads, seqlen_q)
    dsink = q.new_zeros(heads)
    for b in range(batch):
        for i in range(seqlen_q):
            seen = [j for j in range(seqlen_k) if sees(inputs.mask, b, i, j, seqlen_q, seqlen_k)]
            for h in range(heads):
                keys, weights = k[b, seen, h // group], v[b, seen, h // group]
                x = case.scale * (keys @ q[b, i, h])
                slope = 1.0
                if case.softcap:
                    slope = 1.0 - torch.tanh(x / case.softcap) ** 2
                    x = case.softcap * torch.tanh(x / case.softcap)
                sink = -math.inf if inputs.sinks is None else float(inputs.sinks[h])
                top = max([sink, *x.tolist()])
                if top == -math.inf:
                    lse[b, h, i] = top
                    continue
                total = math.exp(sink - top) + sum(math.exp(score - top) for score in x.tolist())
                lse[b, h, i] = top + math.log(total)
                p = torch.exp(x - lse[b, h, i])
                out[b, i, h] = p @ weights
                dlse = 0.0 if inputs.dlse is None else inputs.dlse[b, h, i].double()
                dp = weights @ dout[b, i, h] + dlse  # of lse = log(sum of exp(x)), whose slopes are p
                carried = (p * (dp - dlse)).sum()
                ds = p * (dp - carried) * slope * case.scale
                dq[b, i, h] = ds @ keys
                dk[b, seen, h // group] += ds[:, None] * q[b, i, h]
                dv[b, seen, h // group] += p[:, None] * dout[b, i, h]
                dsink[h] += math.exp(sink - lse[b, h, i]) * (dlse - carried)
    results = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
    return results if inputs.sinks is None else results | {"dsink": dsink}


def by_formula(case: Case, inputs: Inputs, visible: Tensor, rounded: torch.dtype | None = None) -> dict[str, Tensor]:
    """out, lse and the gradients of all rows.

    Args:
        visible: bool (B or 1, Sq, Sk).
        rounded: None computes in fp64. A dtype: in fp32, and what feeds a matrix product is rounded to it.

    Returns:
        By name, in the precision of the computation. ``dsink terms`` (Hq, B * Sq): what dsink is the sum of.
    """
    dtype = torch.float64 if rounded is None else torch.float32
    heads_k = inputs.k.shape[2]
    group = inputs.q.shape[2] // heads_k
    at_once = max(1, CHUNK // max(visible.shape[-1] * visible.shape[-2] * inputs.q.shape[0] * group, 1))
    parts = []
    for first in range(0, heads_k, at_once):
        keys = slice(first, first + at_once)
        queries = slice(first * group, (first + at_once) * group)
        parts.append(
            _by_formula(
                case, group, visible,
                *(inputs.q[:, :, queries].to(dtype), inputs.k[:, :, keys].to(dtype), inputs.v[:, :, keys].to(dtype)),
                None if inputs.sinks is None else inputs.sinks[queries].to(dtype),
                inputs.dout[:, :, queries].to(dtype),
                None if inputs.dlse is None else inputs.dlse[:, queries].to(dtype),
                rounded,
            )
        )  # fmt: skip
    axes = {"out": 2, "lse": 1, "dq": 2, "dk": 2, "dv": 2, "dsink": 0, "dsink terms": 0}
    return {name: torch.cat([part[name] for part in parts], axes[name]) for name in parts[0]}


def _by_formula(case, group, visible, q, k, v, sinks, dout, dlse, rounded) -> dict[str, Tensor]:
    def operand(x: Tensor) -> Tensor:
        return x if rounded in (None, torch.float32) else x.to(rounded).to(x.dtype)

    def by_group(x: Tensor) -> Tensor:
        """(B, Sq, Hq, D) -> (B, Hkv, G, Sq, D)"""
        return x.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4)

    q, dout, k, v = by_group(q), by_group(dout), k.transpose(1, 2)[:, :, None], v.transpose(1, 2)[:, :, None]
    batch, heads_k, _, seqlen_q, _ = q.shape
    hidden = ~visible[:, None, None]
    x = q @ k.mT * case.scale  # [B, Hkv, G, Sq, Sk]
    if case.softcap:
        x = case.softcap * torch.tanh(x / case.softcap)
        slope = 1.0 - (x / case.softcap) ** 2
    x = x.masked_fill_(hidden, -math.inf)
    top = x.new_full((*x.shape[:-1], 1), -math.inf)
    if x.shape[-1]:
        top = x.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.view(1, heads_k, group, 1, 1)
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -math.inf, 0.0)
    x = x.sub_(top)
    total = x.exp().sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    p = x.sub_(total.log().masked_fill(total == 0.0, 0.0)).exp_()
    lse = top + total.log()
    out = operand(p) @ v
    dp = dout @ v.mT
    delta = (out * dout).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse.view(batch, heads_k, group, seqlen_q, 1)
    ds = dp.sub_(delta).mul_(p)
    if case.softcap:
        ds = ds.mul_(slope).masked_fill_(hidden, 0.0)
    dq = case.scale * (operand(ds) @ k)
    dk = case.scale * (operand(ds).mT @ q).sum(2)
    dv = (operand(p).mT @ dout).sum(2)

    def by_tokens(x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2, 4).flatten(2, 3)

    results = {
        "out": by_tokens(out), "lse": lse[..., 0].flatten(1, 2), "dq": by_tokens(dq),
        "dk": dk.transpose(1, 2), "dv": dv.transpose(1, 2),
    }  # fmt: skip
    if sinks is not None:
        # a row that sees neither key nor sink: both -inf, and it adds nothing
        terms = -torch.exp(sink - lse).masked_fill(lse == -math.inf, 0.0) * delta
        terms = terms[..., 0].permute(1, 2, 0, 3).flatten(0, 1).flatten(1)
        results |= {"dsink terms": terms, "dsink": terms.sum(1)}
    return results
