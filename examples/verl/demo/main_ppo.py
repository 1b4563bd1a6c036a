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

HERE = Path(__file__).resolve().parent
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
        overrides: further Hydra overrides, as on verl's command line.
    """

    attention: str
    steps: int
    folder: Path
    gpu: bool = False
    ranks: int = 1
    overrides: tuple[str, ...] = ()

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        return self.folder / "prompts.parquet"

    @property
    def log(self) -> Path:
        return self.folder / "main_ppo.log"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def observations(self) -> Path:
        return self.folder / "observations.jsonl"


def command(run: Run, ray_folder: Path) -> list[str]:
    """The command line. The first override is the whole of this package's configuration; the rest is an ordinary
    GRPO run in fp32, made small."""
    overrides = {
        "+actor_rollout_ref.model.override_config.attn_implementation": run.attention,
        # model, data, algorithm
        "actor_rollout_ref.model.path": run.model,
        "actor_rollout_ref.model.use_remove_padding": True,
        "algorithm.adv_estimator": "grpo",
        "data.train_files": run.prompts,
        "data.val_files": run.prompts,
        "data.train_batch_size": 4,
        "data.max_prompt_length": 16,
        "data.max_response_length": 16,
        "data.dataloader_num_workers": 0,
        "reward.num_workers": 1,
        "reward.custom_reward_function.path": HERE / "toy_task.py",
        # the actor, in fp32 so that 1e-5 means something
        "actor_rollout_ref.actor.strategy": "fsdp2",
        "actor_rollout_ref.actor.fsdp_config.strategy": "fsdp2",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype": "fp32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype": "fp32",
        "+actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype": "fp32",
        "actor_rollout_ref.actor.use_torch_compile": False,
        "actor_rollout_ref.actor.fsdp_config.use_torch_compile": False,
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.actor.use_kl_loss": False,
        "actor_rollout_ref.actor.fsdp_config.ulysses_sequence_parallel_size": run.ranks,
        # the one rollout server of verl_hf_rollout.py; verl counts a server by its ranks of tensor parallelism
        "actor_rollout_ref.rollout.name": "hf_eager",
        "actor_rollout_ref.rollout.n": 2,
        "actor_rollout_ref.rollout.calculate_log_probs": True,
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": 8,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": run.ranks,
        "actor_rollout_ref.rollout.n_gpus_per_node": run.ranks,
        "actor_rollout_ref.rollout.agent.num_workers": 1,
        "actor_rollout_ref.rollout.free_cache_engine": False,
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
        # a Ray of its own; the number of CPUs is Ray's bookkeeping, not a demand
        "+ray_kwargs.ray_init.address": "local",
        "+ray_kwargs.ray_init._temp_dir": ray_folder,
        "+ray_kwargs.ray_init.include_dashboard": False,
        "ray_kwargs.ray_init.num_cpus": 16,
        "hydra.run.dir": run.folder / "hydra",
    }
    if not run.gpu:
        overrides |= {"trainer.device": "cpu", "+ray_kwargs.ray_init.num_gpus": run.ranks}
    pairs = [f"{key}={_hydra(value)}" for key, value in overrides.items()]
    return [_interpreter(ray_folder), "-m", "verl.trainer.main_ppo", *pairs, *run.overrides]


def python_path() -> str:
    """PYTHONPATH for a process that starts in another folder: the demo's modules, the package beside it, the user's."""
    entries = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(HERE), str(CHECKOUT), *(os.path.abspath(entry) for entry in entries if entry)])


def environment(run: Run) -> dict[str, str]:
    """Environment of the trainer: verl's hooks for the stand-ins, no network, one thread, a mark on every child."""
    modules = ["verl_hf_rollout"] if run.gpu else ["verl_cpu_platform", "verl_hf_rollout"]
    own = {
        "VERL_USE_EXTERNAL_MODULES": ",".join(modules),
        "VERL_HF_ROLLOUT_OBSERVATIONS": str(run.observations),
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
