"""Samples that share a prompt, computed as a tree: the prompt once, then its branches.

A row holds groups of segments, [prompt | branch 1 | ... | branch n] [prompt | ...]. A branch sees its prompt and,
causally, itself; its positions go on where the prompt ends, and windows count along that path. The result is that of n
separate samples, forward and backward; the prompt's gradients are the sums of theirs.

Two parts, merged by their lse. Ordinary packed causal attention over all segments, with the sinks; and the branches
against their prompts. The latter needs no copy of a key, because packed segments of queries and of keys are cut
separately: all branches of a group are one segment of queries, whose keys are the prompt. With a window only the first
rows of a branch reach back into the prompt: these are gathered, and ``key_ranges`` says how far each sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .interface import attention_sink
from .masks import constant
from .merge import merge_attention


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
        self._derived: dict[tuple, object] = {}

    def __repr__(self) -> str:
        return f"SharedPrefixes(lengths={self.lengths}, prefix_of={self.prefix_of})"

    def _groups(self) -> list[tuple[int, int, list[int]]]:
        """First row and length of each prompt, and its branches."""
        found = []
        for segment, prefix in enumerate(self.prefix_of):
            if prefix == -1:
                found.append((self._starts[segment], self.lengths[segment], []))
            else:
                found[-1][2].append(segment)
        return found

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
        longest = max(p + max((self.lengths[s] for s in branches), default=0) for _, p, branches in self._groups())
        return -1 if left >= longest - 1 else left

    def branch_cuts(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """cu_seqlens of queries and of keys under which all branches of a group see their prompt, and prompts nothing;
        None if no branch has a row that sees a prompt."""

        def derive():
            cuts_q, cuts_k, seen = [0], [0], False
            for _, prompt, branches in self._groups():
                rows = sum(self.lengths[s] for s in branches)
                cuts_q += [prompt, rows, 0]
                cuts_k += [0, prompt, rows]
                seen = seen or (prompt > 0 and rows > 0)
            return tuple(_int32(accumulate(cuts), device) for cuts in (cuts_q, cuts_k)) if seen else None

        return self.once(("branches", device), derive)

    def window_rows(self, left: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """The rows of branches whose window reaches into the prompt; None if there are none.

        Returns:
            rows int64 (M,); cu_seqlens of these rows and of the keys, under which they see their prompt; and key_ranges
            (M, 2), how much of it.
        """

        def derive():
            rows, ranges, cuts_q, cuts_k = [], [], [0], [0]
            for start, prompt, branches in self._groups():
                reaching = 0
                for s in branches:
                    t = torch.arange(min(self.lengths[s], left) if prompt else 0)
                    rows.append(self._starts[s] + t)
                    first = start + (prompt + t - left).clamp_min(0)
                    ranges.append(torch.stack([first, torch.full_like(first, start + prompt)], -1))
                    reaching += len(t)
                cuts_q += [reaching, 0]
                cuts_k += [prompt, sum(self.lengths[s] for s in branches)]
            if cuts_q == [0] * len(cuts_q):
                return None
            cuts = (_int32(accumulate(cuts), device) for cuts in (cuts_q, cuts_k))
            return torch.cat(rows).to(device), *cuts, torch.cat(ranges).to(device, torch.int32)

        return self.once(("window", left, device), derive)


def _int(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        if isinstance(value, Tensor) and value.dim() == 0 and not value.is_floating_point():
            return int(value)
        raise TypeError(f"lengths and prefix_of must be ints, got {type(value).__name__}")
    return value


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

    Differentiable in q, k, v, sinks and through lse. No key is copied.

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
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise TypeError(f"window_size must be a pair (left, right), got {window_size!r}")
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
            rows, cu_q, cu_k, ranges = found
            prompt = attention_sink(
                q.index_select(0, rows), k, v, causal=False, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, key_ranges=ranges,
                **options,
            )  # fmt: skip
            own = out.index_select(0, rows), lse.index_select(1, rows)
            merged = merge_attention((own[0], prompt[0]), (own[1], prompt[1]))
            out, lse = out.index_copy(0, rows, merged[0]), lse.index_copy(1, rows, merged[1])
    return (out, lse) if return_lse else out
