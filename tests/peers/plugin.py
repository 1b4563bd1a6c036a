"""The pytest plugin of a peer's run: installs the stand-ins, chooses tests, sorts the outcomes, writes a report.

Reads from the environment PEERS_NAME, PEERS_CHECKOUT, PEERS_REPORTS (a folder: one file for each process), PEERS_SAMPLE
(tests of each function, 0 = all) and PEERS_FAULT.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import types
from collections import Counter
from pathlib import Path

import expected
import pytest
import served
import torch
from torch.overrides import TorchFunctionMode

HERE = Path(__file__).resolve().parent
OURS = (str(HERE), str(HERE.parent.parent / "triton_attention_sink_hf"))
STAND_INS = {"flash-attention": "flash_attention", "fla": "flash_linear_attention", "transformers": "hugging_face"}

# Of each test its worst outcome, since subtests and tear-downs report, too; and what there is to say about it.
PASSED, SKIPPED, REFUSED, FAILED = range(4)
outcomes: dict[str, tuple[int, str]] = {}
left_out: Counter[str] = Counter()
served_tests: set[str] = set()


class OnCpu(TorchFunctionMode):
    """device="cuda", in tests that say so, means the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "cuda" in str(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.to:
            args = tuple("cpu" if isinstance(x, str) and x.startswith("cuda") else x for x in args)
        return function(*args, **kwargs)


def without_gpu() -> None:
    """Let tests that are written for a Hopper card run on a CPU."""
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.synchronize = lambda device=None: None
    OnCpu().__enter__()


def stand_in(modules: dict[str, dict], checkout: Path) -> None:
    """Put modules with these attributes in the place of a peer's; what they lack is imported from the checkout."""
    for name, attributes in modules.items():
        module = types.ModuleType(name)
        module.__path__ = [str(checkout / name.replace(".", "/"))]
        vars(module).update(attributes)
        sys.modules[name] = module
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Before a conftest.py of the peer imports what has to be stood in for."""
    module = importlib.import_module(STAND_INS[os.environ["PEERS_NAME"]])
    served.install()
    if hasattr(module, "install"):
        module.install()
        return
    stand_in(module.MODULES, Path(os.environ["PEERS_CHECKOUT"]))
    if not torch.cuda.is_available():
        without_gpu()


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Of each function's cases, a sample, always the same; before pytest makes tests of all, in minutes."""
    size, cases = int(os.environ["PEERS_SAMPLE"]), metafunc._calls
    if 0 < size < len(cases):
        metafunc._calls = random.Random(metafunc.function.__name__).sample(cases, size)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Take out what is not asked of this package."""
    left_out.update(filter(None, (expected.left_out(item.nodeid) for item in items)))
    items[:] = [item for item in items if expected.left_out(item.nodeid) is None]


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        outcomes[report.nodeid] = FAILED, str(report.longrepr).strip()[-400:]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    before = served.calls
    try:
        return (yield)
    finally:
        if served.calls > before:
            served_tests.add(item.nodeid)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    report = yield
    outcome = PASSED, ""
    if report.failed:
        message = f"{call.excinfo.typename}: {call.excinfo.value}".strip()[:400]
        reason = expected.refusal(message) if is_ours(call.excinfo) else None
        outcome = (FAILED, message) if reason is None else (REFUSED, reason)
        if reason is not None:
            report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: refused: {reason}")
    elif report.skipped:
        outcome = SKIPPED, ""
    outcomes[item.nodeid] = max(outcome, outcomes.get(item.nodeid, outcome))
    return report


def is_ours(error: pytest.ExceptionInfo) -> bool:
    """Whether this package or a stand-in raised it."""
    return str(error.traceback[-1].path).startswith(OURS)


def pytest_sessionfinish() -> None:
    def which(outcome: int) -> dict[str, str]:
        return {name: text for name, (found, text) in outcomes.items() if found == outcome}

    report = dict(
        passed=len(which(PASSED)), served=len(which(PASSED).keys() & served_tests), skipped=len(which(SKIPPED)),
        calls=served.calls, refused=Counter(which(REFUSED).values()), left_out=left_out, failed=which(FAILED),
    )  # fmt: skip
    Path(os.environ["PEERS_REPORTS"], f"{os.getpid()}.json").write_text(json.dumps(report))
