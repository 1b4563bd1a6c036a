"""Generation and compiled models: eager's tokens from every cache, and one graph."""

import pytest
import torch
from hf_models import CAUSAL, LENGTHS, VERSION, assert_close, make_pair, packed_positions, padded, tokens, transformers


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
