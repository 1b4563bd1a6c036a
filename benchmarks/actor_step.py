"""One step of an actor on a packed micro-batch: a random gpt-oss, a batch, and the workers that can take the step."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))  # verl_worker.py
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLASH_ATTENTION_4 = "flash_attention_4"
SHARES = (0.05, 0.37, 0.02, 0.21, 0.09, 0.01, 0.17, 0.08)  # of a micro-batch's tokens, per sample


def write_model(folder: Path, smoke: bool) -> int:
    """Write a random checkpoint; return its vocabulary size.

    Its fp32 weights are exact in bf16, so that errors are of the computation, not of a cast.
    """
    from transformers import AutoModelForCausalLM, GptOssConfig

    size = dict(
        num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=8, num_key_value_heads=2,
        head_dim=16, sliding_window=8,
    ) if smoke else dict(
        num_hidden_layers=4, hidden_size=2880, intermediate_size=720, num_attention_heads=64, num_key_value_heads=8,
        head_dim=64, sliding_window=128,
    )  # fmt: skip
    kinds = ["sliding_attention", "full_attention"] * (size["num_hidden_layers"] // 2)
    config = GptOssConfig(
        **size, layer_types=kinds, num_local_experts=2, num_experts_per_tok=2, vocab_size=128 if smoke else 1024,
        max_position_embeddings=2**20, rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    scale = 1.1 / math.sqrt(config.hidden_size)  # queries and keys of about 1, so that attention is not uniform
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                heads = parameter.numel()
                parameter.copy_(torch.linspace(-10.0, 20.0, heads)[torch.randperm(heads)])
            elif "norm" in name:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else scale)
            parameter.copy_(parameter.bfloat16())
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)
    return config.vocab_size


def uneven(tokens: int) -> list[int]:
    """Lengths of the samples in a micro-batch of that many tokens."""
    lengths = [max(int(share * tokens), 1) for share in SHARES]
    lengths[1] += tokens - sum(lengths)
    return lengths


class Batch:
    """Random samples: ids (length,), and the weight of each position's log-prob in the loss (0 for a sample's last)."""

    def __init__(self, lengths: list[int], vocabulary: int):
        generator = torch.Generator().manual_seed(1)
        self.ids = [torch.randint(3, vocabulary, (n,), generator=generator) for n in lengths]
        self.weights = [torch.randn(n, generator=generator) / math.sqrt(sum(lengths)) for n in lengths]
        for weight in self.weights:
            weight[-1] = 0.0

    def single(self) -> list[Batch]:
        """One batch per sample."""
        parts = []
        for ids, weight in zip(self.ids, self.weights, strict=True):
            part = object.__new__(Batch)
            part.ids, part.weights = [ids], [weight]
            parts.append(part)
        return parts


class HuggingFaceWorker:
    """A model with activation checkpointing. bf16: parameters in bf16 under autocast, as FSDP2 hands them out."""

    def __init__(self, folder: Path, attention: str, dtype: torch.dtype = torch.bfloat16):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=dtype)
        self.model = self.model.to(DEVICE, dtype).train()
        self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.attention, self.dtype = attention, dtype

    def step(self, batch: Batch) -> Tensor:
        """Forward and backward of one packed row; gradients add up. Returns the log-probs (T,)."""
        ids, weights = torch.cat(batch.ids).to(DEVICE), torch.cat(batch.weights).to(DEVICE)
        positions = torch.cat([torch.arange(len(x)) for x in batch.ids]).to(DEVICE)[None]
        told = self.packing(batch) if self.attention == FLASH_ATTENTION_4 else {}
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.model(ids[None], position_ids=positions, attention_mask=None, use_cache=False, **told)
        logits = output.logits[0]
        log_probs = -torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1), reduction="none")
        (log_probs * weights).sum().backward()
        return log_probs.detach()

    def packing(self, batch: Batch) -> dict:
        """transformers' keywords for packed rows. transformers itself derives the longest length from position_ids as a
        tensor, which flash-attn-4 refuses."""
        lengths = torch.tensor([0, *map(len, batch.ids)])
        ends, longest = lengths.cumsum(0).int().to(DEVICE), int(lengths.max())
        return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}

    def zero(self) -> None:
        self.model.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, Tensor]:
        """Name -> fp32 gradient on the CPU."""
        return {name: x.grad.float().cpu() for name, x in self.model.named_parameters()}


class VerlActor:
    """verl's actor worker on one rank: FSDP2, bf16, activation checkpointing, packed rows."""

    def __init__(self, folder: Path, attention: str):
        from verl_worker import VerlWorker

        self.worker = VerlWorker(folder, attention)
        self.zero, self.gradients = self.worker.zero, self.worker.gradients

    @staticmethod
    def start() -> None:
        """Raise ImportError unless verl can be used here; on a CPU, through the platform of the demo."""
        if DEVICE == "cpu":
            sys.path.insert(0, str(ROOT / "examples" / "verl" / "demo"))
            os.environ |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
            os.environ["VERL_USE_EXTERNAL_MODULES"] = "verl_cpu_platform"
        os.environ |= {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29511")
        import verl  # noqa: F401
        from verl.workers.engine_workers import TrainingWorker  # noqa: F401

    def step(self, batch: Batch) -> Tensor:
        return torch.cat(self.worker.step(batch.ids, batch.weights))
