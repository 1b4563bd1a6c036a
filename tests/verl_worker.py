"""verl's actor worker as main_ppo builds it, for tests and benchmarks: FSDP2 over all ranks, log-probs, gradients."""

from __future__ import annotations

import torch
from torch import Tensor


class VerlWorker:
    """``TrainingWorker`` with FSDP2. The process group is the caller's.

    Args:
        folder: of a checkpoint. attention: attn_implementation.
        dtype: what FSDP2 hands to the layers, torch.bfloat16 or torch.float32; it reduces in fp32.
        ranks: that share every row (Ulysses). packed: verl's use_remove_padding.
        tail: fill packed rows up to a multiple of 64 tokens (verl's pad_to_length).

    Layers are recomputed in the backward, as by verl's default.
    """

    def __init__(
        self, folder, attention: str, dtype: torch.dtype = torch.bfloat16, *, ranks: int = 1, packed=True, tail=False
    ):
        from verl.workers.config import FSDPEngineConfig, FSDPOptimizerConfig, HFModelConfig, TrainingWorkerConfig
        from verl.workers.engine_workers import TrainingWorker

        name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
        self.packed = packed
        config = TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=str(folder),
                override_config={"attn_implementation": attention},
                use_remove_padding=packed,
                load_tokenizer=False,
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                mixed_precision={"param_dtype": name, "reduce_dtype": "fp32", "buffer_dtype": "fp32"},
                use_torch_compile=False,
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=1,  # ``step`` says it for each batch
                pad_to_length=tail,
                pad_to_length_bucket=64,
                ulysses_sequence_parallel_size=ranks,
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-3, total_training_steps=1),
        )
        worker = TrainingWorker(config)
        worker.reset()
        self.engine = worker.engine

    def step(self, ids: list[Tensor], weights: list[Tensor], micro_batch: int | None = None) -> list[Tensor]:
        """Forward and backward of the weighted sum of log-probs, ``micro_batch`` samples at a time (default: all).

        ids, weights: (T,) each; a weight of a sample's last token counts for nothing if it is 0. Gradients add up.
        Returns each sample's log-probs of its next tokens, (T,), on the device.
        """
        from verl.utils import tensordict_utils as tu

        tensors = {
            "input_ids": _nested(ids),
            "position_ids": _nested([torch.arange(len(x)) for x in ids]),
            "loss_mask": _nested([torch.ones(len(x)) for x in ids]),
            "weight": _nested(weights),
        }
        options = {
            "use_remove_padding": self.packed,
            "use_dynamic_bsz": False,
            "micro_batch_size_per_gpu": micro_batch or len(ids),
            "temperature": 1.0,
            "pad_token_id": 0,
        }
        found = []

        def loss(model_output, data, dp_group=None):
            own = model_output["log_probs"]
            found.extend(x.detach() for x in own.unbind())
            return (own.values() * data["weight"].values()).sum(), {}

        with self.engine.train_mode(zero_grad_on_exit=False):
            self.engine.forward_backward_batch(tu.get_tensordict(tensors, options), loss, forward_only=False)
        return found

    def zero(self) -> None:
        self.engine.optimizer_zero_grad()

    def gradients(self) -> dict[str, Tensor]:
        """Name -> whole fp32 gradient on the CPU. FSDP2 has averaged over the ranks that do not share a row."""
        return {name: x.grad.full_tensor().float().cpu() for name, x in self.engine.module.named_parameters()}


def _nested(rows: list[Tensor]) -> Tensor:
    return torch.nested.as_nested_tensor(list(rows), layout=torch.jagged)
