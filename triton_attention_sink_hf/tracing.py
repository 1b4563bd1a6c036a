"""What torch.compile is told about our functions."""

from __future__ import annotations

from collections.abc import Callable


def constant_result(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, which imports torch._dynamo, in a second: tracing reads this mark."""
    function._dynamo_marked_constant = True
    return function
