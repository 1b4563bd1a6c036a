"""The kernels as ``torch.library`` operators: shapes for tracing, autograd wiring, no mathematics.

``triton_attention_sink::attention_forward`` and ``::attention_backward`` make torch.compile, activation
checkpointing, opcheck and FSDP2 see ordinary differentiable operators.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad

from .call import N_TENSORS, SCHEMA, Call, Tensors, memo_of, placement, traced
from .implementations import OWN_AUTOGRAD, fastest, load
from .masks import DERIVED


def attention_op(call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    """Run ``call``. Returns out (B, Sq, Hq, Dv) and lse (B, Hq, Sq) fp32; both differentiable.

    A traced call goes through the operator. A plain eager call uses the same functions as an ``autograd.Function``,
    without the host time of the operator's wrappers.
    """
    if call.memo is None and traced(*call.tensors()):
        return attention_forward(*call.tensors(), *call.options(), implementation)
    if _are_functorch_transforms_active():
        raise NotImplementedError(
            "attention_sink was called inside a transform of functorch (torch.func.grad, vmap, jvp, ...), which its "
            "Triton kernels do not take part in: use torch.autograd.grad, a loop, or implementation='reference'"
        )
    if implementation in OWN_AUTOGRAD:
        return _own_attention(call, load(implementation))
    if _differentiated(call):
        # tensors that have left a transform need what apply does about them
        apply = _Attention.apply if call.memo is None else _Attention.apply_untransformed
        return apply(call.q, call.k, call.v, call.sinks, call, implementation)
    return _run_forward(call, implementation)


def _differentiated(call: Call) -> bool:
    """Whether the call must be an autograd.Function: for a graph, or to refuse forward mode."""
    q, k, v, sinks = call.q, call.k, call.v, call.sinks
    needed = q.requires_grad or k.requires_grad or v.requires_grad or (sinks is not None and sinks.requires_grad)
    return (needed and torch.is_grad_enabled()) or forward_ad._current_level >= 0


def _run_forward(call: Call, implementation: str) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(call.q, call.v)
    with torch.cuda.device_of(call.q):  # Triton launches on the current device
        _backend(call, implementation).run_forward(call, out, lse)
    return out, lse


def _own_attention(call: Call, backend: ModuleType) -> tuple[Tensor, Tensor]:
    """A backend's own autograd, which refuses what the others refuse."""
    _no_dual_level()
    inputs = [x for x in (call.q, call.k, call.v, call.sinks) if x is not None]
    if _differentiated(call):
        inputs = _OnceDifferentiable.apply(*inputs)
    q, k, v, sinks = (*inputs, None)[:4]
    with torch.cuda.device_of(q):
        return backend.attention(replace(call, q=q, k=k, v=v, sinks=sinks))


def _backend(call: Call, implementation: str) -> ModuleType:
    """The implementation's module. Only a traced call leaves "auto" to be decided here."""
    if implementation != "auto":
        return load(implementation)
    known = {} if call.memo is None else call.memo.implementations
    if "auto" not in known:
        known["auto"] = fastest(call, in_operator=True)
    return load(known["auto"])


def _forward(*inputs) -> tuple[Tensor, Tensor]:
    _no_dual_level()
    *fields, implementation = inputs
    return _run_forward(_joined(fields), implementation)


def _joined(fields: list) -> Call:
    """The call of an operator's arguments. A memo cannot be one of them.

    Nor does an operator share what it derives of ``constant`` cu_seqlens: torch.compile may run it in the memory of a
    CUDA graph, which the graph will use again.
    """
    tensors, options = list(fields[:N_TENSORS]), tuple(fields[N_TENSORS:])
    if hasattr(tensors[4], DERIVED):
        alias = tensors[4].detach()
        tensors[4:6] = alias, alias if tensors[5] is tensors[4] else tensors[5]
    tensors = tuple(tensors)
    return Call.join(tensors, options, memo_of(tensors, options))


attention_forward = torch.library.custom_op(
    "triton_attention_sink::attention_forward",
    _forward,
    mutates_args=(),
    schema=f"({SCHEMA}, str implementation) -> (Tensor, Tensor)",
)


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
        "attention_sink's kernels have no forward-mode derivative: implementation='reference' has it"
    )


def _empty_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    B, Sq, Hq, _ = q.shape
    return q.new_empty(B, Sq, Hq, v.shape[-1]), q.new_empty(B, Hq, Sq, dtype=torch.float32)


def _gradients(
    dout: Tensor | None, dlse: Tensor | None, out: Tensor, lse: Tensor, call: Call, implementation: str, need_dkv: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsinks (Hq,) in their inputs' dtypes. Without ``need_dkv`` dk and dv are empty, as is dsinks
    without sinks."""
    dq, dk, dv, dsinks = _empty_gradients(call.q, call.k, call.v, call.sinks, need_dkv)
    dout = torch.zeros_like(out) if dout is None else dout
    lse = lse.contiguous()  # as the kernels wrote it; a saved-tensor hook may have changed that
    with torch.cuda.device_of(call.q):
        _backend(call, implementation).run_backward(
            call, out, lse, dout, dlse, dq, dk if need_dkv else None, dv if need_dkv else None,
            None if call.sinks is None else dsinks,
        )  # fmt: skip
    return dq, dk, dv, dsinks


def _backward(dout, dlse, out, lse, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, implementation, need_dkv = inputs
    return _gradients(dout, dlse, out, lse, _joined(fields), implementation, need_dkv)


attention_backward = torch.library.custom_op(
    "triton_attention_sink::attention_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor? dout, Tensor? dlse, Tensor out, Tensor lse, {SCHEMA}, str implementation, bool need_dkv)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


@attention_backward.register_fake
def _(dout, dlse, out, lse, q, k, v, sinks, *rest):
    return _empty_gradients(q, k, v, sinks, need_dkv=rest[-1])


def _empty_gradients(q, k, v, sinks, need_dkv) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dk, dv = (torch.empty_like(k), torch.empty_like(v)) if need_dkv else (k.new_empty(0), v.new_empty(0))
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(q.shape[2])
    return torch.empty_like(q), dk, dv, dsinks


def _save(ctx, output: tuple[Tensor, Tensor], tensors: Tensors, rest: tuple) -> None:
    """rest: ``Call.options()``, the implementation, the memo."""
    ctx.save_for_backward(*output, *tensors)
    ctx.rest = rest
    ctx.set_materialize_grads(False)


def _differentiate(gradients, n_inputs: int, ctx, dout: Tensor | None, dlse: Tensor | None) -> tuple:
    """A gradient for each input; those after q, k, v and sinks have none.

    ``gradients(ctx, dout, dlse, out, lse, tensors, need_dkv)`` gives dq, dk, dv, dsinks.
    """
    if dout is None and dlse is None:
        return (None,) * n_inputs
    out, lse, *tensors = ctx.saved_tensors
    need_q, need_k, need_v, need_sinks = ctx.needs_input_grad[:4]
    dq, dk, dv, dsinks = gradients(ctx, dout, dlse, out, lse, tensors, need_k or need_v)
    return (
        dq if need_q else None,
        dk if need_k else None,
        dv if need_v else None,
        dsinks if need_sinks else None,
        *(None,) * (n_inputs - 4),
    )


def _refuse_second_derivative(ctx, *_):
    raise NotImplementedError(
        "attention_sink's kernels have no second derivative, which was asked for (a gradient penalty, a "
        "Hessian-vector product, create_graph=True): implementation='reference' has it"
    )


def _operators_gradients(ctx, dout, dlse, out, lse, tensors, need_dkv):
    options, implementation, _ = ctx.rest
    return attention_backward(dout, dlse, out, lse, *tensors, *options, implementation, need_dkv)


def _save_inputs(ctx, inputs, output) -> None:
    *fields, implementation = inputs
    _save(ctx, output, fields[:N_TENSORS], (fields[N_TENSORS:], implementation, None))


attention_forward.register_autograd(
    partial(_differentiate, _operators_gradients, len(attention_forward._opoverload._schema.arguments)),
    setup_context=_save_inputs,
)
attention_backward.register_autograd(_refuse_second_derivative)


class _Attention(torch.autograd.Function):
    """The eager twin of the operators above. Its backward keeps the forward's memo."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, call, implementation):
        output = _run_forward(call, implementation)
        tensors, memo = call.tensors(), call.memo
        if memo is None:  # apply has unwrapped tensors that left a transform
            tensors = (q, k, v, sinks, *tensors[4:])
        elif memo.placement is None:
            memo.placement = placement(tensors)
        _save(ctx, output, tensors, (call.options(), implementation, memo))
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        return _differentiate(_eager_gradients, 6, ctx, dout, dlse)

    jvp = staticmethod(_refuse_forward_mode)


# what Function.apply calls when it has found neither a functorch transform nor a tensor that has left one
_Attention.apply_untransformed = super(torch.autograd.Function, _Attention).apply


def _eager_gradients(ctx, dout, dlse, out, lse, tensors, need_dkv):
    """As ``_operators_gradients``, with the forward's memo unless a saved-tensor hook moved a tensor."""
    options, implementation, memo = ctx.rest
    if memo is None or not memo.serves(tensors):
        memo = memo_of(tensors, options)
    compute = partial(_gradients, dout, dlse, out, lse, Call.join(tensors, options, memo), implementation, need_dkv)
    return _Gradients.apply(compute, dout, dlse, out, lse, *tensors) if torch.is_grad_enabled() else compute()


class _OnceDifferentiable(torch.autograd.Function):
    """The inputs, for a backend whose gradients autograd would take for constants: create_graph=True is refused."""

    @staticmethod
    def forward(ctx, *inputs):
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx, *gradients):
        return _refuse_second_derivative(ctx) if torch.is_grad_enabled() else gradients


class _Gradients(torch.autograd.Function):
    """``compute()`` under create_graph=True: its result hangs on all that it depends on, so whoever differentiates it
    along any path meets the refusal."""

    @staticmethod
    def forward(ctx, compute, *dependencies):
        return compute()

    backward = staticmethod(_refuse_second_derivative)
