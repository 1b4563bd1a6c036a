"""The measured rows as bars: what each panel says, as data, and how it is drawn (matplotlib)."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .cases import ALL_CASES, CASES, RL, SHORT, UNEVEN, Case
from .report import OURS

# Ours first. Okabe and Ito's colours, which colour-blind readers can tell apart. Eager is no speed to compare with.
COLOURS = {
    OURS: "#D55E00",
    "FlashAttention-4": "#0072B2",
    "FlashAttention-3": "#56B4E9",
    "cuDNN": "#009E73",
    "FlexAttention": "#F0E442",
    "fla": "#CC79A7",
}
PACKED = {
    RL: "packed rows as in RL, 32k tokens",
    UNEVEN: "packed rows of 1 to 16k tokens",
    SHORT: "1,000 packed rows of 32 tokens",
}
# A recorded problem in the README's words; others are shown as they are.
WORDS = {
    "cuDNN's backward with packed rows and a sink needs 9.26": "dense rows only",
    "parallel_attn takes a head dimension up to 128 in practice": "D up to 128 only",
}
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Group:
    """The bars of one case.

    Attributes:
        label: the case in the README's words.
        ms: our time.
        ratios: implementation -> its time over ours, in the order of COLOURS, ours (1.0) included.
        missing: reason -> implementations that have no bar for it.
    """

    label: str
    ms: float
    ratios: dict[str, float]
    missing: dict[str, list[str]]


@dataclass(frozen=True)
class Panel:
    """Groups of one kind, all of one run."""

    title: str
    groups: list[Group]


def read(path: Path) -> list[dict]:
    """The run in a bench.json, then each other run that its ``other_runs`` names.

    ``{"other_runs": {FILE: [CASE, ...]}}``: those cases are taken from FILE, in the same folder, and from it alone.
    """
    run = _load(path)
    others = run.get("other_runs", {})
    moved = {case for cases in others.values() for case in cases}
    runs = [{**run, "rows": [row for row in run["rows"] if row["case"] not in moved]}]
    for file, cases in others.items():
        other = _load(path.parent / file)
        runs.append({**other, "rows": [row for row in other["rows"] if row["case"] in cases]})
    return runs


def _load(path: Path) -> dict:
    run = json.loads(path.read_text())
    if not isinstance(run, dict) or not run.keys() >= {"environment", "rows", "summary"}:
        raise ValueError(f"{path} must be a bench.json, got other contents")
    return run


def panels(runs: list[dict], direction: str) -> list[Panel]:
    """What to draw of ``direction``. A run after the first has panels of its own, which say so."""
    timed = {row["implementation"] for run in runs for row in run["rows"] if "ms" in row}
    names = [name for name in COLOURS if name in timed]
    found: dict[tuple[str, int], list[Group]] = {}
    for case in ALL_CASES:
        for n, run in enumerate(runs):
            rows = [row for row in run["rows"] if row["case"] == case.name]
            if group := _group(case, rows, names, direction):
                found.setdefault((_kind(case), n), []).append(group)
    return [
        Panel(kind + (f"\n(of another run, commit {runs[n]['environment']['commit']})" if n else ""), groups)
        for (kind, n), groups in found.items()
    ]


def _kind(case: Case) -> str:
    if case.queries:
        return "Decoding: few queries on a long cache"
    return ("Packed rows" if case.lengths else "Dense rows") + (", sliding window" if case.window else ", full causal")


def _label(case: Case) -> str:
    mask = f"window {case.window}" if case.window else "full causal"
    if case.queries:
        queries = "" if case.queries == 1 else f"{case.queries} queries, "
        heads = f"{case.heads_q}/{case.heads_k} heads"
        return f"{queries}{case.batch} x {case.seqlen // 1024}k keys, {mask}, D {case.head_dim}, {heads}"
    if case.lengths:
        return f"{PACKED[case.lengths]}, {mask}"
    return f"{mask}, {case.seqlen // 1024}k, D {case.head_dim}"


def _group(case: Case, rows: list[dict], names: list[str], direction: str) -> Group | None:
    times = {row["implementation"]: row["ms"] for row in rows if row.get("direction") == direction}
    if OURS not in times:
        return None
    missing: dict[str, list[str]] = {}
    for name in names:
        if name not in times:
            missing.setdefault(_reason([row for row in rows if row["implementation"] == name]), []).append(name)
    ratios = {name: times[name] / times[OURS] for name in names if name in times}
    return Group(_label(case), times[OURS], ratios, missing)


def _reason(rows: list[dict]) -> str:
    """Why an implementation with these rows of a case has no time in a direction."""
    if not rows:
        return "not in this run"
    problem = next((row["problem"] for row in rows if "problem" in row), "forward only")
    return WORDS.get(problem) or textwrap.shorten(problem, 50, placeholder=" ...")


def caption(runs: list[dict]) -> str:
    """How to read the bars, head counts, then a line for each run: card, versions, date, commit."""
    measured = {row["case"] for run in runs for row in run["rows"]}
    heads = {
        case.head_dim: f"; D {case.head_dim}: {case.heads_q} query and {case.heads_k} key heads"
        for case in CASES
        if case.name in measured
    }
    lines = [
        "Number at a bar: its time over ours; bold: the fastest peer; at our own bar: our time. Packed rows: several "
        "samples in one row.",
        f"bf16. D: head dimension{''.join(heads.values())}.",
    ]
    for n, run in enumerate(runs):
        of = run["environment"]
        software = f"driver {of['driver']}, torch {of['torch']}, triton {of['triton']}"
        lines.append(f"{'Another run' if n else 'Run'}: {of['card']}, {software}, {of['date']}, commit {of['commit']}")
    return "\n".join(lines)


def plot(runs: list[dict]) -> dict[str, bytes]:
    """PNGs of the runs from ``read``, by file name; of the directions that were measured."""
    files = {}
    for direction in DIRECTIONS:
        if parts := panels(runs, direction):
            text, png = caption(runs), io.BytesIO()
            draw(parts, direction, text).savefig(png, dpi=200, metadata={"Title": direction, "Description": text})
            files[f"{direction}.png"] = png.getvalue()
    return files


def draw(parts: list[Panel], direction: str, text: str):
    """A matplotlib figure, two panels a line, ``text`` below: 900 px, the width of a README, at 100 dpi."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(2, len(parts))
    lines = [parts[n : n + columns] for n in range(0, len(parts), columns)]
    heights = [max(_height(panel) for panel in line) for line in lines]
    with matplotlib.rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure((9, 0.128 * sum(heights) + 0.65 * len(lines) + 1.3), layout="constrained")
        grid = figure.subplots(len(lines), columns, squeeze=False, height_ratios=heights)
        for axis in grid.flat[len(parts) :]:
            axis.set_axis_off()
        for line, axes, height in zip(lines, grid, heights, strict=True):
            for panel, axis in zip(line, axes, strict=False):
                _draw(axis, panel, height)
        names = [name for name in COLOURS if any(name in group.ratios for panel in parts for group in panel.groups)]
        legend = figure.legend(
            [Patch(color=COLOURS[name]) for name in names],
            [f"{name} (triton-attention-sink)" if name == OURS else name for name in names],
            title=f"{direction.capitalize()} pass of attention with sinks: time relative to ours, shorter is faster",
            loc="outside upper center", ncols=len(names), columnspacing=1.5, frameon=False,
        )  # fmt: skip
        legend.get_title().set(size=11, weight="bold")
        figure.supxlabel(text, size=8, x=0.01, ha="left")
    return figure


# in bars: what stands above a group's bars, and the gap below
LABEL, GAP = 1.2, 0.6


def _height(panel: Panel) -> float:
    return sum(LABEL + len(group.ratios) + len(group.missing) + GAP for group in panel.groups)


def _draw(axis, panel: Panel, height: float) -> None:
    longest = max(ratio for group in panel.groups for ratio in group.ratios.values())

    def write(x: float, y: float, text: str, **style) -> None:
        axis.text(x + 0.01 * longest, y, text, va="center", bbox={"color": "white", "pad": 0}, zorder=2, **style)

    y = 0.0
    for group in panel.groups:
        write(0, y + LABEL / 2, group.label, weight="bold")
        y += LABEL
        best = min((name for name in group.ratios if name != OURS), key=group.ratios.get, default=None)
        for name, reason in _order(group):
            y += 1
            if reason:
                write(0, y - 0.5, f"{', '.join(group.missing[reason])}: {reason}", style="italic")
                continue
            ratio = group.ratios[name]
            axis.barh(y - 0.5, ratio, 0.9, color=COLOURS[name], zorder=3)
            number = f"{group.ms:.3f} ms" if name == OURS else f"{ratio:.2f}\u00d7"
            write(ratio, y - 0.5, number, weight="bold" if name == best else "normal")
        y += GAP
    axis.vlines(1, 0, y - GAP, color="black", linewidth=0.8, linestyle=":", zorder=0)
    axis.set(title=panel.title, xlabel="time / our time", xlim=(0, 1.18 * longest), ylim=(height, 0), yticks=[])
    axis.locator_params(axis="x", integer=True)


def _order(group: Group) -> Iterator[tuple[str, str | None]]:
    """Implementations from top to bottom, each with None for a bar or the reason that stands in place of its bar.

    A reason stands once, in place of the first bar that it explains.
    """
    reasons = {names[0]: reason for reason, names in group.missing.items()}
    for name in COLOURS:
        if name in group.ratios or name in reasons:
            yield name, reasons.get(name)
