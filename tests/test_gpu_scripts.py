"""benchmarks/random_calls.py and hf_route.py at toy size: what they report is what happened."""

import json
import sys

import pytest
from processes import INTERPRETED_AS_HERE, ROOT, python

pytest.importorskip("transformers")
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import random_calls  # noqa: E402

CALL = (0, 1, 0, True)  # seed, structure, number, smoke


def test_a_random_call_depends_on_its_numbers_alone():
    forms = [random_calls.structure(7, index) for index in range(300)]
    assert forms == [random_calls.structure(7, index) for index in range(300)]
    assert forms != [random_calls.structure(8, index) for index in range(300)]
    cases = [random_calls.values(form, 7, index, 3) for index, form in enumerate(forms)]
    assert cases == [random_calls.values(form, 7, index, 3) for index, form in enumerate(forms)]
    # over the whole space
    assert {form.packed for form in forms} == {None, "alike", "T + 1", "cross"}
    assert {form.loss for form in forms} == {"out", "both", "lse"}
    assert {case.layout for case in cases} == {"bshd", "bhsd", "sliced", "expanded"}
    assert any(max(case.window) > 2**31 for case in cases) and any(case.used for case in cases)
    assert len({case.dims for case in cases}) > 60


def test_a_right_call_is_checked():
    found = random_calls.one(*CALL)
    assert found["verdict"] == "checked" and found["implementation"] == "triton"


def planted(change):
    def call(*arguments):
        return change(*random_calls_call(*arguments))

    random_calls_call = random_calls.call
    return call


def raised(error):
    def call(*arguments):
        raise error

    return call


@pytest.mark.parametrize(
    ("call", "verdict", "problem"),
    [
        (planted(lambda out, lse: (out * 1.01, lse)), "failed", "out: error"),
        (planted(lambda out, lse: (out, lse + float("nan"))), "failed", "lse: error nan"),
        (raised(RuntimeError("out of resources")), "failed", "crash, RuntimeError: out of resources"),
        (raised(ValueError("from elsewhere")), "failed", "crash, ValueError: from elsewhere"),
        (lambda case, inputs, q, *rest: refused_by_us(q), "refused", "ValueError: k's head"),
    ],
)
def test_a_wrong_call_is_told_from_a_refusal(call, verdict, problem, monkeypatch):
    monkeypatch.setattr(random_calls, "call", call)
    found = random_calls.one(*CALL)
    assert found["verdict"] == verdict and found["problem"].startswith(problem), found


def refused_by_us(q):
    from triton_attention_sink_hf import attention_sink

    return attention_sink(q, q[..., :-8], q)


def test_the_route_is_checked_and_compared(tmp_path):
    script = FOLDER / "hf_route.py"
    python(script, "--smoke", "--cases", "rl-d64", "--output", tmp_path, **INTERPRETED_AS_HERE)
    data = json.loads((tmp_path / "hf_route.json").read_text())
    assert len(data["rows"]) == 2 * 3 * 2 and not data["problems"]
    for row in data["rows"]:
        assert max(row["errors"].values()) < 0.01 and row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert {row["case"] for row in data["forward of a model"]} == {"rl-d64", "rl-d64-window128"}
