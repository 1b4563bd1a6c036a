"""``make demo``: verl's unmodified trainer with this package's attention, switched on by one config line.

Writes a tiny random gpt-oss and a toy task, runs ``python -m verl.trainer.main_ppo`` (GRPO, packed rows, fp32), and
reports what the trainer's worker really did. Exit status 0 only if the attention was this package's, the trainer's
probabilities agree with the rollout's within 1e-5, and the sinks were trained.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import main_ppo
import report
import training
from rich.console import Console

RANKS = (1, 2, 4, 8)


def main() -> int:
    arguments = _arguments()
    console = Console()
    gpus = training.gpus()
    hint = training.plugin_missing() or training.too_few(gpus, arguments.sp)
    if hint:
        console.print(hint, style="red")
        return 1
    folder = training.new_folder(arguments.out)
    attention = training.attention(arguments.attn)
    run = main_ppo.Run(attention, arguments.steps, folder, gpu=gpus > 0, ranks=arguments.sp)
    console.print(f"attn_implementation: [bold]{run.attention}[/bold]", soft_wrap=True)
    where = f"{'GPU' if run.gpu else 'CPU'}{f', {run.ranks} ranks with Ulysses' if run.ranks > 1 else ''}"
    versions = ", ".join(f"{name} {number}" for name, number in training.versions().items())
    console.print(f"trainer on the {where}, {versions}; full log: {run.log}", soft_wrap=True)
    begin = time.monotonic()
    failure = training.train(run, arguments.limit, console)
    if failure:
        console.print(f"FAILED: {failure}", style="red", soft_wrap=True)
        return 1
    return _conclude(run, console, time.monotonic() - begin)


def failures(result: report.Report) -> list[str]:
    return [*result.failures, *report.unlike_ours(result), *report.beyond_rounding(result)]


def _conclude(run: main_ppo.Run, console: Console, seconds: float) -> int:
    result = report.read(run)
    found = failures(result)
    console.print(report.table(result, "trainer, packed rows, against rollout, eager on single samples (fp32)"))
    training.say_what_ran(run, result, console)
    if not list(report.unlike_ours(result)):
        console.print(f"which computes here with: {_implementation(run)}", soft_wrap=True)
    for name, distance in result.sink_moves.items():
        console.print(f"{name} moved by {distance:.1e} from the initial checkpoint")
    console.print(f"configuration: {run.config}", soft_wrap=True)
    console.print(f"verl.trainer.main_ppo took {seconds:.0f} s, most of it to start its processes")
    for failure in found:
        console.print(f"FAILED: {failure}", style="red", soft_wrap=True)
    if not found:
        console.print("OK: same probabilities as eager, sinks trained, one config line", style="green")
    return 1 if found else 0


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


def _implementation(run: main_ppo.Run) -> str:
    """Which of the package's implementations serves the tiny model on this machine's device, by its own account."""
    import torch

    from triton_attention_sink_hf import explain

    device = "cuda" if run.gpu else "cpu"
    q, kv = torch.zeros(1, 8, 8, 16, device=device), torch.zeros(1, 8, 2, 16, device=device)
    name = explain(q, kv, kv, torch.zeros(8, device=device)).implementation
    return "plain torch (reference.py; the Triton kernels need a GPU)" if name == "reference" else name


if __name__ == "__main__":
    sys.path.insert(1, str(main_ppo.CHECKOUT))  # the package beside the demo, whichever is installed
    sys.exit(main())
