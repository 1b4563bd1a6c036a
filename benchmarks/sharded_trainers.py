"""Three ways to the log-probs and gradients of the same batch: one device, FSDP2 with Ulysses, and verl's actor worker.

A batch is a list of rows; a row is a list of samples to pack. Without sequence parallelism each of n ranks takes every
n-th row. With it all ranks share each row, one row after the other. All three ways recompute activations.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

ATTENTION = "triton_attention_sink"
ROOT = Path(__file__).resolve().parent.parent
CPU_PLATFORM = ROOT / "examples" / "verl" / "demo"
sys.path.append(str(ROOT / "tests"))  # verl_worker.py


@dataclass(frozen=True)
class Size:
    """A gpt-oss. As many experts as each token takes, so that no rounding can send a token to another one."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    window: int
    experts: int
    vocabulary: int

    def write(self, folder: Path) -> None:
        """Write a checkpoint with random weights and sinks from -2 to 4, and a tokenizer, which verl asks for."""
        from transformers import GptOssConfig, GptOssForCausalLM

        sys.path.insert(0, str(CPU_PLATFORM))
        from tiny_model import write_tokenizer

        torch.manual_seed(0)
        config = GptOssConfig(
            num_hidden_layers=self.layers,
            layer_types=["sliding_attention", "full_attention"] * (self.layers // 2),
            sliding_window=self.window,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            hidden_size=self.hidden,
            intermediate_size=self.hidden,
            num_local_experts=self.experts,
            num_experts_per_tok=self.experts,
            vocab_size=self.vocabulary,
            max_position_embeddings=2**20,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            architectures=["GptOssForCausalLM"],
        )
        model = GptOssForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("sinks"):
                    parameter.copy_(torch.linspace(-2.0, 4.0, self.heads))
                elif name.endswith("bias") or "experts" in name:
                    parameter.normal_(0.0, self.hidden**-0.5 / 2)
        model.save_pretrained(folder)
        write_tokenizer(folder)


@dataclass(frozen=True)
class Sample:
    """ids (T,); weights (T,) of each next token's log-prob in the loss, 0 at the end."""

    ids: Tensor
    weights: Tensor


def batch(rows: list[list[int]], vocabulary: int, seed: int = 1) -> list[list[Sample]]:
    """Random samples of these lengths, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def sample(length: int) -> Sample:
        ids = torch.randint(4, vocabulary, (length,), generator=generator)
        weights = torch.randn(length, generator=generator)
        return Sample(ids, weights * (torch.arange(length) < length - 1))

    return [[sample(length) for length in row] for row in rows]


class OneDevice:
    """Plain transformers, every row on this rank's device."""

    sp = 1

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype):
        self.device = device
        self.model = _load(folder, device)
        assert dtype == torch.float32

    def rows(self, rows: list) -> list:
        return rows

    def step(self, rows: list[list[Sample]]) -> list[Tensor]:
        """Forward and backward of ``rows(rows)``, a row at a time. Log-probs of each row's tokens, (T,) on the CPU."""
        self.model.zero_grad()
        return [self._row(row) for row in self.rows(rows)]

    def _row(self, row: list[Sample]) -> Tensor:
        own = _packed(row, 1, 0, self.device)
        log_probs = _log_probs(self.model, own)
        (log_probs * own["weights"]).sum().backward()
        return log_probs.detach().cpu()

    def gradients(self) -> dict[str, Tensor]:
        """Of the loss over all rows of all ranks, whole, on the CPU."""
        return {name: parameter.grad.cpu() for name, parameter in self.model.named_parameters()}


class Fsdp2(OneDevice):
    """FSDP2 over all ranks and ``with sequence_parallel(group)``."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, sp: int):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.device, self.sp = device, sp
        self.model = _load(folder, device)
        options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),))}
        if dtype != torch.float32:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for layer in self.model.model.layers:
            fully_shard(layer, **options)
        fully_shard(self.model, **options)

    def rows(self, rows: list) -> list:
        return rows if self.sp > 1 else rows[dist.get_rank() :: dist.get_world_size()]

    def _row(self, row: list[Sample]) -> Tensor:
        from triton_attention_sink_hf import sequence_parallel

        if self.sp == 1:
            return super()._row(row)
        own = _packed(row, self.sp, dist.get_rank(), self.device)
        with sequence_parallel(dist.group.WORLD):
            log_probs = _log_probs(self.model, own)
            (log_probs * own["weights"]).sum().backward()
        shards = [torch.empty_like(log_probs) for _ in range(self.sp)]
        dist.all_gather(shards, log_probs.detach())
        return torch.cat(shards)[: sum(len(sample.ids) for sample in row)].cpu()

    def gradients(self) -> dict[str, Tensor]:
        n = dist.get_world_size()  # FSDP has averaged over the ranks
        return {name: (x.grad.full_tensor() * n).cpu() for name, x in self.model.named_parameters()}


class VerlActor(Fsdp2):
    """The worker that verl's trainers build, with its own FSDP2 and ``ulysses_sequence_parallel_size``."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, sp: int):
        from verl_worker import VerlWorker

        self.sp, self.worker = sp, VerlWorker(folder, ATTENTION, dtype, ranks=sp)

    def step(self, rows: list[list[Sample]]) -> list[Tensor]:
        self.worker.zero()
        return [self._row(row) for row in self.rows(rows)]

    def _row(self, row: list[Sample]) -> Tensor:
        found = self.worker.step([sample.ids for sample in row], [sample.weights for sample in row])
        return torch.cat(found).cpu()

    def gradients(self) -> dict[str, Tensor]:
        n = dist.get_world_size() // self.sp  # FSDP has averaged over ranks; verl makes up for those of a row
        return {name: x * n for name, x in self.worker.gradients().items()}


def _load(folder: Path, device: torch.device) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    import triton_attention_sink_hf  # noqa: F401  registers the attention

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=ATTENTION, dtype=torch.float32)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device).train()


def _packed(row: list[Sample], sp: int, rank: int, device: torch.device) -> dict[str, Tensor]:
    """This rank's shard of a row: ids and positions (1, S), labels and weights (S,). Padding is one more sample."""
    total = sum(len(sample.ids) for sample in row)
    shard = -(-total // sp)
    missing = sp * shard - total
    whole = {
        "ids": torch.cat([sample.ids for sample in row])[None],
        "positions": torch.cat([torch.arange(len(sample.ids)) for sample in row])[None],
        "labels": torch.cat([sample.ids.roll(-1) for sample in row]),
        "weights": torch.cat([sample.weights for sample in row]),
    }
    whole = {name: pad(x, (0, missing)) for name, x in whole.items()}
    whole["positions"][:, total:] = torch.arange(missing)
    return {name: x[..., rank * shard : (rank + 1) * shard].to(device) for name, x in whole.items()}


def _log_probs(model: torch.nn.Module, own: dict[str, Tensor]) -> Tensor:
    logits = model(own["ids"], position_ids=own["positions"], use_cache=False).logits[0].float()
    return -torch.nn.functional.cross_entropy(logits, own["labels"], reduction="none")
