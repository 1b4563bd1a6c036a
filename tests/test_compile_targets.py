"""Every kernel config compiles for every architecture without its GPU, fits its shared memory and keeps its registers.

One process per architecture, since Triton must be imported without its interpreter. By default a sample of the cases of
compile_target.py on one architecture of each family; all cases and architectures are marked exhaustive (make nightly).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_budget import SHARED_MEMORY, exceeds
from launchers import LAUNCHERS

TESTS = Path(__file__).parent


def _compile(target: str, *arguments: str, script: str = "compile_target.py") -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run(
        [sys.executable, TESTS / script, target, *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _check(target: str, rows: list[dict]) -> None:
    backends = ("triton", "triton_decode") + (("triton_window", "triton_hopper") if target == "sm90" else ())
    expected = [name for launcher in LAUNCHERS if launcher.backend in backends for name in launcher.kernels]
    assert expected and set(expected) <= {row["kernel"] for row in rows}
    wrong = [row for row in rows if exceeds(target, row)]
    assert not wrong, "\n".join(map(str, wrong))


# Each kernel on Hopper, each size class somewhere, and of every family of configs the case that takes most.
SAMPLE = {
    "sm80": ("narrow packed window", "wide 256 padding", "narrow decode"),
    "sm90": ("narrow packed window", "wide 192/128", "narrow decode"),
    "sm100": ("medium", "narrow decode"),
    "gfx942": ("wide 192/128", "narrow decode"),
}


@pytest.mark.parametrize("target", SAMPLE)
def test_compiles_and_fits(target):
    rows = _compile(target, *SAMPLE[target])
    kernels = {row["kernel"] for row in rows}
    assert {"_decode_reduce_kernel", "_append_kernel"} <= kernels
    assert "_segment_range_kernel" in kernels or not any("packed" in name for name in SAMPLE[target])
    _check(target, rows)


def test_head_dimensions_above_256_fit_the_smallest_memory_of_nvidia():
    _check("sm86", _compile("sm86", "huge 512"))


def test_every_launcher_is_listed():
    folder = TESTS.parent / "triton_attention_sink_hf" / "implementations"
    files = [file for file in folder.rglob("*.py") if "\ndef launch_" in file.read_text()]
    modules = {".".join(file.relative_to(folder).with_suffix("").parts) for file in files}
    assert modules == {launcher.module for launcher in LAUNCHERS}


def test_the_committed_table_is_whole_and_within_budget():
    """benchmarks/ARCHITECTURES.md; after a change of kernels or configs: make arch-table."""
    sys.path.insert(0, str(TESTS.parent / "benchmarks"))
    import architectures

    data = json.loads(architectures.RESULTS.read_text())
    assert architectures.PAGE.read_text() == architectures.page(data)
    assert any(set(targets) == set(SHARED_MEMORY) for targets in data.values())
    kernels = {name for launcher in LAUNCHERS for name in launcher.kernels}
    for triton, targets in data.items():
        for target, table in targets.items():
            rows = [
                {"kernel": kernel, "case": case, **dict(zip(architectures.COLUMNS, numbers, strict=True))}
                for kernel, cases in table.items()
                for case, numbers in cases.items()
            ]
            wrong = [row for row in rows if exceeds(target, row)]
            assert rows and not wrong, (triton, target, wrong)
        assert "sm90" not in targets or kernels <= set(targets["sm90"]), "a kernel is new: make arch-table"


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_everything_compiles_and_fits(target):
    _check(target, _compile(target))


def _check_grid(target: str, *part: str) -> None:
    rows = _compile(target, *part, script="compile_grid.py")
    assert len({row["case"] for row in rows}) >= 5
    limit = SHARED_MEMORY["sm86" if target == "sm80" else target]  # whose configs are the same
    wrong = [row for row in rows if row["shared"] > limit]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_a_sample_of_all_head_dimensions_fits(target):
    _check_grid(target, "7", "661")


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120"])
def test_all_head_dimensions_fit(target):
    _check_grid(target)


def test_wide_values_under_a_short_window_fit():
    """D 40, Dv 128: depth of the pipeline must follow the wider of both."""
    rows = _compile("sm90", "window D 40/128", "--launcher", "triton_window.backward")
    row = next(row for row in rows if row["kernel"] == "_window_bwd_dq_kernel")
    assert row["shared"] <= SHARED_MEMORY["sm90"]
