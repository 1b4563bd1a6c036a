"""Windows and sinks of any size."""

import sys
from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from cases import Case, make_inputs, run

from triton_attention_sink_hf.ops import attention_forward

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "bounds_checked"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy on exp2 and log2 of -inf
]

FP16, FP32 = torch.float16, torch.float32
UNLIMITED = {
    "dense": Case(40, causal=False),
    "causal": Case(40),
    "packed": Case(40, lengths_q=(17, 0, 20), causal=False),
    "packed causal": Case(40, lengths_q=(17, 0, 20)),
    "packed Sq != Sk": Case(40, 50, lengths_q=(17, 0, 20), lengths_k=(3, 30, 17), causal=False),
    "Sq < Sk": Case(20, 40, causal=False),
    "Sq > Sk": Case(40, 20, causal=False),
    "used": Case(9, 50, batch=2, used=(50, 7), causal=False),
    "padding": Case(50, batch=2, padding="left", causal=False),
}


@pytest.mark.parametrize("window", [(2**30 - 1, 2**30 - 1), (2**31 - 1, 2**31 - 2), (2**31, -1), (-1, sys.maxsize)])
@pytest.mark.parametrize("name", UNLIMITED)
def test_windows_of_any_size(name, window):
    """A window longer than the sequence hides nothing, also where it does not fit 32 bits."""
    case = replace(UNLIMITED[name], heads=(1, 1), head_dim=16, dlse=True)
    inputs = make_inputs(case)
    for implementation in ("reference", "triton"):
        want = run(case, inputs, implementation)
        for key, value in run(replace(case, window=window), inputs, implementation).items():
            assert torch.equal(value, want[key]), key


def test_operators_take_windows_of_any_size():
    inputs = make_inputs(Case(40, heads=(2, 1), head_dim=16))
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
    found = []
    for window in (-1, 2**31 - 1, sys.maxsize):
        out, _ = attention_forward(*leaves, *(None,) * 7, window, window, 0.25, 0.0, True, "triton")
        found.append((out, *torch.autograd.grad(out, leaves, inputs.dout)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


LARGEST = torch.finfo(torch.float32).max
OFF = [-1e4, -1e9, -1e10, -1e30, torch.finfo(torch.bfloat16).min, -LARGEST]


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    "case",
    [
        Case(40, dlse=True),
        Case(40, 20),  # rows without a key
        Case(40, lengths_q=(17, 0, 20), dlse=True),
        Case(40, batch=2, padding="left", softcap=5.0),  # rows whose keys are all hidden
        Case(40, window=(7, 0), batch=2),
    ],
    ids=["dlse", "Sq > Sk", "packed", "padding", "window"],
)
def test_sinks_of_any_size(case, dtype):
    case = replace(case, heads=(10, 2), head_dim=16, dtype=dtype)
    inputs = make_inputs(case)
    sinks = torch.tensor([*OFF, 1e4, 1e10, 1e30, LARGEST])
    inputs = replace(inputs, sinks=sinks)
    results = run(case, inputs)
    assert all(bool(x.isfinite().all()) for x in results.values())
    assert_within_budget(case, inputs, results)
    if case.seqlen_k is None and case.padding is None and case.lengths_q is None:
        assert not results["dsink"][: len(OFF)].any()
    # a row without a key gives its whole dlse to the sink, so only the largest sinks have no gradient without one
    assert case.dlse or not results["dsink"].any()
