"""What the measured rows say: ratios, percent of the floor and the terminal table. ``plots.py`` draws them."""

from __future__ import annotations

import json
from pathlib import Path

from .cases import ALL_CASES, GPT_OSS_PAIR, Case

OURS = "ours"


def floor_ms(case: Case, direction: str, ceilings: dict[str, float]) -> float:
    """No kernel is faster: operations over the matrix rate or bytes over the copy rate, whichever takes longer."""
    compute = case.flops(direction) / ceilings["matmul_tflop_s"] / 1e9
    memory = case.bytes(direction) / ceilings["copy_tb_s"] / 1e9
    return max(compute, memory)


def summarise(rows: list[dict], ceilings: dict[str, float]) -> list[dict]:
    """One line per case and direction: our time, the best peer's, their ratio, percent of the floor, TFLOP/s."""
    lines = []
    for case in ALL_CASES:
        for direction in ("forward", "backward"):
            times = {
                row["implementation"]: row
                for row in rows
                if row["case"] == case.name and row.get("direction") == direction
            }
            if OURS not in times:
                continue
            peers = {name: row["ms"] for name, row in times.items() if name != OURS}
            best = min(peers, key=peers.get) if peers else None
            ms = times[OURS]["ms"]
            lines.append(
                {
                    "case": case.name,
                    "direction": direction,
                    "ms": ms,
                    "spread": (times[OURS]["ms_p80"] - times[OURS]["ms_p20"]) / ms,
                    "tflop_s": case.flops(direction) / ms / 1e9,
                    "percent_of_floor": 100 * floor_ms(case, direction, ceilings) / ms,
                    "host_us": times[OURS]["host_us"],
                    "extra_bytes": times[OURS]["extra_bytes"],
                    "best_peer": best,
                    "best_peer_ms": peers.get(best),
                    "speedup": peers[best] / ms if best else None,
                    "peers_ms": peers,
                }
            )
            if case.queries:
                lines[-1]["gb_s"] = case.bytes(direction) / ms / 1e6
    return lines


def pair_ms(rows: list[dict]) -> dict[str, float]:
    """Milliseconds of a gpt-oss layer pair (one full, one windowed layer, forward and backward) per implementation."""
    result: dict[str, float] = {}
    for name in {row["implementation"] for row in rows}:
        times = [
            row["ms"] for row in rows if row["implementation"] == name and row["case"] in GPT_OSS_PAIR and "ms" in row
        ]
        if len(times) == 2 * len(GPT_OSS_PAIR):
            result[name] = sum(times)
    return result


def table(lines: list[dict]) -> str:
    """Plain text, one line per case and direction."""
    text = [
        f"{'case':26s} {'':8s} {'ms':>8s} {'TFLOP/s':>8s} {'GB/s':>8s} {'% floor':>8s} {'host us':>8s}  "
        f"{'best peer':>26s} {'ratio':>6s}"
    ]
    for line in lines:
        peer, ratio = "-", "-"
        if line["best_peer"]:
            peer, ratio = f"{line['best_peer']} {line['best_peer_ms']:.3f}", f"{line['speedup']:.2f}"
        text.append(
            f"{line['case']:26s} {line['direction']:8s} {line['ms']:8.3f} {line['tflop_s']:8.0f} "
            f"{format(line['gb_s'], '.0f') if 'gb_s' in line else '-':>8s} "
            f"{line['percent_of_floor']:8.0f} {line['host_us']:8.0f}  {peer:>26s} {ratio:>6s}"
        )
    return "\n".join(text)


def problems(rows: list[dict]) -> list[str]:
    """What was not measured, and why."""
    return sorted({f"{row['case']}: {row['implementation']}: {row['problem']}" for row in rows if "problem" in row})


def measured_before(path: Path, environment: dict[str, str]) -> list[dict]:
    """Rows of an earlier run that was cut short, if it had the same environment on the same day; else none."""
    if not path.exists():
        return []
    result = json.loads(path.read_text())
    return result["rows"] if result["environment"] == environment else []
