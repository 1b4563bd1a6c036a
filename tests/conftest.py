"""Test setup: Triton is interpreted where there is no GPU, uninitialised memory is poison, seeds are fixed."""

import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anything below imports it

import pytest  # noqa: E402

NO_GPU = "needs a GPU, and torch sees none (run `make gpu-test` on a machine with one)"


def pytest_report_header(config):
    return (
        f"kernels: on {torch.cuda.get_device_name()}" if GPU else f"kernels: interpreted; gpu tests skipped: {NO_GPU}"
    )


def pytest_collection_modifyitems(items):
    if GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty, empty_like and new_empty return NaN (integers: a large value), so an element nobody wrote shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            x = make(*args, **kwargs)
            if x.is_floating_point():
                return x.fill_(float("nan"))
            return x.fill_(2**30) if x.dtype in (torch.int32, torch.int64) else x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
