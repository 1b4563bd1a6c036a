"""Samples that share a prompt, computed as a tree: the prompt once, then its branches.

A row holds groups of segments, [prompt | branch 1 | ... | branch n] [prompt | ...]. A branch sees its prompt and,
causally, itself; its positions go on where the prompt ends, and windows count along that path. The result is that of n
separate samples, forward and backward; the prompt's gradients are the sums of theirs.

Two parts, merged by their lse. Ordinary packed causal attention over all segments, with the sinks; and the branches
against their prompts. The latter needs no copy of a key, because packed segments of queries and of keys are cut
separately: all branches of a group are one segment of queries, whose keys are the prompt. With a window only the first
rows of a branch reach back into the prompt, and only to its end: these are gathered, once, and ``key_ranges`` says how
far each row sees.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from .interface import attention_sink
from .masks import constant
from .merge import merge_attention
from .validation import check_window

TILE = 64  # keys of a tile of the portable backward, or few more or fewer
KEY_TILES = 32  # of a call; times 8 key heads they are two programs for each SM of an H100


class WindowRows(NamedTuple):
    """The part of a tree in which branches see their prompts through a window, as a dense call.

    Its keys, the ends of all prompts, are few. To keep a card busy in the backward, which loops over the queries of a
    tile of keys, the queries are cut into chunks, a batch whose rows all have these keys.

    Attributes:
        rows: int64 (M,), the rows of branches whose window reaches into the prompt.
        padded: the same and more, (chunks * rows of a chunk,).
        tails: int64 (K,), the prompts' rows that they see.
        key_ranges: int32 (chunks, rows of a chunk, 2), which of ``tails`` each of ``padded`` sees; padding none.
    """

    rows: Tensor
    padded: Tensor
    tails: Tensor
    key_ranges: Tensor


class SharedPrefixes:
    """Which segments of a packed row are prompts, and which go on after one. It lives on the host.

    Args:
        lengths: rows of each segment, in the order of the packed row; 0 is allowed.
        prefix_of: for each segment the index of its prompt, or -1. Branches stand directly behind their prompt, which
            has no prompt itself.

    Attributes:
        total: rows of the packed row, the sum of the lengths.

    Raises:
        ValueError, TypeError: a tree that is not of this form.
    """

    def __init__(self, lengths: Sequence[int], prefix_of: Sequence[int]):
        self.lengths, self.prefix_of = tuple(map(_int, lengths)), tuple(map(_int, prefix_of))
        if len(self.lengths) != len(self.prefix_of) or not self.lengths:
            raise ValueError(
                f"lengths and prefix_of must be of one length, at least 1, got {len(self.lengths)} and "
                f"{len(self.prefix_of)}"
            )
        if min(self.lengths) < 0:
            raise ValueError(f"lengths must be >= 0, got {min(self.lengths)}")
        prompt = -1
        for segment, prefix in enumerate(self.prefix_of):
            if prefix == -1:
                prompt = segment
            elif prefix != prompt:
                raise ValueError(
                    f"prefix_of[{segment}] must be -1 or {prompt}, the last segment before it without a prefix, got "
                    f"{prefix}"
                )
        self.total = sum(self.lengths)
        self._starts = (0, *accumulate(self.lengths))
        self._groups: list[tuple[int, int, list[int]]] = []  # first row and length of a prompt, and its branches
        for segment, prefix in enumerate(self.prefix_of):
            if prefix == -1:
                self._groups.append((self._starts[segment], self.lengths[segment], []))
            else:
                self._groups[-1][2].append(segment)
        self._longest = max(p + max((self.lengths[s] for s in branches), default=0) for _, p, branches in self._groups)
        self._derived: dict[tuple, object] = {}

    def __reduce__(self):  # without what was derived of it
        return SharedPrefixes, (self.lengths, self.prefix_of)

    def __repr__(self) -> str:
        return f"SharedPrefixes(lengths={self.lengths}, prefix_of={self.prefix_of})"

    def position_ids(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (1, total): every row's position in its own sample, which a model's rotary embedding needs."""
        parts = []
        for segment, prefix in enumerate(self.prefix_of):
            first = 0 if prefix == -1 else self.lengths[prefix]
            parts.append(torch.arange(first, first + self.lengths[segment]))
        return torch.cat(parts)[None].to(device)

    def previous_rows(self, device: torch.device | str | None = None) -> Tensor:
        """int64 (total,): the row before each in its own sample, whose logits predict it; -1 for the first of a sample.

        The last row of a prompt stands before the first of each branch.
        """
        rows = torch.arange(-1, self.total - 1)
        for segment, prefix in enumerate(self.prefix_of):
            start = self._starts[segment]
            if self.lengths[segment]:
                before = prefix != -1 and self.lengths[prefix]
                rows[start] = self._starts[prefix + 1] - 1 if before else -1
        return rows.to(device)

    def once(self, key: tuple, derive):
        """``derive()``, remembered for ``key`` unless torch.compile traces it."""
        if torch.compiler.is_compiling():
            return derive()
        if key not in self._derived:
            self._derived[key] = derive()
        return self._derived[key]

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """int32 (N + 1,): the first row of each segment."""
        return self.once(("cu_seqlens", device), lambda: constant(_int32(self._starts, device)))

    def reach(self, left: int) -> int:
        """``left``; -1 if no row of any sample is so far from its first that a window of it hides anything."""
        return -1 if left >= self._longest - 1 else left

    def branch_cuts(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cu_seqlens of queries and of keys under which all branches of a group see their prompt, and prompts nothing;
        None if no branch has a row that sees a prompt."""

        def derive():
            cuts_q, cuts_k, seen = [0], [0], False
            for _, prompt, branches in self._groups:
                rows = sum(self.lengths[s] for s in branches)
                cuts_q += [prompt, rows, 0]
                cuts_k += [0, prompt, rows]
                seen = seen or (prompt > 0 and rows > 0)
            return tuple(_int32(accumulate(cuts), device) for cuts in (cuts_q, cuts_k)) if seen else None

        return self.once(("branches", device), derive)

    def window_rows(self, left: int, device: torch.device) -> WindowRows | None:
        """What the branches see of their prompts through a window; None if nothing."""

        def derive():
            rows, tails, ranges, n_tails = [], [], [], 0
            for start, prompt, branches in self._groups:
                reach = min(left, prompt)
                tails.append(start + prompt - reach + torch.arange(reach))
                for s in branches:
                    t = torch.arange(min(self.lengths[s], left) if prompt else 0)
                    rows.append(self._starts[s] + t)
                    first = n_tails + (reach + t - left).clamp_min(0)
                    ranges.append(torch.stack([first, torch.full_like(first, n_tails + reach)], -1))
                n_tails += reach
            if not any(map(len, rows)):
                return None
            rows, tails, ranges = torch.cat(rows), torch.cat(tails), torch.cat(ranges)
            chunks = min(max(KEY_TILES // -(-n_tails // TILE), 1), -(-len(rows) // TILE))
            padding = -len(rows) % chunks
            padded = torch.nn.functional.pad(rows, (0, padding))
            ranges = torch.nn.functional.pad(ranges, (0, 0, 0, padding)).view(chunks, -1, 2)
            return WindowRows(rows.to(device), padded.to(device), tails.to(device), ranges.to(device, torch.int32))

        return self.once(("window", left, device), derive)


def _int(value) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"lengths and prefix_of must be ints, got {type(value).__name__}")


def _int32(values, device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def shared_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None = None,
    *,
    tree: SharedPrefixes,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    softcap: float = 0.0,
    deterministic: bool | None = None,
    return_lse: bool = False,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention of samples that share prompts, equal to that of the samples one by one.

    Differentiable in q, k, v, sinks and through lse. No key is copied for a branch.

    Args:
        q: (T, Hq, D), T = ``tree.total``. k: (T, Hkv, D). v: (T, Hkv, Dv). Positions are already in q and k: those of
            ``tree.position_ids()``.
        tree: which segments share which prompt.
        window_size: (left, 0) or (left, -1): keys before a query's own along its sample, -1 = all.
        implementation: of both parts; with a window, "triton", "reference" or "auto".
        All others: see ``attention_sink``.

    Returns:
        out (T, Hq, Dv) in q's dtype; or (out, lse), lse (Hq, T).

    Raises:
        ValueError, TypeError: an argument that cannot be honoured.
    """
    if not isinstance(tree, SharedPrefixes):
        raise TypeError(f"tree must be a SharedPrefixes, got {type(tree).__name__}")
    check_window(window_size)
    if window_size[1] not in (-1, 0):
        raise ValueError(f"window_size must be (left, 0) or (left, -1), got {window_size!r}: attention is causal")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and (x.dim() != 3 or x.shape[0] != tree.total):
            raise ValueError(f"{name} must be (T, H, D) with T = {tree.total}, as tree.total, got {tuple(x.shape)}")
    options = dict(
        softmax_scale=softmax_scale, softcap=softcap, deterministic=deterministic, return_lse=True,
        implementation=implementation,
    )  # fmt: skip
    device, left = q.device, window_size[0]
    cu = tree.cu_seqlens(device)
    out, lse = attention_sink(q, k, v, sinks, window_size=(left, 0), cu_seqlens_q=cu, cu_seqlens_k=cu, **options)
    if tree.reach(left) < 0:
        cuts = tree.branch_cuts(device)
        if cuts is not None:
            prompt = attention_sink(q, k, v, causal=False, cu_seqlens_q=cuts[0], cu_seqlens_k=cuts[1], **options)
            out, lse = merge_attention((out, prompt[0]), (lse, prompt[1]))
    else:
        found = tree.window_rows(left, device)
        if found is not None:
            rows, chunks, n = found.rows, found.key_ranges.shape[0], found.rows.shape[0]
            parts = (x.index_select(0, found.tails).expand(chunks, -1, -1, -1) for x in (k, v))
            prompt = attention_sink(
                q.index_select(0, found.padded).unflatten(0, (chunks, -1)), *parts, causal=False,
                key_ranges=found.key_ranges, **options,
            )  # fmt: skip
            prompt = prompt[0].flatten(0, 1)[:n], prompt[1].transpose(0, 1).flatten(1)[:, :n]
            own = out.index_select(0, rows), lse.index_select(1, rows)
            merged = merge_attention((own[0], prompt[0]), (own[1], prompt[1]))
            out, lse = out.index_copy(0, rows, merged[0]), lse.index_copy(1, rows, merged[1])
    return (out, lse) if return_lse else out
