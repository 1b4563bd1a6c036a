"""Hopper kernels (wgmma, TMA, warp specialisation) for full attention and wide windows, dense or packed."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import triton as portable
from ..common.problem import Problem, addressable, target_name
from .config import MAX_FUSED_DIM, MIN_QUERIES, TARGETS, TRITON_VERSIONS, triton_version

if not TRITON_VERSIONS[0] <= triton_version() <= TRITON_VERSIONS[1]:
    low, high = (".".join(map(str, version)) for version in TRITON_VERSIONS)
    raise ImportError(
        f"triton must be {low} to {high} for the Hopper kernels, got {'.'.join(map(str, triton_version()))}: "
        "Gluon's interface changes between versions"
    )

from ...call import Call
from . import backward, backward_wide, forward, forward_wide


def supports(call: Call) -> str | None:
    """Why these kernels cannot serve ``call``; None if they can."""
    q, k, v, mask = call.q, call.k, call.v, call.mask
    target = target_name(q.device)
    if target not in TARGETS:
        return f"the Hopper kernels need {TARGETS[0]}, got {target}"
    if call.deterministic and _fused(call):
        return "the Hopper kernels add dq in no fixed order, and deterministic gradients were asked for"
    if mask.key_ranges is not None:
        return "only the portable triton kernels and the reference take key_ranges"
    if mask.key_padding_mask is not None or mask.seqused_k is not None:
        return "the Hopper kernels take neither key_padding_mask nor seqused_k"
    if call.softcap > 0.0 or call.softmax_scale <= 0.0:
        return "the Hopper kernels take a positive softmax_scale and no softcap"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"the Hopper kernels take bfloat16 or float16, got {q.dtype}"
    if not 32 < max(q.shape[-1], v.shape[-1]) <= 256:
        return "the Hopper kernels take head dimensions above 32 and up to 256"
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not addressable(x):
            return f"{name} must be 16-byte aligned with a contiguous last dimension for Hopper's copy engine"
    if q.shape[-1] % 8 or v.shape[-1] % 8:  # TMA stores out and the gradients too
        return "the Hopper kernels take head dimensions that are multiples of 8"
    return portable.supports(call)


def slower_reason(call: Call) -> str | None:
    """Why "auto" leaves ``call`` to the portable kernels, which are faster there; None if it takes this backend."""
    queries = call.q.shape[1]
    if queries < MIN_QUERIES:
        return f"the portable kernels are faster for fewer than {MIN_QUERIES} queries, got {queries}"
    return None


def run_forward(call: Call, out: Tensor, lse: Tensor) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) fp32."""
    if out.numel() and call.k.numel():
        launch = (forward if max(call.q.shape[-1], call.v.shape[-1]) <= 64 else forward_wide).launch_forward
        launch(Problem(call), out, lse)
    else:
        portable.run_forward(call, out, lse)


def run_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    dq: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    dsinks: Tensor | None,
) -> None:
    """Write dq, and dk, dv (inputs' dtypes) and dsinks (Hq,) fp32 where given.

    Heads up to MAX_FUSED_DIM that need no dk and dv take the portable kernels.
    """
    fused = _fused(call)
    if not (out.numel() and call.k.numel()) or (fused and dk is None):
        portable.run_backward(call, out, lse, dout, dlse, dq, dk, dv, dsinks)
        return
    launch = backward.launch_backward if fused else backward_wide.launch_backward
    launch(Problem(call), out, lse, dout if addressable(dout) else dout.contiguous(), dlse, dq, dk, dv, dsinks)


def _fused(call: Call) -> bool:
    """Whether the backward is the fused kernel, which adds dq in no fixed order."""
    return max(call.q.shape[-1], call.v.shape[-1]) <= MAX_FUSED_DIM
