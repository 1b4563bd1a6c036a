"""What SECURITY.md promises: no network, no pickle, no code of a model or the current folder, no link followed."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import contents, invoke
from processes import ROOT, environment, python

from triton_attention_sink_hf.cli import app
from triton_attention_sink_hf.cli.written import Written

PACKAGE = ROOT / "triton_attention_sink_hf"
TREES = {
    file: ast.parse(file.read_text()) for file in [*PACKAGE.rglob("*.py"), ROOT / "triton_attention_sink_autoload.py"]
}
# What an interpreter reports of itself, while our commands and a forward run. Listening before anything is imported.
WATCHED = """
import sys
seen = []
KINDS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "pickle.find_class", "urllib.Request")
sys.addaudithook(lambda event, arguments: event in KINDS and seen.append((event, str(arguments)[:200])))
import torch, transformers
seen.clear()
import triton_attention_sink_hf as package
from triton_attention_sink_hf.cli import app

x = [torch.randn(1, 6, 2, 16, requires_grad=True) for _ in range(3)]
package.attention_sink(*x, torch.zeros(2)).sum().backward()
for arguments in (["demo", "--steps", "1"], ["export", sys.argv[1]], ["bench", "--list"]):
    try:
        app(arguments)
    except SystemExit as end:
        assert not end.code, arguments
assert not seen, seen
import pickle, socket
pickle.loads(pickle.dumps(OSError()))
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
assert {event for event, _ in seen} >= {"pickle.find_class", "socket.connect"}, "the hook would have seen it"
"""


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of the modules that a file imports, at its top or later."""
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 0]
    return {name.split(".")[0] for name in names}


def called(tree: ast.AST) -> set[str]:
    """What a file calls, as written: "open", "torch.load"."""
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_no_network_and_no_pickle_at_work(tmp_path):
    python("-c", WATCHED, tmp_path / "kernel", HF_HUB_OFFLINE="0")


def test_no_network_and_no_pickle_in_the_text():
    network = {
        "socket",
        "ssl",
        "http",
        "urllib",
        "urllib3",
        "requests",
        "httpx",
        "aiohttp",
        "ftplib",
        "huggingface_hub",
    }
    pickles = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for file, tree in TREES.items():
        assert not imported(tree) & (network | pickles), file
        assert not called(tree) & {"torch.load", "torch.hub.load", "eval", "exec", "os.system", "yaml.load"}, file


def test_a_checkpoint_that_is_a_pickle_is_not_read(tmp_path):
    import torch
    import transformers

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64).save_pretrained(tmp_path)
    torch.save({"model.norm.weight": Payload()}, tmp_path / "pytorch_model.bin")
    result = invoke("verify", "--model", str(tmp_path))
    assert result.exit_code == 2 and "weights must be safetensors, got pytorch_model.bin" in result.stderr
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "ran").exists(), "it would have run"


@pytest.mark.parametrize("kind", ["made_up", "llama"])
def test_code_of_a_model_does_not_run(tmp_path, kind):
    """By a class that transformers does not know, and by one that it knows, too."""
    (tmp_path / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 16, "vocab_size": 40}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, "auto_map": classes, **sizes}))
    result = invoke("verify", "--model", str(tmp_path), "--device", "cpu")
    assert result.exit_code == (2 if kind == "made_up" else 0), result.output
    assert not (tmp_path / "ran").exists()


def test_nothing_of_the_current_folder_is_imported(tmp_path):
    """The installed command; what it starts itself is in test_cli.py."""
    command = Path(sys.executable).parent / "triton-attention-sink"
    if not command.exists():
        pytest.skip("needs the package installed (make test does it)")
    names = ("torch", "typer", "rich", "json", "typing", "transformers", "triton", "sitecustomize", "conftest")
    for name in names:
        (tmp_path / f"{name}.py").write_text("raise SystemExit('from the current folder')")
    (tmp_path / "triton_attention_sink_hf").mkdir()
    (tmp_path / "triton_attention_sink_hf" / "__init__.py").write_text("raise SystemExit('from the current folder')")
    for arguments in (["bench", "--list"], ["export", "kernel"]):
        done = subprocess.run(
            [command, *arguments], cwd=tmp_path, env=environment(ROOT), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_files_are_written_in_one_place():
    """``Written`` follows no link and replaces no file of others; every command that writes goes through it."""
    for file, tree in TREES.items():
        writes = {name for name in called(tree) if name.split(".")[-1] in ("write_text", "write_bytes", "open", "save")}
        assert not writes or file.name == "written.py", (file, writes)
    commands = {command.callback.__name__: command.callback for command in app.registered_commands}
    writing = {name for name, function in commands.items() if "Written" in vars(sys.modules[function.__module__])}
    assert writing == {"bench", "export"}


@pytest.mark.parametrize("link", ["file", "folder", "listing"])
def test_no_link_is_followed_on_writing(tmp_path, link):
    """Neither the file's own name, nor a folder on the way to it, nor the list of what was written."""
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    precious.mkdir()
    (precious / "b.json").write_text("{}")
    name = {"file": "a/b.json", "folder": "a", "listing": "list.json"}[link]
    target = precious if link == "folder" else precious / "b.json"
    (out / name).parent.mkdir(exist_ok=True)
    os.symlink(target, out / name)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="must not be a link"):
        Written(out, "list.json").write({"a/b.json": b"ours"})
    assert contents(tmp_path) == before


def test_the_demo_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert invoke("demo", "--steps", "1").exit_code == 0
    assert contents(tmp_path) == {}
