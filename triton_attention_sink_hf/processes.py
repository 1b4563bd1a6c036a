"""Command lines of Python processes that import what this one imports."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).absolute().parent
# sys is built in, so importing it searches no path. The package is loaded from its own folder, whatever sys.path says:
# it may be an editable install, a checkout, or a copy beside an installed one.
START = """
import sys
sys.path[:] = {path!r}
import importlib.util, runpy
spec = importlib.util.spec_from_file_location({name!r}, {init!r}, submodule_search_locations=[{folder!r}])
package = sys.modules[{name!r}] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


def module_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs ``module`` of this package in a fresh process.

    Unlike with ``python -m``, that process imports what this one would, this copy of the package included. The current
    folder, PYTHONPATH and PYTHONSAFEPATH make no difference.
    """
    start = START.format(
        path=[str(entry) for entry in sys.path], name=PACKAGE.name, init=str(PACKAGE / "__init__.py"),
        folder=str(PACKAGE), module=f"{PACKAGE.name}.{module}",
    )  # fmt: skip
    return [sys.executable, "-c", start, *arguments]
