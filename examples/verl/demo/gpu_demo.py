"""``make gpu-demo``: verl's unmodified trainer with vLLM on a GPU, this package's attention against eager.

For each model (a small random gpt-oss and Llama, bf16), three steps of GRPO each with

* the control: eager on padded rows, which is right by definition and slow
* each value of ``--attn`` on packed rows, from the one config line

The trainer's probabilities never equal vLLM's in bf16: both round, differently. So what is right for this model is
measured by the control, and a run fails if its mean difference is more than ``MARGIN`` times the control's. It also
fails if the worker used another attention, its kernels did not run, or vLLM generated a step with other sinks than
the trainer had after the step before. ``--attn eager`` (gpt-oss) and ``--attn one_sample`` are wrong on packed rows,
and must fail. Exit status 0 only if nothing failed. All numbers go to results.json in the run's folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import main_ppo
import report
import training
from rich.console import Console
from rich.table import Table

# Answers are sampled anew in every run, so the means of two runs differ by some percent when nothing else does. Samples
# that mix, or a forgotten sink or window, make several times the difference.
MARGIN = 1.25
KINDS = ("gpt_oss", "llama")
WRONG = ("eager", "one_sample")  # on packed rows: these are to fail by their numbers
COLUMNS = {
    "probs_diff_mean": ".2e",
    "probs_diff_max": ".1e",
    "pearson": ".4f",
    "k3_kl": ".1e",
    "grad_norm": ".2f",
    "seconds": ".1f",
}


def main() -> int:
    arguments = _arguments()
    console = Console()
    gpus = training.gpus()
    hint = training.plugin_missing() or ("a GPU must be there, got none: make demo" if not gpus else None)
    hint = hint or training.too_few(gpus, arguments.sp)
    if hint:
        console.print(hint, style="red")
        return 1
    folder = training.new_folder(arguments.out)
    results = {"environment": _environment(), "margin": MARGIN, "sp": arguments.sp, "models": {}}
    console.print(results["environment"], soft_wrap=True)
    known = json.loads(arguments.control.read_text())["models"] if arguments.control else {}
    for kind in arguments.model:
        runs = results["models"][kind] = {"control": known[kind]["control"]} if kind in known else {}
        for run in planned(kind, arguments, folder):
            name = run.folder.name.removeprefix(f"{kind}-")
            if name not in runs:
                runs[name] = _result(run, arguments.limit, console, runs.get("control"))
                (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        console.print(comparison(kind, runs))
    failed = False
    for kind, runs in results["models"].items():
        for name, failure in ((name, failure) for name, run in runs.items() for failure in run["failures"]):
            failed = True
            console.print(f"FAILED: {kind}, {name}: {failure}", style="red", soft_wrap=True)
    if not failed:
        console.print("OK: as near to vLLM as eager on padded rows, one config line", style="green")
    console.print(f"results: {folder / 'results.json'}", soft_wrap=True)
    return 1 if failed else 0


def planned(kind: str, arguments: argparse.Namespace, folder: Path) -> Iterator[main_ppo.Run]:
    """The control, on one GPU, then each attention."""
    yield main_ppo.Run("eager", arguments.steps, folder / f"{kind}-control", True, 1, kind, "vllm", packed=False)
    for name in arguments.attn:
        attention = training.attention(name)
        yield main_ppo.Run(attention, arguments.steps, folder / f"{kind}-{name}", True, arguments.sp, kind, "vllm")


def _result(run: main_ppo.Run, limit: int, console: Console, control: dict | None) -> dict:
    """One run and its verdict, as results.json holds it."""
    run.folder.mkdir()
    rows = "packed" if run.packed else "padded"
    name = f"{run.kind}, {rows} rows, {run.attention.split('/')[-1]}"
    console.print(f"[bold]{name}[/bold], attn_implementation: {run.attention}; full log: {run.log}", soft_wrap=True)
    begin = time.monotonic()
    stopped = training.train(run, limit, console)
    found = report.read(run)
    console.print(report.table(found, f"{name}, against vLLM (bf16)"))
    training.say_what_ran(run, found, console)
    for name, (launches, time_us) in found.own_kernels().items():
        console.print(f"{launches:>6} x {time_us / launches:7.1f} us  {name}", highlight=False)
    result = {
        "attention": run.attention,
        "packed": run.packed,
        "seconds": round(time.monotonic() - begin, 1),
        "steps": [asdict(step) for step in found.steps],
        "probs_diff_mean": found.probs_diff,
        "attentions": sorted(found.attentions),
        "samples_in_row": found.samples_in_row,
        "sink_moves": found.sink_moves,
        "own_kernels": found.own_kernels(),
    }
    return result | {"failures": [stopped] if stopped else list(failures(run, found, control))}


def failures(run: main_ppo.Run, found: report.Report, control: dict | None) -> Iterator[str]:
    """Everything that is not as it should be. The control has no ``control``."""
    yield from found.failures
    if not found.probs_diff > 0:
        yield f"verl must report the difference of probabilities, got {found.probs_diff}"
    if control is None:
        return
    allowed = MARGIN * control["probs_diff_mean"]
    if not found.probs_diff <= allowed:
        yield (
            f"mean difference from the rollout's probabilities must be at most {MARGIN} times the padded control's, "
            f"{allowed:.2e}, got {found.probs_diff:.2e}"
        )
    if run.attention not in WRONG:
        yield from report.unlike_ours(found)
        for what in ("fwd", "bwd"):
            if not any(what in name for name in found.own_kernels()):
                yield f"this package's {what} kernels must run on the GPU, got {sorted(found.own_kernels())}"


def comparison(kind: str, runs: dict[str, dict]) -> Table:
    """A line a run: means over its steps."""
    table = Table(title=f"{kind}: trainer against vLLM, means of all steps")
    for heading in ("run", "rows", *COLUMNS, ""):
        heading = heading.replace("diff_", "diff\n").replace("_", " ")
        table.add_column(heading, justify="right" if heading in COLUMNS else "left")
    for name, run in runs.items():
        mean = {key: fmean(step[key] for step in run["steps"]) for key in report.METRICS} if run["steps"] else {}
        cells = [f"{mean[key]:{form}}" if mean else "none" for key, form in COLUMNS.items()]
        verdict = "FAILED" if run["failures"] else "OK"
        table.add_row(name, "packed" if run["packed"] else "padded", *cells, verdict)
    return table


def _environment() -> dict:
    """Card and versions, asked in another process: one that has touched CUDA must not start workers."""
    code = "import json; from triton_attention_sink_hf.bench.measure import environment as e; print(json.dumps(e()))"
    answer = subprocess.check_output([sys.executable, "-c", code], cwd=main_ppo.CHECKOUT, text=True)
    return json.loads(answer) | training.versions("vllm")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument(
        "--attn",
        nargs="+",
        default=["triton_attention_sink"],
        help="values of attn_implementation on packed rows; 'path' stands for the path of the package's folder",
    )
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--sp", type=int, default=1, help="GPUs that share every row (Ulysses)")
    parser.add_argument("--control", type=Path, help="results.json of an earlier run, whose control to compare with")
    parser.add_argument("--limit", type=int, default=600, help="seconds after which a run is ended")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-demo"), help="folder for this run's own")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    return arguments


if __name__ == "__main__":
    sys.path.insert(1, str(main_ppo.CHECKOUT))  # the package beside the demo, whichever is installed
    sys.exit(main())
