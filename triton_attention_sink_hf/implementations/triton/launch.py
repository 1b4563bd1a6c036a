"""What the launchers of this backend share: sizes, packing of heads, kernel arguments, ranges of packed rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from ...call import Call
from .masks import _segment_range_kernel

MAX_PACK = 8  # heads in a tile; more leave too few tokens per tile for causal edges


@dataclass(frozen=True)
class Problem:
    """A call as the kernels see it."""

    call: Call

    @property
    def batch(self) -> int:
        return self.call.q.shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.call.q.shape[1]

    @property
    def seqlen_k(self) -> int:
        return self.call.k.shape[1]

    @property
    def heads_q(self) -> int:
        return self.call.q.shape[2]

    @property
    def heads_k(self) -> int:
        return self.call.k.shape[2]

    @cached_property
    def sinks(self) -> Tensor | None:
        """(Hq,) without gaps, as the kernels read it."""
        return None if self.call.sinks is None else self.call.sinks.contiguous()

    @cached_property
    def pack(self) -> int:
        """Query heads in the rows of one tile: they share its keys. A power of two that divides Hq / Hkv."""
        group = self.heads_q // self.heads_k
        return min(group & -group, MAX_PACK)

    @cached_property
    def block_d(self) -> int:
        return triton.next_power_of_2(self.call.q.shape[-1])

    @cached_property
    def block_dv(self) -> int:
        return triton.next_power_of_2(self.call.v.shape[-1])

    @cached_property
    def target(self) -> str:
        """The architecture that the configs are chosen for, such as "sm90" or "gfx942"; "cpu" when interpreted."""
        return target_name(self.call.q.device)

    @cached_property
    def ranges(self) -> Tensor | None:
        """Packed rows: the intervals of visible keys per query, then of seeing queries per key; int32 (2 Tq + 2 Tk)."""
        mask = self.call.mask
        if not mask.packed:
            return None
        cu_q, cu_k = mask.cu_seqlens_q.contiguous(), mask.cu_seqlens_k.contiguous()
        n_q, n_k = self.seqlen_q, self.seqlen_k
        ranges = torch.empty(2 * (n_q + n_k), dtype=torch.int32, device=cu_q.device)
        for own, other, n_own, n_other, before, after, out in (
            (cu_q, cu_k, n_q, n_k, mask.left, mask.right, ranges),
            (cu_k, cu_q, n_k, n_q, mask.right, mask.left, ranges[2 * n_q :]),
        ):
            n_segments = own.numel() - 1
            block = 256
            _segment_range_kernel[(triton.cdiv(n_own, block),)](
                ranges_ptr=out,
                cu_own_ptr=own,
                cu_other_ptr=other,
                n_segments=n_segments,
                n_own=n_own,
                n_other=n_other,
                before=before,
                after=after,
                search_steps=n_segments.bit_length(),
                HAS_BEFORE=before >= 0,
                HAS_AFTER=after >= 0,
                BLOCK=block,
            )
        return ranges

    def sizes(self) -> dict:
        """Arguments that every kernel takes."""
        call, mask = self.call, self.call.mask
        return {
            "ranges_ptr": self.ranges,
            "softmax_scale": call.softmax_scale,
            "batch": self.batch,
            "seqlen_q": self.seqlen_q,
            "seqlen_k": self.seqlen_k,
            "heads_q": self.heads_q,
            "heads_k": self.heads_k,
            "left": mask.left,
            "right": mask.right,
            "HAS_SINK": call.sinks is not None,
            "PACKED": mask.packed,
            "D": call.q.shape[-1],
            "DV": call.v.shape[-1],
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "PACK": self.pack,
        }

    def mask_arguments(self) -> dict:
        """``sizes`` and what the kernels for any mask take: padding, used lengths, softcap, their switches."""
        call, mask = self.call, self.call.mask
        padding = mask.key_padding_mask
        return {
            **self.sizes(),
            "padding_ptr": None if padding is None else padding.view(torch.uint8),
            "seqused_ptr": None if mask.seqused_k is None else mask.seqused_k.contiguous(),
            "softcap": call.softcap,
            "stride_pb": 0 if padding is None else padding.stride(0),
            "stride_pt": 0 if padding is None else padding.stride(1),
            "HAS_LEFT": mask.left >= 0,
            "HAS_RIGHT": mask.right >= 0,
            "HAS_SEQUSED": mask.seqused_k is not None,
            "HAS_PADDING": padding is not None,
            # -inf must stay -inf under the scale, which therefore is applied before the mask unless it is positive
            "PRESCALE": call.softcap > 0.0 or call.softmax_scale <= 0.0,
            "HAS_SOFTCAP": call.softcap > 0.0,
        }


def strides(name: str, x: Tensor) -> dict[str, int]:
    """stride_{name}b, t, h, d of a BSHD tensor."""
    return {f"stride_{name}{axis}": stride for axis, stride in zip("bthd", x.stride(), strict=True)}


def target_name(device: torch.device) -> str:
    """ "sm90", "gfx942", ... for a GPU; "cpu" for tensors that only the interpreter can take."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"
