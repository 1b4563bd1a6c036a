"""Starts verl's unmodified ``python -m verl.trainer.main_ppo`` and ends whatever that started."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from observer import OBSERVATIONS

HERE = Path(__file__).resolve().parent
SHIPPED = {"gpt_oss": HERE.parent / "my_ppo.yaml", "llama": HERE.parent / "my_ppo_llama.yaml"}
CHECKOUT = HERE.parents[2]
MARKER = "TRITON_ATTENTION_SINK_DEMO_RUN"


@dataclass(frozen=True)
class Run:
    """One training run and the files it leaves in ``folder``.

    Attributes:
        attention: value of ``attn_implementation``: a registered name or an absolute path.
        steps: training steps.
        folder: absolute path; everything is written below it. It must be the run's own: the trainer starts there, and
            Python imports what lies where it is started.
        gpu: train on the machine's first GPUs, one a rank, instead of the CPU platform.
        ranks: trainer processes that share every row by Ulysses sequence parallelism; 1 = none.
        kind: "gpt_oss" or "llama".
        rollout: "hf_eager", the server of verl_hf_rollout.py with a tiny model in fp32, or "vllm" with a small one in
            bf16.
        packed: whether the trainer packs a micro-batch's samples into one row (verl's ``use_remove_padding``).
        overrides: further Hydra overrides, as on verl's command line.
    """

    attention: str
    steps: int
    folder: Path
    gpu: bool = False
    ranks: int = 1
    kind: str = "gpt_oss"
    rollout: str = "hf_eager"
    packed: bool = True
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.parquet"

    @property
    def config(self) -> Path:
        return self.folder / "my_ppo.yaml"

    @property
    def log(self) -> Path:
        return self.folder / "main_ppo.log"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def observations(self) -> Path:
        return self.folder / "observations.jsonl"


def write_inputs(run: Run) -> None:
    """Checkpoint, prompts, and the configuration file: the one that examples/verl ships, with the run's attention."""
    import tiny_model
    import yaml
    from toy_task import write_prompts
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if run.rollout == "vllm":
        tiny_model.WRITE[run.kind](run.model, tiny_model.SMALL)
        write_prompts(run.prompts, prompts=96, words=(40, 360), vocabulary=tiny_model.SMALL.vocabulary)
    else:
        tiny_model.WRITE[run.kind](run.model)
        write_prompts(run.prompts)
    config = yaml.safe_load(SHIPPED[run.kind].read_text())
    config["actor_rollout_ref"]["model"]["override_config"]["attn_implementation"] = run.attention
    run.config.write_text(yaml.safe_dump(config, sort_keys=False))


def command(run: Run, ray_folder: Path) -> list[str]:
    """The command line: the configuration file holds the attention; the overrides make an ordinary GRPO run small."""
    overrides = {
        # model, data
        "actor_rollout_ref.model.path": run.model,
        "actor_rollout_ref.model.use_remove_padding": run.packed,
        "data.train_files": run.prompts,
        "data.val_files": run.prompts,
        "data.dataloader_num_workers": 0,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": HERE / "toy_task.py",
        # the actor
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.param_offload": False,
        "actor_rollout_ref.actor.fsdp_config.optimizer_offload": False,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": run.ranks,
        # the rollout
        "actor_rollout_ref.rollout.name": run.rollout,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        # the trainer
        "trainer.n_gpus_per_node": run.ranks,
        "trainer.nnodes": 1,
        "trainer.logger": ["console", "file"],
        "trainer.val_before_train": False,
        "trainer.test_freq": -1,
        "trainer.save_freq": -1,
        "trainer.total_training_steps": run.steps,
        "trainer.total_epochs": run.steps,
        "trainer.default_local_dir": run.folder / "checkpoints",
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 1,
        # a Ray of its own; the number of CPUs is Ray's bookkeeping, not a demand: it starts as many processes at once
        "+ray_kwargs.ray_init.address": "local",
        "+ray_kwargs.ray_init._temp_dir": ray_folder,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "ray_kwargs.ray_init.num_cpus": 16,
        "hydra.run.dir": run.folder / "hydra",
        **(_vllm(run) if run.rollout == "vllm" else _hf_rollout(run)),
    }
    if not run.gpu:
        overrides |= {"trainer.device": "cpu", "+ray_kwargs.ray_init.num_gpus": run.ranks}
    pairs = [f"{key}={_hydra(value)}" for key, value in overrides.items()]
    file = ["--config-dir", str(run.config.parent), "--config-name", run.config.stem]
    return [_interpreter(ray_folder), "-m", "verl.trainer.main_ppo", *file, *pairs, *run.overrides]


def _hf_rollout(run: Run) -> dict[str, object]:
    """fp32, so that 1e-5 means something, and the one server of verl_hf_rollout.py."""
    return {
        "data.train_batch_size": 4,
        "data.max_prompt_length": 16,
        "data.max_response_length": 16,
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype": "fp32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype": "fp32",
        "actor_rollout_ref.actor.use_dynamic_bsz": False,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.rollout.n": 2,
        "actor_rollout_ref.rollout.max_model_len": 32,
        # verl counts a server by its ranks of tensor parallelism
        "actor_rollout_ref.rollout.tensor_model_parallel_size": run.ranks,
        "actor_rollout_ref.rollout.n_gpus_per_node": run.ranks,
        "actor_rollout_ref.rollout.free_cache_engine": False,
    }


def _vllm(run: Run) -> dict[str, object]:
    """bf16, samples longer than the window, micro-batches of several; one engine a GPU, which the trainer shares."""
    return {
        "data.train_batch_size": 8,
        "data.max_prompt_length": 384,
        "data.max_response_length": 256,
        "actor_rollout_ref.model.enable_gradient_checkpointing": True,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 8,
        "actor_rollout_ref.actor.ppo_max_token_len_per_gpu": 8192,
        "actor_rollout_ref.rollout.n": 4,
        "actor_rollout_ref.rollout.max_model_len": 640,
        "actor_rollout_ref.rollout.max_num_batched_tokens": 8192,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 1,
        "actor_rollout_ref.rollout.gpu_memory_utilization": 0.3,
        # 1 GiB of cache: vLLM need not measure what is free, which fails where others use the GPU too
        "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes": 2**30,
        # no compilation and no CUDA graphs: starts sooner, and the observer sees the layers run
        "actor_rollout_ref.rollout.enforce_eager": True,
        "ray_kwargs.ray_init.num_cpus": 8,
    }


def python_path() -> str:
    """PYTHONPATH for a process that starts in another folder: the demo's modules, the package beside it, the user's."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(HERE), str(CHECKOUT), *(os.path.abspath(entry) for entry in entries if entry)])


def environment(run: Run) -> dict[str, str]:
    """Environment of the trainer: verl's hooks for the stand-ins, no network, one thread, a mark on every child."""
    modules = ["observer", *(["wrong_attention"] if run.attention == "one_sample" else [])]
    if run.rollout == "hf_eager":
        modules = ["verl_hf_rollout", *modules]
    if not run.gpu:
        modules = ["verl_cpu_platform", *modules]
    own = {
        "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
        OBSERVATIONS: str(run.observations),
        "VERL_FILE_LOGGER_PATH": str(run.metrics),
        "PYTHONPATH": python_path(),
        "PYTHONUNBUFFERED": "1",
        "HYDRA_FULL_ERROR": "1",
        "HF_HUB_OFFLINE": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "OMP_NUM_THREADS": "1",
        MARKER: uuid.uuid4().hex,
    }
    if not run.gpu:
        own |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
    ours = ("RAY_ADDRESS", "VERL_USE_EXTERNAL_PLUGINS")
    return {key: value for key, value in os.environ.items() if key not in ours} | own


@contextlib.contextmanager
def started(run: Run) -> Iterator[subprocess.Popen]:
    """Start the trainer, its output going to ``run.log``; on leaving, however, nothing that it started is left."""
    env = environment(run)
    # Ray puts sockets there, whose paths may have 107 characters at most
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as ray_folder:
        with open(run.log, "xb") as log:
            process = subprocess.Popen(
                command(run, Path(ray_folder)), env=env, cwd=run.folder, stdout=log, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            _end_all(process, env[MARKER])


def read_rows(file: Path) -> list[dict]:
    """The complete lines of a JSON-lines file that may still be written to; [] if it does not exist yet."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _interpreter(ray_folder: Path) -> str:
    """This Python, by a path without spaces: Ray starts its workers by a shell line that one would split."""
    if " " not in sys.executable:
        return sys.executable
    (ray_folder / "venv").symlink_to(sys.prefix)
    return str(ray_folder / "venv" / Path(sys.executable).relative_to(sys.prefix))


def _hydra(value: object) -> str:
    """A value in Hydra's grammar. Paths are quoted: they may hold spaces or an equals sign."""
    if isinstance(value, Path) or (isinstance(value, str) and "/" in value):
        return "'" + str(value).replace("'", r"\'") + "'"
    if isinstance(value, list):
        return "[" + ",".join(_hydra(item) for item in value) + "]"
    return str(value)


def _end_all(process: subprocess.Popen, mark: str) -> None:
    """End the trainer and Ray's daemons and workers.

    Daemons may outlive their parents, and Ray's agents write their names over their environment: so by descent, taken
    while the trainer lives, and by the mark in the environment.
    """
    left = set()
    if process.poll() is None:
        with contextlib.suppress(psutil.NoSuchProcess):
            left.update(psutil.Process(process.pid).children(recursive=True))
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    left.update(other for other in psutil.process_iter() if _has_mark(other, mark))
    for other in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    psutil.wait_procs(left, timeout=10)


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARKER) == mark
    except (psutil.Error, OSError):
        return False
