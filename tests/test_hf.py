"""Hugging Face models under ``attn_implementation="triton_attention_sink"`` against their own eager attention.

The truth for packed rows is eager on each sequence alone.
"""

import pytest
import torch
from hf_models import (
    COMMON,
    LENGTHS,
    MODELS,
    NAME,
    VERSION,
    VOCAB,
    assert_close,
    assert_same_gradients,
    gradients,
    make_pair,
    packed_positions,
    padded,
    tokens,
    transformers,
    weights,
)
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import masking_utils


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_all_gradients_equal_eager(name):
    eager, ours, tolerance = make_pair(name)
    x = tokens(2, 13)
    expected = eager(x).logits
    found = ours(x).logits
    assert_close(found, expected, tolerance, "logits")
    (expected * weights(expected)).sum().backward()
    (found * weights(found)).sum().backward()
    assert_same_gradients(gradients(ours), gradients(eager), 10 * tolerance)


def eager_per_sequence(model, x: torch.Tensor, rows) -> torch.Tensor:
    """Logits (B, S, V) of packed rows, each sequence run alone."""
    out = []
    for row, lengths in zip(x, rows, strict=True):
        out.append(torch.cat([model(piece[None]).logits for piece in row.split(lengths)], dim=1))
    return torch.cat(out)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("rows", [LENGTHS[:1], LENGTHS], ids=["one row", "two rows"])
@pytest.mark.parametrize(
    "name",
    # those in the second line tell their mask where rows are cut, and not their layers
    [
        *("gpt_oss", "mistral", "mimo_v2_flash", "privacy_filter"),
        *("ministral3", "persimmon", "gpt_bigcode"),
    ],
)
def test_packed_rows_equal_eager_on_each_sequence(name, rows, checkpointing):
    eager, ours, tolerance = make_pair(name)
    x = tokens(len(rows), 17)
    expected = eager_per_sequence(eager, x, rows)
    (expected * weights(expected)).sum().backward()
    if checkpointing:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ours.train()
    arguments = {} if name == "privacy_filter" else {"use_cache": False}
    found = ours(x, position_ids=torch.stack([packed_positions(lengths) for lengths in rows]), **arguments).logits
    (found * weights(found)).sum().backward()
    assert_close(found, expected, tolerance, "logits")
    assert_same_gradients(gradients(ours), gradients(eager), 10 * tolerance)


SAMPLES = torch.repeat_interleave(torch.arange(1, 4), torch.tensor(LENGTHS[0]))[None]
BESIDE_CUTS = {
    "ones": (torch.ones(1, 17), (0, 0)),
    "zeros at the end": (torch.ones(1, 17), (0, 3)),
    "zeros at the start": (torch.ones(1, 17), (2, 0)),
    "zeros on both sides": (torch.ones(1, 17), (2, 3)),
    "sample numbers": (SAMPLES, (0, 0)),
    "sample numbers and zeros": (SAMPLES, (1, 4)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("mask, zeros", BESIDE_CUTS.values(), ids=BESIDE_CUTS)
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_packed_rows_beside_a_mask(name, mask, zeros, compiled):
    """Cuts and padding are both honoured, whatever the padding's positions are; eager loses the cuts."""
    if compiled and (name == "gpt_oss" or "numbers" in str(mask)):
        pytest.skip("one model and one kind of mask are enough to compile")
    torch._dynamo.reset()
    eager, ours, _ = make_pair(name, torch.float32)
    x = tokens(1, 17)
    expected = eager_per_sequence(eager, x, LENGTHS[:1])
    (expected * weights(expected)).sum().backward()
    model = torch.compile(ours, backend="eager", fullgraph=True) if compiled else ours
    for filler in (0, 1):
        row = torch.nn.functional.pad(x, zeros, value=5)
        mask_row = torch.nn.functional.pad(mask, zeros).to(torch.int64)
        positions = torch.nn.functional.pad(packed_positions(LENGTHS[0])[None], zeros, value=filler)
        found = model(row, position_ids=positions, attention_mask=mask_row, use_cache=False).logits
        found = found[:, zeros[0] : zeros[0] + 17]
        assert_close(found, expected, 1e-5, "logits")
    (found * weights(found)).sum().backward()
    assert_same_gradients(gradients(ours), gradients(eager), 1e-4)


def test_rows_packed_and_padded_differently_in_one_batch():
    eager, ours, _ = make_pair("gpt_oss", torch.float32)
    x, lengths = tokens(3, 12), ((5, 4), (10,), (3, 3, 6))
    expected, positions, mask = [], [], []
    for row, own in zip(x, lengths, strict=True):
        free = 12 - sum(own)
        expected.append(eager_per_sequence(eager, row[None, free:], (own,)))
        positions.append(torch.nn.functional.pad(packed_positions(own), (free, 0), value=1))
        mask.append(torch.arange(12) >= free)
    found = ours(x, position_ids=torch.stack(positions), attention_mask=torch.stack(mask).long()).logits
    for row, truth in zip(found, expected, strict=True):
        assert_close(row[None, -truth.shape[1] :], truth, 1e-5, "logits")


@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_padding_between_the_tokens_of_a_sample(name):
    """Padding between tokens is hidden, and the tokens on both sides still see each other."""
    eager, ours, _ = make_pair(name, torch.float32)
    x, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[0, 4:6] = mask[1, 0] = mask[1, 9] = 0
    for positions in (None, (mask.cumsum(1) - 1).clamp_min(0)):
        expected, found = (m(x, attention_mask=mask, position_ids=positions).logits for m in (eager, ours))
        assert_close(found[mask.bool()], expected[mask.bool()], 1e-5, "logits")


REFILLS = {
    "copy_": lambda buffer, new: buffer.copy_(new),
    "data": lambda buffer, new: buffer.data.copy_(new),
    "set data": lambda buffer, new: setattr(buffer, "data", new.clone()),
    "numpy": lambda buffer, new: buffer.numpy().__setitem__(slice(None), new.numpy()),
    "dlpack": lambda buffer, new: torch.from_dlpack(buffer).copy_(new),
}


@pytest.mark.parametrize("what", ["position_ids", "cu_seq_lens", "attention_mask"])
@pytest.mark.parametrize("refill", REFILLS.values(), ids=REFILLS)
def test_what_a_buffer_holds_at_each_forward_counts(refill, what):
    eager, ours, tolerance = make_pair("gpt_oss")
    x, buffer = tokens(1, 17), None
    for lengths in ((5, 9, 3), (11, 4, 2)):
        positions, cu = packed_positions(lengths)[None], torch.tensor([0, *lengths]).cumsum(0)
        mask = (torch.arange(17)[None] < 17 - lengths[2]).long()
        new = {"position_ids": positions, "cu_seq_lens": cu, "attention_mask": mask}[what]
        if buffer is None:
            buffer = new.clone()
        else:
            refill(buffer, new)
        arguments = {"position_ids": buffer if what == "position_ids" else positions}
        if what == "cu_seq_lens":
            arguments |= dict(cu_seq_lens_q=buffer, cu_seq_lens_k=buffer, max_length_q=17, max_length_k=17)
        if what == "attention_mask":
            arguments |= dict(attention_mask=buffer)
        real = mask.bool() if what == "attention_mask" else torch.ones(1, 17, dtype=torch.bool)
        found = ours(x, use_cache=False, **arguments).logits
        assert_close(found[real], eager_per_sequence(eager, x, (lengths,))[real], tolerance, "logits")


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4's BigBird-Pegasus calls no attention function")
@pytest.mark.parametrize("padding", [False, True])
def test_a_decoder_that_does_not_say_that_it_is_causal(padding):
    """Its layers keep is_causal=False and leave causality to their mask."""
    pair = []
    for implementation in ("eager", NAME):
        torch.manual_seed(0)
        config = transformers.BigBirdPegasusConfig(
            vocab_size=VOCAB, d_model=64, decoder_layers=2, decoder_ffn_dim=32, decoder_attention_heads=4,
            pad_token_id=0, max_position_embeddings=64, is_decoder=True, is_encoder_decoder=False, dropout=0.0,
            attention_dropout=0.0,
        )  # fmt: skip
        config._attn_implementation = implementation
        pair.append(transformers.BigBirdPegasusForCausalLM(config).eval())
    x, real = tokens(2, 13), torch.ones(2, 13, dtype=torch.bool)
    if padding:
        real[0, 9:] = False
    arguments = dict(attention_mask=real.long()) if padding else {}
    expected, found = (model(x, **arguments).logits[real] for model in pair)
    assert_close(found, expected, 1e-5, "logits")


def part(name: str, **settings):
    return dict(COMMON, sliding_window=5, query_pre_attn_scalar=16, attn_logit_softcapping=2.0, **settings)


@pytest.mark.parametrize("padding", [None, "right", "left"])
def test_cross_attention_and_windows_of_an_encoder(padding):
    """T5Gemma: windows in the encoder (W keys on each side) and the decoder, none in its cross-attention."""
    if not hasattr(transformers, "T5GemmaForConditionalGeneration"):
        pytest.skip(f"transformers {transformers.__version__} has no T5Gemma")
    kinds = ["sliding_attention", "full_attention"]
    pair = []
    for implementation in ("eager", NAME):
        torch.manual_seed(0)
        config = transformers.T5GemmaConfig(
            encoder=part("encoder", layer_types=kinds), vocab_size=VOCAB, pad_token_id=0, bos_token_id=1,
            decoder=part("decoder", layer_types=kinds, cross_attention_hidden_size=64), dropout_rate=0.0,
        )  # fmt: skip
        config._attn_implementation = implementation
        pair.append(transformers.T5GemmaForConditionalGeneration(config).eval())
    x, decoded = tokens(2, 15), tokens(2, 11)
    arguments = {}
    if padding is not None:
        mask = torch.ones_like(x)
        mask[0, 9:] = 0
        arguments["attention_mask"] = mask if padding == "right" else mask.flip(1)
    expected, found = (model(x, decoder_input_ids=decoded, **arguments).logits for model in pair)
    assert_close(found, expected, 1e-5, "logits")


LOSS_KEYWORDS = {
    "shift_labels": lambda x: torch.nn.functional.pad(x[:, 1:], (0, 1), value=-100),
    "num_items_in_batch": lambda x: 16,
    **{name: lambda x: True for name in ("return_token_accuracy", "use_token_scaling", "return_predicted_tokens")},
    **{
        name: lambda x: 1.0
        for name in ("temperature", "label_smoothing", "lse_square_scale", "final_logit_softcapping")
    },
    "ignore_index": lambda x: 3,
    "reduction": lambda x: "mean",
    "accum_dtype": lambda x: torch.float32,
}


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4's losses know fewer keywords")
@pytest.mark.parametrize("keyword", LOSS_KEYWORDS)
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_keywords_of_losses_are_taken(name, keyword):
    eager, ours, tolerance = make_pair(name)
    x = tokens(2, 9)
    arguments = {keyword: LOSS_KEYWORDS[keyword](x)}
    expected, found = (model(x, labels=x, **arguments).loss for model in (eager, ours))
    assert_close(found, expected, tolerance, "loss")


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4's Gemma 3 needs images to train")
def test_text_of_a_model_that_lets_images_see_each_other():
    """token_type_ids of 0 are text: causal. Neighbours of 1 are an image, whose tokens see each other, also beyond the
    window of 5; on the right of the second row lies padding."""
    pair = []
    for implementation in ("eager", NAME):
        torch.manual_seed(0)
        vision = dict(
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
        config = transformers.Gemma3Config(
            text_config=dict(COMMON, sliding_window=5, query_pre_attn_scalar=16), vision_config=vision,
            mm_tokens_per_image=4, image_token_index=VOCAB - 1, boi_token_index=VOCAB - 2, eoi_token_index=VOCAB - 3,
        )  # fmt: skip
        config._attn_implementation = implementation
        pair.append(transformers.Gemma3ForConditionalGeneration(config).train())
    x = tokens(2, 11).clamp_max(VOCAB - 4)
    kinds = torch.zeros_like(x)
    expected, found = (model(x, token_type_ids=kinds, labels=x).logits for model in pair)
    assert_close(found, expected, 1e-5, "logits")
    kinds[:, 2:9], kinds[1, 5] = 1, 0
    real = torch.ones_like(x)
    real[1, 8:] = 0
    for mask in (None, real):
        for model in pair:
            model.zero_grad()
        expected, found = (model(x, token_type_ids=kinds, labels=x, attention_mask=mask).logits for model in pair)
        keep = real.bool() if mask is not None else torch.ones_like(real, dtype=torch.bool)
        assert_close(found[keep], expected[keep], 1e-5, "logits")
        dout = torch.randn_like(expected) * keep[..., None]
        expected.backward(dout)
        found.backward(dout)
        assert_same_gradients(gradients(pair[1]), gradients(pair[0]), 1e-5)


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 makes PaliGemma's mask in the model")
def test_a_prefix_whose_tokens_see_each_other():
    """PaliGemma: token_type_ids of 0 are the prefix, 1 the answer. The prefix ends elsewhere in each row."""
    pair = []
    for implementation in ("eager", NAME):
        torch.manual_seed(0)
        config = transformers.PaliGemmaConfig(
            text_config=dict(COMMON, model_type="gemma"), image_token_index=VOCAB - 1, projection_dim=64,
            vision_config=dict(
                model_type="siglip_vision_model", hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, image_size=28, patch_size=14,
            ),
        )  # fmt: skip
        config._attn_implementation = implementation
        pair.append(transformers.PaliGemmaForConditionalGeneration(config).train())
    x = tokens(2, 11).clamp_max(VOCAB - 4)
    kinds = (torch.arange(11) >= torch.tensor([[4], [7]])).long()
    real = torch.ones_like(x)
    real[1, :3] = 0
    for mask in (torch.ones_like(x), real):
        for model in pair:
            model.zero_grad()
        arguments = dict(token_type_ids=kinds, labels=x, attention_mask=mask)
        expected, found = (model(x, **arguments).logits for model in pair)
        assert_close(found[mask.bool()], expected[mask.bool()], 1e-5, "logits")
        dout = torch.randn_like(expected) * mask[..., None]
        expected.backward(dout)
        found.backward(dout)
        assert_same_gradients(gradients(pair[1]), gradients(pair[0]), 1e-5)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_pattern_that_is_refused_is_refused_when_compiled(fullgraph):
    config = transformers.LlamaConfig(**COMMON)
    config._attn_implementation = NAME
    name = "inputs_embeds" if VERSION >= (5, 0) else "input_embeds"
    arguments = {"config": config, "attention_mask": None, "past_key_values": None}

    def mask(h, extra):
        more = {name: h} if VERSION >= (5, 0) else {name: h, "cache_position": torch.arange(8)}
        return h + 1, masking_utils.create_causal_mask(**arguments, **more, **extra) is None

    blocks = torch.tensor([[-1, -1, 0, 0, -1, 1, 1, -1]])
    extras = [{"or_mask_function": lambda b, h, q, k: q == k}]
    if VERSION >= (5, 0):
        extras += [{"and_mask_function": lambda b, h, q, k: q == k}]
        extras += [{"block_sequence_ids": blocks}] * fullgraph  # else the frame runs eagerly, which serves them
    for extra in extras:
        torch._dynamo.reset()
        compiled = torch.compile(mask, fullgraph=fullgraph, backend="eager")
        expected = torch._dynamo.exc.Unsupported if fullgraph else ValueError
        with pytest.raises(expected, match="Observed exception" if fullgraph else "mask must be causal"):
            compiled(torch.zeros(1, 8, 64), extra)
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.exhaustive), True])
def test_two_graphs_serve_every_length(packed):
    torch._dynamo.reset()
    eager, ours, _ = make_pair("llama", torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, backend=counter, dynamic=True, fullgraph=True)
    for seqlen in (10, 14, 18, 22, 31):
        x, lengths = tokens(1, seqlen), (4, seqlen - 4) if packed else (seqlen,)
        arguments = dict(position_ids=packed_positions(lengths)[None]) if packed else {}
        with torch.no_grad():
            found = compiled(x, use_cache=False, **arguments).logits
        assert_close(found, eager_per_sequence(eager, x, (lengths,)), 1e-5, "logits")
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_cu_seq_lens_cut_packed_rows(dtype):
    eager, ours, tolerance = make_pair("gpt_oss")
    x = tokens(1, 17)
    cu = torch.tensor([0, 5, 14, 17], dtype=dtype)
    found = ours(
        x, position_ids=packed_positions(LENGTHS[0])[None], use_cache=False,
        cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=9, max_length_k=torch.tensor(9),
    ).logits  # fmt: skip
    assert_close(found, eager_per_sequence(eager, x, LENGTHS[:1]), tolerance, "logits")


def make_padded_pair(name: str):
    """In fp64 most models' eager attention is NaN for a row that sees nothing, as it turns to fp32 for the softmax."""
    if name == "gpt_oss":
        return make_pair(name)
    return *make_pair(name, torch.float32)[:2], 1e-5


@pytest.mark.parametrize("dtype", [torch.bool, torch.long], ids=["bool", "int"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_equals_eager(name, side, dtype):
    eager, ours, tolerance = make_padded_pair(name)
    x, real = padded(side, dtype)
    results = []
    for model in (eager, ours):
        logits = model(x, attention_mask=real).logits
        (logits * weights(logits))[real.bool()].sum().backward()
        results.append((logits[real.bool()], gradients(model)))
    (expected, expected_gradients), (found, found_gradients) = results
    assert_close(found, expected, tolerance, "logits of real tokens")
    assert_same_gradients(found_gradients, expected_gradients, 10 * tolerance)


@pytest.mark.skipif(VERSION < (5, 0), reason="transformers 4 does not run decoders as encoders (is_causal=False)")
@pytest.mark.parametrize("name", ["gpt_oss", "llama", "mistral"])
def test_decoder_as_encoder_equals_eager(name):
    eager, ours, tolerance = make_padded_pair(name)
    x, real = padded("right")
    for arguments in ({}, {"attention_mask": real}):
        expected, found = (model(x, is_causal=False, use_cache=False, **arguments).logits for model in (eager, ours))
        keep = real.bool() if arguments else torch.ones_like(real, dtype=torch.bool)
        assert_close(found[keep], expected[keep], tolerance, "logits")
    assert (expected - eager(x, attention_mask=real, use_cache=False).logits).abs().max() > 1e-3
