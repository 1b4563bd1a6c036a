"""Every Python block of the guides runs, alone and in order; links lead somewhere.

API.md names every public name, argument and command.
"""

import inspect
import json
import pkgutil
import re

import doc_blocks
import pytest
from doc_blocks import DOCUMENTS, IN_ORDER, NOT_RUN, PAGES
from processes import ROOT, python

import triton_attention_sink_hf as package
from triton_attention_sink_hf.cli import app
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

BLOCKS = {document: doc_blocks.blocks((ROOT / document).read_text()) for document in DOCUMENTS}


# The third block leans on the first without saying so.
WRONG_PAGE = "\n```python name=x\nx = 1\n```\n```python after=x\nassert x\n```\n```python\nassert x\n```\n"


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    """Of every block: document -> its line, or "all, in order" -> a traceback or None."""
    page = tmp_path_factory.mktemp("docs") / "wrong.md"
    page.write_text(WRONG_PAGE)
    found = json.loads(python(doc_blocks.__file__, *DOCUMENTS, page).stdout.splitlines()[-1])
    return found | {"wrong": found.pop(f"{page}")}


@pytest.mark.xdist_group("doc blocks")
@pytest.mark.parametrize(
    ("document", "block"),
    [(document, block) for document in DOCUMENTS for block in [*(f"{x.line}" for x in BLOCKS[document]), IN_ORDER]],
)
def test_the_python_block_runs(document, block, errors):
    if block not in errors[document]:
        pytest.skip(f"{document}:{block} needs a package that is not installed")
    assert errors[document][block] is None, errors[document][block]


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_is_found(page):
    text = (ROOT / page).read_text()
    assert len(re.findall(r"^ *```python", text, re.MULTILINE)) == len(BLOCKS.get(page, ()))
    assert (page in BLOCKS) == ("```python" in text)
    for first_line in re.findall(r"^ *```py\n(.*)", text, re.MULTILINE):
        (test,) = (test for begins, (_, test) in NOT_RUN.items() if first_line.startswith(begins))
        assert (ROOT / test).is_file()


@pytest.mark.xdist_group("doc blocks")
def test_a_block_that_fails_alone_is_told_from_one_that_runs(errors):
    failed = {block: error for block, error in errors["wrong"].items() if error}
    assert set(errors["wrong"]) == {"3", "6", "9", IN_ORDER} and set(failed) == {"9"}
    assert 'wrong.md", line 9' in failed["9"] and "NameError" in failed["9"]


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
