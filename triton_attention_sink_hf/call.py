"""One validated attention call, as every layer below the interface sees it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .masks import Mask


@dataclass(frozen=True)
class Call:
    """BSHD tensors (packed rows have B = 1) with every default filled in.

    Attributes:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv). One dtype, one device, any strides.
        sinks: (Hq,) floating, or None.
        mask: which keys a query sees.
        softmax_scale, softcap: see ``attention_sink``; softcap 0 = none.
        deterministic: the caller asked for bit-exact gradients.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    mask: Mask
    softmax_scale: float
    softcap: float
    deterministic: bool
