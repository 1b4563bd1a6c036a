"""fp64 attention for some key heads of a benchmark case, in chunks of queries so that memory stays bounded."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**27


def oracle(case, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, dout: Tensor, head_k: int) -> dict[str, Tensor]:
    """out, dq (B, Sq, G, D), dk, dv (B, Sk, D), dsink (G,) in fp64 for the query heads of key head ``head_k``."""
    B, S, Hq, D = q.shape
    shift = k.shape[1] - S
    G = Hq // k.shape[2]
    scale = D**-0.5
    heads = slice(head_k * G, (head_k + 1) * G)
    starts = torch.zeros(S, dtype=torch.long, device=q.device)
    if case.lengths:
        lengths = torch.tensor(case.lengths, device=q.device)
        starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    sink = sinks[heads].double()[:, None]
    result = {
        name: torch.zeros(shape, dtype=torch.float64, device=q.device)
        for name, shape in (
            ("out", (B, S, G, D)), ("dq", (B, S, G, D)), ("dk", (B, S + shift, D)), ("dv", (B, S + shift, D)),
            ("dsink", (G,)),
        )
    }  # fmt: skip
    for b in range(B):
        Q, dO = (x[b, :, heads].double().transpose(0, 1) for x in (q, dout))  # (G, S, D)
        K, V = k[b, :, head_k].double(), v[b, :, head_k].double()
        i0 = 0
        while i0 < S:
            reach = case.window or S + shift
            first = max(int(starts[i0]), i0 + shift - reach + 1)
            i1 = min(S, i0 + max(1, CHUNK_ELEMENTS // (G * (i0 + shift - first + 2048))), i0 + 2048)
            keys = slice(first, i1 + shift)
            i = torch.arange(i0, i1, device=q.device)[:, None]
            j = torch.arange(first, i1 + shift, device=q.device)[None]
            visible = (j <= i + shift) & (j > i + shift - reach) & (j >= starts[i0:i1, None])
            x = (Q[:, i0:i1] @ K[keys].T * scale).masked_fill_(~visible, float("-inf"))
            lse = torch.logaddexp(torch.logsumexp(x, -1), sink)
            p = x.sub_(lse[..., None]).exp_()
            dp = dO[:, i0:i1] @ V[keys].T
            delta = (p * dp).sum(-1)
            ds = p * (dp - delta[..., None])
            result["out"][b, i0:i1] = (p @ V[keys]).transpose(0, 1)
            result["dq"][b, i0:i1] = (ds @ K[keys] * scale).transpose(0, 1)
            result["dk"][b, keys] += torch.einsum("gij,gid->jd", ds, Q[:, i0:i1]) * scale
            result["dv"][b, keys] += torch.einsum("gij,gid->jd", p, dO[:, i0:i1])
            result["dsink"] -= (torch.exp(sink - lse) * delta).sum(-1)
            i0 = i1
    return result


def oracles(case, tensors: dict[str, Tensor], heads_k=(0, -1)) -> dict[int, dict[str, Tensor]]:
    """The oracle of some key heads; a benchmark asks once per case and compares every implementation with it."""
    n = tensors["k"].shape[2]
    return {head_k: oracle(case, **tensors, head_k=head_k) for head_k in sorted({h % n for h in heads_k})}


def errors(got: dict[str, Tensor], want: dict[int, dict[str, Tensor]]) -> dict[str, float]:
    """Worst relative error (norm of the difference over norm) per output over the oracle's heads; NaN counts as inf."""
    worst: dict[str, float] = {}
    for head_k, expected in want.items():
        G = expected["out"].shape[2]
        heads = slice(head_k * G, (head_k + 1) * G)
        for name, x in got.items():
            x = x[heads] if name == "dsink" else x[:, :, heads] if name in ("out", "dq") else x[:, :, head_k]
            error = float((x.double() - expected[name]).norm() / expected[name].norm())
            worst[name] = max(worst.get(name, 0.0), error if error == error else float("inf"))
    return worst
