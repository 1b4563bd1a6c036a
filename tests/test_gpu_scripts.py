"""The scripts of benchmarks/ for a GPU, at toy size: what they report is what happened."""

import json
import sys

import drawn_calls
import pytest
import torch
from launchers import LAUNCHERS
from processes import INTERPRETED_AS_HERE, ROOT, python

pytest.importorskip("transformers")
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import determinism  # noqa: E402
import random_calls  # noqa: E402
import sanitized  # noqa: E402

from triton_attention_sink_hf import attention_sink  # noqa: E402
from triton_attention_sink_hf.implementations.common import problem  # noqa: E402

CALL = (0, 23, 0, True)  # seed, structure, number, smoke


def test_a_random_call_depends_on_its_numbers_alone():
    calls = [random_calls.drawn_call(7, index, 3, False) for index in range(300)]
    assert calls == [random_calls.drawn_call(7, index, 3, False) for index in range(300)]
    assert calls != [random_calls.drawn_call(8, index, 3, False) for index in range(300)]
    # over the whole space
    cases = [drawn.case for drawn in calls]
    assert {drawn.loss for drawn in calls} == {"out", "both", "lse"}
    assert {case.layout for case in cases} == {"bshd", "bhsd", "sliced", "expanded"}
    assert {case.padding for case in cases} == {None, "left", "right", "holes"}
    assert {0.0, -0.2} < {case.softmax_scale for case in cases}
    assert any(max(case.window) > 2**31 for case in cases) and any(case.used for case in cases)
    assert any(case.lengths_k for case in cases) and any(case.lengths_q and not case.lengths_k for case in cases)
    assert {drawn.page_size for drawn in calls} > {None, 1, 16, 256} and any(drawn.leftpad for drawn in calls)
    assert any(case.seqlen_q == 1 < case.seqlen_k for case in cases) and any(not drawn.leaves for drawn in calls)
    assert len({case.dims for case in cases}) > 60
    sinks = {sink for drawn in calls for sink in drawn.sinks or ()}
    assert {float("inf"), float("-inf"), -10.0, 20.0, torch.finfo(torch.float32).min} < sinks


def test_the_calls_of_a_structure_take_the_same_kernels():
    """Triton specialises a kernel for integers that are 1 or multiples of 16."""

    def kind(drawn):
        case = drawn.case
        return [n % 16 == 0 for n in (case.seqlen_q, case.seqlen_k)], [n == 1 for n in (case.seqlen_q, case.seqlen_k)]

    for index in range(40):
        kinds = [kind(random_calls.drawn_call(0, index, number, False)) for number in range(8)]
        few = random_calls.drawn_call(0, index, 0, False).case.seqlen_q < 16
        assert few or all(found == kinds[0] for found in kinds), index


def test_a_right_call_is_checked():
    found = random_calls.one(*CALL)
    assert found["verdict"] == "checked" and found["implementation"] == "triton"


def planted(change):
    return lambda *arguments, **options: change(*attention_sink(*arguments, **options))


def raised(error):
    def call(*arguments, **options):
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "verdict", "problem"),
    [
        (planted(lambda out, lse: (out * 1.01, lse)), "failed", "out: error"),
        (planted(lambda out, lse: (out, lse + float("nan"))), "failed", "lse: error nan"),
        (raised(RuntimeError("out of resources")), "failed", "crash, RuntimeError: out of resources"),
        (raised(ValueError("from elsewhere")), "failed", "crash, ValueError: from elsewhere"),
        (lambda q, *rest, **options: attention_sink(q, q[..., :-8], q), "refused", "ValueError: k's head"),
    ],
)
def test_a_wrong_call_is_told_from_a_refusal(call, verdict, problem, monkeypatch):
    monkeypatch.setattr(drawn_calls, "attention_sink", call)
    found = random_calls.one(*CALL)
    assert found["verdict"] == verdict and found["problem"].startswith(problem), found
    assert (verdict == "failed") == found.get("reproduce", "").startswith("PYTHONPATH=.:tests python -c")


def test_a_failure_is_printed_as_a_command_that_runs_it_again():
    command = drawn_calls.pasteable(random_calls.drawn_call(*CALL))
    code = command.removeprefix('PYTHONPATH=.:tests python -c "').removesuffix('"')
    assert '"' not in code and "$" not in code and "`" not in code
    done = python("-c", code, path=(ROOT, ROOT / "tests"), **INTERPRETED_AS_HERE)
    assert done.stdout.startswith("triton serves")


def test_the_route_is_checked_and_compared(tmp_path):
    script = FOLDER / "hf_route.py"
    python(script, "--smoke", "--cases", "rl-d64", "--output", tmp_path, **INTERPRETED_AS_HERE)
    data = json.loads((tmp_path / "hf_route.json").read_text())
    assert len(data["rows"]) == 2 * 3 * 2 and not data["problems"]
    for row in data["rows"]:
        assert max(row["errors"].values()) < 0.01 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert {row["case"] for row in data["forward of a model"]} == {"rl-d64", "rl-d64-window128"}


def test_bits_that_differ_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["determinism.py", "--output", str(tmp_path), "--smoke"])
    assert determinism.main() == 0
    data = json.loads((tmp_path / "determinism.json").read_text())
    assert set(data["different"]) == {"full", "packed", "positions"} and data["failed"] == []
    calls = iter(range(10**6))
    right = determinism.compute

    def every_third_is_off(*arguments):
        results = right(*arguments)
        return results | {"dq": results["dq"] + (next(calls) % 3 == 0)}

    monkeypatch.setattr(determinism, "compute", every_third_is_off)
    assert determinism.main() == 1
    data = json.loads((tmp_path / "determinism.json").read_text())
    assert data["failed"] == ["full", "packed"]
    assert all(data["different"]["full"][check] > 0 for check in ("repeated", "streams", "threads"))


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
echo "=========     at _a_kernel+0x10 in a.py:3"
echo "========= Error: Race reported between Write access at _a_kernel+0x20 in a.py:4"
echo "=========     and Read access at _b_kernel+0x30 in a.py:5 [2 hazards]"
echo '["a call below it"]'
echo "$@" | grep -q -- "--tool {tool} .*sanitized.py --work --tool {tool}" && echo "========= {summary}"
"""


@pytest.mark.parametrize(
    ("tool", "summary", "errors", "status"),
    [
        ("memcheck", "ERROR SUMMARY: 0 errors", 0, 0),
        ("memcheck", "ERROR SUMMARY: 1 error", 1, 1),
        ("racecheck", "RACECHECK SUMMARY: 12 hazards displayed (11 errors, 1 warning)", 12, 1),
        ("synccheck", "Target application terminated", None, 1),
    ],
)
def test_what_the_sanitizer_says_is_reported(tmp_path, monkeypatch, tool, summary, errors, status):
    program = tmp_path / "compute-sanitizer"
    program.write_text(SANITIZER.format(tool=tool, summary=summary))
    program.chmod(0o755)
    monkeypatch.setattr(sanitized, "work", lambda: ["a call"])
    arguments = ["sanitized.py", "--tool", tool, "--output", str(tmp_path), "--sanitizer", str(program)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert sanitized.main() == status
    data = json.loads((tmp_path / f"sanitizer-{tool}.json").read_text())
    assert data["errors"] == errors and data["calls"] == ["a call below it"] and summary in data["said"][-1]
    assert data["kernels"] == {"_a_kernel": 2}
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "nowhere")])
    assert sanitized.main() == 2


def test_every_launcher_has_a_call_for_the_sanitizer(monkeypatch):
    monkeypatch.setattr(problem, "target_name", lambda device: "sm90")
    backends = {launcher.backend for launcher in LAUNCHERS}
    assert set(sanitized.CASES) == backends
    for launcher in LAUNCHERS:
        cases = [case for cases in sanitized.CASES.values() for case in cases.values()]
        assert any(launcher.serves(case, "sm90") for case in cases), launcher.module
