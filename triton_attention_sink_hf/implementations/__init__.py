"""Names of the implementations, and the lazily imported modules behind them.

A kernel backend is a package here with ``supports(call) -> str | None`` (a reason, or None),
``run_forward`` and ``run_backward``, and perhaps
``slower_reason(call) -> str | None``, why "auto" leaves the call to another.
To add one, add its folder, its name in ``KERNELS`` and its import in ``load``.
"""

from __future__ import annotations

from functools import lru_cache
from types import ModuleType

# fastest first; the last one supports what any other does, but for pages and left padding
KERNELS = ("triton_decode", "triton_window", "triton_hopper", "triton")
CACHES = "triton_decode"  # reads pages and left padding where they are
REFERENCE = "reference"


@lru_cache
def load(name: str) -> ModuleType:
    """Import the backend ``name``; ImportError if what it needs is not installed."""
    # import statements, because torch.compile traces them and not importlib
    if name == "triton_decode":
        from . import triton_decode as backend
    elif name == "triton_window":
        from . import triton_window as backend
    elif name == "triton_hopper":
        from . import triton_hopper as backend
    elif name == "triton":
        from . import triton as backend
    else:
        raise ValueError(f"name must be one of {KERNELS}, got {name!r}")
    return backend


def fastest(call) -> str:
    """The implementation that "auto" takes for ``call``."""
    return next(name for name in (*KERNELS, REFERENCE) if unsupported_reason(name, call, automatic=True) is None)


def unsupported_reason(name: str, call, automatic: bool = False) -> str | None:
    """Why ``name`` cannot serve ``call``, or None if it can. ``automatic`` adds what "auto" holds against it."""
    if name == REFERENCE:
        return None
    if automatic and call.q.device.type == "cpu":
        return "on a CPU Triton's interpreter is for tests; auto takes the reference"
    try:
        backend = load(name)
    except ImportError as error:
        return f"{error}"
    reason = backend.supports(call)
    if reason is None and automatic and hasattr(backend, "slower_reason"):
        reason = backend.slower_reason(call)
    return reason
