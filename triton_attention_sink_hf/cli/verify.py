"""``triton-attention-sink verify``: the log-probs and gradients of your own model, ours against eager."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer

from .refusal import one_line, refuse

WORST = 5


class DType(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


def verify(
    model: Annotated[str, typer.Option(help="A checkpoint (folder or Hub name), or a folder with a config.json.")],
    dtype: Annotated[DType, typer.Option(help="What to compute in. fp32 is the strictest.")] = DType.fp32,
    device: Annotated[str, typer.Option(help="For example cuda:1 or cpu; by default the GPU if there is one.")] = "",
    layers: Annotated[int | None, typer.Option(min=1, help="Keep only the first N layers, of a large model.")] = None,
    attention: Annotated[
        str, typer.Option(help="attn_implementation to compare with eager.")
    ] = "triton_attention_sink",
    seed: Annotated[int, typer.Option(help="Seed of the random samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Compare this attention on one packed row with eager attention on each sample: log-probs and every gradient.

    Exits 1 on a FAIL, 2 if there is nothing to compare: no such model, device or attention, or too little memory.
    """
    try:
        from ..verify import verify as compare

        report = compare(
            model, dtype=dtype.value, device=device or None, attention=attention, layers=layers, seed=seed,
            log=lambda line: typer.echo(line, err=True),
        )  # fmt: skip
    except (ImportError, ValueError) as error:
        refuse(f"{model} cannot be verified: {one_line(error)}")
    if as_json:
        print(json.dumps(report.as_dict(), indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if report.passed else 1)


def _print(report) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()

    def show(line: str) -> None:
        console.print(line, soft_wrap=True, highlight=False)

    def table(title: str, rows) -> None:
        columns = Table("", "norm", "error", *(["eager's error"] if report.dtype != "fp32" else []), "allowed", "")
        columns.title, columns.title_justify, columns.columns[0].overflow = title, "left", "fold"
        for row in rows:
            eager = [] if row.eager_error is None else [f"{row.eager_error:.1e}"]
            mark = "[green]ok[/green]" if row.passed else "[red]FAIL[/red]"
            name = escape(row.name.removeprefix("model.").replace("self_attn.", ""))
            columns.add_row(name, f"{row.size:.1e}", f"{row.error:.1e}", *eager, f"{row.allowed:.1e}", mark)
        console.print(columns)

    show(f"[bold]{escape(report.model)}[/bold], {report.parameters:,} parameters, {report.dtype} on {report.device}")
    show(f"{escape(report.attention)} on one packed row of {report.lengths} tokens, against eager in fp32, one by one")
    if report.sinks:
        low, high = min(x for x, _ in report.sinks.values()), max(x for _, x in report.sinks.values())
        show(f"sinks of {len(report.sinks)} layers, from {low:.2f} to {high:.2f}")
    for note in report.notes:
        show(f"note: {escape(note)}")
    if report.problem is not None:
        show(f"[red]FAIL[/red]: {escape(report.problem)}")
        return
    difference = f"{report.log_prob_mean:.1e} on average, {report.log_prob_max:.1e} at most"
    table(f"log-probs; they differ by {difference}", [report.log_probs])
    if report.sinks:
        table("gradients of the sinks", report.sink_rows())
    table(f"other gradients, the {WORST} nearest to what is allowed", report.worst(WORST))
    failed = sum(not row.passed for row in report.rows)
    if failed:
        show(f"[red]FAIL[/red]: {failed} of {len(report.rows)} comparisons exceed what is allowed")
    else:
        show(f"[green]PASS[/green]: log-probs and {len(report.rows) - 1} gradients are eager's")
