"""Every Python block of the guides runs, in order, in one process per document; links lead somewhere.

API.md names every public name, argument and command.
"""

import importlib.util
import inspect
import json
import pkgutil
import re

import pytest
from processes import ROOT, python

import triton_attention_sink_hf as package
from triton_attention_sink_hf.cli import app
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

DOCUMENTS = ("README.md", "INSTALLATION_GUIDE.md", "CLEAN_USAGE_GUIDE.md", "API.md")
PAGES = (
    *DOCUMENTS, "CONTRIBUTING.md", "triton_attention_sink_hf/README.md", "examples/verl/README.md",
    "benchmarks/README.md", "benchmarks/LOG.md", "benchmarks/ARCHITECTURES.md", "MODELS.md", "SECURITY.md",
)  # fmt: skip
# ```python, or ```python needs=PACKAGE for a block that runs where PACKAGE is installed. ```py needs a real checkpoint.
BLOCK = re.compile(r"^```python(?: needs=(\w+))?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def runnable(document: str) -> str:
    """The document's blocks as one program with the document's line numbers."""
    text = (ROOT / document).read_text()
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        needs, code = block.groups()
        if needs is None or importlib.util.find_spec(needs) is not None:
            first = text.count("\n", 0, block.start(2))
            lines[first : first + code.count("\n")] = code.splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_python_blocks_run(document, tmp_path):
    program = tmp_path / document.replace(".md", ".py")
    program.write_text(runnable(document))
    assert program.read_text().strip(), f"{document} has no Python block"
    python(program, cwd=tmp_path)


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", PAGES)
def test_links_lead_somewhere(document):
    page = ROOT / document
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
        file = page.parent / target if target else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file.read_text()), f"{target}#{anchor}"


def api_section(number: int) -> str:
    return re.search(rf"^## {number}\. .*?(?=^## |\Z)", (ROOT / "API.md").read_text(), re.MULTILINE | re.DOTALL)[0]


@pytest.mark.parametrize(
    ("section", "function"),
    [
        (1, package.attention_sink), (1, package.merge_attention), (1, package.first_keys_attention),
        (1, package.shared_prefix_attention),
        (3, package.flash_attn_func), (3, package.flash_attn_varlen_func), (3, package.flash_attn_with_kvcache),
        (4, package.sequence_parallel),
        (5, attention_forward),
    ],
)  # fmt: skip
def test_the_api_page_names_every_argument(section, function):
    named = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", api_section(section)))))
    parameters = inspect.signature(function).parameters.values()
    missing = {x.name for x in parameters if x.kind != x.VAR_KEYWORD and x.name != "module"} - named
    assert not missing


def test_the_api_page_has_every_public_name_and_command():
    page = (ROOT / "API.md").read_text()
    assert not [name for name in package.__all__ if not re.search(rf"\b{name}\b", page)]
    commands = {command.callback.__name__ for command in app.registered_commands}
    assert commands == set(re.findall(r"^\| `(\w+)", api_section(9), re.MULTILINE))


def test_the_folders_config_names_what_exists():
    config = json.loads((ROOT / "triton_attention_sink_hf" / "config.json").read_text())
    for key in ("attention_function", "mask_function", "functional_api"):
        module, _, name = config[key].rpartition(".")
        assert callable(pkgutil.resolve_name(f"{module}:{name}"))
