"""Every implementation that the benchmark knows: how to call it, and why it cannot take a case.

A peer is a function ``(case, tensors) -> Runner``. It raises ImportError if the package is missing and
``Unsupported`` for a case outside its features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

GRADIENTS = ("dq", "dk", "dv", "dsink")


class Unsupported(Exception):
    """The peer cannot take this case; the message says why."""


@dataclass(frozen=True)
class Runner:
    """``forward()`` returns out (B, S, H, D). ``backward()`` returns dq, dk, dv, dsink; None if there is none."""

    forward: Callable[[], Tensor]
    backward: Callable[[], tuple[Tensor, ...]] | None


def _autograd(function: Callable[..., Tensor], tensors: dict[str, Tensor], has_backward: bool = True) -> Runner:
    """A runner around a differentiable function of q, k, v, sinks that returns out (B, S, H, D).

    Decoding has no backward.
    """
    has_backward = has_backward and tensors["q"].shape[1] == tensors["k"].shape[1]
    inputs = [tensors[name].detach().clone().requires_grad_(has_backward) for name in ("q", "k", "v", "sinks")]
    saved: list[Tensor] = []

    def backward():
        if not saved:
            saved.append(function(*inputs))
        return torch.autograd.grad(saved[0], inputs, tensors["dout"], retain_graph=True)

    return Runner(lambda: function(*inputs), backward if has_backward else None)


def _dense_or_packed(case, tensors, dense: Callable, packed: Callable) -> Callable[..., Tensor]:
    """A function of q, k, v, sinks that returns out (B, S, H, D), from flash-attn's pair of functions.

    ``packed`` takes (T, H, D) and cu_seqlens_*, max_seqlen_*. Both return out or (out, lse).
    """

    def out(result) -> Tensor:
        return result[0] if isinstance(result, tuple) else result

    if case.lengths is None:
        return lambda q, k, v, s: out(dense(q, k, v, s))
    cu, longest = _cu_seqlens(case, tensors["q"].device), max(case.lengths)
    lengths = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
    return lambda q, k, v, s: out(packed(q.squeeze(0), k.squeeze(0), v.squeeze(0), s, **lengths)).unsqueeze(0)


def _cu_seqlens(case, device) -> Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32)


def _lengths(case, tensors) -> Tensor:
    """Keys in use of each row of a cache, as decoding knows them: on the device."""
    return torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=tensors["q"].device)


def _window(case) -> tuple[int, int]:
    return (-1, -1) if case.window is None else (case.window - 1, 0)


def ours(case, tensors, implementation: str = "auto") -> Runner:
    """This project."""
    from ..interface import attention_sink

    call = partial(attention_sink, window_size=_window(case), implementation=implementation)
    if case.queries:
        call = partial(call, seqused_k=_lengths(case, tensors))
    return _autograd(_dense_or_packed(case, tensors, call, call), tensors)


def flash_attention_4(case, tensors) -> Runner:
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    window = (None, None) if case.window is None else (case.window - 1, 0)

    def call(function, q, k, v, s, **lengths):
        return function(q, k, v, causal=True, window_size=window, learnable_sink=s, **lengths)

    dense, packed = partial(call, flash_attn_func), partial(call, flash_attn_varlen_func)
    return _autograd(_dense_or_packed(case, tensors, dense, packed), tensors)


def flash_attention_3(case, tensors) -> Runner:
    from flash_attn_interface import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

    sinks = tensors["sinks"].bfloat16()

    def call(function, q, k, v, s, **lengths):
        return function(q, k, v, causal=True, window_size=_window(case), sinks=sinks, **lengths)

    dense, packed = partial(call, flash_attn_func), partial(call, flash_attn_varlen_func)
    if case.queries:
        dense = partial(call, partial(flash_attn_with_kvcache, cache_seqlens=_lengths(case, tensors)))
    return _autograd(_dense_or_packed(case, tensors, dense, packed), tensors, has_backward=False)


def flash_linear_attention(case, tensors) -> Runner:
    from fla.ops.attn import parallel_attn

    if case.head_dim > 128:
        raise Unsupported("parallel_attn takes a head dimension up to 128 in practice")
    if case.queries:
        raise Unsupported("parallel_attn takes as many queries as keys")
    cu = None if case.lengths is None else _cu_seqlens(case, tensors["q"].device).long()
    return _autograd(
        lambda q, k, v, s: parallel_attn(q, k, v, sink_bias=s, window_size=case.window, cu_seqlens=cu), tensors
    )


def flex_attention(case, tensors) -> Runner:
    """FlexAttention, renormalised by its lse."""
    import torch._functorch.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    torch._functorch.config.donated_buffer = False
    torch._dynamo.config.recompile_limit = 64
    device = tensors["q"].device
    segment = None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, device=device)
        segment = torch.repeat_interleave(torch.arange(len(case.lengths), device=device), lengths)

    shift = case.seqlen - case.seqlen_q

    def visible(b, h, i, j):
        ok = i + shift >= j
        if case.window is not None:
            ok = ok & (i + shift - j < case.window)
        return ok if segment is None else ok & (segment[i] == segment[j])

    # static shapes: faster, and what --prepare compiled serves
    create = torch.compile(create_block_mask, dynamic=False)
    mask = create(visible, None, None, case.seqlen_q, case.seqlen, device=device)
    compiled = torch.compile(flex_attention, dynamic=False)

    def function(q, k, v, s):
        out, lse = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=mask, enable_gqa=True, return_lse=True)
        return (out * torch.sigmoid(lse - s[None, :, None])[..., None].to(out.dtype)).transpose(1, 2)

    return _autograd(function, tensors)


def cudnn(case, tensors) -> Runner:
    """cuDNN's fused attention through its front end."""
    import cudnn as frontend

    if case.lengths is not None:
        raise Unsupported("cuDNN's backward with packed rows and a sink needs 9.26")
    if case.queries:
        raise Unsupported("cuDNN refuses a sink where there are fewer queries than keys")
    q, k, v, dout = (tensors[name].transpose(1, 2) for name in ("q", "k", "v", "dout"))
    sink = tensors["sinks"].float().view(1, -1, 1, 1).contiguous()
    B, H, S, D = q.shape
    handle = frontend.create_handle()
    frontend.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
    out, dq = torch.empty_like(q), torch.empty_like(q)
    dk, dv, dsink = torch.empty_like(k), torch.empty_like(v), torch.empty_like(sink)
    stats = torch.empty(B, H, S, 1, device=q.device, dtype=torch.float32)
    options = {"attn_scale": D**-0.5, "diagonal_alignment": frontend.diagonal_alignment.TOP_LEFT}
    options["diagonal_band_right_bound"] = 0
    if case.window is not None:
        options["diagonal_band_left_bound"] = case.window

    def build(make):
        graph = frontend.pygraph(
            io_data_type=frontend.data_type.BFLOAT16,
            intermediate_data_type=frontend.data_type.FLOAT,
            compute_data_type=frontend.data_type.FLOAT,
            handle=handle,
        )
        bindings = make(graph)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([frontend.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        workspace = torch.empty(graph.get_workspace_size(), device=q.device, dtype=torch.uint8)
        return lambda: graph.execute(bindings, workspace, handle=handle)

    def output(node, like, dtype=None):
        node.set_output(True).set_dim(list(like.shape)).set_stride(list(like.stride()))
        if dtype is not None:
            node.set_data_type(dtype)
        return node

    def forward_graph(graph):
        nodes = [graph.tensor_like(x) for x in (q, k, v, sink)]
        o, st = graph.sdpa(
            name="sdpa", q=nodes[0], k=nodes[1], v=nodes[2], generate_stats=True, sink_token=nodes[3], **options
        )
        output(o, out)
        output(st, stats, frontend.data_type.FLOAT)
        return dict(zip([*nodes, o, st], [q, k, v, sink, out, stats], strict=True))

    def backward_graph(graph):
        sources = [q, k, v, out, dout, stats, sink, dsink]
        nodes = [graph.tensor_like(x) for x in sources]
        grads = graph.sdpa_backward(
            name="sdpa_backward", q=nodes[0], k=nodes[1], v=nodes[2], o=nodes[3], dO=nodes[4], stats=nodes[5],
            sink_token=nodes[6], dSink_token=nodes[7], **options,
        )  # fmt: skip
        for node, like in zip(grads, (dq, dk, dv), strict=True):
            output(node, like)
        return dict(zip([*nodes, *grads], [*sources, dq, dk, dv], strict=True))

    run_forward, run_backward = build(forward_graph), build(backward_graph)

    def forward():
        run_forward()
        return out.transpose(1, 2)

    def backward():
        run_backward()
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), dsink.flatten()

    forward()
    return Runner(forward, backward)


def eager(case, tensors) -> Runner:
    """Eager attention as in Hugging Face's models: the whole score matrix in the input dtype."""
    if case.visible_scores and case.batch * case.heads_q * case.seqlen_q * case.seqlen * 2 * 4 > 60e9:
        raise Unsupported("the score matrices do not fit into the card's memory")
    S, group = case.seqlen, case.heads_q // case.heads_k
    device = tensors["q"].device
    i, j = torch.arange(S - case.seqlen_q, S, device=device)[:, None], torch.arange(S, device=device)[None]
    visible = j <= i
    if case.window is not None:
        visible &= i - j < case.window
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, device=device)
        segment = torch.repeat_interleave(torch.arange(len(case.lengths), device=device), lengths)
        visible &= segment[:, None] == segment[None]
    bias = torch.zeros(case.seqlen_q, S, device=device, dtype=torch.bfloat16).masked_fill_(
        ~visible, torch.finfo(torch.bfloat16).min
    )

    def function(q, k, v, s):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        scores = q @ k.transpose(2, 3) * case.head_dim**-0.5 + bias
        column = s.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, column], -1)
        p = torch.softmax(logits - logits.amax(-1, keepdim=True), -1)[..., :-1]
        return (p @ v).transpose(1, 2)

    return _autograd(function, tensors)


PEERS: dict[str, Callable] = {
    "ours": ours,
    "FlashAttention-4": flash_attention_4,
    "FlashAttention-3": flash_attention_3,
    "cuDNN": cudnn,
    "FlexAttention": flex_attention,
    "fla": flash_linear_attention,
    "eager": eager,
}
