"""``triton-attention-sink export DIR``: this package as a Hub kernel folder, for the ``kernels`` package."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated

import typer

from .refusal import refuse
from .written import Written

PACKAGE = Path(__file__).absolute().parent.parent
KERNEL = "triton-attention-sink"
OPERATORS = "triton_attention_sink::"
BUILD = "build/torch-universal"
LISTING = "export.json"  # lists the files that export wrote: another export replaces only these
# What attention_sink and flash_attn_* need: nothing of transformers, nothing of the command line.
SOURCES = (
    "call.py", "flash_attn_api.py", "interface.py", "masks.py", "ops.py", "reference.py", "token_sinks.py",
    "tracing.py", "validation.py",
)  # fmt: skip
PAIRS = (("5.9.0", "0.14.1"), ("5.10.4", "0.14.1"), ("5.22.2", "0.17.2"))  # of transformers and kernels
INIT = '''"""Exact attention with learned sinks in Triton, forward and backward, under flash-attn's names."""

from .flash_attn_api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .interface import attention_sink

__all__ = ["attention_sink", "flash_attn_func", "flash_attn_varlen_func", "flash_attn_with_kvcache"]
'''
CARD = """---
library_name: kernels
license: apache-2.0
tags: [kernel]
---
Exact attention with learned sinks (`s_aux`) in Triton, forward and backward: `flash_attn_func`,
`flash_attn_varlen_func`, `flash_attn_with_kvcache`, `attention_sink`. Written by `triton-attention-sink export`.
"""


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder, or an earlier export.")],
) -> None:
    """Write a Hub kernel folder: upload it to org/name, then attn_implementation: org/name.

    Over an earlier export it replaces only the files that it wrote. Exits 2 if other files are in the way.
    """
    try:
        build = write(directory)
    except (ValueError, OSError) as error:
        refuse(error)
    print(f"wrote {build}")
    print("transformers takes it with one release of kernels or another. These pairs ran:")
    for transformers, kernels in PAIRS:
        print(f'  pip install "transformers=={transformers}" "kernels=={kernels}"')
    print(f'try it offline: LOCAL_KERNELS="kernels-community/{KERNEL}={directory.absolute()}"')
    print(f"                attn_implementation: kernels-community/{KERNEL}")


def write(directory: Path) -> Path:
    """Write the folder and return its build variant, DIR/build/torch-universal.

    Raises:
        ValueError: DIR holds something that is not an earlier export, or what export wrote was changed since.
        OSError: DIR cannot be written.
    """
    written = Written(directory, LISTING)
    if directory.exists() and any(directory.iterdir()) and not written.digests:
        raise ValueError(f"DIR must be new, empty or an earlier export, got {directory} with other contents")
    sources = {name: (PACKAGE / name).read_text() for name in SOURCES}
    for file in sorted((PACKAGE / "implementations").rglob("*.py")):
        sources[file.relative_to(PACKAGE).as_posix()] = file.read_text()
    digest = hashlib.sha256("".join(f"{name}\n{text}" for name, text in sources.items()).encode()).hexdigest()[:12]
    # torch's operators are global: a namespace of its own lets this kernel share a process with the package.
    namespace = f"triton_attention_sink_{digest}"
    sources["ops.py"] = sources["ops.py"].replace(OPERATORS, f"{namespace}::")
    sources["__init__.py"] = INIT
    metadata = {
        "id": f"_{namespace}",
        "name": KERNEL,
        "version": 1,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": "cuda"},
    }
    sources["metadata.json"] = json.dumps(metadata, indent=2) + "\n"

    files = {f"{BUILD}/{name}": text.encode() for name, text in sources.items()} | {"README.md": CARD.encode()}
    written.write(files, replace=True)
    return directory / BUILD
