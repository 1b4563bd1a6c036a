"""The entry point of ``torch.backends``: after ``pip install`` our name works without an import of ours, unless off."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import ROOT, environment, python

tomllib = pytest.importorskip("tomllib")
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
SWITCHES = ["TRITON_ATTENTION_SINK_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD"]
ON = dict.fromkeys(SWITCHES, "1")
PACKAGE, AUTOLOAD = "triton_attention_sink_hf", "triton_attention_sink_autoload"
BUILD = """
from transformers import AutoModelForCausalLM, LlamaConfig
config = LlamaConfig(num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=32)
model = AutoModelForCausalLM.from_config(config, attn_implementation="triton_attention_sink")
assert model(input_ids=model.dummy_inputs["input_ids"] % 32).logits.isfinite().all()
print("built", flush=True)
"""


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder for the path with the entry points of pyproject.toml, as pip would write them."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    metadata = tmp_path / "site" / "triton_attention_sink-0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-attention-sink\nVersion: 0\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, points in groups.items() for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("".join(lines))
    return metadata.parent


@needs_transformers
@pytest.mark.parametrize(
    "first",
    [
        "",
        "import torch",
        pytest.param("import transformers.modeling_utils", marks=pytest.mark.exhaustive),
        "import verl",
    ],
)
def test_the_name_works_without_an_import_of_ours(installed, first):
    if first == "import verl":
        pytest.importorskip("verl")
    assert "built" in python("-c", f"{first}\n{BUILD}", path=(installed, ROOT), **ON).stdout


@needs_transformers
@pytest.mark.parametrize("switch", SWITCHES)
def test_a_switch_turns_it_off(installed, switch):
    env = environment(installed, ROOT, **ON | {switch: "0"})
    done = subprocess.run([sys.executable, "-c", BUILD], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 1
    assert 'attn_implementation="triton_attention_sink"` is not supported' in done.stderr


@needs_transformers
def test_an_import_of_ours_makes_the_name_known_where_it_is_off(installed):
    off = dict.fromkeys(SWITCHES, "0")
    assert "built" in python("-c", f"import {PACKAGE}\n{BUILD}", path=(installed, ROOT), **off).stdout


def test_it_imports_three_small_modules(installed):
    out = python(
        "-c",
        f"import torch, sys; before = set(sys.modules); from {AUTOLOAD} import autoload; autoload()\n"
        "print(*sorted(set(sys.modules) - before))",
        **ON | {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
    ).stdout
    assert out.split() == [AUTOLOAD, PACKAGE, f"{PACKAGE}.after_import"]
    code = f"import torch, sys; print('{PACKAGE}' in sys.modules, 'transformers' in sys.modules)"
    assert python("-c", code, path=(installed, ROOT), **ON).stdout.split() == ["True", "False"]


@pytest.mark.parametrize("text", ["raise RuntimeError('broken')", "import no_such_module", "def f(:"])
def test_a_broken_package_does_not_break_torch(installed, text):
    (installed / PACKAGE).mkdir()
    (installed / PACKAGE / "__init__.py").write_text(text)
    done = python("-c", "import torch; print('torch is there')", path=(installed, ROOT), **ON)
    assert "torch is there" in done.stdout
    assert f"{PACKAGE} cannot be imported" in done.stderr and "TRITON_ATTENTION_SINK_AUTOLOAD=0" in done.stderr


@needs_transformers
def test_what_fails_in_the_registration_does_not_break_transformers(installed, tmp_path):
    code = (
        f"import sys; sys.modules['{PACKAGE}.registration'] = None\nimport transformers.modeling_utils; print('there')"
    )
    done = python("-c", code, path=(installed, ROOT), **ON)
    assert "there" in done.stdout and "not registered with transformers" in done.stderr


RAY = f"""
import ray
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
@ray.remote
def build():
    exec({BUILD!r}, {{}})
    return "built"
print(ray.get(build.remote()))
"""
SPAWN = """
import multiprocessing, sys
from pathlib import Path
def build():
    exec(Path(sys.argv[1]).read_text(), {})
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=build)
    child.start(); child.join(); sys.exit(child.exitcode)
"""


@needs_transformers
@pytest.mark.parametrize("host", ["torchrun", pytest.param("accelerate", marks=pytest.mark.exhaustive), "ray", "spawn"])
def test_workers_know_the_name(installed, tmp_path, host):
    file = tmp_path / "program.py"
    file.write_text({"ray": RAY, "spawn": SPAWN}.get(host, BUILD))
    (tmp_path / "build.py").write_text(BUILD)
    if host in ("accelerate", "ray"):
        pytest.importorskip(host)
    command = {
        "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)],
        "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", str(file)],
        "ray": [str(file)],
        "spawn": [str(file), str(tmp_path / "build.py")],
    }[host]
    assert python(*command, path=(installed, ROOT), **ON).stdout.count("built") == (2 if host == "torchrun" else 1)
