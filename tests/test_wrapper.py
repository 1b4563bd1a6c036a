"""The two functions that transformers calls, on their own: what they honour, ignore and refuse."""

from types import SimpleNamespace

import pytest
import torch
from hf_models import (
    ALTERNATING,
    COMMON,
    NAME,
    VERSION,
    VOCAB,
    make_pair,
    tokens,
    transformers,
)
from transformers import masking_utils

import triton_attention_sink_hf.flash_attention_triton_sink as wrapper
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward, attention_mask


def heads(batch=2, seqlen=8, n=4, d=16) -> torch.Tensor:
    return torch.randn(batch, n, seqlen, d, generator=torch.Generator().manual_seed(2))


def layer(**attributes):
    return SimpleNamespace(**{"is_causal": True, "training": False, **attributes})


def test_no_copy_of_q_k_v(monkeypatch):
    seen = []
    monkeypatch.setattr(wrapper, "attention_sink", lambda q, k, v, *a, **kw: seen.extend((q, k, v)) or v)
    q = torch.randn(1, 8, 4, 16).transpose(1, 2)  # as projections leave it
    k, v = torch.randn(2, 1, 2, 8, 16)
    for positions in (None, torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])):
        seen.clear()
        attention_forward(layer(), q, k, v, None, position_ids=positions)
        assert [x.data_ptr() for x in seen] == [q.data_ptr(), k.data_ptr(), v.data_ptr()]


def test_sinks_under_another_name_are_used():
    q, k, v, s = heads(), heads(n=2), heads(n=2), torch.tensor([-10.0, 0.0, 5.0, 20.0])
    by_s_aux, _ = attention_forward(layer(), q, k, v, None, s_aux=s)
    by_sinks, _ = attention_forward(layer(), q, k, v, None, sinks=s)
    assert torch.equal(by_s_aux, by_sinks)
    assert not torch.equal(by_s_aux, attention_forward(layer(), q, k, v, None)[0])


def test_keywords_that_do_not_matter_are_ignored():
    q = heads()
    expected, nothing = attention_forward(layer(), q, q, q, None)
    assert nothing is None and expected.shape == (2, 8, 4, 16)
    found, _ = attention_forward(
        layer(), q, q, q, None, dropout=0.1, use_cache=True, past_key_values=object(), output_router_logits=True,
        cache_position=torch.arange(8), logits_to_keep=1, position_bias=None, some_flag=False,
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_multimodal_rotary_positions():
    """Of four rows the first is the text's, which cuts. Three cannot tell samples from images: refused if they fall."""
    q = heads()
    expected, _ = attention_forward(layer(), q, q, q, None)
    image = torch.tensor([0, 1, 2, 2, 2, 2, 4, 5]).expand(3, 2, 8)
    assert torch.equal(attention_forward(layer(), q, q, q, None, position_ids=image)[0], expected)
    text = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(1, 2, 8)
    expected, _ = attention_forward(layer(), q, q, q, None, position_ids=text[0])
    found, _ = attention_forward(layer(), q, q, q, None, position_ids=torch.cat([text, image]))
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match=r"position_ids must be \(4, B, S\), the text positions first"):
        attention_forward(layer(), q, q, q, None, position_ids=text.expand(3, 2, 8))
    samples = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]).expand(2, 8)
    packed = masking_utils.packed_sequence_mask_function(samples)
    packed = masking_utils.and_masks(masking_utils.causal_mask_function, packed)
    told = attention_mask(2, 8, 8, mask_function=packed)  # by the text positions, as some models tell the mask alone
    found, _ = attention_forward(layer(), q, q, q, told, position_ids=text.expand(3, 2, 8))
    assert torch.equal(found, expected)
    padded = torch.ones(2, 8, dtype=torch.long)
    padded[:, :3] = 0  # positions of padding mean nothing
    attention_forward(layer(), q, q, q, padded, position_ids=text.expand(3, 2, 8))


ONE = torch.tensor([0, 8], dtype=torch.int32)
REFUSED = [
    (dict(dropout=0.1), "dropout must be 0.0 in training"),
    (dict(head_mask=torch.ones(4)), "head_mask must be None"),
    (dict(output_attentions=True), "output_attentions must be False"),
    (dict(position_bias=torch.zeros(1, 4, 8, 8)), "position_bias must be None"),
    (dict(alibi=torch.zeros(4)), "alibi must be None"),
    (dict(indices=torch.zeros(2, 8, 3, dtype=torch.int32)), "indices must be integers (B, Sq, Sk) = (B, 8, 8)"),
    (dict(indices=torch.zeros(2, 8, 8)), "got (2, 8, 8) torch.float32"),
    (dict(sinks=torch.zeros(2, 4, 8, 2)), "sinks must be (Hq,) = (4,), one sink per head"),
    (dict(s_aux=torch.zeros(3)), "s_aux must be (Hq,) = (4,), one sink per head"),
    (dict(s_aux=torch.zeros(4), sinks=torch.zeros(4)), "sinks must be None where s_aux is given"),
    (dict(attention_mask=torch.zeros(2, 1, 8, 8)), "attention_mask must be a 2-D bool or integer padding mask"),
    (dict(attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool)), "position_ids that restart"),
    (dict(attention_mask=torch.zeros(2, 8)), "attention_mask must be a 2-D bool or integer padding mask"),
    (dict(attention_mask=torch.ones(2, 7, dtype=torch.long)), "attention_mask must be (B, Sk) = (2, 8)"),
    *(
        (dict(attention_mask=torch.ones(2, 1, 1, 8, dtype=dtype)), f"got (2, 1, 1, 8) {dtype}")
        for dtype in (torch.uint8, torch.int8, torch.int32, torch.int64, torch.bool)
    ),
    (dict(attention_mask={"full_attention": None}), "attention_mask must be a 2-D tensor or None, got dict"),
    (dict(position_ids=torch.arange(7)[None]), "position_ids must be (B, S) = (2, 8)"),
    (dict(cu_seq_lens_q=ONE), "cu_seq_lens_q and cu_seq_lens_k must both be given"),
    (dict(cu_seq_lens_q=ONE, cu_seq_lens_k=ONE), "the batch must be 1"),
    (
        dict(cu_seq_lens_q=ONE, cu_seq_lens_k=ONE, attention_mask=torch.ones(2, 8, dtype=torch.bool)),
        "attention_mask must be None where cu_seq_lens_q",
    ),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=[message for _, message in REFUSED])
def test_refusals(arguments, message):
    q = heads()
    with pytest.raises((ValueError, TypeError)) as error:
        attention_forward(layer(training=True), q, q, q, **arguments)
    assert message in str(error.value)


def test_an_owned_sink_or_window_that_is_not_passed_on_is_refused():
    q = heads()
    with pytest.raises(ValueError, match="s_aux must be the sinks that SimpleNamespace owns"):
        attention_forward(layer(sinks=torch.zeros(4)), q, q, q, None)
    config = SimpleNamespace(sliding_window=4, layer_types=ALTERNATING)
    for attributes in (dict(sliding_window=4), dict(config=config, layer_idx=0)):
        with pytest.raises(ValueError, match="sliding_window must be the 4"):
            attention_forward(layer(**attributes), q, q, q, None)
    full = dict(config=config, layer_idx=1)
    for attributes in (dict(sliding_window=None), full, dict(sliding_window=4, **full), dict(sliding_window=8)):
        attention_forward(layer(**attributes), q, q, q, None)


@pytest.mark.skipif(VERSION < (5, 0), reason="output_attentions reaches the layers only in transformers 5")
def test_output_attentions_of_a_model_is_refused():
    _, ours, _ = make_pair("llama", torch.float32)
    with pytest.raises(ValueError, match="output_attentions must be False"):
        ours(tokens(1, 4), output_attentions=True)


def test_dropout_of_a_model_in_training_is_refused():
    _, ours, _ = make_pair("llama", torch.float32, attention_dropout=0.1)
    ours(tokens(1, 4))
    with pytest.raises(ValueError, match=r"attention_dropout=0\.0"):
        ours.train()(tokens(1, 4))


def test_dense_mask_of_a_user_is_refused():
    _, ours, _ = make_pair("llama", torch.float32)
    for dtype in (torch.bool, torch.float32):
        with pytest.raises(ValueError, match="attention_mask must be a 2-D bool or integer padding mask"):
            ours(tokens(1, 4), attention_mask=torch.ones(1, 1, 4, 4, dtype=dtype))


def test_mask_patterns_beyond_ours_are_refused():
    config = transformers.LlamaConfig(**COMMON)
    config._attn_implementation = NAME
    config.attention_chunk_size = 4
    embeds = torch.zeros(1, 8, 64)
    name = "inputs_embeds" if VERSION >= (5, 0) else "input_embeds"
    arguments = {"config": config, name: embeds, "attention_mask": None, "past_key_values": None}
    if VERSION < (5, 0):
        arguments["cache_position"] = torch.arange(8)
    with pytest.raises(ValueError, match="got chunked attention"):
        masking_utils.create_chunked_causal_mask(**arguments)
    with pytest.raises(ValueError, match="must be causal, bidirectional, sliding or padded"):
        masking_utils.create_causal_mask(**arguments, or_mask_function=lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match=r"got tokens that see each other|got a mask function of the user's"):
        masking_utils.create_causal_mask(**arguments, or_mask_function=lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match="must be causal, bidirectional, sliding or padded"):
        masking_utils.create_causal_mask(**arguments, and_mask_function=lambda b, h, q, k: q == k)
    if VERSION >= (5, 0):
        with pytest.raises(
            ValueError, match=r"got blocks of tokens that see each other .* \(images\), of which one lies"
        ):
            masking_utils.create_causal_mask(**arguments, block_sequence_ids=torch.arange(8)[None] % 3)
        assert masking_utils.create_causal_mask(**arguments, block_sequence_ids=torch.full((1, 8), -1)).blocks is None
    assert masking_utils.create_causal_mask(**arguments).causal


def test_the_mask_knows_its_pattern_better_than_is_causal():
    """Moonshine, and GPT-2 in transformers 4, set is_causal to False wherever there is a mask, as sdpa wants it."""
    q, real = heads(), torch.ones(2, 8, dtype=torch.bool)
    real[0, :3] = False
    for causal in (True, False):
        skip = {} if causal else {"allow_is_bidirectional_skip": True}
        mask = attention_mask(2, 8, 8, attention_mask=real, **skip)
        expected, _ = attention_forward(layer(is_causal=causal), q, q, q, real)
        found, _ = attention_forward(layer(), q, q, q, mask, is_causal=not causal)
        assert torch.equal(found, expected)


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4's Bloom asks no mask function")
def test_a_model_that_calls_no_attention_function_is_refused():
    config = transformers.BloomConfig(n_layer=1, n_head=2, hidden_size=32, vocab_size=VOCAB)
    config._attn_implementation = NAME
    with pytest.raises(ValueError, match="attn_implementation must be 'eager' for models of BloomConfig"):
        transformers.BloomForCausalLM(config)(tokens(1, 4))


def test_keys_beyond_a_static_cache_are_hidden():
    q, k, v = heads(seqlen=2), heads(n=2, seqlen=10), heads(n=2, seqlen=10)
    k[:, :, 5:] = 1e3
    for window in (None, 3):
        mask = attention_mask(2, 10, 2, q_offset=torch.tensor(3), local_size=window)
        found, _ = attention_forward(layer(), q, k, v, mask, sliding_window=window)
        expected, _ = attention_forward(layer(), q, k[:, :, :5], v[:, :, :5], None, sliding_window=window)
        torch.testing.assert_close(found, expected)
