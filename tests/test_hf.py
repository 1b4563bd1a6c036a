"""Hugging Face models under ``attn_implementation="triton_attention_sink"`` against their own eager attention.

The truth for packed rows is eager on each sequence alone. Sinks are spread from -10 to 20.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import masking_utils  # noqa: E402

import triton_attention_sink_hf.flash_attention_triton_sink as wrapper  # noqa: E402
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward, attention_mask  # noqa: E402

NAME = "triton_attention_sink"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCAB = 97
COMMON = dict(
    num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None, attention_dropout=0.0,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
# model -> (config class, model class, arguments, relative tolerance in fp64)
MODELS = {
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(sliding_window=5, layer_types=ALTERNATING, **EXPERTS), 1e-10),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, 1e-6),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=5), 1e-6),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM",
        dict(sliding_window=5, layer_types=ALTERNATING, attn_logit_softcapping=2.0, query_pre_attn_scalar=16), 1e-6,
    ),
    "granite_swa": ("GraniteSWAConfig", "GraniteSWAForCausalLM", dict(sliding_window=5, layer_types=ALTERNATING), 1e-5),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig", "MiMoV2FlashForCausalLM",
        dict(sliding_window=5, v_head_dim=24, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=32),
        1e-5,
    ),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM", dict(sliding_window=None), 1e-6),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", {}, 1e-6),
    "gpt_bigcode": (
        "GPTBigCodeConfig", "GPTBigCodeForCausalLM",
        dict(n_embd=64, n_head=4, n_layer=2, n_inner=32, n_positions=64, **dict.fromkeys(NO_DROPOUT, 0.0)), 1e-6,
    ),
    "privacy_filter": (
        "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification",
        dict(sliding_window=4, num_labels=7, **EXPERTS), 1e-5,
    ),
}  # fmt: skip
CAUSAL = [name for name in MODELS if name != "privacy_filter"]


def make_pair(name: str, dtype=torch.float64, **overrides):
    """(eager model, our model, tolerance) with the same random weights; skips what this transformers lacks."""
    config_class, model_class, arguments, tolerance = MODELS[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    arguments = {**COMMON, **arguments, **overrides}
    pair = []
    for implementation in ("eager", NAME):
        config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
        config._attn_implementation = implementation
        if dtype == torch.float64:  # which transformers 5's grouped product does not know
            config._experts_implementation = "eager"
        pair.append(getattr(transformers, model_class)(config).to(dtype).eval())
    eager, ours = pair
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in eager.named_parameters():
        if parameter_name.endswith("sinks"):
            parameter.data = torch.linspace(-10, 20, parameter.numel()).to(parameter)
        elif parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == NAME
    return eager, ours, tolerance


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def weights(logits: torch.Tensor) -> torch.Tensor:
    """A fixed cotangent, the same for the same row of the same shape."""
    return torch.cos(torch.arange(logits.numel(), dtype=logits.dtype)).view(logits.shape)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == expected.shape, f"{what}: {ours.shape} against {expected.shape}"
    error = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def assert_same_gradients(ours, expected, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        if grad.abs().max() > 1e-12:
            assert_close(ours[name], grad, tolerance, f"gradient of {name}")
    sinks = [name for name in expected if name.endswith("sinks")]
    assert all(ours[name].abs().max() > 0 for name in sinks)


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


LENGTHS = ((5, 9, 3), (1, 14, 2))  # two rows of 17 packed tokens


def packed_positions(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


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
    """token_type_ids of 0 are text: causal. A 1 is an image: refused, compiled or not."""
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
    kinds[:, 3:6] = 1
    with pytest.raises(ValueError, match="images"):
        pair[1](x, token_type_ids=kinds, labels=x)


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
        extras += [{"block_sequence_ids": blocks}, {"and_mask_function": lambda b, h, q, k: q == k}]
    for extra in extras:
        torch._dynamo.reset()
        compiled = torch.compile(mask, fullgraph=fullgraph, backend="eager")
        expected = torch._dynamo.exc.Unsupported if fullgraph else ValueError
        with pytest.raises(expected, match="Observed exception" if fullgraph else "mask must be causal"):
            compiled(torch.zeros(1, 8, 64), extra)
    torch._dynamo.reset()


@pytest.mark.parametrize("packed", [False, True])
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


def padded(side: str, dtype=torch.long) -> tuple[torch.Tensor, torch.Tensor]:
    x = tokens(3, 13)
    real = torch.ones(3, 13, dtype=dtype)
    for row, n in enumerate((4, 9, 0)):
        where = slice(0, n) if side == "left" else slice(13 - n, 13)
        real[row, where] = 0
        x[row, where] = 0
    return x, real


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


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", CAUSAL)
def test_generate_gives_eager_tokens(name, cache):
    """Prompts of unequal lengths, past the sliding window; with a batch and with one row, whose mask is all ones."""
    eager, ours, _ = make_pair(name, torch.float32)
    x, real = padded("left")
    for prompt, mask in ((x, real), (x[2:, :3], real[2:, :3])):
        options = dict(attention_mask=mask, max_new_tokens=9, do_sample=False)
        expected = eager.generate(prompt, **options)
        found = ours.generate(prompt, cache_implementation=cache, **options)
        assert torch.equal(found, expected)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt_oss", "llama", "mistral"])
def test_chunks_against_a_cache_equal_one_pass(name, static):
    """Several queries at once on a part-filled cache: causality is aligned to the keys in use."""
    eager, ours, _ = make_pair(name, torch.float32)
    x = tokens(2, 16)
    expected = eager(x).logits
    cache = make_cache(ours.config, static)
    start, found = 0, []
    for n in (3, 4, 1, 5, 1, 2):
        # transformers 4 wants to be told where in the cache the new tokens go
        told = {"cache_position": torch.arange(start, start + n)} if VERSION < (5, 0) else {}
        positions = torch.arange(start, start + n)[None]
        found.append(ours(x[:, start : start + n], past_key_values=cache, position_ids=positions, **told).logits)
        start += n
    assert_close(torch.cat(found, dim=1), expected, 1e-4, "logits")


def make_cache(config, static: bool):
    if static:
        return transformers.StaticCache(config=config, max_cache_len=24)
    return transformers.DynamicCache(config=config)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_compiled_whole_graph(name):
    if name == "gpt_oss" and VERSION < (5, 0):
        pytest.skip("transformers 4's gpt-oss experts loop over data: no whole graph under any attention")
    torch._dynamo.reset()
    _, ours, _ = make_pair(name, torch.float32)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    x = tokens(1, 17)
    positions = packed_positions(LENGTHS[0])[None]
    expected = ours(x, position_ids=positions, use_cache=False).logits
    assert_close(compiled(x, position_ids=positions, use_cache=False).logits, expected, 1e-5, "packed")
    x, real = padded("left")
    expected, found = (model(x, attention_mask=real, use_cache=False).logits for model in (ours, compiled))
    assert_close(found[real.bool()], expected[real.bool()], 1e-5, "padded")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_compiled_decoding_from_a_static_cache(name):
    if name == "gpt_oss" and VERSION < (5, 0):
        pytest.skip("transformers 4's gpt-oss experts loop over data: no whole graph under any attention")
    torch._dynamo.reset()
    eager, ours, _ = make_pair(name, torch.float32)
    x, real = padded("left")
    compile_config = transformers.CompileConfig(backend="eager", fullgraph=True, mode=None)
    compile_config._compile_all_devices = True
    options = dict(attention_mask=real, max_new_tokens=7, do_sample=False)
    expected = eager.generate(x, **options)
    assert torch.equal(
        ours.generate(x, cache_implementation="static", compile_config=compile_config, **options), expected
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    torch._dynamo.reset()


# The two functions on their own.


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
    (dict(indices=torch.zeros(2, 8, 3)), "indices must be None"),
    (dict(sinks=torch.zeros(2, 4, 8, 1)), "sinks must be (Hq,) = (4,), one sink per head"),
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
        with pytest.raises(ValueError, match=r"got blocks of tokens that see each other .* \(images\)"):
            masking_utils.create_causal_mask(**arguments, block_sequence_ids=torch.zeros(1, 8, dtype=torch.long))
        masking_utils.create_causal_mask(**arguments, block_sequence_ids=torch.full((1, 8), -1))
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
