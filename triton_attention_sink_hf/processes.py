"""Command lines of Python processes that import what this one imports."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).absolute().parent
# sys is built in, so nothing is searched for before the path is ours. The package is taken by its place, whatever
# the path says: an editable install, a checkout or a copy beside an installed one.
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

    Unlike ``python -m`` it imports from where this process does: this copy of the package, and neither what lies in the
    current folder nor what PYTHONPATH or PYTHONSAFEPATH would add or leave out.
    """
    start = START.format(
        path=[str(entry) for entry in sys.path], name=PACKAGE.name, init=str(PACKAGE / "__init__.py"),
        folder=str(PACKAGE), module=f"{PACKAGE.name}.{module}",
    )  # fmt: skip
    return [sys.executable, "-c", start, *arguments]
