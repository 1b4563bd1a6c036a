"""``triton-attention-sink doctor``: what it says, and when it exits 1."""

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import NAMES, RESULTS, invoke
from processes import ROOT, python

from triton_attention_sink_hf import checks
from triton_attention_sink_hf.cli import doctor as doctor_command


def test_doctor_json_is_only_json_and_complete():
    done = python("-c", "from triton_attention_sink_hf.cli import main; main()", "doctor", "--json")
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == NAMES
    assert all(check["passed"] for check in report["checks"])
    assert set(report["versions"]) >= {"python", "torch", "triton", "transformers", "verl", "vllm", "kernels", "numpy"}
    assert report["config"]["name"] == "attn_implementation: triton_attention_sink"
    assert report["config"]["path"] == f"attn_implementation: {ROOT / 'triton_attention_sink_hf'}"
    if not torch.cuda.is_available():
        assert {row["implementation"] for row in report["implementations"]} == {"reference"}
        assert "need a GPU" in report["implementations"][0]["reasons"]["triton"]


def test_doctor_prints_the_lines_to_paste(monkeypatch):
    monkeypatch.setattr(doctor_command, "checks", lambda: RESULTS)
    result = invoke("doctor")
    assert result.exit_code == 0
    assert "attn_implementation: triton_attention_sink" in result.stdout
    assert f"attn_implementation: {ROOT / 'triton_attention_sink_hf'}" in result.stdout
    assert "external_lib: triton_attention_sink_hf" in result.stdout
    assert result.stdout.count("PASS") == 5


def test_doctor_exits_1_on_a_failed_check_and_says_why(monkeypatch):
    failed = {"name": "Path Format", "passed": False, "detail": "ValueError: [the] reason"}
    monkeypatch.setattr(doctor_command, "checks", lambda: [*RESULTS[:4], failed])
    result = invoke("doctor")
    assert result.exit_code == 1
    assert "FAIL  Path Format          ValueError: [the] reason" in result.stdout
    assert invoke("doctor", "--json").exit_code == 1


def test_doctor_says_why_a_path_cannot_be_used(monkeypatch):
    monkeypatch.setattr(doctor_command, "checks", lambda: RESULTS)
    monkeypatch.setattr(doctor_command, "PACKAGE", Path("/somewhere/flash/triton_attention_sink_hf"))
    result = invoke("doctor")
    assert "not by path: a path in attn_implementation must not contain 'flash'" in result.stdout


NO_CROSS_ENTROPY = "verl takes log-probs token by token"


@pytest.mark.parametrize("vllm", ["0.9.2", "0.24.0", "0.25.0", "0.25.1", "0.25.1+cu130", "0.100.0"])
@pytest.mark.parametrize("has_cross_entropy", [True, False])
def test_doctor_says_what_stops_or_slows_verl(monkeypatch, vllm, has_cross_entropy):
    monkeypatch.setattr(doctor_command, "_has_cross_entropy", lambda: has_cross_entropy)
    is_old = vllm in ("0.9.2", "0.24.0", "0.25.0")
    expected = [f"vllm must be 0.25.1 or newer for gpt-oss in bf16, got {vllm}"] * is_old
    expected += ["flash-attn's cross entropy cannot be imported"] * (not has_cross_entropy)
    hints = doctor_command.verl_hints({"verl": "0.9.1", "vllm": vllm})
    assert [hint.split(":")[0] for hint in hints] == expected


def test_doctor_prints_what_stops_or_slows_verl(monkeypatch):
    found = doctor_command.versions() | {"verl": "0.9.1", "vllm": "0.24.0"}
    monkeypatch.setattr(doctor_command, "versions", lambda: found)
    monkeypatch.setattr(doctor_command, "checks", lambda: RESULTS)
    monkeypatch.setattr(doctor_command, "_has_cross_entropy", lambda: False)
    result = invoke("doctor")
    assert result.exit_code == 0
    hints = doctor_command.verl_hints(found)
    assert len(hints) == 2 and all(f"verl: {hint}" in result.stdout for hint in hints)


@pytest.mark.parametrize("verl, vllm", [(None, "0.24.0"), (None, None), ("0.9.1", None)])
def test_doctor_says_nothing_of_what_is_not_installed(verl, vllm, monkeypatch):
    monkeypatch.setattr(doctor_command, "_has_cross_entropy", lambda: False)
    hints = doctor_command.verl_hints({"verl": verl, "vllm": vllm})
    assert [NO_CROSS_ENTROPY in hint for hint in hints] == [True] * (verl is not None)


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
@pytest.mark.parametrize(
    "files, expected",
    [
        ({}, False),
        ({"flash_attn/cute/__init__.py": ""}, False),  # flash-attn-4 alone
        ({"flash_attn/__init__.py": "import no_such_extension", "flash_attn/ops/triton/cross_entropy.py": ""}, False),
        ({"flash_attn/ops/triton/cross_entropy.py": ""}, True),  # its Triton part alone
    ],
)
def test_doctor_looks_for_the_cross_entropy_as_verl_does(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    program = "from triton_attention_sink_hf.cli import doctor; print(doctor._has_cross_entropy())"
    done = python("-c", program, path=(tmp_path, ROOT))
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.parametrize(
    ("string", "works", "reason"),
    [
        ("triton_attention_sink", True, "this package's attention"),
        (f"{ROOT / 'triton_attention_sink_hf'}/", True, "this package's attention"),
        ("sdpa", True, "transformers' own"),
        ("triton-attention-sink", False, "pip's name"),
        ("triton_attention_sink_hf", False, "the Python package, for import"),
        ("triton_atention_sink", False, "mistyped"),
        ("Triton Attention Sink", False, "mistyped"),
        ("'triton_attention_sink'", False, "mistyped"),
        ("./triton_attention_sink_hf", False, "must be an absolute path"),
        ("~/triton_attention_sink_hf", False, "must be an absolute path"),
        ("/opt/flash/triton_attention_sink_hf", False, "must not contain 'flash'"),
        ("/opt/triton_attention_sink_hf", False, "no folder, and not the folder of this package"),
        (f"{ROOT}", False, "not the folder of this package"),
        ("paged|triton_attention_sink", False, "splits it at '|'"),
        ("sdpaa", False, "is it 'sdpa'"),
        ("nothing", False, "no such name is registered"),
        ("org/name", None, "a kernel on the Hub"),
    ],
)
def test_doctor_says_whether_a_string_works_and_why(string, works, reason):
    result = invoke("doctor", "--attn", string, "--json")
    found = json.loads(result.stdout)
    assert reason in found["reason"] and found["attn_implementation"] == string
    if works is not None:
        assert found["works"] is works and result.exit_code == (not works)
    assert found["ours"] is (works is True and string != "sdpa")
    text = invoke("doctor", "--attn", string).stdout
    assert ("does not work: " in text) is not found["works"] and found["reason"] in text
    assert "triton_attention_sink" in text  # what to write, at least


def test_what_doctor_says_of_a_string_is_what_transformers_does():
    """Each of those that it says do not work raises in transformers; none of the others does."""
    for string in (
        "triton_attention_sink",
        "eager",
        "triton-attention-sink",
        "triton_attention_sink_hf",
        "/opt/x",
        "x",
    ):
        assert (doctor_command._tried(string) is None) is json.loads(
            invoke("doctor", "--attn", string, "--json").stdout
        )["works"], string


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, None),
        ({"TRITON_ATTENTION_SINK_AUTOLOAD": "0"}, "TRITON_ATTENTION_SINK_AUTOLOAD=0"),
        ({"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, "TORCH_DEVICE_BACKEND_AUTOLOAD=0"),
    ],
)
def test_doctor_says_how_the_name_becomes_known(monkeypatch, environment, reason):
    for name in ("TRITON_ATTENTION_SINK_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"):
        monkeypatch.delenv(name, raising=False)
    entry = importlib.metadata.EntryPoint("triton_attention_sink", "triton_attention_sink_autoload:autoload", "x")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == "torch.backends" else [])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    said = doctor_command.registration()
    assert said.startswith("registered by itself") if reason is None else f"not registered by itself ({reason})" in said
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "not installed with pip" in doctor_command.registration()


def test_the_checks_say_which_triton_and_numpy_they_need(monkeypatch):
    import numpy

    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    monkeypatch.delattr("triton.knobs")
    with pytest.raises(ImportError, match=r"triton must be installed, 3.4 or newer, got \d"):
        checks.kernel_device()
    monkeypatch.setattr(numpy, "__version__", "2.4.1")
    with pytest.raises(
        RuntimeError, match=r"numpy must be older than 2.4 for the interpreter of triton 3.6.0, got 2.4.1"
    ):
        checks._check_interpreter("3.6.0")
    checks._check_interpreter("3.7.0")
    monkeypatch.setattr(numpy, "__version__", "2.3.5")
    checks._check_interpreter("3.6.0")
