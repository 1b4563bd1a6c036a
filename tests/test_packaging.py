"""What pip would get: files of sdist and wheel, requirements that leave a user's packages alone, types, links."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import typing
import zipfile
from pathlib import Path

import pytest
import torch

import triton_attention_sink_hf
from triton_attention_sink_hf import attention_sink

tomllib = pytest.importorskip("tomllib")
ROOT = Path(__file__).parent.parent
PACKAGE = "triton_attention_sink_hf"
BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]
for build in (build_meta.build_sdist, build_meta.build_wheel):
    build(out)
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """sdist and wheel of what the repository tracks, built as GitHub's workflow would."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip("needs setuptools 77, as pyproject.toml does")
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("dist")
    ignored = shutil.ignore_patterns(".*", "*.egg-info", "outputs", "results", "build", "dist", "__pycache__")
    shutil.copytree(ROOT, tree, ignore=ignored)
    environment = os.environ | {
        "GITHUB_SERVER_URL": "https://example.org", "GITHUB_REPOSITORY": "a/b", "GITHUB_REF_NAME": "v1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=tree, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_sdist_has_the_package_whole_and_no_tests(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / PACKAGE).rglob("*.py")}
    assert sources <= names and {"setup.py", "pyproject.toml", "README.md", "CHANGELOG.md", "CITATION.cff"} <= names
    others = ("tests", "test_attention_sink", "benchmarks", "examples")
    assert not [name for name in names if name.split("/")[0] in others]


def test_the_wheel_has_the_package_whole(dist):
    (archive,) = dist.glob("*.whl")
    names = {name for name in zipfile.ZipFile(archive).namelist() if ".dist-info" not in name}
    expected = {str(file.relative_to(ROOT)) for file in (ROOT / PACKAGE).rglob("*.py")}
    data = {f"{PACKAGE}/{name}" for name in ("config.json", "README.md", "py.typed")}
    assert names == expected | data | {"triton_attention_sink_autoload.py"}


def test_the_metadata_of_the_wheel(dist):
    (archive,) = dist.glob("*.whl")
    wheel = zipfile.ZipFile(archive)
    (name,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    text = wheel.read(name).decode()
    header, _, body = text.partition("\n\n")
    required = [line.split(": ")[1] for line in header.splitlines() if line.startswith("Requires-Dist")]
    always = {re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line}
    assert always == {"torch", "typer", "rich"}  # no triton: torch's own stays; no numpy
    assert "torch>=2.8" in required
    assert "Project-URL: Repository, https://example.org/a/b" in header and "Classifier: Typing :: Typed" in header
    targets = re.findall(r"\]\(([^)]+)\)", body)
    assert targets and all(target.startswith(("https://", "#")) for target in targets)
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", body):
        assert picture.startswith("https://example.org/a/b/raw/v1/benchmarks/results/")


def test_versions_agree():
    assert f"version: {triton_attention_sink_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {triton_attention_sink_hf.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    pinned = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert tuple(map(int, pinned["numpy"].split(".")))[:2] < (2, 4)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "numpy<2.4" in extras["test"] and not any("numpy" in line for line in (*extras["hf"], *extras["verl"]))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is of Python 3.11")
def test_the_type_of_attention_sink_follows_return_lse():
    signature = inspect.signature(attention_sink)
    returned = {}
    for overload in typing.get_overloads(attention_sink):
        own = inspect.signature(overload)
        assert list(own.parameters) == list(signature.parameters)
        for name, parameter in own.parameters.items():
            other = signature.parameters[name]
            assert parameter.kind == other.kind
            if name != "return_lse":
                assert parameter.annotation == other.annotation
                assert (parameter.default is ...) == (other.default is not inspect.Parameter.empty)
        returned[own.parameters["return_lse"].annotation] = own.return_annotation
    assert returned["Literal[False]"] == "Tensor" and returned["Literal[True]"] == "tuple[Tensor, Tensor]"
    q = torch.randn(1, 3, 1, 16)
    assert isinstance(attention_sink(q, q, q), torch.Tensor) and len(attention_sink(q, q, q, return_lse=True)) == 2


@pytest.mark.parametrize("triton", [(3, 4), (3, 5)])
def test_triton_3_4_gets_the_kernels_without_the_hint_that_it_does_not_know(triton, monkeypatch):
    from triton.runtime.jit import JITFunction

    from triton_attention_sink_hf.implementations.common import old_triton
    from triton_attention_sink_hf.implementations.triton import backward

    monkeypatch.setattr(old_triton, "TRITON", triton)
    for kernel in (backward._attn_bwd_dq_kernel, backward._attn_bwd_dkv_kernel):
        fresh = JITFunction(kernel.fn)
        assert "disable_licm" in fresh.src
        changed = old_triton.known_hints(fresh).src
        assert ("disable_licm" in changed) is (triton >= (3, 5))
        assert changed.count("tl.range(") == JITFunction(kernel.fn).src.count("tl.range(")
