"""Attention with learned sinks, forward and backward, switched on by ``attn_implementation: triton_attention_sink``."""

from .interface import Explanation, attention_sink, explain
from .masks import Mask
from .reference import reference_attention

__version__ = "0.1.0"

__all__ = ["Explanation", "Mask", "attention_sink", "explain", "reference_attention"]
