"""Registers, spills and shared memory of every kernel on every architecture, compiled without a GPU.

    make arch-table                                            # all architectures, with the Triton of .venv
    python benchmarks/architectures.py sm90 gfx942             # some; the rest of the table stays
    OTHER_ENVIRONMENT/bin/python benchmarks/architectures.py   # another Triton: a table of its own in the same files

Compiles the cases of ``tests/compile_target.py``, one process per architecture, as many at once as there are cores.
Writes ``results/architectures.json`` and draws ``ARCHITECTURES.md`` from it. Status 1 if a kernel exceeds its budget
(``tests/compile_budget.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from compile_budget import SHARED_MEMORY, exceeds, spill_budget  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "benchmarks" / "ARCHITECTURES.md"
COLUMNS = ("warps", "registers", "spilled", "shared")

HEAD = """# Kernels on every architecture

Compiled, without a GPU, by `make arch-table`: the cases of `tests/compile_target.py`, with the launchers' own arguments
and configs. What was run on a card: [one table](../INSTALLATION_GUIDE.md#tested-not-tested).

A cell is registers of a thread / spilled / KiB of shared memory, each the most over a kernel's cases. Spilled: bytes of
stack of a thread (gfx: registers). **Bold**: beyond the budget of `tests/compile_budget.py`. The last row is what the
architecture has, and what may spill in bf16 / fp32. `results/architectures.json` has every case.
"""


def compiled(target: str, cases: list[str]) -> list[dict]:
    """The rows of ``compile_target.py``; RuntimeError if a kernel does not compile."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests" / "compile_target.py"), target, *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{target} must compile, got {done.stderr[-2000:]}")
    print(f"{target}: {len(done.stdout.splitlines())} kernels", flush=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def by_kernel(rows: list[dict]) -> dict[str, dict[str, list[int]]]:
    """kernel -> case -> numbers in the order of COLUMNS; of two variants in one case the larger numbers."""
    table: dict[str, dict[str, list[int]]] = {}
    for row in rows:
        cases = table.setdefault(row["kernel"], {})
        numbers = [row[name] for name in COLUMNS]
        cases[row["case"]] = [max(pair) for pair in zip(numbers, cases.get(row["case"], numbers), strict=True)]
    return table


def page(data: dict) -> str:
    """The tables of ``architectures.json`` in Markdown."""
    parts = [HEAD]
    for triton, targets in sorted(data.items()):
        names = [name for name in SHARED_MEMORY if name in targets]
        tables = {name: _apart(targets[name]) for name in names}
        kernels = sorted({kernel for table in tables.values() for kernel in table})
        lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for kernel in kernels:
            full = f"_{kernel.split('`')[1]}_kernel"
            cells = [_cell(name, full, tables[name].get(kernel)) for name in names]
            lines.append(f"| {kernel} | {' | '.join(cells)} |")
        budgets = [(spill_budget(name, "bf16"), spill_budget(name, "fp32"), SHARED_MEMORY[name]) for name in names]
        cells = [f"{usual} / {fp32} / {shared / 1024:.0f}" for usual, fp32, shared in budgets]
        lines.append(f"| budget | {' | '.join(cells)} |")
        parts.append(f"## triton {triton}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _apart(table: dict[str, dict[str, list[int]]]) -> dict[str, dict[str, list[int]]]:
    """A table with short names of kernels, and what they take in fp32 as kernels of their own."""
    parts: dict[str, dict[str, list[int]]] = {}
    for kernel, cases in table.items():
        for case, numbers in cases.items():
            name = f"`{kernel.strip('_').removesuffix('_kernel')}`" + " fp32" * case.startswith("fp32")
            parts.setdefault(name, {})[case] = numbers
    return parts


def _cell(target: str, kernel: str, cases: dict[str, list[int]] | None) -> str:
    if cases is None:
        return ""
    rows = [dict(zip(COLUMNS, numbers, strict=True), case=case, kernel=kernel) for case, numbers in cases.items()]
    most = {name: max(row[name] for row in rows) for name in COLUMNS}
    text = f"{most['registers']} / {most['spilled']} / {most['shared'] / 1024:.0f}"
    return f"**{text}**" if any(exceeds(target, row) for row in rows) else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("targets", nargs="*", default=list(SHARED_MEMORY), help=f"of {', '.join(SHARED_MEMORY)}")
    parser.add_argument("--cases", nargs="*", default=[], help="of compile_target.CASES, by default all of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--redraw", action="store_true", help="draw the page from the file; compile nothing")
    arguments = parser.parse_args()
    data = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    bad = []
    if not arguments.redraw:
        cases = arguments.cases or names_of_cases()
        table = data.setdefault(version("triton"), {})
        with ThreadPoolExecutor(arguments.workers) as pool:
            found = pool.map(lambda target: (target, compiled(target, cases)), arguments.targets)
            for target, rows in found:
                table[target] = by_kernel(rows)
                bad += [f"{target} {row}" for row in rows if exceeds(target, row)]
        text = json.dumps(data, sort_keys=True, separators=(",", ":"))
        RESULTS.write_text(text.replace('},"_', '},\n"_') + "\n")  # a kernel a line
    PAGE.write_text(page(data))
    print("\n".join(bad), f"{len(bad)} kernels beyond their budget; see {PAGE}", sep="\n")
    return 1 if bad else 0


def names_of_cases() -> list[str]:
    os.environ.pop("TRITON_INTERPRET", None)
    from compile_target import CASES

    return list(CASES)


if __name__ == "__main__":
    sys.exit(main())
