"""The quick interpreter computes what Triton's own does, and raises where integers overflow."""

import numpy
import pytest
import torch
from cases import Case, make_inputs, run

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.language.semantic import TritonSemantic  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

if not triton.knobs.runtime.interpret:
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)


@triton.jit
def _double(x):
    return x + x


@triton.jit
def _double_kernel(x_ptr, out_ptr):
    tl.store(out_ptr, _double(tl.load(x_ptr)))


def double(value: int, dtype: torch.dtype) -> int:
    out = torch.empty(1, dtype=dtype)
    _double_kernel[(1,)](torch.tensor([value], dtype=dtype), out)
    return int(out)


def test_an_overflow_is_found():
    assert double(-(2**30), torch.int32) == -(2**31)
    assert double(2**40, torch.int64) == 2**41
    with pytest.raises(Exception, match="int32 overflow detected for operation add"):
        double(2**30, torch.int32)


def test_the_same_bits(monkeypatch):
    case = Case(20, batch=2, heads=(2, 1), head_dim=16, padding="left", dlse=True)
    inputs = make_inputs(case)
    quick = run(case, inputs)
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    check = TritonSemantic.binary_op_sanitize_overflow_impl
    monkeypatch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check.__wrapped__)
    slow = run(case, inputs)
    assert all(numpy.array_equal(quick[name], slow[name]) for name in quick)
