"""The committed tables of ``model_sweep.py`` hold: a sample of every kind in each run, all classes where asked for."""

import json
import os

import pytest

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from model_sweep import classes  # noqa: E402
from model_sweep_table import read_table, summary  # noqa: E402
from processes import INTERPRETED_AS_HERE, python  # noqa: E402

TESTS = os.path.dirname(os.path.abspath(__file__))
VERSION = ".".join(transformers.__version__.split(".")[:2])
TABLE = os.path.join(TESTS, f"model_sweep_{VERSION}.md")
SAMPLE = (
    "GptOssForCausalLM",  # sinks, windows in some layers
    "LlamaForCausalLM",  # nothing special
    "Ministral3ForCausalLM",  # the layers are not told the positions
    "T5GemmaForConditionalGeneration",  # an encoder's window, cross-attention without one
    "ModernBertForMaskedLM",  # an encoder whose W counts the query
    "BigBirdPegasusForConditionalGeneration",  # a decoder that does not say that it is causal
    "NllbMoeForConditionalGeneration",  # routers that read the mask
    "PaliGemmaForConditionalGeneration",  # a mask that is made before the text model
    "DeepseekV4ForCausalLM",  # keys added inside a layer
    "Qwen2VLForConditionalGeneration",  # positions of several axes
    "JambaForCausalLM",  # layers that are not attention
    "JetMoeForCausalLM",  # views of the output
    "T5ForConditionalGeneration",  # its own attention
    "DogeForCausalLM",  # a mask of its own
)


def sweep(path, *arguments: str) -> dict[str, dict[str, str]]:
    script = os.path.join(TESTS, "model_sweep.py")
    python(script, "--json", path, *arguments, timeout=None, **INTERPRETED_AS_HERE)
    with open(path) as file:
        return {name: summary(found) for name, found in json.load(file).items()}


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, str]]:
    if not os.path.exists(TABLE):
        pytest.skip(f"no table for transformers {VERSION}")
    return read_table(TABLE)


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, str]]:
    return sweep(tmp_path_factory.mktemp("sweep") / "sample.json", "--only", ",".join(SAMPLE))


@pytest.mark.xdist_group("model_sweep")
@pytest.mark.parametrize("name", SAMPLE)
def test_class_does_what_the_table_says(name, table, found):
    assert found[name] == table[name]


def test_tables_have_every_class_and_nothing_wrong(table):
    assert set(table) == set(classes())
    wrong = {name: row for name, row in table.items() if "WRONG" in row.values()}
    assert not wrong


@pytest.mark.exhaustive
def test_every_class_does_what_the_table_says(table, tmp_path):
    found = sweep(tmp_path / "all.json")
    assert found == table
