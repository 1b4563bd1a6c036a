"""What a run left behind, read back: the table, and every reason for which the demo fails."""

from __future__ import annotations

import math
from dataclasses import dataclass

from main_ppo import Run, read_rows
from rich.table import Table

PACKAGE = "triton_attention_sink_hf"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Step:
    """One training step. ``sink_move`` is the largest distance of any sink from the initial checkpoint, after it."""

    number: int
    probs_diff_mean: float
    probs_diff_max: float
    pearson: float
    grad_norm: float
    sink_move: float


@dataclass(frozen=True)
class Report:
    """Attributes:
    steps: in order.
    attentions: (name, function) of every attention call in the trainer's worker.
    samples_in_row: how many samples began in the fullest packed row, or rank 0's shard of it.
    ranks: over how many ranks rows were sharded; several values if that changed.
    sink_moves: parameter name -> largest distance of its sinks from the initial checkpoint, after the last step.
    failures: sentences; empty if the run shows what it should.
    """

    steps: list[Step]
    attentions: set[tuple[str, str]]
    samples_in_row: int
    ranks: set[int]
    sink_moves: dict[str, float]
    failures: list[str]


def read(run: Run) -> Report:
    initial = _initial_sinks(run)
    synced = {row["global_step"]: row for row in read_rows(run.observations)}
    moves = {
        step: {name: _distance(values, initial[name]) for name, values in row["sinks"].items()}
        for step, row in synced.items()
    }
    steps = []
    for row in read_rows(run.metrics):
        metrics, number = row["data"], row["step"]
        steps.append(
            Step(
                number,
                metrics.get("training/rollout_probs_diff_mean", math.nan),
                metrics.get("training/rollout_probs_diff_max", math.nan),
                metrics.get("training/rollout_actor_probs_pearson_corr", math.nan),
                metrics.get("actor/grad_norm", math.nan),
                max(moves.get(number, {}).values(), default=math.nan),
            )
        )
    calls = [call for row in synced.values() for call in row["attention"]]
    report = Report(
        steps,
        {(call["name"], call["function"]) for call in calls},
        max((call["samples_in_row"] for call in calls), default=0),
        {call["ranks"] for call in calls},
        moves.get(run.steps, {}),
        [],
    )
    report.failures.extend(_failures(run, report, calls, moves))
    return report


def _failures(run: Run, report: Report, calls: list[dict], moves: dict[int, dict[str, float]]):
    numbers = [step.number for step in report.steps]
    if numbers != list(range(1, run.steps + 1)):
        yield f"steps must be 1 to {run.steps}, got {numbers}"
    if not any(call["training"] for call in calls):
        yield "the worker must call attention while training, got no call"
    for name, function in sorted(report.attentions):
        if name != run.attention or not function.startswith(f"{PACKAGE}."):
            yield f"attention in the worker must be {PACKAGE}'s under the name {run.attention}, got {name} ({function})"
    if report.samples_in_row < 2:
        yield f"packed rows must hold several samples, got {report.samples_in_row}"
    if report.ranks != {run.ranks}:
        yield f"rows must be shared by {run.ranks} ranks, got {sorted(report.ranks)}"
    for step in report.steps:
        if not step.probs_diff_max <= TOLERANCE:
            yield (
                f"step {step.number}: probabilities of trainer and rollout must agree within {TOLERANCE:g}, "
                f"got {step.probs_diff_max:.2g}"
            )
    if any(distance != 0 for distance in moves.get(0, {"": 0.0}).values()):
        yield "the first synchronised sinks must be the initial checkpoint's, got others"
    if not report.sink_moves:
        yield f"the sinks must be synchronised after step {run.steps}, got none"
    for name, distance in report.sink_moves.items():
        if not distance > 0:
            yield f"{name} must move, got no movement in {run.steps} steps"


def table(report: Report) -> Table:
    """One line per step; narrow enough for 80 columns."""
    result = Table(title="trainer, packed rows, against rollout, eager on single samples (fp32)")
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
            f"{step.sink_move:.1e}",
        )
    return result


def _initial_sinks(run: Run) -> dict[str, list[float]]:
    from safetensors import safe_open

    sinks = {}
    for file in run.model.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith("sinks")]  # noqa: SIM118 (no dict)
            sinks |= {name: tensors.get_tensor(name).tolist() for name in names}
    return sinks


def _distance(after: list[float], before: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(after, before, strict=True))
