"""generate() with every cache and strategy gives eager's tokens, on a CPU and on a GPU.

Prompts of unequal lengths, padded on the left, that pass the sliding window; strategies for one prompt take one.
"""

import pytest
import torch
from hf_models import VERSION, make_pair, padded, tokens, transformers

from triton_attention_sink_hf import implementations, interface

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy on -inf, when interpreted

NEW = 9
# name -> (one prompt only, options of generate)
STRATEGIES = {
    "dynamic cache": (False, {}),
    "static cache": (False, dict(cache_implementation="static")),
    "no cache": (False, dict(use_cache=False)),
    "beams": (False, dict(num_beams=3)),
    "beams, static cache": (False, dict(num_beams=3, cache_implementation="static")),
    "prompt lookup": (True, dict(prompt_lookup_num_tokens=3, eos_token_id=1)),
    "chunked prefill": (False, dict(prefill_chunk_size=4)),
    "chunked prefill, static cache": (False, dict(prefill_chunk_size=4, cache_implementation="static")),
    "quantised cache": (
        False,
        dict(cache_implementation="quantized", cache_config=dict(backend="quanto", nbits=4, q_group_size=16)),
    ),
}


PLACES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def models(name: str, device: str):
    eager, ours, _ = make_pair(name, torch.float32)
    return eager.to(device), ours.to(device)


def prompts(one: bool, device: str) -> dict:
    x, real = padded("left")
    if one:
        x = tokens(1, 4).repeat(1, 3)  # repeats itself, so that a lookup finds something
        real = torch.ones_like(x)
    return dict(input_ids=x.to(device), attention_mask=real.to(device), max_new_tokens=NEW, do_sample=False)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_tokens_are_eagers(name, strategy, device):
    one, options = STRATEGIES[strategy]
    if strategy == "quantised cache":
        pytest.importorskip("optimum.quanto", reason="quantised caches need optimum-quanto")
    eager, ours = models(name, device)
    given = prompts(one, device)
    expected = eager.generate(**given, **options)
    assert torch.equal(ours.generate(**given, **options), expected)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_assisted_decoding(name, device):
    """Several candidates are checked at once, and the cache is cropped where they are refused."""
    eager, ours = models(name, device)
    torch.manual_seed(1)
    assistant, _ = models("llama", device)
    given = prompts(True, device)
    expected = eager.generate(**given)
    assert torch.equal(ours.generate(**given, assistant_model=assistant), expected)
    assert torch.equal(eager.generate(**given, assistant_model=ours), expected)


@pytest.mark.parametrize("device", PLACES)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_a_conversation_goes_on_from_its_cache(name, static, device):
    """The second prompt's tokens are several queries on a cache that is in use."""
    eager, ours = models(name, device)
    found = []
    for model in (eager, ours):
        if static:
            cache = transformers.StaticCache(config=model.config, max_cache_len=40)
        else:
            cache = transformers.DynamicCache(config=model.config)
        x = tokens(2, 7).to(device)
        for _ in range(2):
            x = model.generate(x, past_key_values=cache, max_new_tokens=5, do_sample=False)
            x = torch.cat([x, tokens(2, 4).to(device)], 1)
        found.append(x)
    assert torch.equal(*found)


@pytest.mark.parametrize("strategy", ["dynamic cache", "chunked prefill, static cache"])
def test_interpreted_kernels_give_eagers_tokens(strategy, monkeypatch):
    """On a CPU, where "auto" now takes what it takes on a GPU: the decode kernels for all but whole prompts."""
    if torch.cuda.is_available():
        pytest.skip("Triton is not interpreted on a machine with a GPU")
    real, taken = implementations.unsupported_reason, []

    def reason(name, call, automatic=False):
        found = real(name, call)
        if found is None and automatic and hasattr(implementations.load(name), "slower_reason"):
            found = implementations.load(name).slower_reason(call)
        if found is None:
            taken.append(name)
        return found

    for module in (implementations, interface):
        monkeypatch.setattr(module, "unsupported_reason", reason)
    eager, ours = models("gpt_oss", "cpu")
    x, real_tokens = padded("left")
    given = dict(input_ids=x[:2], attention_mask=real_tokens[:2], max_new_tokens=4, do_sample=False)
    expected = eager.generate(**given)
    assert torch.equal(ours.generate(**given, **STRATEGIES[strategy][1]), expected)
    assert "triton_decode" in taken


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["gpt_oss", "llama"])
def test_compiled_decode_steps_in_cuda_graphs(name):
    if name == "gpt_oss" and VERSION < (5, 0):
        pytest.skip("transformers 4's gpt-oss experts loop over data: no whole graph under any attention")
    torch._dynamo.reset()
    eager, ours = models(name, "cuda")
    given = prompts(False, "cuda")
    compiled = transformers.CompileConfig(fullgraph=True, mode="reduce-overhead")
    expected = eager.generate(**given)
    found = ours.generate(**given, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, expected)
    torch._dynamo.reset()
