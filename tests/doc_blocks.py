"""The Python blocks of a document, each run alone: ``doc_blocks.py DOCUMENT...`` prints {document: {block: error}}.

A block's first line says on what it builds; its readers see the language alone.

    ```python             runs alone
    ```python name=X      the same, and others build on it
    ```python after=X     runs behind the block X of the document
    ```python needs=P     runs where the package P is installed
    ```py                 not run: NOT_RUN says why

Each runs in a process, a namespace and a folder of its own, where ``gpt-oss-20b-bf16`` is a tiny model. torch, triton
and transformers are imported once, this package in every block anew. Then all blocks of the document run in order, as a
reader would in a notebook.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import types
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from in_forks import run
from processes import ROOT

DOCUMENTS = ("README.md", "INSTALLATION_GUIDE.md", "CLEAN_USAGE_GUIDE.md", "API.md", "MATHEMATICS.md")
PAGES = (
    *DOCUMENTS, "CONTRIBUTING.md", "triton_attention_sink_hf/README.md", "examples/verl/README.md",
    "benchmarks/README.md", "benchmarks/LOG.md", "benchmarks/ARCHITECTURES.md", "MODELS.md", "SECURITY.md",
    "TROUBLESHOOTING.md",
)  # fmt: skip
# What is not run, by its first line: why, and which test runs it.
NOT_RUN = {"generation = GenerationConfig(": ("the way of transformers 5.24", "tests/test_continuous_batching.py")}
IN_ORDER = "all, in order"
BLOCK = re.compile(r"^```python((?: \w+=[\w-]+)*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# `make test` installs TRL there, apart: verl 0.9.1's actor fails where TRL 1.16 can be imported
TRL_APART = Path(sys.prefix) / "trl"


@dataclass(frozen=True)
class Block:
    """``line``: of its first statement. The options of its first line, or None."""

    line: int
    code: str
    name: str | None = None
    after: str | None = None
    needs: str | None = None


def blocks(text: str) -> list[Block]:
    return [
        Block(
            text.count("\n", 0, found.start(2)) + 1,
            found[2],
            **dict(option.split("=") for option in found[1].split()),
        )
        for found in BLOCK.finditer(text)
    ]


def program(block: Block, all_blocks: list[Block]) -> list[Block]:
    """The block, behind the one that it builds on."""
    base = [other for other in all_blocks if other.name is not None and other.name == block.after]
    assert len(base) == (block.after is not None), f"after={block.after} must be the name of one block"
    return [*base, block]


def installed(package: str | None) -> bool:
    return package is None or find_spec(package) is not None or (package == "trl" and TRL_APART.is_dir())


def write_checkpoint(folder: Path) -> None:
    from triton_attention_sink_hf.checks import tiny_gpt_oss

    tiny_gpt_oss("eager").save_pretrained(folder)


def execute(document: str, sequence: list[Block], checkpoint: Path) -> None:
    if any(block.needs == "trl" for block in sequence) and find_spec("trl") is None:
        sys.path.append(str(TRL_APART))
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.symlink(checkpoint, "gpt-oss-20b-bf16")
        for block in sequence:
            code = "\n" * (block.line - 1) + block.code  # tracebacks show the document's lines
            exec(compile(code, document, "exec"), module.__dict__)


def main(documents: list[str]) -> dict[str, dict[str, str | None]]:
    import torch
    import transformers.models.gpt_oss.modeling_gpt_oss  # noqa: F401
    import triton  # noqa: F401

    torch.set_num_threads(1)
    results: dict[str, dict[str, str | None]] = {}
    with tempfile.TemporaryDirectory() as checkpoint:
        failed = run(partial(write_checkpoint, Path(checkpoint)))
        assert failed is None, failed
        for document in documents:
            found = blocks((ROOT / document).read_text())
            programs = {f"{block.line}": program(block, found) for block in found if installed(block.needs)}
            programs[IN_ORDER] = [block for block in found if block.needs is None]
            started = ((name, partial(execute, document, it, Path(checkpoint))) for name, it in programs.items())
            results[document] = {name: run(start) for name, start in started}
    return results


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
