"""``triton-attention-sink export``: a Hub folder that stands alone, and files that it leaves alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import contents, invoke
from processes import INTERPRETED_AS_HERE, ROOT, python

from triton_attention_sink_hf import attention_sink, checks
from triton_attention_sink_hf.cli import export as export_command
from triton_attention_sink_hf.cli.export import write

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


def test_the_kernels_package_loads_the_export(tmp_path, monkeypatch):
    kernels = pytest.importorskip("kernels", reason="needs the kernels package")
    write(tmp_path / "kernel")
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/triton-attention-sink={tmp_path / 'kernel'}")
    kernel = kernels.get_kernel("kernels-community/triton-attention-sink")
    q = torch.randn(1, 8, 2, 16)
    torch.testing.assert_close(
        kernel.flash_attn_func(q, q, q, causal=True, s_aux=torch.ones(2)), attention_sink(q, q, q, torch.ones(2))
    )
