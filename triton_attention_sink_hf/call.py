"""One validated attention call, as every layer below the interface sees it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .masks import Mask

MAX_MEMOS = 1024
_PLAIN = frozenset((Tensor, Parameter, type(None)))

Tensors = tuple[Tensor | None, ...]


@dataclass
class Call:
    """BSHD tensors (packed rows have B = 1) with every default filled in. Not frozen for the same reason as ``Mask``.

    ``tensors`` and ``options`` take it apart, in the order of the operators' arguments; ``join`` puts it together.

    Attributes:
        q: (B, Sq, Hq, D). k: (B, Sk, Hkv, D). v: (B, Sk, Hkv, Dv). One dtype, one device, any strides.
            With a block_table k and v are pages, (pages, page size, Hkv, D or Dv).
        sinks: (Hq,) floating, or None.
        mask: which keys a query sees.
        softmax_scale, softcap: see ``attention_sink``; softcap 0 = none.
        deterministic: the caller asked for bit-exact gradients.
        memo: what earlier calls of this kind found out; None if the call is traced.
        block_table: int32 (B, n), the pages of each batch row, Sk = n * page size; or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    mask: Mask
    softmax_scale: float
    softcap: float
    deterministic: bool
    memo: Memo | None = None
    block_table: Tensor | None = None

    @property
    def seqlen_k(self) -> int:
        """Sk: key slots of a batch row, or rows of a packed one."""
        return self.k.shape[1] if self.block_table is None else self.block_table.shape[1] * self.k.shape[1]

    def tensors(self) -> Tensors:
        """The ``N_TENSORS`` tensors."""
        mask = self.mask
        return (
            self.q, self.k, self.v, self.sinks,
            mask.cu_seqlens_q, mask.cu_seqlens_k, mask.key_padding_mask, mask.seqused_k,
            mask.leftpad_k, self.block_table, mask.key_ranges,
        )  # fmt: skip

    def options(self) -> tuple:
        """Everything else."""
        mask = self.mask
        return mask.left, mask.right, self.softmax_scale, self.softcap, self.deterministic

    @classmethod
    def join(cls, tensors: Tensors, options: tuple, memo: Memo | None) -> Call:
        """The call with these ``tensors()`` and ``options()``."""
        (
            q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k, leftpad_k, block_table, key_ranges,
        ) = tensors  # fmt: skip
        left, right, softmax_scale, softcap, deterministic = options
        mask = Mask(left, right, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k, leftpad_k, key_ranges)
        return cls(q, k, v, sinks, mask, softmax_scale, softcap, deterministic, memo, block_table)


N_TENSORS = 11
SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? sinks, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_padding_mask, Tensor? seqused_k, "
    "Tensor? leftpad_k, Tensor? block_table, Tensor? key_ranges, "
    "SymInt left, SymInt right, float softmax_scale, float softcap, bool deterministic"
)


class Memo:
    """What was found out about calls that differ at most in the values and the addresses of their tensors.

    A model repeats the same few calls. To check one, to choose its kernels and to plan their launches takes more host
    time than a short kernel runs.

    Attributes:
        checked: every check has passed, except those of a mask's values.
        implementations: which implementation serves the call, by the name that the caller gave.
        plans: what the launchers remember.
        placement: ``placement`` of the tensors that the forward saved for its backward; None before the first.
    """

    __slots__ = ("checked", "implementations", "placement", "plans")

    def __init__(self):
        self.checked = False
        self.implementations: dict[str, str] = {}
        self.plans: dict[tuple, object] = {}
        self.placement: tuple | None = None

    def serves(self, tensors: Tensors) -> bool:
        """Whether saved tensors came back where they were: a saved-tensor hook may change strides and addresses."""
        try:
            return self.placement == placement(tensors)
        except RuntimeError:  # no memory of their own
            return False


def memo_of(tensors: Tensors, options: tuple) -> Memo | None:
    """The one ``Memo`` of calls with such tensors, not ``traced``, and equal options, which determine the rest.

    None if a tensor has no memory of its own, as in functorch's transforms and after it has left them.
    """
    key, last = [], None
    try:
        for x in tensors:
            if x is None:
                key.append(None)
            elif x is last:  # one cu_seqlens for queries and keys
                key.append(True)
            else:  # kernels differ by whether an address is a multiple of 16
                key += x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0
            last = x
    except RuntimeError:
        return None
    return _memo(tuple(key), options)


@functools.lru_cache(MAX_MEMOS)
def _memo(tensors: tuple, options: tuple) -> Memo:
    return Memo()


def placement(tensors: Tensors) -> tuple:
    """The part of ``memo_of``'s key that a saved-tensor hook may change."""
    found, last = [], None
    for x in tensors:
        if x is not None:
            found.append(x is last or (x.stride(), x.data_ptr() % 16 == 0))
        last = x
    return tuple(found)


def traced(*tensors: Tensor | None) -> bool:
    """Whether a call is not just run: torch.compile, dispatch modes (selective checkpointing), subclasses."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return True
    return not _PLAIN.issuperset(map(type, tensors))
