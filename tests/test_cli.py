"""The command line and the newcomer's five checks: what they print, and that they fail when something is broken."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import NAMES, contents, invoke
from processes import ROOT, environment, python

from triton_attention_sink_hf import attention_sink, checks, interface, processes
from triton_attention_sink_hf.cli import bench as bench_command

# The five checks


def test_test_basic_passes_from_any_directory_without_an_installation():
    done = python(ROOT / "test_attention_sink" / "test_basic.py", path=())
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


@pytest.mark.parametrize(
    "program",
    [
        f"import runpy; runpy.run_path({str(ROOT / 'test_attention_sink' / 'test_basic.py')!r}, run_name='__main__')",
        "from triton_attention_sink_hf.cli import main; sys.argv[1:] = ['doctor']; main()",
        "from triton_attention_sink_hf.cli import main; sys.argv[1:] = ['bench', '--list']; main()",
    ],
    ids=["test_basic", "doctor", "bench"],
)
def test_without_torch_one_sentence_says_so(program):
    code = f"import sys; sys.modules['torch'] = None; {program}"
    run = subprocess.run([sys.executable, "-c", code], env=environment(ROOT), capture_output=True, text=True)
    assert run.returncode == 1
    (line,) = (run.stdout + run.stderr).splitlines()
    assert 'torch must be installed, 2.8 or newer (pytorch.org, "Get started")' in line


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


# the command itself


def test_version_and_help_and_completion():
    from triton_attention_sink_hf import __version__

    assert invoke("--version").stdout == f"triton-attention-sink {__version__}\n"
    text = invoke("--help").stdout
    assert "--install-completion" in text and "doctor" in text


def test_bench_lists_what_it_knows():
    lines = invoke("bench", "--list").stdout.splitlines()
    assert "  full-2k" in lines and "implementations" in lines


# demo


def test_demo_trains_as_eager_does():
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 0, result.stdout
    assert "PASS" in result.stdout


@pytest.mark.parametrize("attention", ["nothing", "/nowhere/triton_attention_sink_hf", ""])
def test_demo_refuses_an_unknown_attention(attention):
    result = invoke("demo", "--steps", "1", "--attention", attention)
    assert result.exit_code == 2
    (sentence,) = result.stderr.strip().splitlines()
    assert "attention must be a name that transformers knows" in sentence and repr(attention) in sentence


def test_demo_fails_when_the_sinks_are_not_trained(monkeypatch):
    from triton_attention_sink_hf import flash_attention_triton_sink as wrapper

    def frozen(q, k, v, sinks, **options):
        return attention_sink(q, k, v, sinks.detach(), **options)

    monkeypatch.setattr(wrapper, "attention_sink", frozen)
    result = invoke("demo", "--steps", "3")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


# bench


def test_bench_says_what_it_lacks():
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    result = invoke("bench")
    assert result.exit_code == 2 and result.stderr.strip() == "bench needs a GPU that torch can use; none was found"


@pytest.fixture
def gpu_for_bench(monkeypatch):
    """bench believes in a GPU and times nothing."""
    from triton_attention_sink_hf.bench import measure

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_command, "find_spec", lambda name: name)  # matplotlib is there
    monkeypatch.setattr(measure, "environment", lambda: {"card": "a", "torch": "b", "triton": "c", "date": "d"})
    monkeypatch.setattr(measure, "ceilings", lambda: {"copy_tb_s": 3.0, "matmul_tflop_s": 700.0})
    monkeypatch.setattr(measure, "measure", lambda case, names, log: [])


def test_bench_replaces_its_own_results_alone(tmp_path, gpu_for_bench):
    def bench(*arguments):
        return invoke("bench", "--cases", "full-2k", "--no-plots", "--output", str(tmp_path / "out"), *arguments)

    for arguments in ([], [], ["--resume"]):
        assert bench(*arguments).exit_code == 0
    results = tmp_path / "out" / "bench.json"
    assert json.loads(results.read_text())["environment"]["card"] == "a"
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert bench().exit_code == 0
    text = results.read_text()
    results.write_text(text + " ")  # a note, say
    for arguments in ([], ["--resume"]):
        before = contents(tmp_path)
        result = bench(*arguments)
        assert result.exit_code == 2 and "changed since" in result.stderr
        assert contents(tmp_path) == before
    results.rename(tmp_path / "precious")
    results.symlink_to(tmp_path / "precious")
    before = contents(tmp_path)
    result = bench()
    assert result.exit_code == 2 and "must not be a link" in result.stderr
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["bench.json", "forward.png", "backward.png"])
def test_bench_does_not_replace_other_files(tmp_path, gpu_for_bench, name):
    (tmp_path / name).write_text("mine")
    result = invoke("bench", "--cases", "full-2k", "--output", str(tmp_path))
    assert result.exit_code == 2 and name in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert contents(tmp_path) == {str(tmp_path / name): b"mine"}


@pytest.mark.parametrize("arguments", [("--cases", "nothing"), ("--implementations", "ours,nothing")])
def test_bench_refuses_what_it_does_not_know(gpu_for_bench, arguments):
    result = invoke("bench", *arguments)
    assert result.exit_code == 2 and "nothing" in result.stderr


# Processes that the package starts


PROBE = """
import json, sys
import triton_attention_sink_hf as package
print(json.dumps({"package": package.__file__, "name": __name__, "argv": sys.argv[1:]}))
"""


@pytest.mark.parametrize("environment", [{}, {"PYTHONPATH": "."}, {"PYTHONPATH": "HERE"}, {"PYTHONSAFEPATH": "1"}])
def test_a_process_imports_what_this_one_does(tmp_path, environment, monkeypatch):
    """Whatever lies in the current folder or on PYTHONPATH: modules of the same names, another copy of the package."""
    for name in ("numpy", "torch", "json", "runpy", "importlib", "typing"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the current folder')")
    (tmp_path / "triton_attention_sink_hf").mkdir()
    for name in ("__init__", "checks", "probe"):
        (tmp_path / "triton_attention_sink_hf" / f"{name}.py").write_text("raise SystemExit('another copy')")
    copy = tmp_path / "mine" / "triton_attention_sink_hf"
    copy.mkdir(parents=True)
    (copy / "__init__.py").write_text("")
    (copy / "probe.py").write_text(PROBE)
    monkeypatch.setattr(processes, "PACKAGE", copy)
    command = processes.module_command("probe", "--an", "option")
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    if environment.get("PYTHONPATH") == "HERE":
        environment = {"PYTHONPATH": str(tmp_path)}
    if "PYTHONPATH" in environment:
        (tmp_path / "json.py").unlink()  # site itself may import from PYTHONPATH, before anyone can say otherwise
        (tmp_path / "importlib.py").unlink()
        (tmp_path / "typing.py").unlink()
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {"package": str(copy / "__init__.py"), "name": "__main__", "argv": ["--an", "option"]}


def test_nothing_starts_python_by_a_module_name():
    """``python -m`` and ``-c`` look into the current folder first; module_command does not."""
    for file in (ROOT / "triton_attention_sink_hf").rglob("*.py"):
        if file.name not in ("processes.py", "__main__.py"):  # the launcher is started so itself
            text = file.read_text()
            assert '"-m"' not in text and "sys.executable" not in text, file
