"""What a run left behind, read back: the table, and every reason for which a demo fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from main_ppo import Run, read_rows
from rich.table import Table

PACKAGE = "triton_attention_sink_hf"
TOLERANCE = 1e-5
METRICS = {
    "probs_diff_mean": "training/rollout_probs_diff_mean",
    "probs_diff_max": "training/rollout_probs_diff_max",
    "pearson": "training/rollout_actor_probs_pearson_corr",
    "k3_kl": "rollout_corr/k3_kl",
    "grad_norm": "actor/grad_norm",
    "seconds": "timing_s/step",
}
Sinks = dict[str, list[float]]  # parameter name -> values, one a head


@dataclass(frozen=True)
class Step:
    """One training step: verl's metrics, and the largest distance of any sink from the checkpoint, after it."""

    number: int
    probs_diff_mean: float
    probs_diff_max: float
    pearson: float
    k3_kl: float
    grad_norm: float
    seconds: float
    sink_move: float
    sink_gradients: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Attributes:
    steps: in order.
    attentions: (name, function, device) of every attention call in the trainer's worker.
    samples_in_row: how many samples began in the fullest packed row, or rank 0's shard of it.
    ranks: over how many ranks rows were sharded; several values if that changed.
    sink_moves: parameter name -> largest distance of its sinks from the initial checkpoint, after the last step.
    kernels: GPU kernel -> (launches, microseconds) in the first micro-batches.
    failures: sentences; empty if the run shows what it should, whatever the probabilities are.
    """

    steps: list[Step]
    attentions: set[tuple[str, str, str]]
    samples_in_row: int
    ranks: set[int]
    sink_moves: dict[str, float]
    kernels: dict[str, list[float]]
    failures: list[str]

    def own_kernels(self) -> dict[str, list[float]]:
        """Those of this package: Triton names a kernel as its function, here ``_..._kernel``."""
        return {name: row for name, row in self.kernels.items() if name.startswith("_") and name.endswith("_kernel")}


def read(run: Run) -> Report:
    rows = read_rows(run.observations)
    trained = {row["step"]: row for row in rows if row["role"] == "trainer"}
    initial = _initial_sinks(run)
    steps = []
    for row in read_rows(run.metrics):
        observed = trained.get(row["step"], {"sinks": {}, "sink_gradients": {}})
        moves = _moves(observed["sinks"], initial)
        metrics = {name: row["data"].get(key, math.nan) for name, key in METRICS.items()}
        move = max(moves.values(), default=math.nan)
        steps.append(Step(row["step"], sink_move=move, sink_gradients=observed["sink_gradients"], **metrics))
    calls = [call for row in trained.values() for call in row["attention"]]
    report = Report(
        steps,
        {(call["name"], call["function"], call["device"]) for call in calls},
        max((call["samples_in_row"] for call in calls), default=0),
        {call["ranks"] for call in calls},
        _moves(trained.get(run.steps, {"sinks": {}})["sinks"], initial),
        next((row["kernels"] for row in rows if row["role"] == "kernels"), {}),
        [],
    )
    report.failures.extend(_of_the_run(run, report, calls))
    report.failures.extend(_of_the_sinks(run, report, rows, trained, initial))
    return report


def _of_the_run(run: Run, report: Report, calls: list[dict]) -> Iterator[str]:
    numbers = [step.number for step in report.steps]
    if numbers != list(range(1, run.steps + 1)):
        yield f"steps must be 1 to {run.steps}, got {numbers}"
    if not any(call["training"] for call in calls):
        yield "the worker must call attention while training, got no call"
    for name, function, _ in sorted(report.attentions):
        if name != run.attention:
            yield f"attention in the worker must be {run.attention}, got {name} ({function})"
    if run.packed and report.samples_in_row < 2:
        yield f"packed rows must hold several samples, got {report.samples_in_row}"
    if report.ranks != {run.ranks}:
        yield f"rows must be shared by {run.ranks} ranks, got {sorted(report.ranks)}"


def _of_the_sinks(
    run: Run, report: Report, rows: list[dict], trained: dict[int, dict], initial: Sinks
) -> Iterator[str]:
    """The trainer's must move, and each process that generates must have had every state of them, in order."""
    if not initial:
        return
    if not report.sink_moves:
        yield f"the sinks must be observed after step {run.steps}, got none"
    for name, distance in report.sink_moves.items():
        if not distance > 0:
            yield f"{name} must move, got no movement in {run.steps} steps"
    dtype = torch.bfloat16 if run.rollout == "vllm" else torch.float32
    rollouts = [row for row in rows if row["role"] == "rollout"]
    if not rollouts:
        yield "the rollout's sinks must be observed, got none"
    for process in sorted({row["process"] for row in rollouts}):
        for name, values in initial.items():
            sent = [values, *(trained[step]["sinks"][name] for step in sorted(trained) if step < run.steps)]
            held = [row["sinks"][name] for row in rollouts if row["process"] == process and name in row["sinks"]]
            missing = next((step for step in range(len(sent)) if not _follow(sent[: step + 1], held, dtype)), None)
            if missing is not None:
                yield f"the rollout must generate step {missing + 1} with the trainer's {name}, got others"


def _follow(sent: list[list[float]], held: list[list[float]], dtype: torch.dtype) -> bool:
    """Whether ``held`` has all of ``sent``, cast to ``dtype``, in this order, perhaps with others between."""
    states = iter([torch.tensor(values, dtype=dtype).tolist() for values in held])
    previous = None
    for values in (torch.tensor(values, dtype=dtype).tolist() for values in sent):
        if values != previous and values not in states:  # ``in`` goes on where the last one was found
            return False
        previous = values
    return True


def unlike_ours(report: Report) -> Iterator[str]:
    """Reasons for which the run does not show this package's attention."""
    for name, function, _ in sorted(report.attentions):
        if not function.startswith(f"{PACKAGE}."):
            yield f"attention in the worker must be {PACKAGE}'s, got {name} ({function})"


def beyond_rounding(report: Report) -> Iterator[str]:
    """Steps whose probabilities differ by more than fp32 rounds."""
    for step in report.steps:
        if not step.probs_diff_max <= TOLERANCE:
            yield (
                f"step {step.number}: probabilities of trainer and rollout must agree within {TOLERANCE:g}, "
                f"got {step.probs_diff_max:.2g}"
            )


def table(report: Report, title: str) -> Table:
    """One line per step; narrow enough for 80 columns."""
    result = Table(title=title)
    probs = ("rollout_probs\n_diff_mean", "rollout_probs\n_diff_max", "pearson")
    for heading in ("step", *probs, "grad norm", "sinks\nmoved by"):
        result.add_column(heading, justify="right")
    for step in report.steps:
        result.add_row(
            str(step.number),
            f"{step.probs_diff_mean:.1e}",
            f"{step.probs_diff_max:.1e}",
            f"{step.pearson:.7f}",
            f"{step.grad_norm:.3f}",
            "none" if math.isnan(step.sink_move) else f"{step.sink_move:.1e}",
        )
    return result


def _initial_sinks(run: Run) -> Sinks:
    from safetensors import safe_open

    sinks = {}
    for file in run.model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith("sinks")]  # noqa: SIM118 (no dict)
            sinks |= {name: tensors.get_tensor(name).float().tolist() for name in names}
    return sinks


def _moves(sinks: Sinks, initial: Sinks) -> dict[str, float]:
    return {
        name: max(abs(after - before) for after, before in zip(values, initial[name], strict=True))
        for name, values in sinks.items()
    }
