"""Attention with learned sinks, forward and backward, switched on by ``attn_implementation: triton_attention_sink``.

Importing this package makes that name known to transformers: now if transformers is loaded, else as soon as it is. It
does nothing else. It never touches a GPU, and imports torch, triton and transformers no earlier than they are needed.
"""

import importlib
import warnings
from typing import TYPE_CHECKING

from .after_import import after_import

if TYPE_CHECKING:
    from .attach_sinks import attach_learned_sinks
    from .first_keys import first_keys_attention
    from .flash_attn_api import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
    from .integrations.sequence_parallel import sequence_parallel
    from .interface import Explanation, attention_sink, explain
    from .masks import Mask
    from .merge import merge_attention
    from .reference import reference_attention
    from .shared_prefix import SharedPrefixes, shared_prefix_attention

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "Mask",
    "SharedPrefixes",
    "attach_learned_sinks",
    "attention_sink",
    "explain",
    "first_keys_attention",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "merge_attention",
    "reference_attention",
    "sequence_parallel",
    "shared_prefix_attention",
]

_HOMES = {
    "Explanation": "interface",
    "Mask": "masks",
    "SharedPrefixes": "shared_prefix",
    "attach_learned_sinks": "attach_sinks",
    "attention_sink": "interface",
    "explain": "interface",
    "first_keys_attention": "first_keys",
    "flash_attn_func": "flash_attn_api",
    "flash_attn_varlen_func": "flash_attn_api",
    "flash_attn_with_kvcache": "flash_attn_api",
    "merge_attention": "merge",
    "reference_attention": "reference",
    "sequence_parallel": "integrations.sequence_parallel",
    "shared_prefix_attention": "shared_prefix",
}


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_with_transformers() -> None:
    try:
        from .registration import register

        register()
    except Exception as error:
        # The functional API works all the same; a model that names us will say that the name is unknown.
        warnings.warn(f"triton_attention_sink is not registered with transformers: {error}", stacklevel=2)


after_import("transformers.modeling_utils", _register_with_transformers)
