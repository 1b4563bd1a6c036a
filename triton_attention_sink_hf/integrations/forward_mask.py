"""The mask function for transformers, and what it hands to every layer of a forward: a ``ForwardMask``.

transformers calls ``attention_mask`` once a forward for each kind of layer, and tells it what no layer is told: whether
the pattern is causal, its window, the padding, how many keys there are, and where a packed row is cut. A
``ForwardMask`` carries that, and what the layers derive from their own arguments once a forward. It is no tensor, so no
mask of a user's can be taken for it, and it dies with its forward, so nothing is remembered for the next one.

A model that computes with its mask (adds it, slices it, reads it) gets the dense mask that eager attention would have
got: every tensor operation and attribute goes to ``dense``. Attention layers are served if they get the object itself.
"""

from __future__ import annotations

import copy
import functools
import sys
import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .patterns import BLOCKS, check_pattern, refuse_own_attention, refuse_pattern
from .segments import (
    cu_seqlens_from_cuts,
    cuts_at_changes,
    cuts_from_positions,
    cuts_from_samples,
)
from .sequence_parallel import active_group, in_backward

T = TypeVar("T")

NO_PADDING, RUNS, GAPS = range(3)  # each row's tokens side by side; or with padding between them


class Forward:
    """What the masks of one forward share: what layers derived, and what must be read from the device.

    Attributes:
        used: a layer has seen one of the masks; the next mask begins another forward.
        masks: how many there are.
    """

    def __init__(self):
        self.used, self.masks = False, 0
        self._derived: dict[tuple, tuple[tuple[Tensor, ...], object]] = {}
        self._questions: list[Tensor] = []
        self._answers: list[int] = []

    def once(self, tensors: Tensor | tuple[Tensor, ...], key: Hashable, derive: Callable[[], T]) -> T:
        """``derive()``, remembered for these tensor objects and ``key``.

        Under torch.compile the graph removes the repetition. During CUDA-graph capture everything is derived inside the
        graph: a value from outside would go stale when the graph is replayed on new data.
        """
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        if recorded(tensors[0]):
            return derive()
        key = (key, *map(id, tensors))
        if key not in self._derived:
            self._derived[key] = (tensors, derive())  # tensors that are kept keep their ids
        return self._derived[key][1]

    def ask(self, question: Tensor) -> int:
        """Put a question, an integer (); returns its number."""
        self._questions.append(question)
        return len(self._questions) - 1

    def answer(self, number: int) -> int:
        """The value of a question."""
        if number >= len(self._answers):
            self.read()
        return self._answers[number]

    def read(self) -> None:
        """Read the answers to all that was asked so far at once: the only wait for the device."""
        new = self._questions[len(self._answers) :]
        if new:
            self._answers += torch.stack([question.to(new[0].device) for question in new]).tolist()


class _Current(threading.local):
    forward: Forward | None = None


_CURRENT = _Current()


def _current_forward() -> Forward:
    """The forward whose masks are being made in this thread."""
    if torch.compiler.is_compiling():
        return Forward()
    forward = _CURRENT.forward
    if forward is None or forward.used:
        forward = _CURRENT.forward = Forward()
    return forward


class ForwardMask:
    """Which keys the queries of one kind of layer see, and what the layers of this forward share.

    Attributes:
        shape: (B, 1, Sq, Sk). device: of the model's inputs. dtype: of the model.
        causal: causal, else bidirectional. window: (left, right) keys beside a query's own position, -1 = unlimited.
        real: bool (B, Sk), True = token, False = padding; None: nobody gave a padding mask.
        sample_ids: integer (B, Sk), the number of each token's sample, 0 = padding; None: nobody gave them.
        cuts: bool (B, Sq), True where a packed sample begins, as the model told the mask function; None: it did not.
        used: keys in use, int or Tensor, where they can be fewer than Sk; else None.
        told: whether the mask function made this, which knows the pattern better than the layer.
        group: the process group over which the rows are sharded, None if they are whole; if ``has_group``.
        forward: shared with the other masks of the forward.
    """

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        device: torch.device | None,
        *,
        causal: bool,
        window: tuple[int, int] = (-1, -1),
        real: Tensor | None = None,
        sample_ids: Tensor | None = None,
        cuts: Tensor | None = None,
        used: int | Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        group: dist.ProcessGroup | None = None,
        has_group: bool = False,
        forward: Forward | None = None,
        arguments: dict | None = None,
    ):
        self.shape, self.device, self.dtype = shape, device, dtype
        self.causal, self.window = causal, window
        self.real, self.sample_ids, self.cuts, self.used = real, sample_ids, cuts, used
        self.group, self.has_group, self.told = group, has_group, arguments is not None
        self.forward = Forward() if forward is None else forward
        self._arguments = arguments
        self._dense: Tensor | None = None
        self._padding: int | None = None  # number of the question
        self._blocks: int | None = None
        free = real is not None and real.device.type == "cpu"  # a layer's own mask is not worth waiting for
        if real is not None and used is None and shape[2] == shape[3] and not recorded(real) and (self.told or free):
            runs = (cuts_at_changes(real) & real).sum(1) + real[:, 0]
            self._padding = self.forward.ask((~real.all()).int() + (runs > 1).any().int())

    def refuse_blocks(self, blocks: Tensor) -> None:
        """Refuse blocks of tokens (B, S), negative = none, as soon as one may be read."""
        question = self.forward.ask((blocks >= 0).any().int())
        if blocks.device.type != "cpu":
            self._blocks = question
        elif self.forward.answer(question):
            refuse_pattern(BLOCKS)

    def check(self, seqlen_q: int, seqlen_k: int) -> None:
        """Raise for a layer that has other queries or keys than the mask function was told of."""
        if self.told and (self.shape[2] != seqlen_q or self.shape[3] != seqlen_k):
            raise ValueError(
                f"attention_mask must be made for the layer's {seqlen_q} queries and {seqlen_k} keys, got one for "
                f"{self.shape[2]} and {self.shape[3]}: the layer adds or drops keys, which the mask says nothing of. "
                "Use attn_implementation='eager'"
            )
        self.forward.used = True
        if self._blocks is not None and (torch.cuda.is_current_stream_capturing() or self.forward.answer(self._blocks)):
            refuse_pattern(BLOCKS)

    def refuse_restarts(self, positions: Tensor) -> None:
        """Raise where positions (B, S) that never fall within a sample fall between two tokens."""
        falls = positions.diff(dim=-1) < 0
        if self.real is not None:  # positions of padding mean nothing
            real = self.real.to(positions.device)
            falls = falls & real[:, 1:] & real[:, :-1]
        if self.cuts is not None:  # of the text positions, which the mask function was told
            falls = falls & ~self.cuts[:, 1:].to(positions.device)
        falls = falls.any()
        message = (
            "position_ids must be (4, B, S), the text positions first, for packed rows, got (3, B, S) that "
            "restart: packed samples cannot be told from images. Or pass cu_seq_lens_q and cu_seq_lens_k"
        )
        if recorded(positions):
            torch._assert_async(~falls, message)
        elif self.forward.once(positions, "restarts", lambda: bool(falls)):
            raise ValueError(message)

    def whole(self, seqlen: int) -> ForwardMask:
        """Of the gathered rows of ``seqlen`` tokens, of which this is the mask of a shard."""
        shape = (self.shape[0], 1, seqlen, seqlen)
        return ForwardMask(shape, self.device, causal=self.causal, window=self.window, forward=self.forward)

    def padding(self) -> int:
        """NO_PADDING, RUNS or GAPS. What may not be read (torch.compile, graph capture, a cache) counts as GAPS."""
        if self.real is None:
            return NO_PADDING
        if self._padding is None or recorded(self.real):
            return GAPS
        return self.forward.answer(self._padding)

    def visibility(
        self, q: Tensor, k: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What hides keys beyond causality and window: (cu_seqlens, key_padding_mask, seqused_k), each or None.

        Args:
            q, k: (B, Sq, H, D) and (B, Sk, H, D). position_ids: (B, Sq), (1, Sq) or (Sq,).

        Returns:
            cu_seqlens int32 (B * Sq + 1,) of the flattened rows, with a key_padding_mask bool (B * Sk,) if one is
            needed beside it; or without cu_seqlens key_padding_mask (B, Sk) and seqused_k int32 (B,).
        """
        self.forward.used = True
        batch, seqlen = q.shape[:2]
        real, device = self.real, q.device
        if real is not None and real.device != device:
            real = self.forward.once(real, device, lambda: self.real.to(device))
        if self.used is not None:
            used = torch.zeros(batch, dtype=torch.int32, device=device) + self.used
            return None, real, used.to(torch.int32)
        if seqlen != k.shape[1] or seqlen < 2:
            return None, real, None
        padding = self.padding()
        sources = tuple(x for x in (self.cuts, self.sample_ids, position_ids, self.real) if x is not None)
        if not sources:
            return None, None, None
        cu, gaps = self.forward.once(
            sources, (batch, seqlen, device), lambda: self._segments(batch, padding, position_ids, device)
        )
        if cu is None:
            return None, None if padding == NO_PADDING else real, None
        return cu, real.flatten() if gaps else None, None

    def _segments(self, batch: int, padding: int, position_ids: Tensor | None, device) -> tuple[Tensor | None, bool]:
        """cu_seqlens or None (nothing is cut), and whether padding must be hidden beside it."""
        real = None if padding == NO_PADDING else self.real.to(device)
        found = []
        if self.cuts is not None:
            found.append(self.cuts.to(device))
        if self.sample_ids is not None:
            found.append(cuts_from_samples(self.sample_ids.to(device)))
        if position_ids is not None:
            found.append(cuts_from_positions(position_ids.to(device).reshape(-1, position_ids.shape[-1]), real))
        if device.type == "cpu" and not torch.compiler.is_compiling():  # where looking is free
            found = [cuts for cuts in found if cuts.any()]
        if padding == RUNS and (found or device.type != "cpu"):
            # padding is a segment of its own, which nobody else sees and the fast kernels serve
            found.append(cuts_at_changes(real))
            padding = NO_PADDING
        if not found:
            return None, False
        return cu_seqlens_from_cuts(functools.reduce(torch.logical_or, found), batch), padding != NO_PADDING

    __hash__ = object.__hash__  # == is a tensor operation, as for tensors

    @property
    def dense(self) -> Tensor:
        """The mask that eager attention would have got: (B, 1, Sq, Sk), 0 = seen, the dtype's minimum = hidden."""
        if self._dense is None:
            masking = sys.modules["transformers.masking_utils"]
            self._dense = masking.eager_mask(**{**self._arguments, "allow_is_bidirectional_skip": False})
        return self._dense

    @property
    def ndim(self) -> int:
        return 4

    def dim(self) -> int:
        return 4

    def to(self, *args, **kwargs):
        """On another device; any other conversion is that of ``dense``."""
        device = args[0] if args else kwargs.get("device")
        if not isinstance(device, (str, int, torch.device)) or kwargs.get("dtype") is not None or len(args) > 1:
            return self.dense.to(*args, **kwargs)
        moved = copy.copy(self)
        moved.device = torch.device(device)
        for name in ("real", "sample_ids", "cuts", "used"):
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(moved, name, self.forward.once(value, ("to", moved.device), lambda x=value: x.to(moved.device)))
        return moved

    def __getitem__(self, index):
        if isinstance(index, tuple) and index[:-1] in ((...,), (slice(None),) * 3):  # cut to the keys of a cache
            last = index[-1]
            if isinstance(last, slice) and last.start is None and (last.stop is None or last.stop >= self.shape[3]):
                return self
        return self.dense[index]

    def __getattr__(self, name: str):
        if name.startswith("_") or name in ("forward", "told"):  # not yet set, as in a copy
            raise AttributeError(name)
        return getattr(self.dense, name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map(lambda x: x.dense if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*plain[0], **plain[1])


def _forwarded(name: str):
    return lambda self, *args: getattr(self.dense, name)(*args)


for _name in (
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "and",
    "or",
    "invert",
    "neg",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
):
    setattr(ForwardMask, f"__{_name}__", _forwarded(f"__{_name}__"))


def attention_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs,
) -> ForwardMask:
    """transformers' mask interface.

    Args:
        q_length: queries, at positions ``q_offset`` and on (a tensor for static caches).
        kv_length: key slots, at positions ``kv_offset`` and on.
        cache_position: (q_length,), in place of q_length and q_offset in transformers 4.57.
        mask_function: transformers' description of the pattern; all but causal, bidirectional, sliding and packed are
            refused.
        attention_mask: 2-D padding mask over all positions so far, nonzero = real; or what an earlier call returned.

    Raises:
        ValueError: a pattern that the attention function could not honour; a model that would not call it.
    """
    if isinstance(attention_mask, ForwardMask):  # made ahead of the forward, as generate does
        return attention_mask
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache counts it up in place
    arguments = dict(
        batch_size=batch_size, kv_length=kv_length, q_length=q_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, cache_position=cache_position, device=device,
        **kwargs,
    )  # fmt: skip
    refuse_own_attention(kwargs.get("config"))
    packed, blocks = check_pattern(mask_function, kwargs)
    bidirectional = "allow_is_bidirectional_skip" in kwargs  # only those patterns are created with it
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    elif device is None and attention_mask is not None:
        device = attention_mask.device
    # Keys in use, where they can be fewer than the slots; a bidirectional pattern counts on the padding mask alone.
    used = None
    if kv_length != q_length and not bidirectional:
        used = q_offset + q_length - kv_offset
        if not isinstance(used, Tensor) and used == kv_length:
            used = None
    real = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length] != 0
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))
    cuts = None
    if isinstance(packed, Tensor):
        cuts = cuts_at_changes(packed)
    elif packed and attention_mask is None and kv_length == q_length:
        cuts = _packed_cuts(mask_function, batch_size, q_length, device, bidirectional)
    group = active_group()
    mask = ForwardMask(
        (batch_size, 1, q_length, kv_length),
        device,
        causal=not bidirectional,
        window=_window(kwargs.get("local_size"), bidirectional),
        real=real,
        cuts=cuts,
        used=used,
        dtype=kwargs.get("dtype", torch.float32),
        group=group,
        has_group=group is not None or torch.compiler.is_compiling() or not in_backward(),
        forward=_current_forward(),
        arguments={name: value for name, value in arguments.items() if value is not None},
    )
    if blocks is not None:
        mask.refuse_blocks(blocks)
    mask.forward.masks += 1
    kinds = getattr(kwargs.get("config"), "layer_types", None) or (None,)
    if mask.forward.masks >= len(set(kinds)) and not (real is not None and recorded(real)):
        mask.forward.read()  # here rather than in the first layer
    return mask


def _window(local_size: int | None, bidirectional: bool) -> tuple[int, int]:
    """Keys beside a query's own position. A causal window of W holds the query and W - 1 keys before it, a
    bidirectional one W keys on each side."""
    if local_size is None:
        return -1, -1
    if local_size < 1:
        raise ValueError(f"sliding_window must be at least 1, got {local_size}")
    return (local_size, local_size) if bidirectional else (local_size - 1, 0)


def _packed_cuts(mask_function, batch: int, seqlen: int, device, bidirectional: bool) -> Tensor:
    """bool (B, S): the tokens that do not see the token before them."""
    rows = torch.arange(batch, device=device)[:, None]
    i = torch.arange(seqlen, device=device)[None, :]
    head = torch.zeros((), dtype=torch.int64, device=device)
    if torch.compiler.is_compiling() and not bidirectional:  # where a pattern cannot be taken apart
        ahead = mask_function(rows, head, (i - 1).clamp_min(0), i) & (i > 0)
        torch._assert_async(~ahead.any(), "the model's mask must be causal, got tokens that see the one after them")
    return ~mask_function(rows, head, i, (i - 1).clamp_min(0)).expand(batch, seqlen)


def recorded(x: Tensor) -> bool:
    """Whether work on x is being recorded, by torch.compile or into a CUDA graph, to run on other values later."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
