"""Test setup: Triton is interpreted where there is no GPU, uninitialised memory is poison, seeds are fixed."""

import importlib.util
import os

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before anything below imports it

import pytest  # noqa: E402

if not GPU and importlib.util.find_spec("triton"):
    import quick_interpreter

    quick_interpreter.install()

NO_GPU = "needs a GPU, and torch sees none (run `make gpu-test` on a machine with one)"


def pytest_report_header(config):
    return (
        f"kernels: on {torch.cuda.get_device_name()}" if GPU else f"kernels: interpreted; gpu tests skipped: {NO_GPU}"
    )


LONG = ("test_verl.py", "test_sft.py", "test_sequence_parallel.py", "test_compile_targets.py", "test_model_sweep.py")


def pytest_collection_modifyitems(items):
    # Minutes that cannot be divided come first: at the end one worker would wait for the other.
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
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
                with torch.no_grad():
                    return x.fill_(float("nan"))
            return x.fill_(2**30) if x.dtype in (torch.int32, torch.int64) else x

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def integers_wrap(monkeypatch):
    """For lengths that nobody has checked: kernels may overflow with them, as long as they stay in their tensors."""
    if not GPU:
        monkeypatch.setattr(quick_interpreter, "raises", False)


@pytest.fixture
def bounds_checked(monkeypatch):
    """Interpreted kernels fail if they load or store outside the memory that their tensor arguments span."""
    from triton.runtime import interpreter

    if GPU:
        pytest.skip("only the interpreter lets a test see every address")
    spans: list[tuple[int, int]] = []

    class Watched:
        """triton's interpreter extension, with the addresses of loads and stores checked first."""

        def __getattr__(self, name):
            return getattr(extension, name)

        def load(self, pointers, mask, other, dtype):
            check("load", pointers, mask, dtype.itemsize)
            return extension.load(pointers, mask, other, dtype)

        def store(self, pointers, values, mask):
            check("store", pointers, mask, values.dtype.itemsize)
            return extension.store(pointers, values, mask)

    def check(action, pointers, mask, size):
        addresses = pointers[mask.astype(bool)].astype("int64")
        inside = addresses != addresses
        for start, end in spans:
            inside |= (addresses >= start) & (addresses + size <= end)
        assert inside.all(), f"{action} outside every tensor: {(~inside).sum()} of {addresses.size} addresses"

    def launch(self, *args, **kwargs):
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.numel()]
        spans[:] = {(x.data_ptr(), x.data_ptr() + _span(x) * x.element_size()) for x in tensors}
        return call(self, *args, **kwargs)

    extension, call = interpreter._interpreter, interpreter.GridExecutor.__call__
    monkeypatch.setattr(interpreter, "_interpreter", Watched())
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


def _span(x: torch.Tensor) -> int:
    """Elements from the first to the last of x in memory."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
