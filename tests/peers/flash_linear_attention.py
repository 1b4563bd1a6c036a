"""Stands in for fla.ops.attn's two functions with sinks. Their references and helpers come from the checkout."""

from __future__ import annotations

import served
import torch
from torch import Tensor


def parallel_attn(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    window_size: int | None = None, cu_seqlens: Tensor | None = None, chunk_indices: Tensor | None = None,
    *, sink_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``window_size`` counts the query's own position; 0 sees no key."""
    served.refuse(g=g)
    options = {}
    if cu_seqlens is not None:
        options = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), cu_seqlens.int())
    if window_size == 0:
        options["key_ranges"] = torch.zeros(*q.shape[:2], 2, dtype=torch.int32, device=q.device)
    elif window_size is not None:
        options["window_size"] = (window_size - 1, 0)
    return served.attention_sink(q, k, v, sink_bias, softmax_scale=scale, **options)


def attn_decoding_one_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None,
    cu_seqlens: Tensor | None = None, do_gate_scale: bool = False, *, sink_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One query of each packed sample: q (1, N, Hq, D), k (1, T, Hkv, D)."""
    served.refuse(g=g)
    queries = torch.arange(q.shape[1] + 1, dtype=torch.int32, device=q.device)
    return served.attention_sink(
        q, k, v, sink_bias, softmax_scale=scale, cu_seqlens_q=queries, cu_seqlens_k=cu_seqlens.int()
    )


MODULES = {
    "fla": {"__version__": "0"},
    "fla.ops": {},
    "fla.ops.attn": {},
    # a test takes shared memory away from fla's kernels
    "fla.ops.attn.parallel": {"parallel_attn": parallel_attn, "check_shared_mem": None},
    "fla.ops.attn.decoding": {"attn_decoding_one_step": attn_decoding_one_step},
}
