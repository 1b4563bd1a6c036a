"""Every Python block of the guides runs, in order, in one process per document; links lead somewhere."""

import importlib.util
import json
import pkgutil
import re

import pytest
from processes import ROOT, python

DOCUMENTS = ("README.md", "INSTALLATION_GUIDE.md", "CLEAN_USAGE_GUIDE.md")
# ```python, or ```python needs=PACKAGE for a block that runs where PACKAGE is installed
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


@pytest.mark.parametrize("document", [*DOCUMENTS, "triton_attention_sink_hf/README.md", "examples/verl/README.md"])
def test_links_to_files_lead_somewhere(document):
    folder = (ROOT / document).parent
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / document).read_text())
    missing = [target for target in targets if not (folder / target).exists()]
    assert not missing


def test_the_folders_config_names_what_exists():
    config = json.loads((ROOT / "triton_attention_sink_hf" / "config.json").read_text())
    for key in ("attention_function", "mask_function", "functional_api"):
        module, _, name = config[key].rpartition(".")
        assert callable(pkgutil.resolve_name(f"{module}:{name}"))
