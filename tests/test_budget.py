"""The error budget: no right computation exceeds it by luck; what is wrong does, also where there are few numbers."""

import pytest
import torch
from budget import DRAWS, eager, measure, oracle
from cases import Case, make_inputs

FP16, FP32 = torch.float16, torch.float32
FEW = {
    "two heads": Case(35, heads=(2, 1), head_dim=256, window=(20, 0)),
    "one head": Case(20, heads=(1, 1), head_dim=16),
    "one query": Case(1, 30, heads=(2, 1), head_dim=64),
    "one query one key": Case(1, 1, heads=(1, 1), head_dim=16),
    "three rows": Case(3, heads=(3, 1), head_dim=24, lengths_q=(1, 2)),
    "lse alone": Case(40, heads=(2, 1), head_dim=16, dlse=True),
    "fp16 sinks": Case(24, heads=(2, 2), head_dim=32, sink_dtype=FP16),
}


def beyond(case, inputs, got) -> list[str]:
    return [str(row) for row in measure(case, inputs, got) if not row.error <= row.allowed]


def result(case, inputs, draw: int) -> dict[str, torch.Tensor]:
    """An eager computation as a kernel would return it: in the dtypes of its outputs."""
    found = eager(case, inputs, draw=draw)
    dtypes = {"lse": FP32, "dsink": case.sink_dtype}
    return {name: x.to(dtypes.get(name, case.dtype)) for name, x in found.items()}


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", FEW)
def test_no_right_computation_exceeds_it(name, dtype):
    """Other orders, bases and scales than those that the budget is made of."""
    case = Case(**{**FEW[name].__dict__, "dtype": dtype})
    for seed in range(4):
        inputs = make_inputs(case, seed=seed)
        for draw in range(DRAWS, DRAWS + 4):
            assert not beyond(case, inputs, result(case, inputs, draw)), (seed, draw)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("output", ["out", "lse", "dq", "dk", "dv", "dsink"])
def test_a_planted_fault_exceeds_it(name, output, dtype):
    """A hundred roundings of the output's dtype, or of the dtype that P and dS are rounded to."""
    case = Case(**{**FEW[name].__dict__, "dtype": dtype})
    inputs = make_inputs(case)
    got = result(case, inputs, 0)
    unit = torch.finfo(got[output].dtype).eps
    got[output] = got[output] * (1 + 100 * unit)
    size = oracle(case, inputs)[output].norm()
    conditioned = next(row for row in measure(case, inputs, result(case, inputs, 0)) if row.output == output)
    if conditioned.eager_error < 10 * unit * size:  # else the computation itself is worse than the fault
        assert any(row.startswith(output) for row in beyond(case, inputs, got))
