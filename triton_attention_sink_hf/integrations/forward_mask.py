"""``ForwardMask``: what the layers of one forward know about their keys, and what they derive from it once.

The mask function (``mask_function.py``) makes one for each kind of layer and hands it to every layer. It is no tensor,
so no user's mask can be taken for it. It dies with its forward, so nothing is remembered for the next one.

A model that computes with its mask (adds, slices or reads it) gets the dense mask of eager attention: every tensor
operation and attribute goes to ``dense``. Attention layers must get the object itself.
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

from ..masks import constant
from .blocks import NONE, SCATTERED, key_ranges_of_blocks, kind_of_blocks
from .patterns import BLOCKS, refuse_pattern
from .segments import cu_seqlens_from_cuts, cuts_at_changes, cuts_from_positions, cuts_from_samples

T = TypeVar("T")

NO_PADDING, RUNS, GAPS = range(3)  # RUNS: no padding between the tokens of a row; GAPS: some


class Forward:
    """What the masks of one forward share: what layers derived, and questions to the device.

    Attributes:
        used: a layer has seen one of the masks, so the next mask begins another forward.
        masks: how many masks there are.
    """

    def __init__(self):
        self.used, self.masks = False, 0
        self._derived: dict[tuple, tuple[tuple[Tensor, ...], object]] = {}
        self._questions: list[Tensor] = []
        self._answers: list[int] = []

    def once(self, tensors: Tensor | tuple[Tensor, ...], key: Hashable, derive: Callable[[], T]) -> T:
        """``derive()``, remembered for these tensor objects and ``key``.

        Nothing is remembered under torch.compile, whose graph removes repetitions, and during CUDA-graph capture, where
        a value from outside the graph would be stale on replay.
        """
        tensors = tensors if isinstance(tensors, tuple) else (tensors,)
        if is_recorded(tensors[0]):
            return derive()
        key = (key, *map(id, tensors))
        if key not in self._derived:
            self._derived[key] = (tensors, derive())  # kept alive, so that no other tensor gets their ids
        return self._derived[key][1]

    def ask(self, question: Tensor) -> int:
        """Queue a question, an integer tensor (). Returns its number."""
        self._questions.append(question)
        return len(self._questions) - 1

    def answer(self, number: int) -> int:
        """The value of a question; reads all that are open."""
        if number >= len(self._answers):
            self.read()
        return self._answers[number]

    def read(self) -> None:
        """Read all open questions in one copy: the only wait for the device."""
        new = self._questions[len(self._answers) :]
        if new:
            self._answers += torch.stack([question.to(new[0].device) for question in new]).tolist()


class _Current(threading.local):
    forward: Forward | None = None


_CURRENT = _Current()


def current_forward() -> Forward:
    """The forward whose masks this thread is making."""
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
        blocks: integer (B, Sk), the number of the block of tokens that see each other in both directions, negative =
            none. None: there are none.
        cuts: bool (B, Sq), True where a packed sample begins, as the model told the mask function; None: it did not.
        used: keys in use, int or Tensor, where they can be fewer than Sk; else None.
        from_mask_function: the mask function made this, not a layer, so its pattern and sizes are the model's.
        group: the process group over which the rows are sharded, None if they are whole. Valid if ``has_group``.
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
        self.group, self.has_group, self.from_mask_function = group, has_group, arguments is not None
        self.blocks: Tensor | None = None
        self._windowed = False
        self.forward = Forward() if forward is None else forward
        self._arguments = arguments
        self._dense: Tensor | None = None
        self._padding: int | None = None  # number of the question
        self._kind: int | None = None  # number of the question of what blocks there are
        free = real is not None and real.device.type == "cpu"  # a layer's own mask is not worth waiting for
        if (
            real is not None
            and used is None
            and shape[2] == shape[3]
            and not is_recorded(real)
            and (self.from_mask_function or free)
        ):
            runs = (cuts_at_changes(real) & real).sum(1) + real[:, 0]
            self._padding = self.forward.ask((~real.all()).int() + (runs > 1).any().int())

    def set_blocks(self, blocks: Tensor, windowed: bool = False) -> None:
        """Let the tokens of each block, numbered in ``blocks`` (B, Sk) from 0 on, see each other; negative = none.

        ``windowed``: as far as the window reaches to the left.

        Blocks that are not served are refused as soon as their numbers may be read, here or by the first layer.
        """
        self._windowed = windowed
        self.blocks = blocks if self.real is None else blocks.masked_fill(~self.real.to(blocks.device), -1)
        self._kind = self.forward.ask(kind_of_blocks(self.blocks))
        if blocks.device.type == "cpu":
            self.check_blocks()

    def check_blocks(self) -> None:
        """Raise for blocks that are not served, and forget them if there are none."""
        if self.blocks is None or self._kind is None:
            return
        if self.blocks.is_cuda and torch.cuda.is_current_stream_capturing():
            refuse_pattern(f"{BLOCKS}, while a CUDA graph is captured")
        kind, self._kind = self.forward.answer(self._kind), None
        if kind == NONE:
            self.blocks = None
        elif kind == SCATTERED:
            refuse_pattern(f"{BLOCKS}, of which one lies in two places of a row")
        elif self.shape[2] != self.shape[3]:
            refuse_pattern(f"{BLOCKS}, in a cache of another length")

    def key_ranges(self, packed: bool, device: torch.device) -> Tensor | None:
        """What causality, window and blocks leave of the keys, as ``attention_sink`` takes it; None without blocks.

        int32 (B, S, 2), or ``packed`` (B * S, 2) in rows of the flattened batch.
        """
        if self.blocks is None:
            return None

        def derive():
            ranges = key_ranges_of_blocks(self.blocks.to(device), self.window[0], self._windowed)
            if packed:
                rows = torch.arange(ranges.shape[0], device=device, dtype=torch.int32) * ranges.shape[1]
                ranges = (ranges + rows[:, None, None]).flatten(0, 1)
            return ranges

        return self.forward.once(self.blocks, ("key_ranges", self.window[0], packed, device), derive)

    def check(self, seqlen_q: int, seqlen_k: int) -> None:
        """Raise for a layer whose queries or keys are not those that the mask function was asked for."""
        if self.from_mask_function and (self.shape[2] != seqlen_q or self.shape[3] != seqlen_k):
            raise ValueError(
                f"attention_mask must be made for the layer's {seqlen_q} queries and {seqlen_k} keys, got one for "
                f"{self.shape[2]} and {self.shape[3]}: the layer adds or drops keys, which the mask says nothing of. "
                "Use attn_implementation='eager'"
            )
        self.forward.used = True
        self.check_blocks()

    def refuse_restarts(self, positions: Tensor) -> None:
        """Raise if positions (B, S) fall between two tokens: within a sample they never do."""
        falls = positions.diff(dim=-1) < 0
        if self.real is not None:  # positions of padding mean nothing
            real = self.real.to(positions.device)
            falls = falls & real[:, 1:] & real[:, :-1]
        if self.cuts is not None:  # cuts that the mask function knows are no surprise
            falls = falls & ~self.cuts[:, 1:].to(positions.device)
        falls = falls.any()
        message = (
            "position_ids must be (4, B, S), the text positions first, for packed rows, got (3, B, S) that "
            "restart: packed samples cannot be told from images. Or pass cu_seq_lens_q and cu_seq_lens_k"
        )
        if is_recorded(positions):
            torch._assert_async(~falls, message)
        elif self.forward.once(positions, "restarts", lambda: bool(falls)):
            raise ValueError(message)

    def for_gathered_rows(self, seqlen: int) -> ForwardMask:
        """This mask is of a shard: the mask of the ``seqlen`` rows of all ranks."""
        if self.blocks is not None:
            refuse_pattern(f"{BLOCKS}, under sequence parallelism")
        shape = (self.shape[0], 1, seqlen, seqlen)
        return ForwardMask(shape, self.device, causal=self.causal, window=self.window, forward=self.forward)

    def padding(self) -> int:
        """NO_PADDING, RUNS or GAPS. GAPS where the mask may not be read (torch.compile, graph capture, a cache)."""
        if self.real is None:
            return NO_PADDING
        if self._padding is None or is_recorded(self.real):
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
        if device.type == "cpu" and not torch.compiler.is_compiling():  # where reading costs no wait
            found = [cuts for cuts in found if cuts.any()]
        if padding == RUNS and (found or device.type != "cpu"):
            # padding becomes segments of its own, which no token sees; the fast kernels take them
            found.append(cuts_at_changes(real))
            padding = NO_PADDING
        if not found:
            return None, False
        cu_seqlens = cu_seqlens_from_cuts(functools.reduce(torch.logical_or, found), batch)
        return cu_seqlens if is_recorded(cu_seqlens) else constant(cu_seqlens), padding != NO_PADDING

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
        """A copy on another device. Any other conversion goes to ``dense``."""
        device = args[0] if args else kwargs.get("device")
        if not isinstance(device, (str, int, torch.device)) or kwargs.get("dtype") is not None or len(args) > 1:
            return self.dense.to(*args, **kwargs)
        moved = copy.copy(self)
        moved.device = torch.device(device)
        for name in ("real", "sample_ids", "cuts", "used", "blocks"):
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
        if name.startswith("_") or name in ("forward", "from_mask_function"):  # not yet set, as in a copy
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


def is_recorded(x: Tensor) -> bool:
    """Whether torch.compile or a CUDA graph records the work on x, to run it on other values later."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
