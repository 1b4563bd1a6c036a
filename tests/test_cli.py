"""The command line and the newcomer's five checks: what they print, and that they fail when something is broken."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from triton_attention_sink_hf import attention_sink, checks, interface
from triton_attention_sink_hf.cli import app
from triton_attention_sink_hf.cli import doctor as doctor_command
from triton_attention_sink_hf.cli.export import write

ROOT = Path(__file__).parent.parent
NAMES = ["Import Test", "Triton Kernel Check", "Basic Forward Pass", "GQA Support", "Path Format"]
RESULTS = [{"name": name, "passed": True, "detail": "fine"} for name in NAMES]


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def fresh(*command: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a Python command from another directory, with the interpreter not yet asked for."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    inherited |= {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([sys.executable, *command], env=inherited, capture_output=True, text=True, cwd="/")


# The five checks


def test_test_basic_passes_from_any_directory_without_an_installation():
    done = fresh(str(ROOT / "test_attention_sink" / "test_basic.py"))
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, total = done.stdout.splitlines()
    assert [line[:26].split("PASS  ")[-1].strip() for line in lines] == NAMES
    assert total == "5 of 5 checks passed"


def test_a_failed_check_is_one_line_with_its_reason_and_exit_status_1(monkeypatch, capsys):
    def broken():
        raise ValueError("the reason\nand a long tail")

    monkeypatch.setattr(checks, "CHECKS", {"Import Test": broken, "GQA Support": lambda: "fine"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("test_basic", ROOT / "test_attention_sink" / "test_basic.py")
    test_basic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(test_basic)
    assert test_basic.main() == 1
    first, second, total = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL  Import Test") and first.endswith("ValueError: the reason")
    assert second.startswith("PASS  GQA Support")
    assert total == "1 of 2 checks passed"


@pytest.mark.parametrize("check", [checks.check_kernels, checks.check_forward, checks.check_gqa])
def test_the_kernel_checks_notice_a_lost_sink_gradient(check, monkeypatch):
    def without_sink_gradient(q, k, v, sinks, **options):
        if options["implementation"] == "triton":
            sinks = sinks.detach() + 0.0 * sinks
        return attention_sink(q, k, v, sinks, **options)

    monkeypatch.setattr(interface, "attention_sink", without_sink_gradient)
    with pytest.raises(AssertionError, match="dsinks must be fp64's"):
        check()


def test_the_path_check_notices_ignored_sinks(monkeypatch):
    from triton_attention_sink_hf import flash_attention_triton_sink as wrapper

    def ignore_sinks(q, k, v, sinks, **options):
        return attention_sink(q, k, v, 0.0 * sinks - 100.0, **options)

    monkeypatch.setattr(wrapper, "attention_sink", ignore_sinks)
    with pytest.raises(AssertionError, match=r"logits with .* must be eager's"):
        checks.check_path()


def test_the_path_check_says_which_paths_cannot_work(monkeypatch):
    monkeypatch.setattr(checks, "FOLDER", Path("/somewhere/flash/triton_attention_sink_hf"))
    with pytest.raises(ValueError, match="'flash'"):
        checks.check_path()


# doctor


def test_doctor_json_is_only_json_and_complete():
    done = fresh(
        "-c", "from triton_attention_sink_hf.cli import main; main()", "doctor", "--json", PYTHONPATH=str(ROOT)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert [check["name"] for check in report["checks"]] == NAMES
    assert all(check["passed"] for check in report["checks"])
    assert set(report["versions"]) >= {"python", "torch", "triton", "transformers", "verl", "kernels", "numpy"}
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


# demo


def test_demo_trains_as_eager_does():
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 0, result.stdout
    assert "PASS" in result.stdout


def test_demo_fails_when_the_sinks_are_not_trained(monkeypatch):
    from triton_attention_sink_hf import flash_attention_triton_sink as wrapper

    def frozen(q, k, v, sinks, **options):
        return attention_sink(q, k, v, sinks.detach(), **options)

    monkeypatch.setattr(wrapper, "attention_sink", frozen)
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


# export


STANDALONE = """
import importlib.util, inspect, json, sys
spec = importlib.util.spec_from_file_location("exported_kernel", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules["exported_kernel"] = kernel
spec.loader.exec_module(kernel)
assert not [name for name in sys.modules if name.startswith(("triton_attention_sink_hf", "transformers"))]
parameters = inspect.signature(kernel.flash_attn_varlen_func).parameters
needed = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "causal", "window_size"}
assert needed | {"s_aux"} <= set(parameters), parameters

import torch
torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
def results(function, **options):
    torch.manual_seed(0)
    x = [torch.randn(1, 20, heads, 16, device=device, requires_grad=True) for heads in (4, 2, 2)]
    s = torch.linspace(-2, 3, 4, device=device).requires_grad_()
    out = function(*x, causal=True, window_size=(5, 0), **options | {"s_aux" if not options else "sinks": s})
    return [out, *torch.autograd.grad(out.square().sum(), [*x, s])]
by_kernel = results(kernel.attention_sink, implementation="triton")
for a, b in zip(by_kernel, results(kernel.attention_sink, implementation="reference"), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
for a, b in zip(by_kernel, results(kernel.flash_attn_func), strict=True):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
"""

BESIDE_THE_PACKAGE = """
sys.path.insert(0, sys.argv[2])
import triton_attention_sink_hf
for a, b in zip(by_kernel, results(triton_attention_sink_hf.attention_sink, implementation="triton"), strict=True):
    assert torch.equal(a, b)
for a, b in zip(by_kernel, results(kernel.attention_sink, implementation="triton"), strict=True):
    assert torch.equal(a, b)
"""


def test_export_stands_alone_and_beside_the_package(tmp_path):
    result = invoke("export", str(tmp_path / "kernel"))
    assert result.exit_code == 0
    build = tmp_path / "kernel" / "build" / "torch-universal"
    metadata = json.loads((build / "metadata.json").read_text())
    assert set(metadata) == {"id", "name", "version", "license", "python-depends", "backend"}
    assert metadata["python-depends"] == []
    environment = checks.interpreter_environment() or {"TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "0")}
    done = fresh("-c", STANDALONE + BESIDE_THE_PACKAGE, str(build), str(ROOT), **environment)
    assert done.returncode == 0, done.stderr


def test_export_replaces_its_own_folder_only(tmp_path):
    build = write(tmp_path / "kernel")
    (build / "stale.py").touch()
    write(tmp_path / "kernel")
    assert not (build / "stale.py").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    result = invoke("export", str(tmp_path / "mine"))
    assert result.exit_code == 2
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.tex"]


def test_the_kernels_package_loads_the_export(tmp_path, monkeypatch):
    kernels = pytest.importorskip("kernels", reason="needs the kernels package")
    write(tmp_path / "kernel")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/triton-attention-sink={tmp_path / 'kernel'}")
    kernel = kernels.get_kernel("kernels-community/triton-attention-sink")
    q = torch.randn(1, 8, 2, 16)
    torch.testing.assert_close(
        kernel.flash_attn_func(q, q, q, causal=True, s_aux=torch.ones(2)), attention_sink(q, q, q, torch.ones(2))
    )
