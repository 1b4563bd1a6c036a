"""Second derivatives, forward mode, vmap and functorch: refused with what to do, or right."""

import pytest
import torch
from cases import Case, call, leaves_of, make_inputs, operator_options, run
from torch.utils.checkpoint import checkpoint

from triton_attention_sink_hf import attention_sink
from triton_attention_sink_hf.ops import attention_forward

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore::UserWarning")


def _through(way: str, case: Case, inputs):
    """q, k, v, sinks -> out, by the kernels."""

    def attend(q, k, v, sinks):
        return call(case, inputs, q, k, v, sinks)[0]

    if way == "operator":
        return lambda q, k, v, sinks: attention_forward(q, k, v, sinks, *operator_options(case, inputs))[0]
    if way == "checkpoint":
        return lambda *leaves: checkpoint(attend, *leaves, use_reentrant=False)
    if way.startswith("compile"):
        torch.compiler.reset()
        return torch.compile(attend, fullgraph=True, backend=way.removeprefix("compile "))
    return attend


WAYS = ["call", "operator", "checkpoint", "compile eager", "compile aot_eager"]
SECOND = "second derivative|double backward"  # the latter is torch.compile's own sentence


@pytest.mark.parametrize("ask", ["grad", "backward", "backward of inputs"])
@pytest.mark.parametrize("way", WAYS)
def test_second_derivatives_raise(way, ask):
    """A gradient penalty whose weights are behind q, k and v, and reached only through the kernels' backward."""
    case = Case(12)
    inputs = make_inputs(case)
    x, weights = torch.randn(1, 12, 64).requires_grad_(), [torch.randn(64, n * 32).requires_grad_() for n in (4, 2, 2)]
    q, k, v = ((x @ w).unflatten(-1, (-1, 32)) for w in weights)
    out = _through(way, case, inputs)(q, k, v, inputs.sinks)
    (dx,) = torch.autograd.grad(out.sin().sum(), x, create_graph=True)
    penalty = dx.square().sum()
    with pytest.raises(RuntimeError, match=SECOND):
        if ask == "grad":
            torch.autograd.grad(penalty, weights)
        else:
            penalty.backward(inputs=weights if "inputs" in ask else None)


@pytest.mark.parametrize("second", range(5))
@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("way", ["call", "operator"])
def test_second_derivatives_raise_for_each_input(way, first, second):
    """d out / d first again by second, or by dout: with just these two in the graph."""
    case = Case(8, dlse=True)
    inputs = make_inputs(case)
    arguments = [inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.dout]
    for i in {first, second}:
        arguments[i] = arguments[i].clone().requires_grad_()
    out = _through(way, case, inputs)(*arguments[:4])
    (gradient,) = torch.autograd.grad((out * arguments[4]).sum(), arguments[first], create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(gradient.sum(), arguments[second])


def test_second_derivatives_through_lse_raise():
    inputs = make_inputs(Case(8))
    q = inputs.q.requires_grad_()
    _, lse = attention_sink(q, inputs.k, inputs.v, inputs.sinks, return_lse=True, implementation="triton")
    (dq,) = torch.autograd.grad(lse.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        torch.autograd.grad(dq.sum(), q)


def test_functional_hessian_raises():
    inputs = make_inputs(Case(4, heads=(1, 1), head_dim=16))

    def loss(q):
        return attention_sink(q, inputs.k, inputs.v, inputs.sinks, implementation="triton").square().sum()

    for ask in (torch.autograd.functional.hessian, torch.autograd.functional.hvp, torch.autograd.functional.vhp):
        with pytest.raises(NotImplementedError, match="second derivative"):
            ask(loss, inputs.q, *(() if ask is torch.autograd.functional.hessian else (inputs.q,)))


def test_create_graph_gives_the_same_first_gradients():
    case = Case(20, batch=2, dlse=True)
    inputs = make_inputs(case)
    want = run(case, inputs)
    leaves = leaves_of(inputs)
    out, lse = call(case, inputs, *leaves)
    got = torch.autograd.grad((out, lse), leaves, (inputs.dout, inputs.dlse), create_graph=True)
    for value, key in zip(got, ("dq", "dk", "dv", "dsink"), strict=True):
        assert torch.equal(value, want[key]) and value.requires_grad


def test_outputs_without_gradient():
    """No graph where no input needs one, and none under no_grad."""
    case = Case(12)
    inputs = make_inputs(case)
    out, lse = call(case, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks)
    assert not out.requires_grad and not lse.requires_grad
    with torch.no_grad():
        out, _ = call(case, inputs, *leaves_of(inputs))
    assert not out.requires_grad


@pytest.mark.parametrize("grad", [True, False])
def test_forward_mode_is_refused(grad):
    """A tangent must not be dropped, although no graph is recorded."""
    inputs = make_inputs(Case(12))
    with torch.autograd.forward_ad.dual_level(), torch.set_grad_enabled(grad):
        q = torch.autograd.forward_ad.make_dual(inputs.q, torch.ones_like(inputs.q))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative: implementation='reference'"):
            attention_sink(q, inputs.k, inputs.v, inputs.sinks, implementation="triton")


def test_forward_mode_of_what_is_traced_is_refused():
    """torch.library's operators would answer with tangents of 0."""
    inputs = make_inputs(Case(8))

    def attend(q):
        return attention_sink(q, inputs.k, inputs.v, inputs.sinks, implementation="triton")

    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        jvp = torch.compile(lambda q: torch.func.jvp(attend, (q,), (q,)), backend=backend, fullgraph=True)
        with pytest.raises(Exception, match="no forward-mode derivative"):
            jvp(inputs.q)
    with torch.autograd.forward_ad.dual_level():
        q = torch.autograd.forward_ad.make_dual(inputs.q, inputs.q)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            attention_forward(q, inputs.k, inputs.v, inputs.sinks, *operator_options(Case(8), inputs))


def test_vmap_is_refused():
    inputs = make_inputs(Case(12))
    attend = torch.func.vmap(lambda q: attention_sink(q, inputs.k, inputs.v, inputs.sinks, implementation="triton"))
    with pytest.raises(RuntimeError, match="vmap"):
        attend(torch.stack([inputs.q, inputs.q]))


def test_functorch():
    """Inside a transform kernels are refused, whatever their arguments; a tensor that left one may have no address."""
    q, k, v, sinks = leaves_of(make_inputs(Case(8)))
    left = []
    torch.func.grad(lambda x: left.append(x) or x.sum())(q.detach())
    want = attention_sink(q, k, v, sinks, implementation="reference")
    assert torch.equal(attention_sink(left[0], k, v, sinks, implementation="reference"), want)
    for q in (q, q.detach()):  # noqa: B020
        with pytest.raises(NotImplementedError, match=r"functorch.*implementation='reference'"):
            torch.func.grad(lambda x, q=q: (attention_sink(q, k, v, sinks, implementation="triton") * x).sum())(
                torch.ones(())
            )


def _loss(implementation, *others):
    return lambda q: attention_sink(q, *others, implementation=implementation).square().sum()


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        torch.func.hessian,
        lambda loss: torch.func.grad(lambda q: torch.func.grad(loss)(q).sum()),
        lambda loss: lambda q: torch.func.jvp(loss, (q,), (q,)),
        lambda loss: lambda q: torch.func.vmap(loss)(torch.stack([q, q])),
        lambda loss: lambda q: torch.func.linearize(loss, q),
    ],
    ids=["grad", "jacrev", "hessian", "grad of grad", "jvp", "vmap", "linearize"],
)
def test_transforms_say_what_to_do(transform):
    """The kernels name the transforms and the way out, which then works."""
    inputs = make_inputs(Case(4, heads=(1, 1), head_dim=16))
    others = inputs.k, inputs.v, inputs.sinks
    with pytest.raises(NotImplementedError, match=r"torch\.func.*implementation='reference'|forward-mode"):
        transform(_loss("triton", *others))(inputs.q)
    if transform is not torch.func.linearize:
        transform(_loss("reference", *others))(inputs.q)
