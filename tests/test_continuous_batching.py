"""transformers' continuous batching gives generate()'s tokens for each request; what it cannot do right is refused."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from hf_models import NAME, make_pair, tokens, transformers
from processes import ROOT, python
from transformers import GenerationConfig

from triton_attention_sink_hf import attention_sink
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

api = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")
ContinuousBatchingConfig = getattr(transformers, "ContinuousBatchingConfig", None)
if ContinuousBatchingConfig is None:
    pytest.skip("this transformers has no ContinuousBatchingConfig", allow_module_level=True)

# some versions ask for "paged|" + name; later ones refuse every registered name unless it is set after their gate
PREFIXED = hasattr(api.ContinuousBatchingManager, "switch_to_paged_attn")
LENGTHS, NEW = (3, 17, 9, 12), 8


def batched(model, prompts, max_batch_tokens: int) -> list:
    """Results in the order of the prompts."""
    generation = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=-1)
    batching = ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=max_batch_tokens, return_logprobs=True)
    if PREFIXED:
        return list(model.generate_batch(prompts, generation, batching, warmup=False).values())
    batching.auto_switch_to_flash = False
    model.set_attn_implementation("paged|eager")
    manager = model.init_continuous_batching(generation, batching)
    model.set_attn_implementation(NAME)
    manager.start()
    try:
        names, found = manager.add_requests(prompts, max_new_tokens=NEW), {}
        while len(found) < len(prompts):
            result = manager.get_result(timeout=1)
            assert result is not None or manager.is_running()
            if result is not None and result.is_finished():
                found[result.request_id] = result
    finally:
        manager.stop(block=True)
    return [found[name] for name in names]


@pytest.mark.parametrize("max_batch_tokens", [64, 8], ids=["whole prompts", "chunked prefill"])
@pytest.mark.parametrize("name", ["llama", "gpt_oss"])
def test_tokens_are_those_of_generate(name, max_batch_tokens):
    eager, ours, _ = make_pair(name, torch.float32)
    prompts = [tokens(n).tolist() for n in LENGTHS]
    results = batched(ours, prompts, max_batch_tokens)
    if PREFIXED and name == "gpt_oss":
        assert all("needs a later transformers" in str(result.error) for result in results)
        return
    assert ours.config._attn_implementation == NAME
    for prompt, result in zip(prompts, results, strict=True):
        expected = eager.generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
        assert result.error is None
        assert result.generated_tokens == expected[0, len(prompt) :].tolist()
        # what a trainer gets for the same tokens
        logits = ours(expected).logits[0, len(prompt) - 1 : -1]
        trained = logits.log_softmax(-1).gather(1, expected[0, len(prompt) :, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(result.logprobs), trained, rtol=1e-4, atol=1e-4)


# One step of TRL's GRPO, with a completion's reward its number of different tokens.
GRPO = """
import sys, torch
from datasets import Dataset
from hf_models import make_pair, tokens
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
import triton_attention_sink_hf

_, model, _ = make_pair("llama", torch.float32)
words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(97)}, unk_token="t2"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
words = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="t0", bos_token="t1", eos_token="t3", unk_token="t2"
)
prompts = [" ".join(f"t{x}" for x in tokens(n).tolist()) for n in (5, 12, 9, 7)]
arguments = GRPOConfig(
    output_dir=sys.argv[1], max_steps=1, per_device_train_batch_size=4, num_generations=2, max_completion_length=8,
    use_transformers_continuous_batching=True, report_to="none", use_cpu=True, bf16=False, save_strategy="no",
    logging_steps=1,
)
trainer = GRPOTrainer(
    model=model, args=arguments, train_dataset=Dataset.from_dict({"prompt": prompts}), processing_class=words,
    reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
)
trainer.train()
assert model.config._attn_implementation == "triton_attention_sink"
log = trainer.state.log_history[0]
assert log["completions/mean_length"] > 1 and 0 < log["grad_norm"] < 1e3, log
"""


@pytest.mark.skipif(not PREFIXED, reason="this transformers refuses registered names in generate_batch")
def test_grpo_rolls_out_by_continuous_batching(tmp_path):
    apart = Path(sys.prefix) / "trl"  # where `make test` installs TRL
    if importlib.util.find_spec("trl") is None and not apart.is_dir():
        pytest.skip("TRL is not installed (`make test` does it)")
    python("-c", GRPO, tmp_path, path=(ROOT, ROOT / "tests", apart))


@pytest.mark.parametrize("window", [None, 6])
def test_one_new_token_a_request_in_pages(window):
    """block_table, k_cache and v_cache, as transformers 5.24 hands them to kernels with "flash" in their name."""
    heads, heads_k, d, page, lengths = 4, 2, 16, 4, (9, 1, 14)
    old = [[torch.randn(n, heads_k, d) for n in lengths] for _ in range(2)]
    table = torch.tensor([[5, 0, 2, -1], [7, -1, -1, -1], [1, 8, 3, 6]], dtype=torch.int32)
    caches = [torch.full((9, page, heads_k, d), float("nan")) for _ in range(2)]
    for cache, rows in zip(caches, old, strict=True):
        for b, row in enumerate(rows):
            for j in range(lengths[b]):
                cache[table[b, j // page], j % page] = row[j]
    q, k, v = (torch.randn(1, n, 3, d) for n in (heads, heads_k, heads_k))
    sinks = torch.linspace(-3, 3, heads)
    cu_k = torch.tensor([0, 10, 12, 27])
    module = torch.nn.Module()
    out, _ = attention_forward(
        module, q, k, v, None, s_aux=sinks, sliding_window=window, cu_seq_lens_q=torch.arange(4), cu_seq_lens_k=cu_k,
        block_table=table, k_cache=caches[0], v_cache=caches[1], write_index=[], read_index=[], logits_indices=cu_k,
    )  # fmt: skip
    for b in range(3):
        keys, values = (torch.cat([rows[b], new[0, :, b][None]])[None] for rows, new in zip(old, (k, v), strict=True))
        expected = attention_sink(
            q[:, :, b : b + 1].transpose(1, 2),
            keys,
            values,
            sinks,
            window_size=(-1 if window is None else window - 1, 0),
        )
        torch.testing.assert_close(out[:, b : b + 1], expected)


def test_a_cache_without_its_indices_is_refused():
    q = torch.randn(1, 2, 3, 16)
    with pytest.raises(ValueError, match="cache must be None"):
        attention_forward(torch.nn.Module(), q, q, q, None, cache=object())


def test_padding_in_a_batch_is_refused():
    q, cu = torch.randn(1, 2, 3, 16), torch.tensor([0, 3])
    real = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="attention_mask must be None in continuous batching"):
        attention_forward(
            torch.nn.Module(), q, q, q, real, write_index=[], cu_seq_lens_q=cu, cu_seq_lens_k=cu
        )  # fmt: skip
