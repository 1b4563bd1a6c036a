"""``triton-attention-sink bench``: check and time this project against every peer that is installed."""

from __future__ import annotations

import json
import os
import site
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .refusal import refuse
from .written import Written

LISTING = "bench-files.json"  # lists the files that bench wrote: another run replaces only these


def bench(
    cases: Annotated[str, typer.Option(help="Comma-separated parts of case names; all if empty.")] = "",
    implementations: Annotated[str, typer.Option(help="Comma-separated names; all if empty.")] = "",
    extra_path: Annotated[
        list[Path] | None,
        typer.Option(help="Directory that holds peers not installed here.", exists=True, file_okay=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Directory for bench.json and the plots.")] = Path("outputs/bench"),
    plots: Annotated[bool, typer.Option(help="Draw forward.png and backward.png (needs matplotlib).")] = True,
    list_cases: Annotated[
        bool, typer.Option("--list", help="Print the cases and the implementations, time none.")
    ] = False,
    redraw: Annotated[
        Path | None,
        typer.Option(help="Only draw the plots of this bench.json, into --output. Needs no GPU.", dir_okay=False),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Keep the cases that bench.json already has from this card, software and commit.")
    ] = False,
    prepare: Annotated[
        int, typer.Option(help="Compile in this many processes first; peers take 10 to 40 s a case.")
    ] = 0,
    compile_only: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Time forward and backward of every case, each implementation checked against fp64 first.

    Exits 1 if this project was wrong, 2 if nothing could be measured.
    """
    if redraw:
        _redraw(redraw, output)
        return
    if list_cases:
        _list()
        return
    import torch
    from triton import knobs

    if not torch.cuda.is_available():
        refuse("bench needs a GPU that torch can use; none was found")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # else nothing finds what --prepare compiled
    # where Triton looks anyway, but torch.compile would name another folder in the middle of the run
    os.environ.setdefault("TRITON_CACHE_DIR", knobs.cache.dir)
    for path in extra_path or []:
        site.addsitedir(str(path))
    from ..bench import report
    from ..bench.cases import ALL_CASES
    from ..bench.measure import ceilings, compile_all, environment, measure, run_once
    from ..bench.peers import PEERS

    wanted = [name for name in cases.split(",") if name]
    chosen = [case for case in ALL_CASES if case.name in wanted]  # whole names before parts of names
    chosen = chosen or [case for case in ALL_CASES if not wanted or any(part in case.name for part in wanted)]
    asked = [name for name in implementations.split(",") if name]
    names = [name for name in PEERS if not asked or name in asked]
    if not chosen:
        refuse(f"cases must be parts of {[case.name for case in ALL_CASES]}, got {cases!r}")
    if unknown := [name for name in asked if name not in PEERS]:
        refuse(f"implementations must be some of {list(PEERS)}, got {unknown}")
    if plots:
        _need_matplotlib("pip install matplotlib, or --no-plots")
    if compile_only:
        for case in chosen:
            run_once(case, names)
        return
    try:
        written = Written(output, LISTING)
        written.check(["bench.json", *(["forward.png", "backward.png"] if plots else [])])
        output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        refuse(error)
    card = environment()
    rows = report.measured_before(output / "bench.json", card) if resume else []
    chosen = [case for case in chosen if case.name not in {row["case"] for row in rows}]
    if prepare:
        compile_all(chosen, names, extra_path or [], prepare, log=typer.echo)
    rates = ceilings()
    typer.echo(f"{card['card']}: copy {rates['copy_tb_s']:.2f} TB/s, bf16 matmul {rates['matmul_tflop_s']:.0f} TFLOP/s")
    for case in chosen:
        rows += measure(case, names, log=typer.echo)
        written.write({"bench.json": _result(card, rates, rows, report)})  # an interrupted run keeps what it measured
    lines = report.summarise(rows, rates)
    typer.echo("\n".join(report.problems(rows)))
    typer.echo(report.table(lines))
    for name, ms in sorted(report.pair_ms(rows).items(), key=lambda item: item[1]):
        typer.echo(f"gpt-oss layer pair, forward and backward: {name} {ms:.2f} ms")
    if plots:
        _draw([{"environment": card, "rows": rows}], written)
    if any(row["implementation"] == report.OURS and "problem" in row for row in rows):
        raise typer.Exit(1)


def _list() -> None:
    from ..bench.cases import ALL_CASES
    from ..bench.peers import PEERS

    for title, names in (("cases", [case.name for case in ALL_CASES]), ("implementations", PEERS)):
        typer.echo("\n  ".join((title, *names)))


def _need_matplotlib(how: str) -> None:
    if find_spec("matplotlib") is None:
        refuse(f"bench needs matplotlib for its plots; it is not installed: {how}")


def _redraw(file: Path, output: Path) -> None:
    from ..bench.plots import read

    _need_matplotlib("pip install matplotlib")
    try:
        _draw(read(file), Written(output, LISTING))
    except (ValueError, OSError) as error:
        refuse(error)


def _draw(runs: list[dict], written: Written) -> None:
    from ..bench.plots import plot

    pictures = plot(runs)
    written.write(pictures)
    typer.echo("\n".join(f"wrote {written.root / name}" for name in pictures) or "no plots: ours was not timed")


def _result(card: dict, rates: dict, rows: list[dict], report) -> bytes:
    result = {
        "environment": card,
        "ceilings": rates,
        "rows": rows,
        "summary": report.summarise(rows, rates),
        "gpt_oss_pair_ms": report.pair_ms(rows),
    }
    return (json.dumps(result, indent=1) + "\n").encode()
