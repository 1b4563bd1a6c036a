"""One validated attention call, as every layer below the interface sees it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .masks import Mask

MAX_LAYOUTS = 1024
_PLAIN = frozenset((Tensor, Parameter, type(None)))


class Layout:
    """What was found out about calls that differ at most in the values and the addresses of their tensors.

    A model repeats the same few calls, and to check one, to choose its kernels and to plan their launches takes more
    host time than a short kernel runs.

    Attributes:
        checked: all is right about such a call but perhaps the values of its mask.
        implementations: which implementation serves it, by the name that the caller gave.
        plans: what the launchers remember.
    """

    __slots__ = ("checked", "implementations", "plans")

    def __init__(self):
        self.checked = False
        self.implementations: dict[str, str] = {}
        self.plans: dict[tuple, object] = {}


def layout_of(tensors: tuple[Tensor | None, ...], *options) -> Layout | None:
    """The one ``Layout`` of calls with such tensors, not ``traced``, and equal options, which determine the rest.

    None where a tensor has no memory of its own, as in functorch's transforms and when it has left them.
    """
    key = []
    try:
        for x in tensors:
            if x is None:
                key.append(None)
            else:  # kernels differ by whether an address is a multiple of 16
                key += x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0
    except RuntimeError:
        return None
    return _layout(tuple(key), options)


@functools.lru_cache(MAX_LAYOUTS)
def _layout(tensors: tuple, options: tuple) -> Layout:
    return Layout()


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call is not just run: torch.compile, dispatch modes (selective checkpointing), subclasses."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return not _PLAIN.issuperset(map(type, tensors))


@dataclass
class Call:
    """BSHD tensors (packed rows have B = 1) with every default filled in. Not frozen for the same reason as ``Mask``.

    Attributes:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv). One dtype, one device, any strides.
        sinks: (Hq,) floating, or None.
        mask: which keys a query sees.
        softmax_scale, softcap: see ``attention_sink``; softcap 0 = none.
        deterministic: the caller asked for bit-exact gradients.
        layout: None if the call is traced.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    mask: Mask
    softmax_scale: float
    softcap: float
    deterministic: bool
    layout: Layout | None = None
