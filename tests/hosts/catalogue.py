"""Trainers that can be tried on a CPU: what pip installs, and the command that trains, with this attention by one line.

Every run takes two steps of plain SGD in fp32, each over all samples at once, so the order of the samples is nothing to
know, and a parameter's movement is its gradient. Adam would hide the gradients' size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAME = "triton_attention_sink"
LENGTHS = (5, 19, 12, 7, 3, 30)  # around the tiny model's window of 8


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        attn: the string in the config. packed: all samples in one row, else padded rows.
        model, data, out: folders; ``data`` is what ``write_data`` wrote.
    """

    attn: str
    packed: bool
    model: Path
    data: Path
    out: Path


@dataclass(frozen=True)
class Host:
    """A trainer.

    Attributes:
        packages: names whose versions the table shows, the first the host itself.
        install: lines for ``pip install``, in order. torch is installed before them.
        command: a program of the host's environment, and its arguments.
        attn: what stands in its config.
        line: how the user writes it.
        refused: mode -> a part of the host's own error, where it cannot work.
        model: the tiny model, gpt_oss or llama. stand_ins: modules that it imports, does not use here, and that
            cannot be installed on a CPU: there, but empty. environment: the folder's name, if another host's serves.
    """

    packages: tuple[str, ...]
    install: tuple[tuple[str, ...], ...]
    command: Callable[[Run], list[str | Path]]
    line: str
    attn: str = NAME
    refused: dict[str, str] | None = None
    model: str = "gpt_oss"
    stand_ins: tuple[str, ...] = ()
    environment: str | None = None


def write_data(folder: Path) -> None:
    """The same samples as token ids (ids/train.jsonl) and as conversations (chats/), in the tiny tokenizer's words."""
    ids, chats = [], []
    for sample, length in enumerate(LENGTHS):
        row = [10 + (37 * sample + 11 * i * i + 5 * i) % 110 for i in range(length)]
        words = [f"w{i}" for i in row]
        ids.append({"input_ids": row, "labels": [-100, *row[1:]], "attention_mask": [1] * length})
        turns = (("user", words[:1]), ("assistant", words[1:]))
        chats.append({"messages": [{"role": role, "content": " ".join(text)} for role, text in turns]})
    for name, rows in (("ids", ids), ("chats", chats)):
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(values: dict) -> list[str]:
    return [part for name, value in values.items() for part in (f"--{name}", f"{value}")]


def script(run: Run) -> list[str | Path]:
    packed = ["--packed"] if run.packed else []
    ids = run.data / "ids/train.jsonl"
    named = {"model": run.model, "data": ids, "attn": run.attn, "out": run.out}
    return ["python", HERE / "hf_trainer.py", *options(named), *packed]


def launched(run: Run) -> list[str | Path]:
    return ["accelerate", "launch", "--cpu", "--num_processes", "1", *script(run)[1:]]


def plain_sgd(out: Path) -> dict:
    """Arguments that all hosts on top of the Hugging Face Trainer share."""
    return {
        "output_dir": out, "max_steps": 2, "per_device_train_batch_size": len(LENGTHS), "optim": "sgd",
        "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "gradient_accumulation_steps": 1,
        "report_to": "none", "bf16": "false", "logging_steps": 1, "save_strategy": "no",
    }  # fmt: skip


def trl(run: Run) -> list[str | Path]:
    chosen = {"packing": "true", "max_length": 2 * sum(LENGTHS)} if run.packed else {}
    return [
        "trl", "sft",
        *options(plain_sgd(run.out)),
        *options({"model_name_or_path": run.model, "dataset_name": run.data / "chats", "dtype": "float32"}),
        *options({"attn_implementation": run.attn, "use_cpu": "true", **chosen}),
    ]  # fmt: skip


def ms_swift(run: Run) -> list[str | Path]:
    return [
        "swift", "sft",
        *options(plain_sgd(run.out) | {"save_strategy": "steps", "save_steps": 2, "save_only_model": "true"}),
        *options({"model": run.model, "model_type": "gpt_oss", "template": "dummy", "tuner_type": "full"}),
        *options({"dataset": run.data / "chats/train.jsonl", "load_from_cache_file": "false"}),
        *options({"torch_dtype": "float32", "attn_impl": run.attn}),
        *options({"packing": "true", "packing_length": 2 * sum(LENGTHS)} if run.packed else {}),
    ]  # fmt: skip


def axolotl(run: Run) -> list[str | Path]:
    rows = {"sample_packing": True, "micro_batch_size": 1, "sequence_len": 2 * sum(LENGTHS)}
    padded = {"sample_packing": False, "micro_batch_size": len(LENGTHS), "sequence_len": 2 * max(LENGTHS)}
    config = {
        "base_model": f"{run.model}", "attn_implementation": run.attn, "output_dir": f"{run.out}",
        "datasets": [{"path": f"{run.data / 'ids/train.jsonl'}", "ds_type": "json", "type": None}],
        "dataset_prepared_path": f"{run.out}-prepared", "val_set_size": 0.0, "max_steps": 2, "learning_rate": 0.1,
        "gradient_accumulation_steps": 1, "optimizer": "sgd", "lr_scheduler": "constant", "max_grad_norm": 0.0,
        "bf16": False, "fp16": False, "tf32": False, "float32": True, "logging_steps": 1, "save_strategy": "no",
        "dataset_num_proc": 1, "use_mlflow": False, **(rows if run.packed else padded),
    }  # fmt: skip
    file = run.out.with_suffix(".yaml")
    file.write_text(json.dumps(config))  # JSON is YAML
    return ["axolotl", "train", file]


def llama_factory(run: Run) -> list[str | Path]:
    folder = run.out.parent
    model = run.model
    if run.attn != "eager":  # the one line stands in the checkpoint: nothing else of LLaMA-Factory takes a name
        model = folder / f"model-{run.out.name}"
        shutil.copytree(run.model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"attn_implementation": run.attn}))
    (run.data / "dataset_info.json").write_text(json.dumps({"chats": {
        "file_name": "chats/train.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    }}))  # fmt: skip
    config = plain_sgd(run.out) | {
        "model_name_or_path": f"{model}", "stage": "sft", "do_train": True, "finetuning_type": "full",
        "dataset": "chats", "dataset_dir": f"{run.data}", "template": "empty", "output_dir": f"{run.out}",
        "flash_attn": "disabled" if run.attn == "eager" else "auto", "cutoff_len": 2 * sum(LENGTHS), "bf16": False,
        "overwrite_cache": True, "disable_gradient_checkpointing": True, "preprocessing_num_workers": 1,
        **({"packing": True, "neat_packing": True, "per_device_train_batch_size": 1} if run.packed else {}),
    }  # fmt: skip
    file = run.out.with_suffix(".yaml")
    file.write_text(json.dumps(config))
    return ["llamafactory-cli", "train", file]


HOSTS = {
    "transformers": Host(
        packages=("transformers", "accelerate"),
        install=(("transformers", "accelerate"),),
        command=script,
        line='`attn_implementation="triton_attention_sink"`',
    ),
    "accelerate": Host(
        packages=("accelerate", "transformers"),
        install=(("transformers", "accelerate"),),
        command=launched,
        environment="transformers",
        line="the same, in the script",
    ),
    "TRL": Host(
        packages=("trl", "transformers"),
        install=(("trl", "transformers"),),
        command=trl,
        line="`trl sft --attn_implementation triton_attention_sink`",
    ),
    "ms-swift": Host(
        packages=("ms-swift", "transformers", "trl"),
        install=((
            "transformers==5.10.4", "trl<1.0", "peft<0.21", "datasets<4.8.5", "accelerate", "addict", "aiohttp",
            "binpacking", "dacite", "einops", "fastapi", "importlib-metadata", "json-repair", "matplotlib",
            "modelscope", "nltk", "openai", "oss2", "pandas", "pillow", "requests", "rouge", "safetensors", "scipy",
            "sentencepiece", "simplejson", "sortedcontainers", "tensorboard", "tiktoken", "uvicorn", "zstandard",
        ), ("--no-deps", "ms-swift==4.6.0", "attrdict", "cpm-kernels", "transformers-stream-generator")),
        command=ms_swift,
        line="`swift sft --attn_impl triton_attention_sink`",
        refused={"packed": 'The "packing" feature requires a flash attention implementation'},
    ),
    "Axolotl": Host(
        packages=("axolotl", "transformers", "trl"),
        install=((
            "transformers==5.16.1", "accelerate==1.13.0", "datasets==4.8.4", "peft==0.20.0", "trl==1.9.0",
            "huggingface_hub==1.17.0", "kernels<0.17", "pydantic==2.12.5", "addict", "fire", "requests", "einops",
            "colorama", "numba<1", "typer==0.25.1", "evaluate==0.4.1", "scipy", "nvidia-ml-py==12.560.30", "art",
            "python-dotenv", "zstandard", "fastcore", "schedulefree", "axolotl-contribs-lgpl", "axolotl-contribs-mit",
            "posthog==6.7.11", "mistral-common==1.11.5", "triton", "hf_xet", "psutil", "sentencepiece", "click",
            "gradio", "wandb", "tensorboard",
        ), ("--no-deps", "axolotl==0.19.0", "bitsandbytes==0.50.2")),
        command=axolotl,
        attn=f"/{NAME}",
        line="`attn_implementation: /triton_attention_sink`",
    ),
    "LLaMA-Factory": Host(
        packages=("llamafactory", "transformers", "trl"),
        install=((
            "transformers<=5.6.0,!=5.6.0,>=5", "accelerate<=1.11.0", "datasets<=4.0.0", "peft<=0.18.1,>=0.18.0",
            "trl<=0.24.0", "tyro<0.9.0", "torchdata<=0.11.0", "einops", "fastapi", "fire", "hf-transfer", "matplotlib",
            "modelscope", "omegaconf", "pandas", "protobuf", "pydantic", "scipy", "sentencepiece", "sse-starlette",
            "tiktoken", "uvicorn",
        ), ("--no-deps", "llamafactory==0.9.5")),
        command=llama_factory,
        stand_ins=("torchaudio",),
        model="llama",
        refused={"packed": "attention_mask must be a 2-D bool or integer padding mask (B, S), got (1, 1, 152, 152)"},
        line='`"attn_implementation": "triton_attention_sink"` in the checkpoint\'s config.json',
    ),
}  # fmt: skip
