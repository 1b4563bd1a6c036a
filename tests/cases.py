"""Attention calls as data: a ``Case`` makes its inputs and runs itself through ``attention_sink``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from triton_attention_sink_hf import Mask, attention_sink


@dataclass(frozen=True)
class Case:
    """One call. Sequence lengths are totals of rows; ``lengths_*`` cuts them into packed segments (batch 1).

    Attributes:
        padding: "left", "right" or "holes": which keys of each batch row are not real.
        used: keys in use per batch row (``seqused_k``).
        ranges: ``key_ranges``. "random": any, some empty, some past the keys. "blocks": causal, but 7 tokens of every
            20 see each other; "prefix": causal, but all see the first third; both for Sq = Sk and causal=False.
        sinks: the head's logits run from -10 to 20; "frozen" ones get no gradient, None is no sink.
        dlse: lse takes part in the loss.
        layout: memory of q, k, v and dout: "bshd", "bhsd" (transposed views), "sliced" (every second row and column
            of a larger tensor), "expanded" (batch and key heads with stride 0).
    """

    seqlen_q: int = 64
    seqlen_k: int | None = None
    heads: tuple[int, int] = (4, 2)
    head_dim: int | tuple[int, int] = 32
    batch: int = 1
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    lengths_q: tuple[int, ...] | None = None
    lengths_k: tuple[int, ...] | None = None
    padding: str | None = None
    used: tuple[int, ...] | None = None
    ranges: str | None = None
    softmax_scale: float | None = None
    softcap: float = 0.0
    sinks: str | None = "learned"
    sink_dtype: torch.dtype = torch.float32
    dlse: bool = False
    layout: str = "bshd"

    @property
    def dims(self) -> tuple[int, int]:
        return self.head_dim if isinstance(self.head_dim, tuple) else (self.head_dim, self.head_dim)

    @property
    def scale(self) -> float:
        return self.dims[0] ** -0.5 if self.softmax_scale is None else self.softmax_scale


@dataclass(frozen=True)
class Inputs:
    """q (B, Sq, Hq, D), k, v, sinks and the gradients that come back: dout as out, dlse (B, Hq, Sq) fp32 or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    dout: Tensor
    dlse: Tensor | None
    mask: Mask


def make_inputs(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs of ``case``, the same for one seed."""
    generator = torch.Generator(device).manual_seed(seed)
    seqlen_k = case.seqlen_q if case.seqlen_k is None else case.seqlen_k
    heads_q, heads_k = case.heads
    d, dv = case.dims

    def tensor(seqlen, heads, size):
        shape = (case.batch, seqlen, heads, size)
        stored = {
            "bshd": shape,
            "bhsd": (case.batch, heads, seqlen, size),
            "sliced": (case.batch, 2 * seqlen, heads + 1, 2 * size),
            "expanded": (1, seqlen, 1 if heads == heads_k else heads, size),
        }[case.layout]
        x = torch.randn(stored, generator=generator, device=device).to(case.dtype)
        if case.layout == "bhsd":
            return x.transpose(1, 2)
        if case.layout == "sliced":
            return x[:, ::2, 1:, ::2]
        return x.expand(shape)

    sinks = None
    if case.sinks is not None:
        sinks = torch.linspace(-10, 20, heads_q, device=device).to(case.sink_dtype)
    dlse = None
    if case.dlse:
        dlse = torch.randn(case.batch, heads_q, case.seqlen_q, generator=generator, device=device)
    return Inputs(
        q=tensor(case.seqlen_q, heads_q, d),
        k=tensor(seqlen_k, heads_k, d),
        v=tensor(seqlen_k, heads_k, dv),
        sinks=sinks,
        dout=tensor(case.seqlen_q, heads_q, dv),
        dlse=dlse,
        mask=_mask(case, seqlen_k, device),
    )


def short_window(case: Case) -> bool:
    """Whether the window kernels serve ``case`` too."""
    plain = case.padding is None and case.used is None and case.softcap == 0.0 and case.lengths_k is None
    plain = plain and case.ranges is None
    short = case.causal and 0 <= case.window[0] <= 128
    dims = all(size % 8 == 0 and 16 <= size <= 128 for size in case.dims)
    return plain and short and dims and case.dtype in (torch.bfloat16, torch.float16)


def hopper(case: Case) -> bool:
    """Whether the Hopper kernels serve ``case`` on their card."""
    plain = case.padding is None and case.used is None and case.softcap == 0.0 and case.scale > 0.0
    plain = plain and case.ranges is None
    dims = 32 < max(case.dims) <= 256 and all(size % 8 == 0 for size in case.dims)
    return plain and dims and case.layout in ("bshd", "bhsd") and case.dtype != torch.float32


def cu_seqlens(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _mask(case: Case, seqlen_k: int, device: str) -> Mask:
    cu_q = cu_k = padding = used = None
    if case.lengths_q is not None:
        cu_q = cu_seqlens(case.lengths_q, device)
        cu_k = cu_q if case.lengths_k is None else cu_seqlens(case.lengths_k, device)
    if case.padding is not None:
        position = torch.arange(seqlen_k, device=device).expand(case.batch, seqlen_k)
        # rows of a batch differ: the first keeps all keys, the last loses most, with two rows or more
        hidden = torch.linspace(0.1 if case.batch == 1 else 0.0, 0.8, case.batch, device=device)[:, None] * seqlen_k
        padding = {
            "left": position >= hidden.long(),
            "right": position < seqlen_k - hidden.long(),
            "holes": (position * 7 + torch.arange(case.batch, device=device)[:, None]) % 3 != 0,
        }[case.padding]
    if case.used is not None:
        used = torch.tensor(case.used, dtype=torch.int32, device=device)
    ranges = None if case.ranges is None else _key_ranges(case, seqlen_k, device)
    return Mask(case.window[0], 0 if case.causal else case.window[1], cu_q, cu_k, padding, used, key_ranges=ranges)


def _key_ranges(case: Case, seqlen_k: int, device: str) -> Tensor:
    """int32 (B, Sq, 2)"""
    i = torch.arange(case.seqlen_q, device=device).expand(case.batch, case.seqlen_q)
    if case.ranges == "random":
        generator = torch.Generator().manual_seed(5)
        ends = torch.randint(-9, seqlen_k + 9, (case.batch, case.seqlen_q, 2), generator=generator).sort(-1).values
        ends[:, ::5] = ends[:, ::5].flip(-1)  # empty
        return ends.to(device, torch.int32)
    last = torch.where(i % 20 < 7, i - i % 20 + 7, i + 1)
    if case.ranges == "prefix":
        last = (i + 1).clamp_min(seqlen_k // 3)
    return torch.stack([torch.zeros_like(last), last], -1).to(torch.int32)


def leaves_of(inputs: Inputs) -> list[Tensor]:
    """q, k, v and, if there are any, sinks, which now need a gradient."""
    return [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks) if x is not None]


def operator_options(case: Case, inputs: Inputs) -> tuple:
    """What the operators take after q, k, v and sinks: the portable kernels, deterministic gradients."""
    mask = inputs.mask
    return (
        mask.cu_seqlens_q, mask.cu_seqlens_k, mask.key_padding_mask, mask.seqused_k, mask.leftpad_k, None,
        mask.key_ranges, mask.left, mask.right, case.scale, case.softcap, True, "triton",
    )  # fmt: skip


def run(
    case: Case, inputs: Inputs, implementation: str = "triton", deterministic: bool | None = None
) -> dict[str, Tensor]:
    """out, lse and the gradients dq, dk, dv, dsink, always with a batch axis."""
    return differentiated(case, inputs, lambda *leaves: call(case, inputs, *leaves, implementation, deterministic))


def differentiated(case: Case, inputs: Inputs, attend: Callable) -> dict[str, Tensor]:
    """The same of ``attend(q, k, v, sinks)`` -> (out, lse), which takes and returns tensors with a batch axis."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    sinks = None if inputs.sinks is None else inputs.sinks.detach().requires_grad_(case.sinks == "learned")
    out, lse = attend(q, k, v, sinks)
    outputs, gradients = [out], [inputs.dout]
    if inputs.dlse is not None:
        outputs, gradients = [out, lse], [inputs.dout, inputs.dlse]
    leaves = [q, k, v, sinks] if case.sinks == "learned" else [q, k, v]
    results = dict(zip(("dq", "dk", "dv", "dsink"), torch.autograd.grad(outputs, leaves, gradients), strict=False))
    return results | {"out": out.detach(), "lse": lse.detach()}


def call(
    case: Case, inputs: Inputs, q, k, v, sinks, implementation: str = "triton", deterministic: bool | None = None
) -> tuple[Tensor, Tensor]:
    """attention_sink for ``case`` on BSHD tensors: (out, lse), packed calls with their batch axis put back."""
    mask, packed = inputs.mask, inputs.mask.packed
    out, lse = attention_sink(
        *((x.squeeze(0) for x in (q, k, v)) if packed else (q, k, v)),
        sinks,
        causal=case.causal,
        window_size=case.window,
        softmax_scale=case.softmax_scale,
        softcap=case.softcap,
        cu_seqlens_q=mask.cu_seqlens_q,
        cu_seqlens_k=mask.cu_seqlens_k,
        key_padding_mask=mask.key_padding_mask.squeeze(0) if packed and case.padding else mask.key_padding_mask,
        seqused_k=mask.seqused_k,
        key_ranges=mask.key_ranges.squeeze(0) if packed and case.ranges else mask.key_ranges,
        deterministic=deterministic,
        return_lse=True,
        implementation=implementation,
    )
    return (out.unsqueeze(0), lse.unsqueeze(0)) if packed else (out, lse)
