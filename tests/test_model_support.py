"""MODELS.md is what the committed verdicts say, and the verdicts are what the installed transformers gives."""

import json

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from model_support import FEATURES, PAGE, RESULTS, ROWS  # noqa: E402
from model_support_page import newest, page  # noqa: E402
from processes import INTERPRETED_AS_HERE, ROOT, python  # noqa: E402

SAMPLE = ("DeepSeek-V4, sliding layers alone", "PaliGemma")  # D 512, blocks


@pytest.fixture(scope="module")
def results() -> dict:
    with open(RESULTS) as file:
        return json.load(file)


def measured(folder, *arguments: str) -> dict[str, dict[str, str]]:
    out = folder / "models.json"
    python(ROOT / "tests" / "model_support.py", "--json", out, *arguments, timeout=None, **INTERPRETED_AS_HERE)
    return json.loads(out.read_text())[transformers.__version__]


def of_this_version(results: dict) -> dict[str, dict[str, str]]:
    if transformers.__version__ not in results:
        pytest.skip(f"no verdicts for transformers {transformers.__version__}")
    return results[transformers.__version__]


def test_the_page_is_what_the_verdicts_say(results):
    with open(PAGE) as file:
        assert file.read() == page(results)


def test_every_row_has_every_feature_and_nothing_is_wrong(results):
    assert set(results[newest(results)]) == set(ROWS)
    for version, rows in results.items():
        for name, row in rows.items():
            assert set(row) == set(FEATURES), (version, name)
            wrong = {feature: verdict for feature, verdict in row.items() if verdict.startswith("WRONG")}
            assert not wrong, (version, name, wrong)


@pytest.mark.xdist_group("model_sweep")
def test_a_sample_of_rows_is_as_committed(results, tmp_path):
    expected = of_this_version(results)
    assert measured(tmp_path, "--only", "|".join(SAMPLE)) == {name: expected[name] for name in SAMPLE}


@pytest.mark.exhaustive
def test_every_row_is_as_committed(results, tmp_path):
    assert measured(tmp_path) == of_this_version(results)
