"""TROUBLESHOOTING.md quotes messages that exist, and every message that a model or a trainer can meet."""

import ast
import functools
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import ROOT

PACKAGE = ROOT / "triton_attention_sink_hf"
SECTIONS = dict(
    part.split("\n", 1) for part in (ROOT / "TROUBLESHOOTING.md").read_text().split("\n## ")[1:]
)  # heading -> text
FOREIGN, SILENT = "Messages of other programs", "Without a message"
# What constants in messages stand for.
NAMES = {"KEY": "attention_sink", "NAME": "triton_attention_sink", "FIRST": "first:", "LEARNED": "learned"}

# Whose messages those of other programs are: a file of an installed package, or None: of one that is not, or of none.
SOURCES = {
    'Specified attn_implementation="triton_attention_sink" is not supported': "transformers/modeling_utils.py",
    'Specified attn_implementation="..." is not supported': "transformers/modeling_utils.py",
    "HFValidationError": "huggingface_hub/errors.py",
    "Failed to load the backend extension": "torch/__init__.py",
    "kernels is either not installed or uses an incompatible version": "transformers/integrations/hub_kernels.py",
    "Automatically falling back to": "transformers/modeling_utils.py",
    "got mixed torch.Tensor and DTensor": "torch/distributed/tensor/_dispatch.py",
    "is not a value head model, please install trl": "verl/utils/model.py",
    "Cannot find primary config": "hydra/_internal/defaults_list.py",
    "Could not override": "hydra/_internal/config_loader_impl.py",
    "is not in struct": "omegaconf/dictconfig.py",
    "KeyError: 'layers.0.mlp.experts.w2_weight'": None,  # vLLM
    "To serve at least one request with the model's max seq len (131072) ...": None,  # vLLM
    "is not supported for continuous batching": None,  # transformers 5.24
    "attn_implementation='triton_attention_sink' is not a recognized backend": None,  # Axolotl
    'The "packing" feature requires a flash attention implementation': None,  # ms-swift
    "only 0-dimensional arrays can be converted to Python scalars": None,  # numpy 2.4
}
# Where calls of a model, a trainer or a launcher end up. The others' messages are the last row of the last table.
MET = (
    "__init__.py", "__main__.py", "attach_sinks.py", "flash_attention_triton_sink.py", "ops.py", "registration.py",
    "integrations",
)  # fmt: skip


def quoted(section: str) -> list[str]:
    """What stands between backquotes in the first column."""
    rows = [line for line in SECTIONS[section].splitlines() if line.startswith("| ")][1:]
    return [message for row in rows for message in re.findall(r"`([^`]+)`", row.split(" | ")[0])]


def pattern(message: str) -> re.Pattern:
    """Of a quoted message; ``...``, X, Y, Z and NAME stand for anything."""
    parts = re.split(r"\.\.\.|\b(?:X|Y|Z|NAME)\b", message.removesuffix(" ..."))
    return re.compile(".*".join(map(re.escape, parts)), re.DOTALL)


def text_of(node: ast.AST) -> str:
    """A message as it stands in the code, {} for what is filled in."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(map(text_of, values))
        case ast.FormattedValue(value=ast.Name(id=name)) if name in NAMES:
            return repr(NAMES[name]) if node.conversion == ord("r") else NAMES[name]
    return "{}"


def messages(file: Path) -> list[str]:
    """The strings that the file raises, warns of or refuses with; and those assigned to ``message``, ``must``."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Raise(exc=ast.Call(func=ast.Name(id="AttributeError"))):  # Python's own, for a name
                pass
            case (
                ast.Raise(exc=ast.Call(args=[first, *_]))
                | ast.Call(func=ast.Attribute(attr="warn") | ast.Name(id="refuse"), args=[first, *_])
            ):
                found.append(text_of(first))
            case ast.Assign(targets=[ast.Name(id="message" | "must" | "hint")], value=value):
                found.append(text_of(value))
            case ast.Return(value=ast.JoinedStr() as value):
                found.append(text_of(value))
    return [text for text in found if len(re.findall(r"[a-z]{3}", text)) > 1]


@functools.cache
def all_messages() -> list[str]:
    files = [*PACKAGE.rglob("*.py"), ROOT / "triton_attention_sink_autoload.py"]
    return [text for file in files for text in messages(file)]


OURS = [message for section in SECTIONS if section not in (FOREIGN, SILENT) for message in quoted(section)]
GENERIC = "X must be Y, got Z"


@pytest.mark.parametrize("message", OURS)
def test_a_quoted_message_is_one_of_the_package(message):
    assert any(pattern(message).search(text) for text in all_messages())


@pytest.mark.parametrize("message", SOURCES)
def test_a_quoted_message_is_one_of_the_program_that_it_is_said_to_be(message):
    file = SOURCES[message]
    if file is None or find_spec(file.split("/")[0]) is None:
        pytest.skip("of a program that is not installed")
    source = Path(find_spec(file.split("/")[0]).origin).parent / file.split("/", 1)[1]
    source = re.sub(r'["\']\s*\n\s*f?["\']', "", source.read_text().replace("`", ""))  # strings in several pieces
    words = re.sub(r'"[^"]*"', '"..."', message)  # the value is filled in
    assert pattern(words).search(source)


def test_messages_of_other_programs_have_a_source():
    assert set(SOURCES) == {x for x in quoted(FOREIGN) if x not in ('"/a/path"',)}


@pytest.mark.parametrize("name", MET)
def test_every_message_that_a_model_can_meet_is_there(name):
    files = [*(PACKAGE / name).rglob("*.py")] or [PACKAGE / name]
    known = [pattern(message) for message in OURS if message != GENERIC]
    found = [text for file in files for text in messages(file)]
    missing = [text for text in found if not any(one.search(text) for one in known)]
    assert found and not missing


def test_the_guides_say_where_it_is():
    for page in ("README.md", "CLEAN_USAGE_GUIDE.md"):
        assert "(TROUBLESHOOTING.md)" in (ROOT / page).read_text()
