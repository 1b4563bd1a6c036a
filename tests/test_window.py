"""The window kernels, interpreted in fp16: every window size, group, dimension and layout that they serve."""

from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from cases import Case, make_inputs, run, short_window

from triton_attention_sink_hf import attention_sink, explain

FP16 = torch.float16
PACKED = (0, 1, 15, 16, 17, 40, 0, 63)

CASES = {
    **{f"window {w}": Case(150, heads=(4, 2), window=(w - 1, 0)) for w in (1, 2, 16, 17, 64, 65, 127, 128, 129)},
    **{f"group {g}": Case(70, heads=(g, 1), window=(20, 0)) for g in (1, 2, 3, 4, 7, 8, 12, 16)},
    **{f"D {d}": Case(50, heads=(2, 1), head_dim=d, window=(30, 0)) for d in (16, 24, 40, 64, 80, 128)},
    "Dv other than D": Case(50, heads=(4, 1), head_dim=(96, 40), window=(30, 0)),
    "longer window than the sequence": Case(33, heads=(8, 1), window=(127, 0)),
    "even tiles": Case(160, heads=(8, 1), window=(127, 0)),
    "more keys": Case(40, 200, heads=(8, 1), window=(127, 0), dlse=True),
    "more queries": Case(200, 40, heads=(8, 1), window=(31, 0), dlse=True),
    "packed": Case(160, heads=(8, 1), lengths_q=PACKED, window=(127, 0), dlse=True),
    "packed, short window": Case(152, heads=(4, 1), lengths_q=PACKED, window=(5, 0)),
    "packed, no group": Case(155, heads=(2, 2), lengths_q=PACKED, window=(30, 0)),
    "batch": Case(70, heads=(8, 2), batch=3, window=(40, 0)),
    "bhsd": Case(70, heads=(8, 2), batch=2, window=(40, 0), layout="bhsd"),
    "sliced": Case(70, heads=(4, 2), batch=2, window=(40, 0), layout="sliced"),
    "expanded": Case(70, heads=(4, 2), batch=2, window=(40, 0), layout="expanded"),
    "no sinks": Case(70, heads=(8, 2), window=(40, 0), sinks=None),
    "frozen sinks": Case(70, heads=(8, 2), window=(40, 0), sinks="frozen"),
    "own scale": Case(70, heads=(8, 2), window=(40, 0), softmax_scale=0.5),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_exactness(name, poisoned_empty, bounds_checked):
    case = Case(**{**CASES[name].__dict__, "dtype": FP16})
    assert short_window(case)
    inputs = make_inputs(case)
    results = run(case, inputs, "triton_window")
    assert_within_budget(case, inputs, results)
    again = run(case, inputs, "triton_window")
    for key, value in results.items():
        assert torch.equal(value, again[key]), f"{key} differs between two equal calls"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seqlen_k, lengths", [(60, None), (20, None), (60, (17, 0, 40))])
def test_sinks_of_any_size(seqlen_k, lengths, poisoned_empty):
    case = Case(60, seqlen_k, heads=(8, 1), dtype=FP16, window=(20, 0), dlse=True, lengths_q=lengths)
    largest = torch.finfo(torch.float32).max
    sinks = torch.tensor([-1e9, -1e10, -1e30, -largest, 1e4, 1e10, 1e30, largest])
    inputs = replace(make_inputs(case), sinks=sinks)
    results = run(case, inputs, "triton_window")
    assert all(bool(x.isfinite().all()) for x in results.values())
    assert_within_budget(case, inputs, results)
    if lengths is None and seqlen_k == 60:
        assert not results["dsink"][:4].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_query_touches_no_other_row(value):
    inputs = make_inputs(Case(60, heads=(4, 1), dtype=FP16, window=(20, 0)))
    call = {"window_size": (20, 0), "implementation": "triton_window"}
    want = attention_sink(inputs.q, inputs.k, inputs.v, inputs.sinks, **call)
    q = inputs.q.clone()
    q[0, 30, 2, 5] = value
    got = attention_sink(q, inputs.k, inputs.v, inputs.sinks, **call)
    touched = torch.zeros(got.shape[:3], dtype=torch.bool)
    touched[0, 30, 2] = True
    assert torch.equal(got[~touched], want[~touched])
    assert bool(got[touched].isnan().all())


def test_without_keys_gradients():
    """k and v frozen: only dq and dsink are computed, and equal those of the whole backward."""
    inputs = make_inputs(Case(60, heads=(4, 1), dtype=FP16, window=(20, 0)))
    case = Case(60, heads=(4, 1), dtype=FP16, window=(20, 0))
    whole = run(case, inputs, "triton_window")
    q, sinks = inputs.q.clone().requires_grad_(), inputs.sinks.clone().requires_grad_()
    out = attention_sink(q, inputs.k, inputs.v, sinks, window_size=(20, 0), implementation="triton_window")
    dq, dsink = torch.autograd.grad(out, (q, sinks), inputs.dout)
    assert torch.equal(dq, whole["dq"]) and torch.equal(dsink, whole["dsink"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"window_size": (129, 0)}, "causal windows of at most 129 keys"),
        ({"window_size": (20, 20), "causal": False}, "causal windows"),
        ({"softcap": 5.0}, "no softcap"),
        ({"softmax_scale": -1.0}, "positive softmax_scale"),
        ({"key_padding_mask": torch.ones(1, 60, dtype=torch.bool)}, "neither key_padding_mask"),
    ],
)
def test_says_what_it_does_not_serve(changes, reason):
    inputs = make_inputs(Case(60, heads=(4, 1), dtype=FP16))
    call = {"window_size": (20, 0), **changes}
    assert reason in explain(inputs.q, inputs.k, inputs.v, inputs.sinks, **call).reasons["triton_window"]
    with pytest.raises(ValueError, match="implementation must be one that supports this call"):
        attention_sink(inputs.q, inputs.k, inputs.v, inputs.sinks, implementation="triton_window", **call)
