"""Runs at the start of every Python process below the launcher: this copy of the package is imported.

Python imports one module of this name. This one stands first on PYTHONPATH, so it runs the one that it hides, too.
"""

import importlib.util
import os
import sys
from importlib.machinery import PathFinder

folder = os.path.dirname(os.path.abspath(__file__))
package = os.path.dirname(folder)
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry) != folder]  # as if it were not there


def run(name: str, spec) -> None:
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


hidden = PathFinder.find_spec("sitecustomize")
if hidden is not None:
    run("sitecustomize", hidden)
name = os.path.basename(package)
init = os.path.join(package, "__init__.py")
run(name, importlib.util.spec_from_file_location(name, init, submodule_search_locations=[package]))
