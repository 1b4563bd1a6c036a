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
from processes import INTERPRETED_AS_HERE, ROOT, python
from typer.testing import CliRunner

from triton_attention_sink_hf import attention_sink, checks, interface, processes
from triton_attention_sink_hf.cli import app
from triton_attention_sink_hf.cli import bench as bench_command
from triton_attention_sink_hf.cli import doctor as doctor_command
from triton_attention_sink_hf.cli import export as export_command
from triton_attention_sink_hf.cli.export import write

NAMES = ["Import Test", "Triton Kernel Check", "Basic Forward Pass", "GQA Support", "Path Format"]
RESULTS = [{"name": name, "passed": True, "detail": "fine"} for name in NAMES]


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


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
    environment = checks.interpreter_environment() or INTERPRETED_AS_HERE
    python("-c", STANDALONE + BESIDE_THE_PACKAGE, build, ROOT, path=(), **environment)


HUB_ROUTE = """
import sys
from triton_attention_sink_hf.checks import _logits_and_gradients, _relative
eager = _logits_and_gradients("eager", "cpu")
ours = _logits_and_gradients("kernels-community/triton-attention-sink", "cpu")
assert max(_relative(ours[name], expected) for name, expected in eager.items()) < 1e-5
assert any(name.startswith("_triton_attention_sink") for name in sys.modules), "the exported kernel served"
print("as eager")
"""


def test_the_hub_route_of_one_pair_gives_eager_gradients(tmp_path):
    """transformers and kernels of constraints.txt, which is one of the pairs that export names."""
    from transformers import __version__ as transformers

    apart = Path(sys.prefix) / "kernels"
    if not apart.is_dir() or transformers not in dict(export_command.PAIRS):
        pytest.skip("needs transformers and kernels of constraints.txt (make test installs them)")
    kernels = dict(export_command.PAIRS)[transformers]
    assert (apart / f"kernels-{kernels}.dist-info").is_dir()
    assert f"kernels=={kernels}" in invoke("export", str(tmp_path / "kernel")).stdout
    folder = f"kernels-community/triton-attention-sink={tmp_path / 'kernel'}"
    assert python("-c", HUB_ROUTE, path=(ROOT, apart), LOCAL_KERNELS=folder).stdout.strip() == "as eager"


def refused(folder: Path) -> str:
    """The sentence of an export that must not happen."""
    result = invoke("export", str(folder))
    assert result.exit_code == 2
    (sentence,) = result.stderr.strip().splitlines()
    return sentence


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its bytes, every link with its target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found


def test_another_export_replaces_what_export_wrote(tmp_path, monkeypatch):
    build = write(tmp_path / "kernel")
    monkeypatch.setattr(export_command, "SOURCES", (*export_command.SOURCES, "checks.py"))
    monkeypatch.setattr(export_command, "CARD", "another card")
    write(tmp_path / "kernel")
    assert (build / "checks.py").exists()
    monkeypatch.undo()
    write(tmp_path / "kernel")
    assert not (build / "checks.py").exists()  # no longer part of it, and as export wrote it
    write(tmp_path / "new")
    again, new = contents(tmp_path / "kernel"), contents(tmp_path / "new")
    assert [*again.values()] == [*new.values()]


@pytest.mark.parametrize("name", ["thesis.tex", "README.md", ".git/HEAD", "build/torch-universal/metadata.json"])
def test_export_needs_a_folder_of_its_own(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    before = contents(tmp_path)
    assert "DIR must be new, empty or an earlier export" in refused(tmp_path)
    assert contents(tmp_path) == before


def test_export_leaves_other_files_alone(tmp_path):
    build = write(tmp_path / "kernel")
    for name in ("LICENSE", ".git/HEAD", "build/torch-universal/keep.py", "build/torch-cuda/__init__.py"):
        (tmp_path / "kernel" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "kernel" / name).write_text("mine")
    before = contents(tmp_path)
    write(tmp_path / "kernel")
    assert contents(tmp_path) == before and (build / "keep.py").exists()


@pytest.mark.parametrize(
    "name", ["README.md", "build/torch-universal/ops.py", "build/torch-universal/metadata.json", "export.json"]
)
@pytest.mark.parametrize("text", ["mine", "[1]", "{}", '{"../precious": "0"}', '{"README.md": 1}'])
def test_export_does_not_replace_what_was_changed_since(tmp_path, name, text):
    write(tmp_path / "kernel")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "kernel" / name).write_text(text)
    before = contents(tmp_path)
    assert name in refused(tmp_path / "kernel") or "earlier export" in refused(tmp_path / "kernel")
    assert contents(tmp_path) == before


LINKS = ["README.md", "export.json", "build", "build/torch-universal", "build/torch-universal/implementations"]


@pytest.mark.parametrize("name", [*LINKS, "build/torch-universal/ops.py"])
@pytest.mark.parametrize("target", ["moved", "copied", "dangling"])
def test_export_follows_no_link(tmp_path, name, target):
    """To what export wrote, moved elsewhere; to something else; to nothing."""
    write(tmp_path / "kernel")
    path, elsewhere = tmp_path / "kernel" / name, tmp_path / "elsewhere"
    is_folder = path.is_dir()
    path.rename(elsewhere)
    if target == "copied":
        elsewhere.rename(tmp_path / "away")
        elsewhere.mkdir() if is_folder else elsewhere.write_text("precious")
    if target == "dangling":
        elsewhere.rename(tmp_path / "away")
    if elsewhere.is_dir():
        (elsewhere / "keep.txt").write_text("keep")
    path.symlink_to(elsewhere)
    before = contents(tmp_path)
    assert "must not be a link" in refused(tmp_path / "kernel")
    assert contents(tmp_path) == before


def test_export_does_not_write_into_a_file_with_two_names(tmp_path, monkeypatch):
    write(tmp_path / "kernel")
    (tmp_path / "also").hardlink_to(tmp_path / "kernel" / "README.md")
    before = (tmp_path / "also").read_text()
    monkeypatch.setattr(export_command, "CARD", "another card")
    write(tmp_path / "kernel")
    assert (tmp_path / "also").read_text() == before
    assert (tmp_path / "kernel" / "README.md").read_text() == "another card"


def test_export_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "must be a folder, got a file" in refused(tmp_path / "file")
    assert refused(tmp_path / "file" / "below")
    assert contents(tmp_path) == {str(tmp_path / "file"): b"mine"}


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


def test_the_kernels_package_loads_the_export(tmp_path, monkeypatch):
    kernels = pytest.importorskip("kernels", reason="needs the kernels package")
    write(tmp_path / "kernel")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/triton-attention-sink={tmp_path / 'kernel'}")
    kernel = kernels.get_kernel("kernels-community/triton-attention-sink")
    q = torch.randn(1, 8, 2, 16)
    torch.testing.assert_close(
        kernel.flash_attn_func(q, q, q, causal=True, s_aux=torch.ones(2)), attention_sink(q, q, q, torch.ones(2))
    )
