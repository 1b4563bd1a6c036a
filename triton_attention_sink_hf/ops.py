"""The kernels as ``torch.library`` operators: shapes for tracing, autograd wiring, no mathematics.

``triton_attention_sink::attention_forward`` and ``::attention_backward`` make torch.compile, activation
checkpointing, opcheck and FSDP2 see ordinary differentiable operators.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from .call import Call, layout_of, traced
from .implementations import fastest, load
from .masks import Mask


def attention_op(call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    """Run ``call``. Returns out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) fp32; both differentiable.

    What is traced goes through the operator. Plain eager calls use the same functions as an ``autograd.Function``,
    without the host time of the operator's wrappers.
    """
    q, k, v, mask = call.q, call.k, call.v, call.mask
    if call.layout is None:
        tensors = (
            q, k, v, call.sinks, mask.cu_seqlens_q, mask.cu_seqlens_k, mask.key_padding_mask, mask.seqused_k
        )  # fmt: skip
        if traced(*tensors):
            return attention_forward(
                *tensors, mask.left, mask.right, call.softmax_scale, call.softcap, call.deterministic, implementation
            )
    if _are_functorch_transforms_active():
        raise NotImplementedError(
            "attention_sink was called inside a transform of functorch (torch.func.grad, vmap, jvp, ...), which its "
            "Triton kernels do not take part in: use torch.autograd.grad, a loop, or implementation='reference'"
        )
    if _differentiated(call):
        # tensors that have left a transform need what apply does about them
        apply = _Attention.apply if call.layout is None else _Attention.apply_untransformed
        return apply(q, k, v, call.sinks, call, implementation)
    return _run_forward(call, implementation)


def _differentiated(call: Call) -> bool:
    """Whether the call must be an autograd.Function: for a graph, or to refuse forward mode."""
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    needed = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    return (needed and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_padding_mask: Tensor | None,
    seqused_k: Tensor | None,
    left: int,
    right: int,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    _no_dual_level()
    tensors = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k)
    return _run_forward(_call(tensors, left, right, softmax_scale, softcap, deterministic), implementation)


def _call(tensors: tuple[Tensor | None, ...], left, right, softmax_scale, softcap, deterministic) -> Call:
    q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, *_ = tensors
    layout = layout_of(tensors, left, right, softmax_scale, softcap, deterministic, cu_seqlens_q is cu_seqlens_k)
    return Call(q, k, v, sinks, Mask(left, right, *tensors[4:]), softmax_scale, softcap, deterministic, layout)


def _run_forward(call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(call.q, call.v)
    with torch.cuda.device_of(call.q):  # Triton launches on the current device
        _backend(call, implementation).run_forward(call, out, lse)
    return out, lse


def _backend(call: Call, implementation: str) -> ModuleType:
    """ "auto" came from a call that was traced; another name is taken."""
    if implementation != "auto":
        return load(implementation)
    known = {} if call.layout is None else call.layout.implementations
    if "auto" not in known:
        known["auto"] = fastest(call)
    return load(known["auto"])


attention_forward = torch.library.custom_op("triton_attention_sink::attention_forward", _forward, mutates_args=())


@attention_forward.register_fake
def _(q, k, v, *_):
    _no_dual_level()
    return _empty_outputs(q, v)


def _no_dual_level() -> None:
    """torch.library's operators drop the tangents of forward mode in silence."""
    if forward_ad._current_level >= 0:
        _refuse_forward_mode()


def _refuse_forward_mode(*_):
    raise NotImplementedError(
        "attention_sink's Triton kernels have no forward-mode derivative: implementation='reference' has it"
    )


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, _ = q.shape
    return q.new_empty(B, Sq, Hq, v.shape[-1]), q.new_empty(B, Hq, Sq, dtype=torch.float32)


def _gradients(
    dout: Tensor | None,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_padding_mask: Tensor | None,
    seqused_k: Tensor | None,
    left: int,
    right: int,
    softmax_scale: float,
    softcap: float,
    deterministic: bool,
    implementation: str,
    need_dkv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsinks (Hq,) in their inputs' dtypes. Without ``need_dkv`` dk and dv are empty, as is dsinks
    without sinks."""
    tensors = (q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, key_padding_mask, seqused_k)
    call = _call(tensors, left, right, softmax_scale, softcap, deterministic)
    dq, dk, dv, dsinks = _empty_gradients(q, k, v, sinks, need_dkv)
    dout = torch.zeros_like(out) if dout is None else dout
    with torch.cuda.device_of(q):
        _backend(call, implementation).run_backward(
            call, out, lse, dout, dlse, dq, dk if need_dkv else None, dv if need_dkv else None,
            None if sinks is None else dsinks,
        )  # fmt: skip
    return dq, dk, dv, dsinks


attention_backward = torch.library.custom_op("triton_attention_sink::attention_backward", _gradients, mutates_args=())


@attention_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, sinks, *rest):
    return _empty_gradients(q, k, v, sinks, need_dkv=rest[-1])


def _empty_gradients(q, k, v, sinks, need_dkv) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if need_dkv else (k.new_empty(0), v.new_empty(0))
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(q.shape[2])
    return torch.empty_like(q), dk, dv, dsinks


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.options = inputs[8:]
    ctx.set_materialize_grads(False)


def _backward_with(gradients, n_inputs, ctx, dout, dlse):
    """A gradient for each input; those after q, k, v and sinks have none."""
    if dout is None and dlse is None:
        return (None,) * n_inputs
    out, lse, q, k, v, sinks, *mask = ctx.saved_tensors
    need_q, need_k, need_v, need_sinks = ctx.needs_input_grad[:4]
    dq, dk, dv, dsinks = gradients(dout, dlse, out, lse, q, k, v, sinks, *mask, *ctx.options, need_k or need_v)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        dsinks if need_sinks else None,
        *(None,) * (n_inputs - 4),
    )


def _refuse_second_derivative(ctx, *_):
    raise NotImplementedError(
        "attention_sink's Triton kernels have no second derivative, which was asked for (a gradient penalty, a "
        "Hessian-vector product, create_graph=True): implementation='reference' has it"
    )


attention_forward.register_autograd(partial(_backward_with, attention_backward, 14), setup_context=_save_for_backward)


attention_backward.register_autograd(_refuse_second_derivative)


class _Gradients(torch.autograd.Function):
    """``_gradients`` under create_graph=True: they hang on all that they depend on, so whoever differentiates them
    along any path meets the refusal."""

    @staticmethod
    def forward(ctx, *arguments):
        return _gradients(*arguments)

    backward = staticmethod(_refuse_second_derivative)


class _Attention(torch.autograd.Function):
    """The eager twin of the operators above."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, call, implementation):
        mask = call.mask
        output = _run_forward(call, implementation)
        inputs = (
            q, k, v, sinks, mask.cu_seqlens_q, mask.cu_seqlens_k, mask.key_padding_mask, mask.seqused_k,
            mask.left, mask.right, call.softmax_scale, call.softcap, call.deterministic, implementation,
        )  # fmt: skip
        _save_for_backward(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        return _backward_with(_Gradients.apply if torch.is_grad_enabled() else _gradients, 6, ctx, dout, dlse)

    jvp = staticmethod(_refuse_forward_mode)


# what Function.apply calls when it has found neither a functorch transform nor a tensor that has left one
_Attention.apply_untransformed = super(torch.autograd.Function, _Attention).apply
