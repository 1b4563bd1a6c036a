"""benchmarks/random_calls.py and hf_route.py at toy size: what they report is what happened."""

import json
import sys

import drawn_calls
import pytest
import torch
from processes import INTERPRETED_AS_HERE, ROOT, python

pytest.importorskip("transformers")
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import random_calls  # noqa: E402

from triton_attention_sink_hf import attention_sink  # noqa: E402

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
