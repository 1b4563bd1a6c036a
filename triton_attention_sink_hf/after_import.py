"""Do something right after a module has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable


def after_import(name: str, action: Callable[[], None]) -> None:
    """Call ``action`` once: now if the module ``name`` is imported, else at the end of its import.

    A later ``action`` runs inside an import statement of somebody else's, so it must not raise.
    """
    if _is_imported(name):
        action()
    else:
        sys.meta_path.insert(0, _Finder(name, action))


def _is_imported(name: str) -> bool:
    """Whether the module is there as a whole: not only begun."""
    module = sys.modules.get(name)
    return module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False)


class _Finder:
    """Finds nothing itself: it lets the others find the module, and has its loader tell when it is done."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(self, name: str, path=None, target=None):
        if name != self.name:
            if _is_imported(self.name):  # its import had begun before after_import was called
                self._finish()
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                del spec.loader.exec_module  # of the instance; the class's own is left
                execute(module)
                self._finish()

            spec.loader.exec_module = exec_module
        return spec

    def _finish(self) -> None:
        try:
            sys.meta_path.remove(self)
        except ValueError:  # another thread was faster
            return
        self.action()
