"""``python -m triton_attention_sink_hf [-m MODULE | FILE] ...``: any program, in which our name is known.

Python starts anew with the same flags and the program's own arguments, so the program runs unchanged. What is new is
``launch`` at the front of PYTHONPATH, which this process and all below it inherit.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

NAME = "triton_attention_sink_hf"
LAUNCH = str(Path(__file__).absolute().parent / "launch")
USAGE = f"""usage: python -m {NAME} [-m MODULE | FILE] ...

Run a Python program, and every Python process that it starts, with attn_implementation: triton_attention_sink known to
transformers. The command line of this package is triton-attention-sink, or python -m {NAME}.cli."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    if sys.flags.ignore_environment or sys.flags.no_site:
        raise SystemExit(f"python -m {NAME} must run without -E, -I and -S: children find it through PYTHONPATH")
    others = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{LAUNCH}{os.pathsep}{others}" if others else LAUNCH
    os.execv(sys.executable, [sys.executable, *python_flags(sys.orig_argv, arguments), *arguments])


def python_flags(command: list[str], arguments: list[str]) -> list[str]:
    """Python's own flags in ``command``, which ends with ``-m NAME`` and ``arguments``; -m may be one of ``-um``."""
    flags = command[1 : len(command) - len(arguments)]
    flags[-1] = flags[-1].removesuffix(NAME)
    if not flags[-1]:
        flags.pop()
    flags[-1] = flags[-1].removesuffix("m")
    return flags[:-1] if flags[-1] == "-" else flags


if __name__ == "__main__":
    main()
