"""For transformers' model tests, which need no stand-in: only what a test asks for is replaced.

Where a model would take a kernel (by default, as sdpa, as any FlashAttention) it takes this package's attention, by its
name. eager, the tests' reference, stays. Tests of FlashAttention run without it and without a GPU.
"""

from __future__ import annotations

import unittest

NAME = "triton_attention_sink"


def is_kernel(name: str | None) -> bool:
    return name is None or name == "sdpa" or name.startswith("flash_attention")


def without_skips(test):
    """The test below the decorators that would skip it."""
    while getattr(test, "__unittest_skip__", False) and hasattr(test, "__wrapped__"):
        test = test.__wrapped__
    return test


def install() -> None:
    from transformers import PreTrainedModel, testing_utils
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel

    import triton_attention_sink_hf  # noqa: F401 - makes the name known

    adjusted = PreTrainedModel._check_and_adjust_attn_implementation

    def ours_for_kernels(self, attn_implementation, *args, **kwargs):
        if is_kernel(attn_implementation) and self._supports_attention_backend:
            attn_implementation = NAME
        return adjusted(self, attn_implementation, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = ours_for_kernels
    GptOssPreTrainedModel._supports_sdpa = True  # tests of sdpa against eager; sdpa is ours here, and has the sinks
    for name in ("require_flash_attn", "require_flash_attn_3", "require_flash_attn_4"):
        setattr(testing_utils, name, without_skips)
    unittest.TestCase.maxDiff = None
