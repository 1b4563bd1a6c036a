"""A call as the launchers see it: sizes, packing of heads, kernel arguments, ranges of packed rows."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from ...call import Call, Memo
from ...masks import DERIVED
from .config import LEAST_COLUMNS, MAX_PACK, RANGES_BLOCK, TMA_TARGETS
from .masks import _segment_range_kernel
from .relaunch import Blocks, Launch

MAX_PLANS = 1024


class Problem:
    """A call as the kernels see it.

    Attributes:
        sinks: (Hq,) without gaps, as the kernels read it, or None.
        memo: where ``planned`` remembers.
    """

    def __init__(self, call: Call):
        self.call = call
        self.sinks = None if call.sinks is None else call.sinks.contiguous()
        self.memo = call.memo or Memo()

    @property
    def batch(self) -> int:
        """B; packed rows have 1."""
        return self.call.q.shape[0]

    @property
    def seqlen_q(self) -> int:
        return self.call.q.shape[1]

    @property
    def seqlen_k(self) -> int:
        return self.call.seqlen_k

    @property
    def heads_q(self) -> int:
        return self.call.q.shape[2]

    @property
    def heads_k(self) -> int:
        return self.call.k.shape[2]

    @property
    def pack(self) -> int:
        """Query heads in the rows of one tile: they share its keys. A power of two that divides Hq / Hkv."""
        group = self.heads_q // self.heads_k
        return min(group & -group, MAX_PACK)

    @property
    def block_d(self) -> int:
        return self._columns(self.call.q)

    @property
    def block_dv(self) -> int:
        return self._columns(self.call.v)

    def _columns(self, x: Tensor) -> int:
        """Columns of a tile of x."""
        return max(padded(x.shape[-1]), LEAST_COLUMNS.get(self.target, 0))

    @property
    def target(self) -> str:
        """The architecture that the configs are chosen for, such as "sm90" or "gfx942"; "cpu" when interpreted."""
        return target_name(self.call.q.device)

    @property
    def ranges(self) -> Tensor | None:
        """Packed rows, int32 (4 Tq + 4 Tk): the interval of visible keys and the segment of every query, then the
        interval of seeing queries and the segment of every key."""
        mask = self.call.mask
        if not mask.packed:
            return None
        seqlen_q, seqlen_k = self.seqlen_q, self.seqlen_k

        def compute():
            cu_q, cu_k = mask.cu_seqlens_q.contiguous(), mask.cu_seqlens_k.contiguous()
            ranges = cu_q.new_empty(4 * (seqlen_q + seqlen_k))
            launch = _ranges_launch(cu_q.numel() - 1, seqlen_q, seqlen_k, mask.left, mask.right)
            launch(ranges_ptr=ranges, cu_q_ptr=cu_q, cu_k_ptr=cu_k)
            return ranges

        return self.derived("ranges", compute)

    def derived(self, what, compute: Callable[[], Tensor]) -> Tensor:
        """``compute()``, which the cuts of packed rows and the window determine.

        Calls share one result if their cu_seqlens are one ``constant`` tensor, on one stream. Not while a graph is
        recorded: it will run with other values.
        """
        mask = self.call.mask
        known = getattr(mask.cu_seqlens_q, DERIVED, None)
        if known is None or mask.cu_seqlens_k is not mask.cu_seqlens_q:
            return compute()
        stream = None
        if mask.cu_seqlens_q.is_cuda:
            if torch.cuda.is_current_stream_capturing():
                return compute()
            stream = driver.active.get_current_stream(mask.cu_seqlens_q.get_device())  # a tenth of torch's time
        key = what, mask.left, mask.right, self.seqlen_q, self.seqlen_k, stream
        result = known.get(key)
        if result is None:
            result = known[key] = compute()
        return result

    def sizes(self) -> dict:
        """Arguments that every kernel takes and that ``memo`` determines."""
        call, mask = self.call, self.call.mask
        return {
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

    def mask_tensors(self) -> dict:
        """Tensors that the kernels for any mask take."""
        mask = self.call.mask
        return {
            "ranges_ptr": self.ranges,
            "padding_ptr": None if mask.key_padding_mask is None else mask.key_padding_mask.view(torch.uint8),
            "seqused_ptr": None if mask.seqused_k is None else mask.seqused_k.contiguous(),
        }


@functools.lru_cache(MAX_PLANS)
def _ranges_launch(segments: int, seqlen_q: int, seqlen_k: int, left: int, right: int) -> Launch:
    return Launch(
        _segment_range_kernel,
        (ceil_div(max(seqlen_q, seqlen_k), RANGES_BLOCK), 2),
        n_segments=segments,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        left=left,
        right=right,
        search_steps=segments.bit_length(),
        HAS_LEFT=left >= 0,
        HAS_RIGHT=right >= 0,
        BLOCK=RANGES_BLOCK,
    )


def planned(build):
    """Cache ``build(problem, *rest)``, the grid and the constant arguments of a launch, in the problem's memo."""

    @functools.wraps(build)
    def plan(problem: Problem, *rest):
        plans, key = problem.memo.plans, (build, *rest)
        result = plans.get(key)
        if result is None:
            if len(plans) >= MAX_PLANS:
                plans.clear()
            result = plans[key] = build(problem, *rest)
        return result

    return plan


def strides(name: str, stride: tuple[int, ...]) -> dict:
    """stride_{name}b, t, h, d of a BSHD tensor.

    Strides that a model fixes are constexpr, so that address arithmetic in loops becomes immediate offsets. The batch
    stride varies with the sequence length. So does the head stride if heads are outside tokens.
    """
    b, t, h, d = stride
    return {
        f"stride_{name}b": b,
        f"stride_{name}t": tl.constexpr(t),
        f"stride_{name}h": tl.constexpr(h) if h <= t else h,
        f"stride_{name}d": tl.constexpr(d),
    }


def dlse_arguments(stride: tuple[int, ...] | None) -> dict:
    """Strides of dlse (B, Hq, Sq), and whether there is one."""
    b, h, t = stride or (0, 0, 0)
    return {"stride_dlb": b, "stride_dlh": h, "stride_dlt": t, "HAS_DLSE": stride is not None}


def use_tma(problem: Problem, *tensors: Tensor) -> bool:
    """Whether the target has TMA and it can address the tensors."""
    return problem.target in TMA_TARGETS and all(map(addressable, tensors))


def addressable(x: Tensor) -> bool:
    """Whether TMA can address a BSHD tensor: last stride 1, the others and the address multiples of 16 bytes.

    Traced tensors have no address; their storage offset decides.
    """
    b, t, h, d = x.stride()
    unit = 16 // x.element_size()
    if d != 1 or b % unit or t % unit or h % unit or min(b, t, h) <= 0:
        return False
    return x.storage_offset() % unit == 0 if torch.compiler.is_compiling() else x.data_ptr() % 16 == 0


def token_blocks(shape: tuple[int, ...], stride: tuple[int, ...], tokens: int, heads: int, columns: int) -> Blocks:
    """Blocks of (1, tokens, heads, columns) of a BSHD tensor; what lies outside reads as 0 and is not written."""
    block_shape = [1, tokens, heads, columns]
    return Blocks(TensorDescriptor, {"shape": shape, "strides": stride, "block_shape": block_shape})


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(d: int) -> int:
    """The power of two that holds head dimension d; a matrix product needs 16."""
    return max(next_power_of_2(d), 16)


@functools.lru_cache
def target_name(device: torch.device) -> str:
    """ "sm90", "gfx942", ... for a GPU; "cpu" for tensors that only the interpreter can take."""
    if device.type != "cuda":
        return "cpu"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm{properties.major}{properties.minor}"


@functools.lru_cache
def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; 4 for the interpreter, so that persistent kernels loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
