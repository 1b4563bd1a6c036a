"""The operators as torch sees them: opcheck, torch.compile, checkpointing, autocast, second derivatives, explain."""

import shutil
import warnings

import pytest
import torch
from cases import Case, call, leaves_of, make_inputs, operator_options, run
from torch.utils.checkpoint import checkpoint

from triton_attention_sink_hf import attention_sink, explain, implementations, interface, ops
from triton_attention_sink_hf.call import N_TENSORS, Call
from triton_attention_sink_hf.ops import attention_backward, attention_forward

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore::UserWarning")

SAMPLES = {
    "plain": Case(20, batch=2),
    "no sinks": Case(20, sinks=None, heads=(2, 2)),
    "packed": Case(24, lengths_q=(3, 0, 17)),
    "padding": Case(9, 20, batch=2, padding="left", window=(7, 0)),
    "used": Case(1, 20, batch=2, used=(20, 3)),
    "ranges": Case(8, heads=(2, 1), head_dim=16, ranges="blocks", causal=False),
    "transposed": Case(20, batch=2, layout="bhsd", head_dim=(16, 24)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck_forward(name):
    case = SAMPLES[name]
    inputs = make_inputs(case)
    leaves = leaves_of(inputs)
    sinks = leaves[3] if len(leaves) == 4 else None
    torch.library.opcheck(attention_forward, (*leaves[:3], sinks, *operator_options(case, inputs)))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("need_dkv", [True, False])
def test_opcheck_backward(name, need_dkv):
    case = SAMPLES[name]
    inputs = make_inputs(case)
    tensors, options = (inputs.q, inputs.k, inputs.v, inputs.sinks), operator_options(case, inputs)
    out, lse = attention_forward(*tensors, *options)
    dlse = torch.randn_like(lse)
    torch.library.opcheck(attention_backward, (inputs.dout, dlse, out, lse, *tensors, *options, need_dkv))


@pytest.mark.parametrize("name", SAMPLES)
def test_operator_equals_eager_call(name):
    """Plain eager calls skip the operator; both must give the same bits."""
    case = SAMPLES[name]
    inputs = make_inputs(case)
    want = run(case, inputs)
    leaves = leaves_of(inputs)
    sinks = leaves[3] if len(leaves) == 4 else None
    out, lse = attention_forward(*leaves[:3], sinks, *operator_options(case, inputs))
    assert torch.equal(out, want["out"]) and torch.equal(lse, want["lse"])
    for value, key in zip(torch.autograd.grad(out, leaves, inputs.dout), ("dq", "dk", "dv", "dsink"), strict=False):
        assert torch.equal(value, want[key]), key


def test_a_call_owns_the_order_of_its_fields():
    tensors, options = tuple(torch.zeros(1) for _ in range(N_TENSORS)), (1, 2, 0.5, 3.0, True)
    joined = Call.join(tensors, options, None)
    assert all(a is b for a, b in zip(joined.tensors(), tensors, strict=True)) and joined.options() == options
    names = [argument.name for argument in attention_forward._opoverload._schema.arguments]
    for name, value in zip(names, (*tensors, *options, "implementation"), strict=True):
        assert value == name or value is getattr(joined, name, getattr(joined.mask, name, None)), name


def test_the_backward_keeps_the_memo_of_the_forward(monkeypatch):
    monkeypatch.setattr(ops, "memo_of", None)  # what would look for another
    for case in SAMPLES.values():
        run(case, make_inputs(case))


def _elsewhere(x: torch.Tensor) -> torch.Tensor:
    """The values of x at a misaligned address, with a gap after each."""
    return x.new_empty(2 * x.numel() + 1)[1:].view(*x.shape, 2)[..., 0].copy_(x)


@pytest.mark.parametrize("name", SAMPLES)
def test_saved_tensors_may_come_back_elsewhere(name):
    """A hook such as offloading keeps values, not strides, addresses or that two arguments are one tensor."""
    case = SAMPLES[name]
    inputs = make_inputs(case)
    want = run(case, inputs)
    with torch.autograd.graph.saved_tensors_hooks(_elsewhere, lambda x: x):
        got = run(case, inputs)
    for key, value in want.items():
        assert value is None or torch.equal(got[key], value), key


NEEDS_A_COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")


@pytest.mark.parametrize(
    ("backend", "implementation"),
    [
        ("aot_eager", "triton"),
        ("aot_eager", "reference"),
        pytest.param("inductor", "triton", marks=NEEDS_A_COMPILER),
        pytest.param("inductor", "reference", marks=[NEEDS_A_COMPILER, pytest.mark.exhaustive]),  # half a minute
    ],
)
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
    leaves = leaves_of(inputs)
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


@pytest.mark.parametrize("packed", [False, True])
def test_graphs_know_no_thresholds(packed, monkeypatch):
    """The fastest kernel for a length is chosen at run time, so one graph serves all lengths."""
    torch.compiler.reset()
    graphs, taken = [], []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def reason(name, call, automatic=False):
        if name == "triton_window" and call.q.shape[1] < 20:
            return "shorter than 20"
        if name == "triton_decode":
            return "not here"
        if name == "flash_attention_4":
            return "not installed"
        if name == "triton_hopper":
            return "not here" if call.q.shape[1] % 2 else "not there"
        return None

    def load(name):
        taken.append(name)
        return real_load(name)

    real_load = implementations.load
    for module in (implementations, interface):
        monkeypatch.setattr(module, "unsupported_reason", reason)
    monkeypatch.setattr(ops, "load", load)

    def function(q, k, v, sinks, cu):
        return attention_sink(q, k, v, sinks, window_size=(5, 0), cu_seqlens_q=cu, cu_seqlens_k=cu)

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=backend)
    for n in (18, 22, 33, 19):
        inputs = make_inputs(
            Case(n, batch=1 if packed else 3, dtype=torch.float16, lengths_q=(4, 0, n - 4) if packed else None)
        )
        arguments = [x[0] if packed else x for x in (inputs.q, inputs.k, inputs.v)]
        arguments = [x.requires_grad_() for x in (*arguments, inputs.sinks)]
        got, want = compiled(*arguments, inputs.mask.cu_seqlens_q), function(*arguments, inputs.mask.cu_seqlens_q)
        assert torch.equal(got, want)
        for a, b in zip(*(torch.autograd.grad(x.sum(), arguments) for x in (got, want)), strict=True):
            assert torch.equal(a, b)
    assert len(graphs) == 1
    assert taken == [name for n in (18, 22, 33, 19) for name in ["triton" if n < 20 else "triton_window"] * 4]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant):
    case = Case(20, batch=2, dlse=True)
    inputs = make_inputs(case)
    want = run(case, inputs)
    leaves = leaves_of(inputs)
    out, lse = checkpoint(lambda *x: call(case, inputs, *x), *leaves, use_reentrant=use_reentrant)
    torch.autograd.backward((out, lse), (inputs.dout, inputs.dlse))
    for x, key in zip(leaves, ("dq", "dk", "dv", "dsink"), strict=True):
        assert torch.equal(x.grad, want[key]), key


def test_autocast():
    inputs = make_inputs(Case(20))
    leaves = leaves_of(inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = attention_sink(*leaves, return_lse=True, implementation="reference")
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    rounded = [x.detach().bfloat16() for x in leaves[:3]]
    assert torch.equal(out, attention_sink(*rounded, inputs.sinks, implementation="reference"))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))
    double = [x.detach().double() for x in leaves[:3]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention_sink(*double, implementation="reference").dtype == torch.float64


def test_sinks_gradient_has_their_dtype():
    case = Case(12)
    inputs = make_inputs(case)
    sinks = inputs.sinks.bfloat16()
    options = operator_options(case, inputs)
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
    leaves = leaves_of(inputs)

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


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_a_loss_through_lse_alone(implementation):
    """v takes part, with a gradient of 0, in every implementation."""
    leaves = leaves_of(make_inputs(Case(12)))
    _, lse = attention_sink(*leaves, return_lse=True, implementation=implementation)
    lse.sum().backward()
    assert not leaves[2].grad.any() and all(bool(x.grad.any()) for i, x in enumerate(leaves) if i != 2)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_outputs_are_contiguous(implementation, heads, packed, layout):
    """Models call view on them."""
    for dtype in (torch.float32, torch.float16):
        case = Case(12, heads=heads, lengths_q=(5, 7) if packed else None, layout=layout, dtype=dtype)
        inputs = make_inputs(case)
        for x in call(case, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks, implementation):
            assert x.is_contiguous()


def test_auto_says_loudly_that_a_gpu_gets_the_reference(monkeypatch):
    """The warning comes once per reason, also under torch.compile; on a CPU there is none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(interface, "_WARNED", set())
    monkeypatch.setattr(interface, "reference_attention", lambda q, k, v, *_, **__: (q, q))

    def reason(name, call, automatic=False):
        return None if name == "reference" else f"{name} is for {for_whom[0]}"

    for module in (implementations, interface):
        monkeypatch.setattr(module, "unsupported_reason", reason)
    seen, for_whom = [], [""]
    with warnings.catch_warnings(record=True) as caught, FakeTensorMode():
        warnings.simplefilter("always")
        for device in ("cuda", "cpu"):
            for for_whom[0] in ("others", "others", "fewer"):
                q = torch.empty(1, 8, 2, 16, device=device)
                attention_sink(q, q, q)
                explain(q, q, q)
                seen.append(len(caught))
    assert seen == [1, 1, 2, 2, 2, 2]
    message = str(caught[0].message)
    assert "cuda: triton is for others" in message and "Sq * Sk" in message and caught[0].filename == __file__
    torch.compiler.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tell = torch.compile(
            lambda x: (interface._warn_of_reference("cuda", "tracing"), x + 1)[1], fullgraph=True, backend="eager"
        )
        tell(torch.ones(2))
        tell(torch.ones(2))
    assert [str(w.message).count("tracing") for w in caught if "attention_sink" in str(w.message)] == [1]
