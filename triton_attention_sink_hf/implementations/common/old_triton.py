"""What Triton 3.4, which torch 2.8 brings, does not know yet."""

from __future__ import annotations

import re

from triton.runtime.jit import JITFunction

from .relaunch import TRITON


def known_hints(kernel):
    """``kernel`` without ``disable_licm``, a hint for loops, where Triton is older than it. Stands above triton.jit."""
    if TRITON < (3, 5) and isinstance(kernel, JITFunction):  # its interpreter ignores hints
        kernel._unsafe_update_src(re.sub(r", disable_licm=\w+", "", kernel.src))
    return kernel
