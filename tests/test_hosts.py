"""What `make hosts` relies on, without its environments: the comparison, the witness, and the guide's table."""

import json
import math
import sys

import pytest
import torch
from processes import ROOT, python

HOSTS = ROOT / "tests" / "hosts"
sys.path.insert(0, str(HOSTS))

import catalogue  # noqa: E402


@pytest.fixture
def compared(tmp_path):
    """Of three checkpoints' parameters (start, ours, eager): what compare.py prints."""
    torch_files = pytest.importorskip("safetensors.torch")

    def compare(*checkpoints) -> float:
        for number, parameters in enumerate(checkpoints):
            folder = tmp_path / f"{number}"
            folder.mkdir()
            torch_files.save_file({name: torch.tensor(x) for name, x in parameters.items()}, folder / "a.safetensors")
        return float(python(HOSTS / "compare.py", *(tmp_path / f"{number}" for number in range(3))).stdout)

    return compare


def test_the_comparison_is_relative_to_eagers_movement(compared):
    start, ours, eager = {"a": [0.0, 0.0], "s": [1.0]}, {"a": [3.0, 4.0], "s": [1.3]}, {"a": [3.0, 4.0], "s": [1.2]}
    assert compared(start, ours, eager) == pytest.approx(0.5, rel=1e-5)


def test_the_comparison_notices_nan(compared):
    start, ours, eager = ({"a": [x], "b": [1.0 + x]} for x in (0.0, float("nan"), 2.0))
    assert math.isnan(compared(start, ours, eager))


@pytest.mark.parametrize("eager", [{"a": [1.0], "s": [1.0]}, {"a": [1.0]}], ids=["still", "missing"])
def test_a_parameter_that_cannot_be_compared_fails(compared, eager):
    with pytest.raises(AssertionError, match=r"eager left these where they were|other parameters"):
        compared({"a": [0.0], "s": [1.0]}, {"a": [1.0], "s": [2.0]}, eager)


@pytest.mark.parametrize("calls", [0, 3])
def test_the_witness_counts_calls_and_registers_nothing(tmp_path, calls):
    code = f"""
import sys, torch
assert "sitecustomize" in sys.modules and "triton_attention_sink_hf" not in sys.modules
for _ in range({calls}):
    from triton_attention_sink_hf import attention_sink
    attention_sink(*[torch.ones(1, 4, 2, 16)] * 3)
"""
    python("-c", code, path=(HOSTS / "witness", ROOT), WITNESS=str(tmp_path))
    assert [int(file.read_text()) for file in tmp_path.iterdir()] == [calls] * (calls > 0)


def test_the_samples_are_the_same_in_both_forms(tmp_path):
    catalogue.write_data(tmp_path)
    ids, chats = (
        [json.loads(line) for line in (tmp_path / name / "train.jsonl").read_text().splitlines()]
        for name in ("ids", "chats")
    )
    words = [" ".join(turn["content"] for turn in chat["messages"]).split() for chat in chats]
    assert [[f"w{i}" for i in row["input_ids"]] for row in ids] == words
    assert [len(row["input_ids"]) for row in ids] == [*catalogue.LENGTHS]


def test_the_guide_has_every_trainer_and_its_line():
    table = (ROOT / "INSTALLATION_GUIDE.md").read_text().split("### Other trainers")[1].split("\n## ")[0]
    for name, host in catalogue.HOSTS.items():
        assert any(row.startswith(f"| {name} ") and host.line in row for row in table.splitlines()), name
