"""``make demo``: verl's unmodified trainer with this package's attention, switched on by one config line.

Writes a tiny random gpt-oss and a toy task, runs ``python -m verl.trainer.main_ppo`` (GRPO, packed rows, fp32), and
reports what the trainer's worker really did. Exit status 0 only if the attention was this package's, the trainer's
probabilities agree with the rollout's within 1e-5, and the sinks were trained.
"""

from __future__ import annotations

import argparse
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
RANKS = (1, 2, 4, 8)
# What verl's log says when a phase begins, and the name of the phase: seconds without news are explained.
PHASES = {
    "ray init kwargs": "starting Ray",
    "Started a local Ray instance": "starting verl's task runner",
    "create worker group": "starting the trainer's worker",
    "Total steps": "starting the rollout server",
    "[rollout] received": "training",
}


def main() -> int:
    arguments = _arguments()
    console = Console()
    gpus = _gpus()
    hint = _plugin_missing() or _too_few(gpus, arguments.sp)
    if hint:
        console.print(hint, style="red")
        return 1
    folder = _new_folder(arguments.out)
    run = main_ppo.Run(_attention(arguments.attn), arguments.steps, folder, gpu=gpus > 0, ranks=arguments.sp)
    console.print(f"attn_implementation: [bold]{run.attention}[/bold]", soft_wrap=True)
    where = f"{'GPU' if run.gpu else 'CPU'}{f', {run.ranks} ranks with Ulysses' if run.ranks > 1 else ''}"
    console.print(f"trainer on the {where}, {_versions()}; full log: {run.log}", soft_wrap=True)
    begin = time.monotonic()
    returncode = _train(run, arguments.limit, console)
    if returncode != 0:
        with open(run.log, errors="replace") as log:
            console.print("".join(deque(log, TAIL)), markup=False, highlight=False, soft_wrap=True)
        reason = f"took more than {arguments.limit} s" if returncode is None else f"ended with status {returncode}"
        console.print(f"FAILED: main_ppo {reason}; full log: {run.log}", style="red", soft_wrap=True)
        return 1
    return _conclude(run, console, time.monotonic() - begin)


def _train(run: main_ppo.Run, limit: int, console: Console) -> int | None:
    """Run the trainer under a progress display. Returns its exit status, None if that took more than ``limit`` s."""
    text = TextColumn("{task.description}")
    columns = (SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("writing model and task", total=run.steps)
        _write_inputs(run)
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


def _write_inputs(run: main_ppo.Run) -> None:
    from tiny_model import write_gpt_oss
    from toy_task import write_prompts
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    write_gpt_oss(run.model)
    write_prompts(run.prompts)


def _conclude(run: main_ppo.Run, console: Console, seconds: float) -> int:
    result = report.read(run)
    console.print(report.table(result))
    for name, function in sorted(result.attentions):
        console.print(f"attention in the trainer's worker: {name} = {function}", soft_wrap=True)
    if any(function.startswith(report.PACKAGE) for _, function in result.attentions):
        console.print(f"which computes here with: {_implementation(run)}", soft_wrap=True)
    shard = f"rank 0's shard of a row that {run.ranks} ranks share" if run.ranks > 1 else "one row"
    console.print(f"packed rows: up to {result.samples_in_row} samples begin in {shard}")
    for name, distance in result.sink_moves.items():
        console.print(f"{name} moved by {distance:.1e} from the initial checkpoint")
    console.print(f"verl.trainer.main_ppo took {seconds:.0f} s, most of it to start its processes")
    for failure in result.failures:
        console.print(f"FAILED: {failure}", style="red", soft_wrap=True)
    if not result.failures:
        console.print("OK: same probabilities as eager, sinks trained, one config line", style="green")
    return 1 if result.failures else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--attn",
        default="triton_attention_sink",
        help="value of attn_implementation; 'path' stands for the absolute path of the installed package's folder",
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sp", type=int, default=1, help="ranks that share every row (Ulysses); each is a process")
    parser.add_argument("--limit", type=int, default=600, help="seconds after which the trainer is ended")
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"), help="folder in which each run makes its own")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    if arguments.sp not in RANKS:
        parser.error(f"--sp must be one of {RANKS} for the tiny model's 8 heads, got {arguments.sp}")
    return arguments


def _new_folder(out: Path) -> Path:
    """An empty folder in ``out``: whatever else is there is neither imported by the trainer nor written over."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=time.strftime("%Y-%m-%d-%H%M%S-"), dir=out.resolve()))
    except OSError as error:
        sys.exit(f"--out must be a folder that can be written, got {out}: {error.strerror}")


def _attention(name: str) -> str:
    if name != "path":
        return name
    spec = importlib.util.find_spec(report.PACKAGE)
    return str(Path(spec.origin).parent)


def _plugin_missing() -> str | None:
    """verl logs a plug-in that fails to load at debug level only; say it here instead."""
    if not any(plugin.value == report.PACKAGE for plugin in entry_points(group="verl.plugins")):
        return "verl must find this package's entry point (pip install -e '.[hf,verl]'), got none installed"
    return None


def _implementation(run: main_ppo.Run) -> str:
    """Which of the package's implementations serves the tiny model on this machine's device, by its own account."""
    import torch

    from triton_attention_sink_hf import explain

    device = "cuda" if run.gpu else "cpu"
    q, kv = torch.zeros(1, 8, 8, 16, device=device), torch.zeros(1, 8, 2, 16, device=device)
    name = explain(q, kv, kv, torch.zeros(8, device=device)).implementation
    return "plain torch (reference.py; the Triton kernels need a GPU)" if name == "reference" else name


def _too_few(gpus: int, ranks: int) -> str | None:
    return f"--sp must be at most the machine's {gpus} GPUs, got {ranks}" if 0 < gpus < ranks else None


def _gpus() -> int:
    """How many GPUs there are. Asked in another process: a process that has touched CUDA must not start workers."""
    question = "import torch; print(torch.cuda.device_count())"
    environment = os.environ | {"PYTHONPATH": main_ppo.python_path()}
    # -c imports what lies where it is started
    return int(subprocess.check_output([sys.executable, "-c", question], env=environment, cwd=main_ppo.HERE))


def _versions() -> str:
    names = ("verl", "torch", "transformers", "triton-attention-sink")
    return ", ".join(f"{name} {version(name)}" for name in names)


if __name__ == "__main__":
    sys.path.insert(1, str(main_ppo.CHECKOUT))  # the package beside the demo, whichever is installed
    sys.exit(main())
