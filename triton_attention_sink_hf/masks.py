"""What a query may see: one description that every implementation reads.

Queries and keys of one batch row (or one packed segment) are aligned at their *last* elements, as in
flash-attn 2.1+: query ``i`` of ``Sq`` stands at key position ``i + Sk - Sq``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Attribute of cu_seqlens whose values never change: a dict in which kernels keep what they derived of them.
DERIVED = "_attention_sink_derived"
# Rows of a batch row or of a packed row stay below it, so positions beside windows below it fit 32 bits.
MAX_ROWS = 2**30


def constant(cu_seqlens: Tensor) -> Tensor:
    """The same tensor, with the promise that its values never change.

    The layers of a forward, and their backward, then share what kernels derive of it. Only for tensors that no user can
    reach: of others nobody knows whether something writes to their memory.
    """
    setattr(cu_seqlens, DERIVED, {})
    return cu_seqlens


@dataclass
class Mask:
    """Visibility of keys for queries. ``left`` and ``right`` count keys beside the query's own position.

    Not ``frozen``, which would cost time on every call. Nothing changes a mask once the call is prepared.

    Attributes:
        left: keys before the query's position that it sees; -1 = all of them, as is anything from ``MAX_ROWS`` on.
        right: keys after it, likewise; 0 = causal.
        cu_seqlens_q, cu_seqlens_k: int32 (N + 1,), first row of each packed segment; rows past the last entry
            belong to no segment and see nothing. Entries may repeat (empty segments).
        key_padding_mask: bool (B, Sk), True = real key; packed rows have B = 1.
        seqused_k: int32 (B,), keys in use; later slots are hidden, and the alignment is to this length.
        leftpad_k: int32 (B,), slots before the first key; they count in seqused_k and in positions, and are hidden.
        key_ranges: int32 (B, Sq, 2), for each query the key rows [first, last) that it may see, beside all else that
            is said here. They need not rise from query to query, may pass the keys there are, and may be empty.
    """

    left: int = -1
    right: int = -1
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    key_padding_mask: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    key_ranges: Tensor | None = None

    def __post_init__(self):
        if self.left >= MAX_ROWS:
            self.left = -1
        if self.right >= MAX_ROWS:
            self.right = -1

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    def dense(self, seqlen_q: int, seqlen_k: int, device: torch.device) -> Tensor:
        """Visibility as bool (B or 1, Sq, Sk); True = the query sees the key. Quadratic: for the oracle and tests."""
        i = torch.arange(seqlen_q, device=device)[None, :, None]
        j = torch.arange(seqlen_k, device=device)[None, None, :]
        if self.packed:
            cu_q, cu_k = self.cu_seqlens_q.long(), self.cu_seqlens_k.long()
            segment_q = torch.searchsorted(cu_q[1:], i.flatten(), right=True)
            segment_k = torch.searchsorted(cu_k[1:], j.flatten(), right=True)
            n = cu_q.numel() - 1
            visible = (segment_q[:, None] == segment_k[None, :]) & (segment_q < n)[:, None]
            visible = visible[None]
            shift = torch.cat([cu_k[1:] - cu_q[1:], cu_q.new_zeros(1)])[segment_q][None, :, None]
        else:
            visible = torch.ones(1, seqlen_q, seqlen_k, dtype=torch.bool, device=device)
            shift = seqlen_k - seqlen_q
            if self.seqused_k is not None:
                used = self.seqused_k.long().clamp(0, seqlen_k)[:, None, None]
                shift = used - seqlen_q
                visible = visible & (j < used)
            if self.leftpad_k is not None:
                visible = visible & (j >= self.leftpad_k.long()[:, None, None])
        if self.left >= 0:
            visible = visible & (j >= i + shift - self.left)
        if self.right >= 0:
            visible = visible & (j <= i + shift + self.right)
        if self.key_padding_mask is not None:
            visible = visible & self.key_padding_mask[:, None, :]
        if self.key_ranges is not None:
            first, last = self.key_ranges.long().split(1, -1)
            visible = visible & (j >= first) & (j < last)
        return visible
