"""Names of the implementations, and the lazily imported modules behind them.

A kernel backend is a package here with ``supports(call) -> str | None`` (a reason, or None),
``run_forward`` and ``run_backward``, and perhaps
``slower_reason(call) -> str | None``, why "auto" leaves the call to another.
One that brings its own autograd has ``attention(call) -> (out, lse)`` instead of the two, and no operator runs it.
To add one, add its folder, its name in ``KERNELS`` and its import in ``load``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType

# "auto" takes the first that it can; the last one supports what any other does, but for pages and left padding
KERNELS = ("triton_decode", "flash_attention_4", "triton_window", "triton_hopper", "triton")
OWN_AUTOGRAD = ("flash_attention_4",)
CACHES = "triton_decode"  # reads pages and left padding where they are
REFERENCE = "reference"


@lru_cache
def load(name: str) -> ModuleType:
    """Import the backend ``name``; ImportError if what it needs is not installed."""
    # import statements, because torch.compile traces them and not importlib
    if name == "triton_decode":
        from . import triton_decode as backend
    elif name == "flash_attention_4":
        from . import flash_attention_4 as backend
    elif name == "triton_window":
        from . import triton_window as backend
    elif name == "triton_hopper":
        from . import triton_hopper as backend
    elif name == "triton":
        from . import triton as backend
    else:
        raise ValueError(f"name must be one of {KERNELS}, got {name!r}")
    return backend


@lru_cache
def load_merge() -> Callable | None:
    """``common.merge.merge``; None without Triton."""
    try:
        from .common.merge import merge
    except ImportError:
        return None
    return merge


def fastest(call, in_operator: bool = False) -> str:
    """The implementation that "auto" takes for ``call``."""
    names = [name for name in (*KERNELS, REFERENCE) if not (in_operator and name in OWN_AUTOGRAD)]
    return next(name for name in names if unsupported_reason(name, call, automatic=True) is None)


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
    reason = backend.slower_reason(call) if automatic and hasattr(backend, "slower_reason") else None
    return reason or backend.supports(call)  # this order: what would lose is not even imported
