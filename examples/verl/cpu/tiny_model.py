"""Tiny random checkpoints, small enough to train on two cores, on which a mistake in the attention shows.

The sinks are spread from -2 to 4 and the window is 8 tokens, so ignoring either changes the probabilities by percents.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 128
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def write_gpt_oss(folder: Path) -> None:
    """Write a gpt-oss with one sliding and one full layer: 8 query heads, 2 kv heads, head dimension 16."""
    config = GptOssConfig(
        num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        **TOKEN_IDS,
    )
    torch.manual_seed(0)
    _write(GptOssForCausalLM(config), folder)


def write_llama(folder: Path) -> None:
    """Write a Llama, which has no sinks and no window, of the same size."""
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        hidden_size=64,
        intermediate_size=64,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        **TOKEN_IDS,
    )
    torch.manual_seed(0)
    _write(LlamaForCausalLM(config), folder)


def _write(model: PreTrainedModel, folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                heads = parameter.numel()
                parameter.copy_(torch.linspace(-2.0, 4.0, heads)[torch.randperm(heads)])
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 0.15)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of words w4 to w127 beside a checkpoint."""
    words = {f"w{i}": i for i in range(len(SPECIAL), VOCABULARY)}
    tokenizer = Tokenizer(WordLevel({**SPECIAL, **words}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    wrapped.save_pretrained(folder)
