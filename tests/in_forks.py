"""Run functions of a module, each in a process of its own that shares the imports: ``in_forks.py MODULE NAME...``.

Prints a JSON object: name -> None, or the traceback. A failure does not end the others.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib import import_module


def run(function: Callable) -> str | None:
    with tempfile.TemporaryFile("w+") as file:
        if (child := os.fork()) == 0:
            status = 1
            try:
                function()
                status = 0
            except BaseException:
                traceback.print_exc(file=file)
                file.flush()
            os._exit(status)
        status = os.waitpid(child, 0)[1]
        file.seek(0)
        return (file.read() or f"status {status}") if status else None


if __name__ == "__main__":
    module, *names = sys.argv[1:]
    functions = import_module(module)
    print(json.dumps({name: run(getattr(functions, name)) for name in names}))
