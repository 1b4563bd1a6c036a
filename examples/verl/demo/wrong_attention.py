"""``attn_implementation: one_sample``: eager attention that takes a packed row for one sample. Wrong, as a control.

transformers' eager does so by itself in gpt-oss. In Llama it cuts packed rows where ``position_ids`` restart.
"""

from __future__ import annotations

import sys

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, eager_mask


def attention(module, *arguments, **keywords):
    """The model's own eager attention."""
    return sys.modules[type(module).__module__].eager_attention_forward(module, *arguments, **keywords)


def mask(*arguments, mask_function=None, **keywords):
    """Causal, whatever the model asks for."""
    return eager_mask(*arguments, mask_function=causal_mask_function, **keywords)


AttentionInterface.register("one_sample", attention)
AttentionMaskInterface.register("one_sample", mask)
