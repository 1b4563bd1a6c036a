"""The error budget: no correct computation exceeds it by chance; every wrong one does, even with few numbers."""

import pytest
import torch
from budget import DRAWS, eager, measure
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
    """Other orders, bases and scales than the budget's own. One in thousands may, so one of sixteen."""
    case = Case(**{**FEW[name].__dict__, "dtype": dtype})
    found = []
    for seed in range(4):
        inputs = make_inputs(case, seed=seed)
        found += [beyond(case, inputs, result(case, inputs, draw)) for draw in range(DRAWS, DRAWS + 4)]
    assert sum(map(bool, found)) <= 1, found


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("output", ["out", "lse", "dq", "dk", "dv", "dsink"])
def test_a_planted_fault_exceeds_it(name, output, dtype):
    """A hundred roundings of the output's dtype, or twenty times eager's error where that is more."""
    case = Case(**{**FEW[name].__dict__, "dtype": dtype})
    inputs = make_inputs(case)
    got = result(case, inputs, 0)
    right = next(row for row in measure(case, inputs, got) if row.output == output)
    fault = max(100 * torch.finfo(got[output].dtype).eps * right.size, 20 * right.eager_error)
    got[output] = got[output] + fault / got[output].numel() ** 0.5
    assert any(row.startswith(output) for row in beyond(case, inputs, got))
