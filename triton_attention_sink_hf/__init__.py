"""Attention with learned sinks, forward and backward, switched on by ``attn_implementation: triton_attention_sink``.

Importing this package registers that name with transformers if transformers is installed, and does nothing else; in
particular it never touches a GPU.
"""

import importlib.util
import sys
import warnings

from .flash_attn_api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from .integrations.sequence_parallel import sequence_parallel
from .interface import Explanation, attention_sink, explain
from .masks import Mask
from .reference import reference_attention

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Mask",
    "attention_sink",
    "explain",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "reference_attention",
    "sequence_parallel",
]


def _register_with_transformers() -> None:
    if "transformers" not in sys.modules and importlib.util.find_spec("transformers") is None:
        return
    try:
        from .registration import register

        register()
    except ImportError as error:
        # The functional API works all the same; a model that names us will say that the name is unknown.
        warnings.warn(f"triton_attention_sink is not registered with transformers: {error}", stacklevel=3)


_register_with_transformers()
