"""The portable kernels, interpreted on a CPU in fp32 and fp16: every feature, forward and all gradients, against fp64.

(bf16 is for the GPU: Triton's interpreter multiplies bf16 wrongly.) Memory that nobody wrote is NaN, and a load or a
store outside the tensors fails.
"""

from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget, oracle
from cases import Case, call, cu_seqlens, make_inputs, run

from triton_attention_sink_hf import attention_sink
from triton_attention_sink_hf.ops import attention_forward

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "bounds_checked"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy on exp2 and log2 of -inf
]

FP16, FP32 = torch.float16, torch.float32
LENGTHS = (0, 1, 15, 16, 17, 0, 40)
CASES = {
    # masks
    "causal": Case(70, batch=2),
    "bidirectional": Case(70, causal=False),
    "window 1": Case(70, window=(0, 0)),
    "window 127": Case(260, heads=(2, 1), head_dim=16, window=(126, 0)),
    "window 128": Case(260, heads=(2, 1), head_dim=16, window=(127, 0)),
    "window 129": Case(260, heads=(2, 1), head_dim=16, window=(128, 0)),
    "window larger than S": Case(70, window=(1000, 0)),
    "window both sides": Case(150, heads=(2, 1), causal=False, window=(40, 9), dlse=True),
    "window right only": Case(100, heads=(2, 1), causal=False, window=(-1, 20)),
    "window left of bidirectional": Case(100, heads=(2, 1), causal=False, window=(20, -1)),
    # heads
    "heads 1/1": Case(40, heads=(1, 1)),
    "heads 3/1": Case(40, heads=(3, 1)),
    "heads 4/1": Case(40, heads=(4, 1)),
    "heads 7/1": Case(25, heads=(7, 1)),
    "heads 8/1": Case(20, heads=(8, 1), dlse=True),
    "heads 14/2": Case(20, heads=(14, 2), head_dim=16),
    "heads 16/1": Case(12, heads=(16, 1), head_dim=16),
    "heads 3/3": Case(40, heads=(3, 3)),
    # packed rows
    "packed": Case(sum(LENGTHS), lengths_q=LENGTHS, dlse=True),
    "packed bidirectional": Case(sum(LENGTHS), lengths_q=LENGTHS, causal=False, heads=(2, 2)),
    "packed window": Case(sum(LENGTHS), lengths_q=LENGTHS, window=(9, 0)),
    "packed window both sides": Case(sum(LENGTHS), lengths_q=LENGTHS, causal=False, window=(3, 20)),
    "packed ends before T": Case(sum(LENGTHS) + 30, sum(LENGTHS) + 7, lengths_q=LENGTHS, dlse=True),
    "packed 127, 128, 129": Case(384, lengths_q=(127, 128, 129), heads=(2, 1), head_dim=16),
    "packed 127, 128, 129 window 128": Case(384, lengths_q=(129, 127, 128), heads=(2, 1), head_dim=16, window=(127, 0)),
    "packed one segment": Case(40, lengths_q=(40,)),
    "packed all empty": Case(20, lengths_q=(0, 0, 0)),
    "packed Sq != Sk": Case(60, 77, lengths_q=(20, 1, 0, 30, 9), lengths_k=(5, 33, 17, 0, 22), dlse=True),
    "packed Sq != Sk bidirectional": Case(
        60, 77, lengths_q=(20, 1, 0, 30, 9), lengths_k=(5, 33, 17, 0, 22), causal=False, window=(30, 4), heads=(2, 1)
    ),
    # padding and caches
    "left padding": Case(50, batch=3, padding="left"),
    "right padding": Case(50, batch=3, padding="right", heads=(2, 1)),
    "holes": Case(50, batch=2, padding="holes", dlse=True),
    "packed holes": Case(90, lengths_q=(33, 0, 40, 17), padding="holes", heads=(4, 2)),
    "packed padding window": Case(90, lengths_q=(33, 40, 17), padding="left", window=(15, 0), heads=(2, 1), dlse=True),
    "packed padding bidirectional": Case(60, lengths_q=(33, 20), padding="right", causal=False, sinks=None),
    "padding window": Case(90, batch=2, padding="left", window=(15, 0), heads=(2, 1), sinks=None),
    "padding bidirectional": Case(50, batch=3, padding="right", causal=False),
    "padding Sq < Sk": Case(9, 50, batch=3, padding="left"),
    "used": Case(9, 50, batch=4, used=(50, 0, 5, 33)),
    "used one query": Case(1, 50, batch=8, used=(50, 1, 33, 20, 49, 13, 8, 40), window=(15, 0), heads=(8, 1)),
    "used bidirectional": Case(20, 50, batch=3, used=(50, 7, 33), causal=False, window=(3, 5)),
    "used and padding": Case(9, 50, batch=2, used=(44, 33), padding="left"),
    # any interval of keys for each query
    "ranges": Case(50, 70, ranges="random", heads=(2, 1), causal=False, batch=2, dlse=True),
    "ranges causal window": Case(90, ranges="random", window=(60, 0), heads=(2, 1), head_dim=16, sinks=None),
    "ranges blocks window": Case(110, ranges="blocks", causal=False, window=(30, -1), heads=(2, 1), head_dim=16),
    "ranges prefix": Case(110, ranges="prefix", causal=False, heads=(4, 1), head_dim=24, dlse=True),
    "ranges packed": Case(
        60, 77, lengths_q=(20, 1, 0, 30), lengths_k=(5, 33, 17, 0), ranges="random", heads=(2, 1), softcap=2.0
    ),
    "ranges padding": Case(30, batch=2, padding="left", ranges="random", heads=(2, 1), head_dim=16),
    "ranges used": Case(20, 50, batch=2, used=(0, 33), ranges="random", causal=False, layout="sliced", heads=(2, 1)),
    # lengths
    "Sq < Sk": Case(30, 100, heads=(2, 1)),
    "Sq > Sk": Case(100, 30, heads=(2, 1), dlse=True),
    "Sq > Sk without sinks": Case(100, 30, heads=(2, 1), sinks=None, dlse=True),
    "Sq > Sk window": Case(100, 30, window=(5, 0), heads=(2, 1)),
    "one query": Case(1, 100, batch=2, heads=(8, 2)),
    "one query one key": Case(1, 1, heads=(1, 1), head_dim=16),
    "one key": Case(40, 1, causal=False),
    "no key in any window": Case(20, 40, causal=False, window=(-1, -1), batch=2, used=(0, 0)),
    # scores
    "softcap": Case(50, softcap=1.5, dlse=True),
    "softcap window": Case(70, 90, softcap=30.0, window=(20, 0), heads=(2, 1)),
    "negative scale": Case(50, softmax_scale=-0.3),
    "zero scale": Case(50, softmax_scale=0.0),
    "negative scale with softcap": Case(50, softmax_scale=-0.3, softcap=2.0, padding="left", batch=2),
    "large scale": Case(50, softmax_scale=1.0, head_dim=16),
    # sinks and the loss
    "no sinks": Case(50, sinks=None),
    "no sinks, lse": Case(50, sinks=None, dlse=True),
    "frozen sinks": Case(50, sinks="frozen"),
    "fp16 sinks": Case(50, sink_dtype=FP16),
    "lse": Case(50, dlse=True, batch=2),
    # head dimensions
    **{f"D {d}": Case(35, heads=(2, 1), head_dim=d, window=(20, 0)) for d in (16, 24, 40, 64, 80, 96, 128, 256)},
    "D 192/128": Case(35, heads=(4, 1), head_dim=(192, 128), window=(20, 0), dlse=True),
    "D 24/64": Case(35, heads=(2, 1), head_dim=(24, 64), padding="left"),
    "D 256/16": Case(35, heads=(2, 1), head_dim=(256, 16), lengths_q=(30, 5)),
    "D 512": Case(20, heads=(4, 1), head_dim=512, window=(9, 0)),
    "D 320/500": Case(35, heads=(2, 1), head_dim=(320, 500), padding="left", softcap=9.0, dlse=True),
    "D 24/257": Case(35, heads=(2, 1), head_dim=(24, 257), lengths_q=(30, 5), causal=False, sinks=None),
    # memory layouts
    "transposed": Case(50, batch=2, layout="bhsd", dlse=True),
    "transposed packed": Case(sum(LENGTHS), lengths_q=LENGTHS, layout="bhsd"),
    "sliced": Case(50, batch=2, layout="sliced", head_dim=24),
    "expanded": Case(50, batch=2, layout="expanded", heads=(4, 2)),
}


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", CASES)
def test_exactness(name, dtype):
    case = Case(**{**CASES[name].__dict__, "dtype": dtype})
    inputs = make_inputs(case)
    assert_within_budget(case, inputs, run(case, inputs))


def test_rows_that_see_nothing():
    """out = 0 and lse = sink: their sink's probability is 1, so dlse reaches the sink whole."""
    case = Case(40, 10, heads=(2, 1), dlse=True)
    inputs = make_inputs(case)
    results = run(case, inputs)
    blind = slice(0, 30)
    assert not results["out"][:, blind].any() and not results["dq"][:, blind].any()
    torch.testing.assert_close(results["lse"][0, :, blind], inputs.sinks[:, None].expand(2, 30))
    results = run(Case(40, 10, heads=(2, 1), sinks=None), inputs_without_sinks := make_inputs(
        Case(40, 10, heads=(2, 1), sinks=None)
    ))  # fmt: skip
    assert inputs_without_sinks.sinks is None
    assert not results["out"][:, blind].any() and not results["dq"][:, blind].any()
    assert (results["lse"][:, :, blind] == float("-inf")).all()


@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 0), (0, 5), (5, 0)])
@pytest.mark.parametrize("batch", [0, 2])
def test_nothing_to_do(batch, seqlen_q, seqlen_k):
    case = Case(seqlen_q, seqlen_k, batch=batch, dlse=True)
    inputs = make_inputs(case)
    assert_within_budget(case, inputs, run(case, inputs))


def test_no_rows_packed():
    case = Case(0, 0, lengths_q=(0, 0))
    inputs = make_inputs(case)
    assert_within_budget(case, inputs, run(case, inputs))


@pytest.mark.parametrize("sink", [float("-inf"), float("inf"), float("nan")])
def test_extreme_sink_stays_in_its_head(sink):
    case = Case(30, 20, heads=(4, 2), dlse=True)
    inputs = make_inputs(case)
    inputs.sinks[1] = sink
    results = run(case, inputs)
    assert bool(results["dsink"][[0, 2, 3]].isfinite().all())
    for head in (0, 2, 3):
        for name, axis in (("out", 2), ("lse", 1), ("dq", 2)):
            assert bool(results[name].select(axis, head).isfinite().all()), (name, head)
    if sink == float("-inf"):  # as good as none; rows without a key have lse = -inf
        want = oracle(case, inputs)
        for name, value in results.items():
            torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-5)
    else:
        seeing = slice(10, None)
        out, lse = results["out"][:, seeing, 1], results["lse"][:, 1, seeing]
        assert bool(((out == 0) | out.isnan()).all())
        assert bool((lse.isnan() | (lse == sink)).all())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_query_row_touches_no_other_row(bad):
    case = Case(40, heads=(4, 1))
    inputs = make_inputs(case)
    clean = run(case, inputs)
    inputs.q[0, 17, 2] = bad
    results = run(case, inputs)
    for name in ("out", "dq"):
        difference = (results[name] != clean[name]).any(-1)[0]  # NaN differs from everything
        assert difference[17, 2]
        difference[17, 2] = False
        assert not difference.any(), name
    assert not bool(results["out"][0, 17, 2].isfinite().all())


@pytest.mark.parametrize("hidden", ["unused", "after the last segment"])
def test_what_no_row_sees_is_not_read(hidden):
    """NaN in unused slots of a cache and in rows past the last segment reaches no output."""
    if hidden == "unused":
        case = Case(6, 40, batch=2, used=(31, 9), heads=(4, 2))
    else:
        case = Case(40, lengths_q=(20, 11), heads=(4, 2))
    inputs = make_inputs(case)
    clean = run(case, inputs)
    for b, length in enumerate(case.used or (31,)):
        inputs.k[b, length:] = inputs.v[b, length:] = float("nan")
        if hidden != "unused":
            inputs.q[b, length:] = float("nan")
    results = run(case, inputs)
    for name, value in results.items():
        assert torch.equal(value, clean[name]), name


def test_same_call_twice_bit_for_bit():
    case = Case(40, batch=2, heads=(6, 2), padding="holes", dlse=True)
    inputs = make_inputs(case)
    first, second = run(case, inputs), run(case, inputs)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("wanted", ["q", "k", "v", "sinks", "qs"])
def test_gradients_only_where_asked(wanted):
    """Leaving an input without gradient changes no other gradient."""
    case = Case(40)
    inputs = make_inputs(case)
    everything = run(case, inputs)
    needs = {"q": "q", "k": "k", "v": "v", "sinks": "s", "qs": "qs"}[wanted]
    leaves = {name: x.detach().clone() for name, x in zip("qkvs", (inputs.q, inputs.k, inputs.v, inputs.sinks))}  # noqa: B905
    for name in needs:
        leaves[name].requires_grad_()
    out, _ = call(case, inputs, *leaves.values())
    out.backward(inputs.dout)
    for name, key in (("q", "dq"), ("k", "dk"), ("v", "dv"), ("s", "dsink")):
        if name in needs:
            assert torch.equal(leaves[name].grad, everything[key])
        else:
            assert leaves[name].grad is None


def test_gradient_through_lse_alone():
    case = Case(40, dlse=True)
    inputs = make_inputs(case)
    inputs.dout.zero_()
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
    _, lse = call(case, inputs, *leaves)
    got = torch.autograd.grad(lse, leaves, inputs.dlse)
    want = oracle(case, inputs)
    for value, name in zip(got, ("dq", "dk", "dv", "dsink"), strict=True):
        torch.testing.assert_close(value.double(), want[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda x: x.repeat_interleave(2)[::2], lambda x: x[2].expand(4)])
def test_sinks_of_any_stride(make):
    case = Case(30)
    inputs = make_inputs(case)
    inputs.sinks.copy_(torch.tensor([-2.0, 0.5, 1.0, 3.0]))
    sinks = make(inputs.sinks)
    got, _ = call(case, inputs, inputs.q, inputs.k, inputs.v, sinks)
    want, _ = call(case, inputs, inputs.q, inputs.k, inputs.v, sinks.contiguous())
    assert torch.equal(got, want)


def test_strided_vectors_of_integers_and_masks():
    case = Case(9, 40, batch=3, used=(40, 7, 20), padding="left")
    inputs = make_inputs(case)
    want = run(case, inputs)["out"]
    mask = inputs.mask
    got = attention_sink(
        inputs.q, inputs.k, inputs.v, inputs.sinks,
        seqused_k=mask.seqused_k.repeat_interleave(2)[::2],
        key_padding_mask=mask.key_padding_mask.t().contiguous().t(),
        implementation="triton",
    )  # fmt: skip
    assert torch.equal(got, want)
    case = Case(40, lengths_q=(10, 30))
    inputs = make_inputs(case)
    cu = inputs.mask.cu_seqlens_q.repeat_interleave(2)[::2]
    q, k, v = (x.squeeze(0) for x in (inputs.q, inputs.k, inputs.v))
    got = attention_sink(q, k, v, inputs.sinks, cu_seqlens_q=cu, cu_seqlens_k=cu, implementation="triton")
    assert torch.equal(got, run(case, inputs)["out"].squeeze(0))


@pytest.mark.usefixtures("integers_wrap")
@pytest.mark.parametrize(
    "cu",
    [(0, 50, 20, 70), (0, 30, 70, 5000), (-400, 20, -3, 70), (0, 2**31 - 1, -(2**31), 70), (70, 50, 30, 0)],
    ids=["decreasing", "beyond T", "negative", "huge", "backwards"],
)
@pytest.mark.parametrize("side", ["both", "q", "k"])
def test_wrong_cu_seqlens_stay_inside_their_tensors(cu, side):
    """The operator below the checks, as on a GPU, where nobody has looked at the values; addresses are checked."""
    case = Case(70, heads=(2, 1), head_dim=16)
    inputs = make_inputs(case)
    wrong, right = torch.tensor(cu, dtype=torch.int32), cu_seqlens((20, 30, 20))
    cu_q, cu_k = (wrong if side in (name, "both") else right for name in "qk")
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    tensors, options = (cu_q, cu_k, *(None,) * 5), (31, 0, case.scale, 0.0, True, "triton")
    out, _ = attention_forward(q, k, v, inputs.sinks, *tensors, *options)
    for x in (out, *torch.autograd.grad(out, (q, k, v), inputs.dout)):
        assert not bool(x.isnan().any())


def test_any_key_ranges_stay_inside_their_tensors():
    inputs = make_inputs(Case(9, 40, batch=2, heads=(2, 1), head_dim=16))
    wild = torch.tensor([-(2**31), 2**31 - 1, -1, 0, 39, 40, 41], dtype=torch.int32)
    ranges = wild[torch.randint(7, (2, 9, 2))]
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out = attention_sink(q, k, v, inputs.sinks, key_ranges=ranges, implementation="triton")
    torch.testing.assert_close(
        out, attention_sink(q, k, v, inputs.sinks, key_ranges=ranges, implementation="reference")
    )
    for x in torch.autograd.grad(out, (q, k, v), inputs.dout):
        assert not bool(x.isnan().any())


@pytest.mark.usefixtures("integers_wrap")
@pytest.mark.parametrize("used", [(-5, 40), (1000, 3), (2**31 - 1, -(2**31))])
def test_wrong_seqused_stays_inside_its_tensors(used):
    case = Case(9, 40, batch=2, heads=(2, 1), head_dim=16)
    inputs = make_inputs(case)
    seqused = torch.tensor(used, dtype=torch.int32)
    q, k, v = (x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    tensors, options = (None, None, None, seqused, *(None,) * 3), (31, 0, case.scale, 0.0, True, "triton")
    out, _ = attention_forward(q, k, v, inputs.sinks, *tensors, *options)
    for x in (out, *torch.autograd.grad(out, (q, k, v), inputs.dout)):
        assert not bool(x.isnan().any())


@pytest.mark.parametrize("kind", ["plain", "packed", "padding"])
def test_inputs_inside_larger_buffers(kind):
    """Inputs that lie in NaN: the results are those of the same inputs alone, and the NaN around them stays."""
    case = {
        "plain": Case(45, 51, heads=(4, 2), window=(20, 0)),
        "packed": Case(48, lengths_q=(17, 1, 30), heads=(4, 2)),
        "padding": Case(45, batch=2, padding="holes", heads=(4, 2)),
    }[kind]
    inputs = make_inputs(case)
    want = run(case, inputs)
    buffers, fenced = [], []
    for x in (inputs.q, inputs.k, inputs.v, inputs.dout):
        B, S, H, D = x.shape
        buffer = torch.full((B, S + 40, H + 2, D + 16), float("nan"))
        inside = buffer[:, 20 : 20 + S, 1 : 1 + H, 8 : 8 + D]
        inside.copy_(x)
        buffers.append((buffer, buffer.clone()))
        fenced.append(inside)
    q, k, v = (x.detach().requires_grad_() for x in fenced[:3])
    sinks = inputs.sinks.requires_grad_()
    out, lse = call(case, inputs, q, k, v, sinks)
    got = dict(zip(("dq", "dk", "dv", "dsink"), torch.autograd.grad(out, (q, k, v, sinks), fenced[3]), strict=True))
    for name, value in {**got, "out": out, "lse": lse}.items():
        assert torch.equal(value, want[name]), name
    for buffer, before in buffers:
        assert torch.equal(buffer.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dims", [(1, 1), (4, 4), (8, 8), (12, 5), (17, 3), (36, 100), (7, 130), (255, 1)], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(20, dtype=FP16),
        Case(20, dlse=True, lengths_q=(5, 0, 12)),
        Case(20, batch=2, padding="left", softcap=5.0, dtype=FP16),
        Case(20, batch=2, window=(5, 0), layout="bhsd"),
        Case(20, layout="sliced", dtype=FP16),
    ],
    ids=["plain", "packed", "padding softcap", "window", "sliced"],
)
def test_any_head_dimension(case, dims):
    case = replace(case, head_dim=dims)
    inputs = make_inputs(case)
    assert_within_budget(case, inputs, run(case, inputs), tiny=True)
