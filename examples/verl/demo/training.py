"""What both demos do around a run: check the machine, start the trainer under a progress display, wait for its end."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from importlib.metadata import entry_points, version
from pathlib import Path

import main_ppo
import report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

TAIL = 40
# What verl's log says when a phase begins, and the name of the phase: seconds without news are explained.
PHASES = {
    "ray init kwargs": "starting Ray",
    "Started a local Ray instance": "starting verl's task runner",
    "create worker group": "starting the trainer's worker",
    "Total steps": "starting the rollout server",
    "[rollout] received": "training",
    "vLLM API server version": "starting vLLM",
    "Training Progress": "training",
}


def train(run: main_ppo.Run, limit: int, console: Console) -> str | None:
    """Write the inputs and run the trainer. Returns why it failed, after the end of its log; None if it did not."""
    returncode = _wait(run, limit, console)
    if returncode == 0:
        return None
    with open(run.log, errors="replace") as log:
        console.print("".join(deque(log, TAIL)), markup=False, highlight=False, soft_wrap=True)
    reason = f"took more than {limit} s" if returncode is None else f"ended with status {returncode}"
    return f"main_ppo {reason}; full log: {run.log}"


def _wait(run: main_ppo.Run, limit: int, console: Console) -> int | None:
    """The trainer's exit status, None if it took more than ``limit`` seconds and was ended."""
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing model and task", total=run.steps)
        main_ppo.write_inputs(run)
        with main_ppo.started(run) as process:
            progress.update(task, description="starting verl.trainer.main_ppo")
            phase, done, deadline = None, 0, time.monotonic() + limit
            while time.monotonic() < deadline:
                ended = process.poll() is not None
                log = run.log.read_text(errors="replace")
                latest = next((name for mark, name in reversed(PHASES.items()) if mark in log), phase)
                if latest != phase:
                    phase = latest
                    progress.update(task, description=phase)
                    if not console.is_terminal:
                        console.print(phase)
                for row in main_ppo.read_rows(run.metrics)[done:]:
                    done += 1
                    progress.update(task, completed=done)
                    console.print(f"step {row['step']}: {row['data']['timing_s/step']:.1f} s")
                if ended:
                    return process.returncode
                time.sleep(0.3)
            return None


def say_what_ran(run: main_ppo.Run, result: report.Report, console: Console) -> None:
    """The attention in the worker, and how full its rows were."""
    for name, function, device in sorted(result.attentions):
        console.print(f"attention in the trainer's worker: {name} = {function} on {device}", soft_wrap=True)
    if run.packed:
        shard = f"rank 0's shard of a row that {run.ranks} ranks share" if run.ranks > 1 else "one row"
        console.print(f"packed rows: up to {result.samples_in_row} samples begin in {shard}")


def new_folder(out: Path) -> Path:
    """An empty folder in ``out``: whatever else is there is neither imported by the trainer nor written over."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d-%H%M%S-"), dir=out.resolve()))
    except OSError as error:
        sys.exit(f"--out must be a folder that can be written, got {out}: {error.strerror}")


def attention(name: str) -> str:
    """The value of ``attn_implementation``; 'path' stands for the absolute path of the package's folder."""
    if name != "path":
        return name
    spec = importlib.util.find_spec(report.PACKAGE)
    return str(Path(spec.origin).parent)


def plugin_missing() -> str | None:
    """verl logs a plug-in that fails to load at debug level only; say it here instead."""
    if not any(plugin.value == report.PACKAGE for plugin in entry_points(group="verl.plugins")):
        return "verl must find this package's entry point (pip install -e '.[hf,verl]'), got none installed"
    return None


def too_few(gpus: int, ranks: int) -> str | None:
    return f"--sp must be at most the machine's {gpus} GPUs, got {ranks}" if 0 < gpus < ranks else None


def gpus() -> int:
    """How many GPUs there are. Asked in another process: a process that has touched CUDA must not start workers."""
    question = "import torch; print(torch.cuda.device_count())"
    environment = os.environ | {"PYTHONPATH": main_ppo.python_path()}
    # -c imports what lies where it is started
    return int(subprocess.check_output([sys.executable, "-c", question], env=environment, cwd=main_ppo.HERE))


def versions(*more: str) -> dict[str, str]:
    return {name: version(name) for name in ("verl", *more, "torch", "transformers", "triton-attention-sink")}
