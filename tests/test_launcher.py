"""``python -m triton_attention_sink_hf``: the program runs as without it, and all Python processes know our name."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
from processes import ROOT, environment

from triton_attention_sink_hf.__main__ import NAME, python_flags

SELF = """
import json, sys
imported = "triton_attention_sink_hf" in sys.modules
print(json.dumps([sys.argv, __name__, __file__, sys.path, sys.flags.optimize, sys.flags.dont_write_bytecode]))
print("imported:", imported)
raise SystemExit(7)
"""
CHILDREN = """
import multiprocessing, subprocess, sys
code = "import sys; print('imported:', 'triton_attention_sink_hf' in sys.modules)"
def child():
    exec(code)
if __name__ == "__main__":
    subprocess.run([sys.executable, "-c", code], check=True)
    process = multiprocessing.get_context("spawn").Process(target=child)
    process.start(); process.join()
"""
REGISTERED = """
from transformers import AttentionInterface
assert "triton_attention_sink" in AttentionInterface().valid_keys()
print("registered", flush=True)
"""


def python(*command: str, cwd="/", path=(), status=0) -> subprocess.CompletedProcess:
    env = environment(*path, ROOT)
    done = subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("start", [["-m", NAME], ["-O", "-m", NAME], ["-OBm", NAME], [f"-m{NAME}"]])
@pytest.mark.parametrize("program", [["program.py", "a", "--b"], ["-m", "program", "-m", "x"]])
def test_the_program_runs_unchanged(tmp_path, start, program):
    (tmp_path / "program.py").write_text(SELF)
    flags = [flag for flag in ("-O", "-OB") if start[0].startswith(flag)]
    plain, *_ = python(*flags[-1:], *program, cwd=tmp_path, status=7).stdout.splitlines()
    launched, imported = python(*start, *program, cwd=tmp_path, status=7).stdout.splitlines()
    assert launched == plain and imported == "imported: True"


def test_children_import_it_too(tmp_path):
    (tmp_path / "program.py").write_text(CHILDREN)
    assert python(str(tmp_path / "program.py")).stdout.splitlines() == ["imported: False"] * 2
    assert python("-m", NAME, str(tmp_path / "program.py")).stdout.splitlines() == ["imported: True"] * 2


def test_the_users_own_sitecustomize_runs(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("mine = True")
    code = f"import sys, sitecustomize; print(sitecustomize.mine, {NAME!r} in sys.modules)"
    assert python("-m", NAME, "-c", code, path=[tmp_path]).stdout.split() == ["True", "True"]


@pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    ("host", "inside"),
    [
        ("torch.distributed.run", True),
        pytest.param("torch.distributed.run", False, marks=pytest.mark.exhaustive),
        pytest.param("accelerate.commands.launch", True, marks=pytest.mark.exhaustive),
        ("accelerate.commands.launch", False),
    ],
)
def test_it_launches_launchers_and_is_launched(tmp_path, host, inside):
    if host.startswith("accelerate"):
        pytest.importorskip("accelerate")
    file = tmp_path / "program.py"
    file.write_text(REGISTERED)
    options = ["--standalone"] if host.startswith("torch") else ["--cpu", "--num_processes", "1"]
    launcher, host_command = ["-m", NAME], ["-m", host, *options]
    command = host_command + launcher if inside else launcher + host_command
    assert python(*command, str(file)).stdout.count("registered") == 1


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (["python", "-m", NAME, "f.py"], []),
        (["python", "-u", "-X", "dev", "-m", NAME, "f.py"], ["-u", "-X", "dev"]),
        (["python", "-um", NAME, "f.py"], ["-u"]),
        (["python", f"-um{NAME}", "f.py"], ["-u"]),
        (["python", f"-m{NAME}", "f.py"], []),
    ],
)
def test_flags_of_python_are_kept(command, flags):
    assert python_flags(command, ["f.py"]) == flags


def test_it_says_how_it_is_used_and_refuses_what_would_ignore_it():
    assert "usage: python -m" in python("-m", NAME, "--help").stdout
    assert "usage: python -m" in python("-m", NAME, status=2).stdout
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', 'f.py']; import runpy\n"
    code += f"runpy.run_module({NAME!r}, run_name='__main__')"
    assert "must run without -E" in python("-E", "-c", code, status=1).stderr
