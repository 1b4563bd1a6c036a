"""``make gpu-demo``: verl's unmodified trainer with vLLM on a GPU, this package's attention against eager.

For each model (a small random gpt-oss and Llama, bf16), three steps of GRPO each with

* the control: eager on padded rows, which is right by definition and slow
* each value of ``--attn`` on packed rows, from the one config line

In bf16 the trainer's probabilities never equal vLLM's: both round, differently. The control measures by how much they
may differ for this model. A run fails if

* in step 1, where all runs have the same weights, its ``rollout_probs_diff_mean`` is more than ``MARGIN`` times the
  control's
* in any step its ``k3_kl`` is more than ``MARGIN`` times the control's largest. Later steps have other policies, since
  answers are sampled: the more certain one of them gets, the larger are differences of probabilities, but not of
  log-probabilities
* vLLM generated a step with other sinks than the trainer had after the step before
* the worker used another attention, or this package's kernels did not run

``--attn eager`` (gpt-oss) and ``--attn one_sample`` are wrong on packed rows, and must fail. Exit status 0 only if
nothing failed. All numbers go to results.json in the run's folder.
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

# Two runs of one attention differ by 2 to 6 %, since answers are sampled. On a CPU, in fp32, packed rows that are taken
# for one sample have a k3_kl of 0.2 to 0.9, which is over 100 times the control's in bf16.
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
        for name, run in planned(kind, arguments, folder):
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


def planned(kind: str, arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, main_ppo.Run]]:
    """The control, on one GPU, then each attention, by the names that results.json gives them."""
    control = folder / f"{kind}-control"
    yield "control", main_ppo.Run("eager", arguments.steps, control, True, 1, kind, "vllm", packed=False)
    for name in arguments.attn:
        own = folder / f"{kind}-{name}"
        yield name, main_ppo.Run(training.attention(name), arguments.steps, own, True, arguments.sp, kind, "vllm")


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
        "attentions": sorted(found.attentions),
        "samples_in_row": found.samples_in_row,
        "sink_moves": found.sink_moves,
        "own_kernels": found.own_kernels(),
    }
    return result | {"failures": [stopped] if stopped else list(failures(run, found, control))}


def failures(run: main_ppo.Run, found: report.Report, control: dict | None) -> Iterator[str]:
    """Everything that is not as it should be. The control has no ``control``."""
    yield from found.failures
    for step in found.steps:
        if not (step.probs_diff_mean > 0 and step.k3_kl > 0):
            yield f"step {step.number}: verl must report how far trainer and rollout differ, got nothing"
    if control is None:
        return
    first, largest = control["steps"][0]["probs_diff_mean"], max(step["k3_kl"] for step in control["steps"])
    for step in found.steps:
        if step.number == 1 and not step.probs_diff_mean <= MARGIN * first:
            yield _beyond("step 1: rollout_probs_diff_mean", step.probs_diff_mean, first)
        if not step.k3_kl <= MARGIN * largest:
            yield _beyond(f"step {step.number}: k3_kl", step.k3_kl, largest)
    if run.attention not in WRONG:
        yield from report.unlike_ours(found)
        for what in ("fwd", "bwd"):
            if not any(what in name for name in found.own_kernels()):
                yield f"this package's {what} kernels must run on the GPU, got {sorted(found.own_kernels())}"


def _beyond(what: str, got: float, control: float) -> str:
    return f"{what} must be at most {MARGIN} times the padded control's {control:.2e}, got {got:.2e}"


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
