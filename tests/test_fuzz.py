"""Random shapes and features, interpreted, against fp64."""

import pytest
import torch
from budget import assert_within_budget
from cases import Case, make_inputs, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "bounds_checked"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


@st.composite
def cases(draw) -> Case:
    heads_k = draw(st.sampled_from([1, 2]))
    heads = (heads_k * draw(st.sampled_from([1, 2, 3, 4, 6])), heads_k)
    size = st.sampled_from([1, 4, 8, 15, 16, 24, 32, 33, 40])
    window = draw(st.sampled_from([(-1, -1), (0, 0), (7, 3), (20, -1), (-1, 5), (1000, 0)]))
    common = {
        "heads": heads,
        "head_dim": (draw(size), draw(size)),
        "dtype": draw(st.sampled_from([torch.float16, torch.float32])),
        "causal": draw(st.booleans()),
        "window": window,
        "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])),
        "softmax_scale": draw(st.sampled_from([None, None, 0.1, -0.2])),
        "sinks": draw(st.sampled_from(["learned", "frozen", None])),
        "dlse": draw(st.booleans()),
        "layout": draw(st.sampled_from(["bshd", "bhsd", "sliced"])),
    }
    if draw(st.booleans()):
        lengths = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=4))
        tail_q, tail_k = draw(st.integers(0, 5)), draw(st.integers(0, 5))
        lengths_q, lengths_k = zip(*lengths, strict=True)
        return Case(
            sum(lengths_q) + tail_q, sum(lengths_k) + tail_k, lengths_q=lengths_q, lengths_k=lengths_k, **common
        )
    seqlen_q, seqlen_k = draw(st.integers(1, 50)), draw(st.integers(1, 50))
    batch = draw(st.sampled_from([1, 2]))
    used = tuple(draw(st.integers(0, seqlen_k)) for _ in range(batch)) if draw(st.booleans()) else None
    padding = draw(st.sampled_from([None, "left", "right", "holes"]))
    return Case(seqlen_q, seqlen_k, batch=batch, used=used, padding=padding, **common)


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_any_call_is_within_budget(case):
    inputs = make_inputs(case)
    assert_within_budget(case, inputs, run(case, inputs), tiny=True)
