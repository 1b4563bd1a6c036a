"""Every kernel config compiles for every architecture without its GPU, fits its shared memory and keeps its registers.

One process per architecture, since Triton must be imported without its interpreter. By default a part of the cases of
compile_target.py on the architectures that the project names; all cases and architectures are marked exhaustive.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import LAUNCHERS

SHARED_MEMORY = {
    "sm80": 166_912,
    "sm86": 101_376,
    "sm89": 101_376,
    "sm90": 232_448,
    "sm100": 232_448,
    "sm120": 101_376,
    "gfx942": 65_536,
}
TESTS = Path(__file__).parent
# Bytes of stack a thread (AMD: registers) that may spill. A few words outside a loop cost nothing that can be measured;
# fp32 holds its operands in registers, which ptxas does not fit at D of 128 and 256 with any tile that was tried.
# Above 256 its dq holds 512 columns of two tiles in a thread's registers (triton/config.py).
SPILLED, SPILLED_FP32, SPILLED_FP32_HUGE = 32, 288, 2600
# The tiles for Hopper are those that an H100 ran fastest: without spills dk, dv took a quarter longer (LOG.md). With
# triton 3.6 none needs more than 128 bytes; 3.9 has 328 for dk, dv of packed rows at D of 256.
SPILLED_MEASURED = {"sm90": 256}


def _compile(target: str, *arguments: str, script: str = "compile_target.py") -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run(
        [sys.executable, TESTS / script, target, *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def _spills_allowed(target: str, case: str) -> int:
    if case.startswith("fp32"):
        return SPILLED_FP32_HUGE if case.startswith("fp32 huge") else SPILLED_FP32
    return SPILLED_MEASURED.get(target, SPILLED)


def _check(target: str, rows: list[dict]) -> None:
    backends = ("triton", "triton_decode") + (("triton_window", "triton_hopper") if target == "sm90" else ())
    expected = [name for launcher in LAUNCHERS if launcher.backend in backends for name in launcher.kernels]
    assert expected and set(expected) <= {row["kernel"] for row in rows}
    wrong = [
        row
        for row in rows
        if row["shared"] > SHARED_MEMORY[target]
        or row.get("unwritten")
        or row["spilled"] > _spills_allowed(target, row["case"])
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx942"])
def test_compiles_and_fits(target):
    rows = _compile(target, "narrow packed window", "medium", "wide 192/128", "wide 256 padding", "narrow decode")
    assert {"_segment_range_kernel", "_decode_reduce_kernel", "_append_kernel"} <= {row["kernel"] for row in rows}
    _check(target, rows)


def test_head_dimensions_above_256_fit_the_smallest_memory_of_nvidia():
    _check("sm86", _compile("sm86", "huge 512"))


def test_every_launcher_is_listed():
    folder = TESTS.parent / "triton_attention_sink_hf" / "implementations"
    files = [file for file in folder.rglob("*.py") if "\ndef launch_" in file.read_text()]
    modules = {".".join(file.relative_to(folder).with_suffix("").parts) for file in files}
    assert modules == {launcher.module for launcher in LAUNCHERS}


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_everything_compiles_and_fits(target):
    _check(target, _compile(target))


def _check_grid(target: str, *part: str) -> None:
    rows = _compile(target, *part, script="compile_grid.py")
    assert len({row["case"] for row in rows}) > 5
    limit = SHARED_MEMORY["sm86" if target == "sm80" else target]  # whose configs are the same
    wrong = [row for row in rows if row["shared"] > limit]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("target", ["sm80", "sm90"])
def test_a_sample_of_all_head_dimensions_fits(target):
    _check_grid(target, "7", "331")


@pytest.mark.exhaustive
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "sm120"])
def test_all_head_dimensions_fit(target):
    _check_grid(target)


def test_wide_values_under_a_short_window_fit():
    """D 40, Dv 128: depth of the pipeline must follow the wider of both."""
    row = next(row for row in _compile("sm90", "window D 40/128") if row["kernel"] == "_window_bwd_dq_kernel")
    assert row["shared"] <= SHARED_MEMORY["sm90"]
