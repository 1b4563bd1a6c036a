"""Two steps of supervised fine-tuning by each host's own trainer on a CPU, recorded so that eager can repeat them.

Run by test_sft.py in processes of its own: ``python sft_runs.py HOST MODEL OUT CASE...``, HOST one of trl, hf, verl. A
case is MODE/ATTENTION. For each, OUT/MODE-ATTENTION.pt holds ``steps``, for every step a list of samples (ids, labels),
labels -100 where no loss is, and ``parameters`` after the last step. Plain SGD, so that a step shows the gradient: Adam
would move every parameter by the learning rate, whatever its gradient.
"""

from __future__ import annotations

import os
import sys
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

OURS, MIXED = "triton_attention_sink", "samples_see_each_other"
LEARNING_RATE, STEPS, BATCH = 0.1, 2, 3
LENGTHS = (5, 19, 12, 7, 3, 30)  # around the window of 8


def samples() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(4, 128, (n,), generator=generator).tolist() for n in LENGTHS]


def register_mixed() -> None:
    """Our attention, told nothing of the samples' boundaries: what the tests must notice."""
    from transformers import AttentionInterface, AttentionMaskInterface

    ours = AttentionInterface()[OURS]
    boundaries = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k")
    AttentionInterface.register(
        MIXED, lambda *args, **kwargs: ours(*args, **{k: v for k, v in kwargs.items() if k not in boundaries})
    )
    AttentionMaskInterface.register(MIXED, AttentionMaskInterface()[OURS])


def cut(inputs: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The samples of what the model was called with: a packed row, or padded rows with a mask."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    if inputs.get("attention_mask") is not None:
        real = inputs["attention_mask"].bool()
        return [(row[keep], label[keep]) for row, label, keep in zip(ids, labels, real, strict=True)]
    starts = [*(inputs["position_ids"][0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    return [(ids[0, a:b], labels[0, a:b]) for a, b in pairwise(starts)]


def loaded(model: Path, attention: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention, dtype=torch.float32)


def recorded(model: torch.nn.Module) -> list:
    """A list that grows by the samples of every forward in training."""
    steps = []

    def record(module, args, kwargs):
        if module.training:
            steps.append(cut({name: x.clone() for name, x in kwargs.items() if isinstance(x, Tensor)}))

    model.register_forward_pre_hook(record, with_kwargs=True)
    return steps


def arguments(out: Path) -> dict:
    return dict(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH, optim="sgd", max_grad_norm=0.0,
        learning_rate=LEARNING_RATE, lr_scheduler_type="constant", report_to="none", use_cpu=True, bf16=False,
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip


def trl(mode: str, attention: str, folder: Path, out: Path) -> dict:
    """mode: packing, padding_free."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    model = loaded(folder, attention)
    model.config.router_aux_loss_coef = model.router_aux_loss_coef = 0.0  # TRL would add it, a loss of the whole batch
    steps = recorded(model)
    options = {"packing": dict(packing=True, max_length=32), "padding_free": dict(padding_free=True, max_length=None)}
    config = SFTConfig(**arguments(out), gradient_checkpointing=True, **options[mode])
    data = Dataset.from_list([{"input_ids": ids} for ids in samples()])
    SFTTrainer(model, config, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(folder)).train()
    return {"steps": steps, "parameters": dict(model.named_parameters())}


def hf(mode: str, attention: str, folder: Path, out: Path) -> dict:
    """mode: flattened (position_ids), flattened_cu_seqlens, padded."""
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        DataCollatorWithFlattening,
        Trainer,
        TrainingArguments,
    )

    model = loaded(folder, attention)
    steps = recorded(model)
    if mode == "padded":
        collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(folder))
    else:
        collator = DataCollatorWithFlattening(return_flash_attn_kwargs=mode == "flattened_cu_seqlens")
    # versions differ in whether the first label, which nothing predicts, counts in the mean
    data = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in samples()]
    Trainer(model, TrainingArguments(**arguments(out)), data_collator=collator, train_dataset=data).train()
    return {"steps": steps, "parameters": dict(model.named_parameters())}


def verl(mode: str, attention: str, folder: Path, out: Path) -> dict:
    """mode: packed, padded (verl's use_remove_padding)."""
    import pandas as pd
    from hydra import compose, initialize_config_module
    from verl.trainer.sft_trainer import SFTTrainer
    from verl.workers.engine_workers import TrainingWorker

    file = out / "chats.parquet"
    words = [" ".join(f"w{i}" for i in ids) for ids in samples()]
    chats = [[{"role": "user", "content": text[:2]}, {"role": "assistant", "content": text}] for text in words]
    pd.DataFrame({"messages": chats}).to_parquet(file)
    overrides = {
        "model.path": folder,
        "+model.override_config.attn_implementation": attention,
        "model.use_remove_padding": mode == "packed",
        "engine.strategy": "fsdp2",
        "+engine.mixed_precision.param_dtype": "fp32",
        "+engine.mixed_precision.reduce_dtype": "fp32",
        "+engine.mixed_precision.buffer_dtype": "fp32",
        "engine.use_torch_compile": False,
        "optim.optimizer": "SGD",
        "optim.lr": LEARNING_RATE,
        "optim.weight_decay": 0.0,
        "optim.clip_grad": 1e9,
        "data.train_files": file,
        "data.train_batch_size": BATCH,
        "data.micro_batch_size_per_gpu": BATCH,
        "data.use_dynamic_bsz": False,
        "data.num_workers": 0,
        "data.ignore_input_ids_mismatch": True,
        "trainer.total_training_steps": STEPS,
        "trainer.logger": "[]",
        "trainer.device": "cpu",
        "trainer.default_local_dir": out / f"checkpoints-{mode}-{attention}",
        "trainer.resume_mode": "disable",
        "checkpoint.save_contents": "[]",
    }
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("sft_trainer_engine", [f"{key}={value}" for key, value in overrides.items()])
    trainer, steps = SFTTrainer(config), []

    class Recorded(TrainingWorker):
        def train_batch(self, data):
            rows = zip(data["input_ids"].unbind(), data["loss_mask"].unbind(), strict=True)
            steps.append([(ids, ids.masked_fill(mask == 0, -100)) for ids, mask in rows])
            return super().train_batch(data)

    trainer.training_client.__class__ = Recorded
    trainer.fit()
    return {
        "steps": steps,
        "parameters": {name: x.full_tensor() for name, x in trainer.engine.module.named_parameters()},
    }


def main(host: str, folder: Path, out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    if host == "verl":
        import verl as plugins  # noqa: F401  loads its plug-ins: the CPU platform, and this package by its entry point
    else:
        import triton_attention_sink_hf  # noqa: F401  the one import
    register_mixed()
    run = {"trl": trl, "hf": hf, "verl": verl}[host]
    for case in cases:
        mode, attention = case.split("/")
        result = run(mode, attention, folder, out)
        result["parameters"] = {name: x.detach().clone() for name, x in result["parameters"].items()}
        torch.save(result, out / f"{mode}-{attention}.pt")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
