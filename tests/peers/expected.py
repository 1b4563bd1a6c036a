"""What of the peers' tests is not asked of this package, each with its reason; everything else has to pass."""

import re

# Refusals: an error that this package raises, by its message. A test that ends with one is counted as refused.
REFUSALS = {
    r"dropout_p must be 0\.0": "dropout in attention",
    r"alibi_slopes must be None": "ALiBi",
    r"rotary_(cos|sin) must be None": "rotary embeddings inside the kernel",
    r"block_table must be None, got a tensor: attention_sink": "flash_attn_varlen_func takes no pages",
    r"(qv|gather_kv_indices|(score|mask)_mod|block_sparse_tensors) must be None": "FlashAttention-4's other features",
    r"g must be None": "fla's decay factors",
    r"is private to flash-attn": "flash-attn's private functions",
    r"attention_mask must be a 2-D bool or integer padding mask": "dense 4-D masks",
    r"output_attentions must be False": "the attention matrix, which never exists",
}

# Tests that are not run, by the end of their names: they ask for no attention's results.
LEFT_OUT = {
    r"::test_(can_set_attention_dynamically|sdpa_can_dispatch_non_composite_models)$": "wants sdpa by its name",
    r"::test_flash_attn_invalid_head_dim\[": "wants FlashAttention-4's message",
    r"IntegrationTest::": "needs weights",
    # past the cache's end: on a GPU no value is read, and an append ends the process by a device-side assertion
    r"::test_flash_attn_kvcache_paged_block_table_bounds\[": "wants lengths checked on the device",
    r"::test_flash_attn_2_fp32_ln$": "needs bitsandbytes",
    r"::test_flash_attn_generator_arg_must_be_none$": "flash-attn's C++ functions",
}


def refusal(message: str) -> str | None:
    """The reason why this package refuses with this message, or None: nobody expects it to."""
    return next((reason for pattern, reason in REFUSALS.items() if re.search(pattern, message)), None)


def left_out(name: str) -> str | None:
    """Why the test of this name is not run, or None."""
    return next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, name)), None)
