"""Random calls over the whole call space: the reference against its formulas, interpreted kernels against fp64.

``drawn_calls.py`` draws them, here through hypothesis, which shrinks what fails. The same calls run on a GPU by
``benchmarks/random_calls.py``.
"""

import pytest
import torch
from budget import assert_within_budget, oracle
from drawn_calls import inputs_of, pasteable, run, structure, values, without_infinities
from formulas import by_formula, by_rows
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

QUICK = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
LONG = settings(QUICK, max_examples=1500, derandomize=False)


def interpreted(test):
    """Poisoned memory, checked addresses; numpy may warn of infinities."""
    test = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")(test)
    return pytest.mark.usefixtures("poisoned_empty", "bounds_checked")(test)


@st.composite
def calls(draw):
    pick = draw(st.randoms(use_true_random=False))
    return without_infinities(values(structure(pick, small=True), pick, small=True))


def same(found: dict, expected: dict) -> None:
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, rtol=1e-9, atol=1e-11, msg=lambda text, x=name: f"{x}: {text}")


def check_reference(drawn) -> None:
    note(pasteable(drawn))
    inputs = inputs_of(drawn)
    want = by_rows(drawn.case, inputs)
    visible = inputs.mask.dense(inputs.q.shape[1], inputs.k.shape[1], inputs.q.device)
    same(oracle(drawn.case, inputs), want)
    same(by_formula(drawn.case, inputs, visible), want)


def check_kernels(drawn) -> None:
    note(pasteable(drawn))
    inputs = inputs_of(drawn)
    assert_within_budget(drawn.case, inputs, run(drawn, inputs)[1], tiny=True)


@settings(QUICK, max_examples=100)
@given(drawn=calls())
def test_the_reference_is_what_the_formulas_say(drawn):
    check_reference(drawn)


@interpreted
@QUICK
@given(drawn=calls())
def test_any_call_is_within_budget(drawn):
    check_kernels(drawn)


@pytest.mark.exhaustive
@LONG
@given(drawn=calls())
def test_many_references_are_what_the_formulas_say(drawn):
    check_reference(drawn)


@pytest.mark.exhaustive
@interpreted
@LONG
@given(drawn=calls())
def test_many_calls_are_within_budget(drawn):
    check_kernels(drawn)
