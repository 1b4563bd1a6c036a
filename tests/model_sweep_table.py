"""The committed table of a sweep: written, read, and what is compared."""

from __future__ import annotations

import re

import transformers

WINDOW_COLUMN = "short_window"
HEAD = """# Models of transformers {version} under `attn_implementation="triton_attention_sink"`

Written by `python tests/model_sweep.py --out FILE`; see there what each case does. `=` is eager's result, to 1e-4 in
fp32; `r` with a number: refused by this package; `n` with a number: nothing to compare; the reasons are below. The last
column is all cases with a window shorter than the row, the worst of them; `-` where the class has none.

"""


def summary(found: dict[str, dict[str, str]]) -> dict[str, str]:
    """The verdict of each column, without numbers and names that differ from class to class."""
    columns = {case: _reason(verdict) for case, verdict in found[""].items()}
    window = [_reason(verdict) for verdict in found.get("window", {}).values()]
    for kind in ("WRONG", "refused", "right", "n/a"):
        match = [verdict for verdict in window if verdict.startswith(kind)]
        if match:
            columns[WINDOW_COLUMN] = match[0]
            break
    return columns


def _reason(verdict: str) -> str:
    kind, _, reason = verdict.partition(": ")
    if kind in ("right", "WRONG"):
        return kind
    reason = re.sub(r"\b\d+\b", "N", re.sub(r"\b\w+(Config|Attention)\b", "this class", reason))
    if reason.startswith("eager fails: ") or reason.startswith("config: "):
        reason = ": ".join(reason.split(": ")[:2])
    return f"{kind}: {reason.split(', got')[0].rstrip()[:110].replace('|', '/')}"


def write_table(results: dict[str, dict[str, dict[str, str]]], cases: tuple[str, ...], path: str) -> None:
    rows = {name: summary(found) for name, found in results.items()}
    columns = (*cases, WINDOW_COLUMN)
    codes: dict[str, str] = {"right": "=", "WRONG": "WRONG"}
    for row in rows.values():
        for verdict in row.values():
            codes.setdefault(verdict, f"{verdict[0]}{len(codes) - 1}")
    with open(path, "w") as file:
        file.write(HEAD.format(version=transformers.__version__))
        file.write(f"| class | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}\n")
        for name in sorted(rows):
            cells = (codes.get(rows[name].get(column), "-") for column in columns)
            file.write(f"| {name} | {' | '.join(cells)} |\n")
        file.write("\n")
        file.writelines(f"- {code} {verdict}\n" for verdict, code in codes.items() if verdict not in ("right", "WRONG"))


def read_table(path: str) -> dict[str, dict[str, str]]:
    """What ``summary`` gave for each class when the table was written."""
    with open(path) as file:
        lines = file.read().splitlines()
    verdicts = {code: verdict for code, _, verdict in (line[2:].partition(" ") for line in lines if line[:2] == "- ")}
    verdicts |= {"=": "right", "WRONG": "WRONG"}
    (_, *columns), *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines if line[:2] == "| ")
    return {
        name: {column: verdicts[cell] for column, cell in zip(columns, cells, strict=True) if cell != "-"}
        for name, *cells in rows
    }
