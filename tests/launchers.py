"""Every launcher of every backend, named once: compilation, relaunch and GPU tests iterate over these.

Nothing of Triton is imported before it is asked for: a machine may have a Triton without Gluon, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import torch
from cases import Case, hopper, short_window

from triton_attention_sink_hf.call import Call
from triton_attention_sink_hf.masks import Mask

IMPLEMENTATIONS = "triton_attention_sink_hf.implementations"


@dataclass(frozen=True)
class Launcher:
    """``launch_forward`` or ``launch_backward`` of a module.

    Attributes:
        module: its name under ``implementations``; the first part is the backend.
        kernels: the attention kernels that it launches.
        serves: whether it serves a case on a target such as "sm90".
    """

    module: str
    kernels: tuple[str, ...]
    serves: Callable[[Case, str], bool]

    @property
    def backend(self) -> str:
        return self.module.split(".")[0]

    @property
    def is_forward(self) -> bool:
        return self.module.split(".")[-1].startswith("forward")

    @property
    def launch(self) -> Callable:
        """(problem, out, lse), or (problem, out, lse, dout, dlse, dq, dk, dv, dsinks)."""
        module = import_module(f"{IMPLEMENTATIONS}.{self.module}")
        return module.launch_forward if self.is_forward else module.launch_backward


def _any(case: Case, target: str) -> bool:
    return True


def _window(case: Case, target: str) -> bool:
    return target == "sm90" and short_window(case)


def _window_in_one_kernel(case: Case, target: str) -> bool:
    if not _window(case, target):
        return False
    problem = import_module(f"{IMPLEMENTATIONS}.common.problem").Problem(meta_call(case))
    q, k, v = problem.call.q, problem.call.k, problem.call.v
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    return import_module(f"{IMPLEMENTATIONS}.triton_hopper.backward_window").supports(problem, out, out, None, q, k)


def _hopper(case: Case, target: str) -> bool:
    return target == "sm90" and hopper(case)


def _narrow(case: Case, target: str) -> bool:
    return _hopper(case, target) and max(case.dims) <= 64


def _not_narrow(case: Case, target: str) -> bool:
    return _hopper(case, target) and max(case.dims) > 64


def _fused(case: Case, target: str) -> bool:
    return _hopper(case, target) and max(case.dims) <= 128


def _wide(case: Case, target: str) -> bool:
    return _hopper(case, target) and max(case.dims) > 128


def _decode(case: Case, target: str) -> bool:
    return case.lengths_q is None and case.ranges is None


LAUNCHERS = (
    Launcher("triton_decode.forward", ("_decode_fwd_kernel",), _decode),
    Launcher("triton.forward", ("_attn_fwd_kernel",), _any),
    Launcher("triton.backward", ("_attn_bwd_dq_kernel", "_attn_bwd_dkv_kernel"), _any),
    Launcher("triton_window.forward", ("_window_fwd_kernel",), _window),
    Launcher("triton_window.backward", ("_window_bwd_dq_kernel", "_window_bwd_dkv_kernel"), _window),
    Launcher("triton_hopper.backward_window", ("_hopper_window_bwd_kernel",), _window_in_one_kernel),
    Launcher("triton_hopper.forward", ("_hopper_fwd_kernel",), _narrow),
    Launcher("triton_hopper.forward_wide", ("_hopper_wide_fwd_kernel",), _not_narrow),
    Launcher("triton_hopper.backward", ("_hopper_bwd_kernel",), _fused),
    Launcher("triton_hopper.backward_wide", ("_hopper_dkv_kernel", "_hopper_dq_kernel"), _wide),
)


def backends(case: Case, target: str) -> list[str]:
    """The implementations that serve ``case`` on ``target``."""
    return [launcher.backend for launcher in LAUNCHERS if launcher.is_forward and launcher.serves(case, target)]


def meta_pages(case: Case, page_size: int = 16) -> Call:
    """``case`` on a cache of pages whose rows begin late, likewise. Padding masks go."""
    call = meta_call(case)
    n = -(-call.seqlen_k // page_size)
    k, v = (x.new_empty(2 * case.batch * n, page_size, *x.shape[2:]) for x in (call.k, call.v))
    lengths = torch.empty(case.batch, dtype=torch.int32, device="meta")
    mask = Mask(call.mask.left, call.mask.right, seqused_k=lengths, leftpad_k=lengths)
    return replace(call, k=k, v=v, mask=mask, block_table=lengths.new_empty(case.batch, n))


def meta_call(case: Case) -> Call:
    """``case`` on the meta device: shapes and strides, no memory."""
    seqlen_k = case.seqlen_k or case.seqlen_q
    (heads_q, heads_k), (d, dv) = case.heads, case.dims

    def tensor(seqlen, heads, size):
        if case.layout == "bhsd":
            return torch.empty(case.batch, heads, seqlen, size, dtype=case.dtype, device="meta").transpose(1, 2)
        return torch.empty(case.batch, seqlen, heads, size, dtype=case.dtype, device="meta")

    def ints(size):
        return torch.empty(size, dtype=torch.int32, device="meta")

    cu = None if case.lengths_q is None else ints(len(case.lengths_q) + 1)
    padding = None
    if case.padding is not None:
        padding = torch.empty(case.batch, seqlen_k, dtype=torch.bool, device="meta")
    used = None if case.used is None else ints(case.batch)
    ranges = None if case.ranges is None else ints((case.batch, case.seqlen_q, 2))
    sinks = None if case.sinks is None else torch.empty(heads_q, device="meta")
    mask = Mask(case.window[0], 0 if case.causal else case.window[1], cu, cu, padding, used, key_ranges=ranges)
    q, k, v = tensor(case.seqlen_q, heads_q, d), tensor(seqlen_k, heads_k, d), tensor(seqlen_k, heads_k, dv)
    return Call(q, k, v, sinks, mask, case.scale, case.softcap, True)
