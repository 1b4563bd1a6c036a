"""The operators as torch sees them: opcheck, torch.compile, checkpointing, autocast, second derivatives, explain."""

import shutil

import pytest
import torch
from cases import Case, call, make_inputs, run
from torch.utils.checkpoint import checkpoint

from triton_attention_sink_hf import attention_sink, explain
from triton_attention_sink_hf.ops import attention_backward, attention_forward

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore::UserWarning")

SAMPLES = {
    "plain": Case(20, batch=2),
    "no sinks": Case(20, sinks=None, heads=(2, 2)),
    "packed": Case(24, lengths_q=(3, 0, 17)),
    "padding": Case(9, 20, batch=2, padding="left", window=(7, 0)),
    "used": Case(1, 20, batch=2, used=(20, 3)),
    "transposed": Case(20, batch=2, layout="bhsd", head_dim=(16, 24)),
}


def _options(case: Case, inputs) -> tuple:
    mask = inputs.mask
    return (
        mask.cu_seqlens_q, mask.cu_seqlens_k, mask.key_padding_mask, mask.seqused_k,
        mask.left, mask.right, case.scale, case.softcap, True, "triton",
    )  # fmt: skip


def _leaves(inputs) -> list[torch.Tensor]:
    return [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks) if x is not None]


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name):
    case = SAMPLES[name]
    inputs = make_inputs(case)
    leaves = _leaves(inputs)
    sinks = leaves[3] if len(leaves) == 4 else None
    torch.library.opcheck(attention_forward, (*leaves[:3], sinks, *_options(case, inputs)))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("need_dkv", [True, False])
def test_opcheck_backward(name, need_dkv):
    case = SAMPLES[name]
    inputs = make_inputs(case)
    tensors, options = (inputs.q, inputs.k, inputs.v, inputs.sinks), _options(case, inputs)
    out, lse = attention_forward(*tensors, *options)
    dlse = torch.randn_like(lse)
    torch.library.opcheck(attention_backward, (inputs.dout, dlse, out, lse, *tensors, *options, need_dkv))


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_equals_eager_call(name):
    """Plain eager calls skip the operator; both must give the same bits."""
    case = SAMPLES[name]
    inputs = make_inputs(case)
    want = run(case, inputs)
    leaves = _leaves(inputs)
    sinks = leaves[3] if len(leaves) == 4 else None
    out, lse = attention_forward(*leaves[:3], sinks, *_options(case, inputs))
    assert torch.equal(out, want["out"]) and torch.equal(lse, want["lse"])
    for value, key in zip(torch.autograd.grad(out, leaves, inputs.dout), ("dq", "dk", "dv", "dsink"), strict=False):
        assert torch.equal(value, want[key]), key


BACKENDS = [
    "aot_eager",
    pytest.param("inductor", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")),
]


@pytest.mark.parametrize("implementation", ["triton", "reference"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile(backend, implementation):
    torch.compiler.reset()
    case = SAMPLES["padding"]

    def function(q, k, v, sinks, padding):
        out, lse = attention_sink(
            q * 2.0, k, v, sinks, window_size=case.window, key_padding_mask=padding, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        return out.sin(), lse

    inputs = make_inputs(case)
    leaves = _leaves(inputs)
    want = function(*leaves, inputs.mask.key_padding_mask)
    got = torch.compile(function, fullgraph=True, backend=backend)(*leaves, inputs.mask.key_padding_mask)
    dout = [torch.randn_like(x) for x in want]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    expected = torch.autograd.grad(want, leaves, dout)
    for a, b in zip(torch.autograd.grad(got, leaves, dout), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_compile_with_dynamic_shapes():
    torch.compiler.reset()
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def function(q, k, v, sinks, cu):
        return attention_sink(q, k, v, sinks, cu_seqlens_q=cu, cu_seqlens_k=cu, implementation="triton")

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for lengths in ((3, 0, 17), (5, 9, 12), (2, 2, 30)):
        inputs = make_inputs(Case(sum(lengths), lengths_q=lengths))
        arguments = (*(x[0] for x in (inputs.q, inputs.k, inputs.v)), inputs.sinks, inputs.mask.cu_seqlens_q)
        torch.testing.assert_close(compiled(*arguments), function(*arguments))
    assert len(graphs) == 1, "another length must not trace again"


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    case = Case(20, batch=2, dlse=True)
    inputs = make_inputs(case)
    want = run(case, inputs)
    leaves = _leaves(inputs)
    out, lse = checkpoint(lambda *x: call(case, inputs, *x), *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward((out, lse), (inputs.dout, inputs.dlse))
    for x, key in zip(leaves, ("dq", "dk", "dv", "dsink"), strict=True):
        assert torch.equal(x.grad, want[key]), key


def test_autocast():
    inputs = make_inputs(Case(20))
    leaves = _leaves(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention_sink(*leaves, return_lse=True, implementation="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in leaves[:3]]
    assert torch.equal(out, attention_sink(*rounded, inputs.sinks, implementation="reference"))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
    double = [x.detach().double() for x in leaves[:3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_sink(*double, implementation="reference").dtype == torch.float64


@pytest.mark.parametrize("through", ["call", "operator"])
def test_second_derivatives_raise(through):
    case = Case(12)
    inputs = make_inputs(case)
    leaves = _leaves(inputs)
    if through == "call":
        out, _ = call(case, inputs, *leaves)
    else:
        out, _ = attention_forward(*leaves, *_options(case, inputs))
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(dq.sum(), leaves[:1])


def test_outputs_without_gradient():
    """No graph where no input needs one, and none under no_grad."""
    case = Case(12)
    inputs = make_inputs(case)
    out, lse = call(case, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks)
    assert not out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        out, _ = call(case, inputs, *_leaves(inputs))
    assert not out.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(grad):
    """A tangent must not be dropped, although no graph is recorded."""
    inputs = make_inputs(Case(12))
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
        q = torch.autograd.forward_ad.make_dual(inputs.q, torch.ones_like(inputs.q))
        with pytest.raises((NotImplementedError, RuntimeError), match="forward"):
            attention_sink(q, inputs.k, inputs.v, inputs.sinks, implementation="triton")


def test_vmap_is_refused():
    inputs = make_inputs(Case(12))
    attend = torch.func.vmap(lambda q: attention_sink(q, inputs.k, inputs.v, inputs.sinks, implementation="triton"))
    with pytest.raises(RuntimeError, match="vmap"):
        attend(torch.stack([inputs.q, inputs.q]))


def test_sinks_gradient_has_their_dtype():
    case = Case(12)
    inputs = make_inputs(case)
    sinks = inputs.sinks.bfloat16()
    options = _options(case, inputs)
    out, lse = attention_forward(inputs.q, inputs.k, inputs.v, sinks, *options)
    *_, dsinks = attention_backward(inputs.dout, None, out, lse, inputs.q, inputs.k, inputs.v, sinks, *options, True)
    assert dsinks.dtype == sinks.dtype and dsinks.shape == sinks.shape


def test_modified_inputs_are_noticed():
    """Changing q in place before backward must not give the gradient of another q."""
    inputs = make_inputs(Case(12))
    q = inputs.q.clone().requires_grad_()
    held = q * 1.0
    out = attention_sink(held, inputs.k, inputs.v, inputs.sinks, implementation="triton")
    held.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("deterministic", [None, True, False])
def test_deterministic_is_bit_exact_here(deterministic):
    inputs = make_inputs(Case(40, heads=(4, 2)))
    leaves = _leaves(inputs)

    def gradients():
        out = attention_sink(*leaves, deterministic=deterministic, implementation="triton")
        return torch.autograd.grad(out, leaves, inputs.dout)

    for a, b in zip(gradients(), gradients(), strict=True):
        assert torch.equal(a, b)


def test_explain_says_which_and_why():
    inputs = make_inputs(Case(12))
    explanation = explain(inputs.q, inputs.k, inputs.v, inputs.sinks)
    assert explanation.implementation == "reference"  # on a CPU, although the interpreter could
    assert explanation.reasons["triton"] is None and explanation.reasons["reference"] is None
    assert str(explanation).splitlines()[0] == "reference serves this call"
    double = explain(inputs.q.double(), inputs.k.double(), inputs.v.double())
    assert "float64" in double.reasons["triton"]


def test_auto_on_a_cpu_is_the_reference():
    inputs = make_inputs(Case(12))
    arguments = (inputs.q, inputs.k, inputs.v, inputs.sinks)
    assert torch.equal(attention_sink(*arguments), attention_sink(*arguments, implementation="reference"))


def test_functorch():
    """A tensor that has left a transform may have no address; inside of one kernels are refused, whatever they get."""
    q, k, v, sinks = _leaves(make_inputs(Case(8)))
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(q.detach())
    want = attention_sink(q, k, v, sinks, implementation="reference")
    assert torch.equal(attention_sink(left[0], k, v, sinks, implementation="reference"), want)
    for q in (q, q.detach()):  # noqa: B020
        with pytest.raises(RuntimeError, match="functorch"):
            torch.func.grad(lambda x, q=q: (attention_sink(q, k, v, sinks, implementation="triton") * x).sum())(
                torch.ones(())
            )
