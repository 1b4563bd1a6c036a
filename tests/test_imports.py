"""Imports point down only, load nothing unneeded, and survive missing packages. In fresh processes."""

import ast
from pathlib import Path

import pytest
from processes import ROOT, python

PACKAGE = "triton_attention_sink_hf"
TRITON, INTERFACE, OPS = f"{PACKAGE}.implementations.triton", f"{PACKAGE}.interface", f"{PACKAGE}.ops"
ABOVE_OPS = (
    INTERFACE,
    f"{PACKAGE}.flash_attn_api",
    f"{PACKAGE}.flash_attention_triton_sink",
    f"{PACKAGE}.integrations",
)
# The package from the bottom up: a file imports only from what stands above its own line here. ``__init__`` is the
# package as its users import it.
LAYERS = (
    "after_import",
    "tracing",
    "masks",
    "call",
    "reference",
    "token_sinks",
    "validation",
    "implementations",
    "merge",
    "ops",
    "interface",
    "first_keys",
    "shared_prefix",
    "flash_attn_api",
    "integrations",
    "flash_attention_triton_sink",
    "registration",
    "attach_sinks",
    "naming",
    "__init__",
    "__main__",
    "launch",
    "processes",
    "checks",
    "verify",
    "bench",
    "cli",
)

# The package's __init__ registers with transformers, which imports triton: a stand-in shows what a module itself needs.
BARE_PACKAGE = f"""
import sys, types
package = types.ModuleType({PACKAGE!r})
package.__path__ = [{str(ROOT / PACKAGE)!r}]
package.__version__ = "0"
sys.modules[{PACKAGE!r}] = package
"""

# As if the named distribution were not installed: no finder finds it.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == {absent!r} else PathFinder.find_spec(name, path, target)
sys.meta_path = [finder for finder in sys.meta_path if finder is not PathFinder] + [Finder]
"""

USE_REFERENCE = f"""
import torch
from {PACKAGE} import attention_sink, explain
q = torch.randn(1, 5, 2, 16)
assert attention_sink(q, q, q, torch.zeros(2)).shape == q.shape
"""


def imported_layers(file: Path) -> set[str]:
    """The layers that a file of the package imports from, its own left out; imports inside functions count."""
    place = [PACKAGE, *file.relative_to(ROOT / PACKAGE).parts]
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join([*(place[: -node.level] if node.level else ()), *filter(None, [node.module])])
            names |= {f"{parent}.{alias.name}" for alias in node.names}
    inside = {f"{name}.__init__".split(".")[1] for name in names if name.split(".")[0] == PACKAGE}
    return {name if name in LAYERS else "__init__" for name in inside} - {layer(file)}


def layer(file: Path) -> str:
    return file.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")


def run(code: str) -> str:
    """Run code in a fresh interpreter that sees the checkout; its stderr. Fails the test if the code fails."""
    return python("-c", code).stderr


def test_every_import_points_down():
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    assert {layer(file) for file in files} == set(LAYERS)
    up = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported_layers(file)
        if LAYERS.index(name) > LAYERS.index(layer(file))
    }
    assert not up
    wrapper = imported_layers(ROOT / PACKAGE / "flash_attention_triton_sink.py")
    assert {"integrations", "interface"} <= wrapper  # the imports are found


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("masks", ("triton", "transformers", "verl", TRITON, OPS, *ABOVE_OPS)),
        ("reference", ("triton", "transformers", "verl", TRITON, OPS, *ABOVE_OPS)),
        ("validation", ("triton", "transformers", "verl", TRITON, OPS, *ABOVE_OPS)),
        ("implementations.common.problem", ("transformers", "verl", TRITON, OPS, f"{PACKAGE}.reference", *ABOVE_OPS)),
        ("implementations.triton_window", ("transformers", "verl", f"{PACKAGE}.implementations.triton_hopper", OPS)),
        ("implementations.triton", ("transformers", "verl", OPS, f"{PACKAGE}.reference", *ABOVE_OPS)),
        ("ops", ("triton", "transformers", "verl", TRITON, f"{PACKAGE}.reference", *ABOVE_OPS)),
        ("interface", ("triton", "transformers", "verl", TRITON, OPS, *ABOVE_OPS[1:])),
        ("flash_attn_api", ("triton", "transformers", "verl", *ABOVE_OPS[2:])),
        ("integrations.mask_function", ("transformers", "verl", TRITON, OPS, *ABOVE_OPS[:-1])),
        ("flash_attention_triton_sink", ("transformers", "verl", TRITON, OPS, f"{PACKAGE}.registration")),
        ("cli", ("torch", "triton", "transformers", "verl")),
    ],
)
def test_a_module_imports_only_what_lies_below_it(module, forbidden):
    run(f"""{BARE_PACKAGE}
import {PACKAGE}.{module}
imported = [name for name in {forbidden!r} if name in sys.modules]
assert not imported, imported
""")


BACKENDS = {"flash_attention_4", "triton", "triton_decode", "triton_window", "triton_hopper"}
# What a module of a backend may import of the other backends. To hand a whole call over, its __init__ may import the
# portable backend; the window's asks for Hopper's backward when it is first called for.
ACROSS = {
    "triton_decode/__init__.py": {"triton"},
    "triton_window/__init__.py": {"triton", "triton_hopper.backward_window"},
    "triton_hopper/__init__.py": {"triton"},
}


def _imports(file: Path) -> dict[str, bool]:
    """What a file imports from the folders beside its own, and whether at its top."""
    tree = ast.parse(file.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 2]
    return {".".join(filter(None, (node.module, x.name))): node in tree.body for node in nodes for x in node.names}


def test_backends_share_common_and_nothing_else():
    folder = ROOT / PACKAGE / "implementations"
    seen = set()
    for file in folder.rglob("*.py"):
        name = file.relative_to(folder).as_posix()
        for imported, at_top in _imports(file).items():
            if imported.split(".")[0] not in BACKENDS:
                continue
            assert imported in ACROSS.get(name, ()), f"{name} imports {imported}"
            assert at_top or imported != "triton", f"{name} imports {imported} late"
            assert not at_top or imported == "triton", f"{name} imports {imported} when it is imported"
            seen.add((name, imported))
    assert seen == {(name, imported) for name, names in ACROSS.items() for imported in names}


def test_long_files_say_why():
    files = [file for folder in (PACKAGE, "tests", "benchmarks", "examples") for file in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for file in files:
        text = file.read_text()
        if text.count("\n") > 400:
            assert "Over 400 lines:" in ast.get_docstring(ast.parse(text)), f"{file.name} is long and does not say why"


def test_functions_take_few_arguments():
    """But for kernels, whose arguments the launchers name."""
    for file in (ROOT / PACKAGE / "implementations").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and not node.name.endswith("_kernel"):
                assert len(node.args.args) <= 20, f"{file.name}: {node.name} has {len(node.args.args)} arguments"


def test_importing_the_package_does_not_touch_the_gpu():
    run(f"""
import torch
def touched(*_):
    raise RuntimeError("CUDA was initialised")
torch.cuda._lazy_init = torch.cuda.get_device_properties = torch.cuda.current_device = touched
import {PACKAGE}
assert not torch.cuda.is_initialized()
""")


SLOW = ("torch._dynamo", "triton", "transformers", "verl", "trl", "ray", f"{PACKAGE}.cli", f"{PACKAGE}.checks")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        (f"import {PACKAGE}", ("torch", *SLOW)),
        (f"import torch, {PACKAGE}", (*SLOW, f"{PACKAGE}.interface")),
        (f"from {PACKAGE} import *", SLOW),  # every public name
        (f"import {PACKAGE}.cli", ("torch", *SLOW[:-2])),
    ],
)
def test_importing_costs_nothing_that_was_not_asked_for(statement, forbidden):
    run(f"""
{statement}
import sys
imported = [name for name in {forbidden!r} if name in sys.modules]
assert not imported, imported
""")


def test_every_public_name_is_found_where_the_package_says():
    import triton_attention_sink_hf as package

    assert set(package.__all__) == set(package._HOMES) <= set(dir(package))
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'attention_sinks'"):
        package.attention_sinks  # noqa: B018


def test_without_transformers_the_functional_interface_works():
    stderr = run(WITHOUT.format(absent="transformers") + USE_REFERENCE + "assert 'transformers' not in sys.modules")
    assert "not registered" not in stderr


def test_an_unusable_transformers_is_said_and_the_functional_interface_works():
    pretend = "import sys, types\nfor name in ('transformers', 'transformers.modeling_utils'):\n"
    pretend += "    sys.modules[name] = types.ModuleType(name)\n"
    stderr = run(pretend + USE_REFERENCE)
    assert "not registered with transformers" in stderr
    assert "4.57" in stderr


def test_without_triton_the_reference_serves_and_explain_says_why():
    code = WITHOUT.format(absent="triton") + USE_REFERENCE
    code += """
explanation = explain(q, q, q)
assert explanation.implementation == "reference"
assert "triton must be installed" in explanation.reasons["triton"], explanation.reasons
"""
    run(code)
