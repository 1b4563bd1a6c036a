"""Small random checkpoints on which a mistake in the attention shows.

The sinks are spread from -2 to 4 and samples are longer than the window, so ignoring either changes the probabilities
by percents.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

# the last five are gpt-oss's marks of a conversation, which rollout engines look for
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


@dataclass(frozen=True)
class Size:
    """What both models share, gpt-oss's window and experts, and the standard deviations of random weights.

    Where every expert serves every token (``experts_per_token`` of as many), no rounding can send a token to another
    expert.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    experts: int
    experts_per_token: int
    vocabulary: int
    positions: int
    dtype: torch.dtype
    weights: float
    embedding: float
    head: float


TINY = Size(2, 64, 8, 2, 16, 8, 4, 2, 128, 512, torch.float32, 0.15, 0.15, 0.15)
# gpt-oss's own head dimension and window, in bf16: what kernels for GPUs are made for
SMALL = Size(4, 512, 16, 2, 64, 128, 4, 4, 1024, 131072, torch.bfloat16, 0.05, 0.5, 0.1)


def write_gpt_oss(folder: Path, size: Size = TINY) -> None:
    """Write a gpt-oss whose layers are sliding and full in turn."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if size is SMALL:  # gpt-oss-20b's: vLLM builds its rotary embedding from these keys and no others
        rope = {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        }
    config = GptOssConfig(
        num_hidden_layers=size.layers,
        layer_types=["sliding_attention", "full_attention"] * (size.layers // 2),
        sliding_window=size.window,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        hidden_size=size.hidden,
        intermediate_size=size.hidden,
        num_local_experts=size.experts,
        num_experts_per_tok=size.experts_per_token,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.positions,
        tie_word_embeddings=False,
        rope_parameters=rope,
        **TOKEN_IDS,
    )
    torch.manual_seed(0)
    _write(GptOssForCausalLM(config), folder, size)


def write_llama(folder: Path, size: Size = TINY) -> None:
    """Write a Llama, which has no sinks and no window, of the same size."""
    config = LlamaConfig(
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        hidden_size=size.hidden,
        intermediate_size=size.hidden,
        vocab_size=size.vocabulary,
        max_position_embeddings=size.positions,
        tie_word_embeddings=False,
        **TOKEN_IDS,
    )
    torch.manual_seed(0)
    _write(LlamaForCausalLM(config), folder, size)


WRITE = {"gpt_oss": write_gpt_oss, "llama": write_llama}


def _write(model: PreTrainedModel, folder: Path, size: Size) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                heads = parameter.numel()
                parameter.copy_(torch.linspace(-2.0, 4.0, heads)[torch.randperm(heads)])
            elif "norm" in name:
                parameter.fill_(1.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, size.embedding)
            elif "lm_head" in name:
                parameter.normal_(0.0, size.head)
            else:
                parameter.normal_(0.0, size.weights)
    model.config.architectures = [type(model).__name__]
    model.to(size.dtype).save_pretrained(folder)
    write_tokenizer(folder, size.vocabulary)


def write_tokenizer(folder: Path, vocabulary: int = TINY.vocabulary) -> None:
    """Write a tokenizer of words w9, w10, ... beside a checkpoint."""
    words = {word: i for i, word in enumerate(SPECIAL)} | {f"w{i}": i for i in range(len(SPECIAL), vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    wrapped.save_pretrained(folder)
