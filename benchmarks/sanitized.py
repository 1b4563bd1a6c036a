"""Every kernel once, small, below NVIDIA's compute-sanitizer.

    python benchmarks/sanitized.py --tool memcheck --output OUT    # or racecheck, initcheck, synccheck
    python benchmarks/sanitized.py --output OUT                    # without one: the results alone, against fp64

Writes OUT/sanitizer-TOOL.json: errors, reports by kernel, the first lines of what the tool says, the calls that ran.
The calls run once without the tool, which compiles the kernels and checks the results, and once below it. Status 1 if
it finds an error, 2 if it is missing (``--sanitizer PATH``, by default ``compute-sanitizer`` of PATH or of
/usr/local/cuda). torch allocates each tensor by itself there, so that what lies beside it belongs to nobody. initcheck
does not see what TMA writes, so calls whose results TMA writes are left out there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from budget import assert_within_budget  # noqa: E402
from cases import Case, differentiated, make_inputs, run  # noqa: E402
from drawn_calls import Drawn, arguments, inputs_of, served_by  # noqa: E402
from drawn_calls import run as run_drawn  # noqa: E402
from visibility import Visible, tree_visible  # noqa: E402

from triton_attention_sink_hf import SharedPrefixes, shared_prefix_attention  # noqa: E402

UNSEEN = {"initcheck": ("triton_window", "triton_hopper")}
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
REPORT = re.compile(r"(?:^=+ +at|Race reported between \w+ access at) (\w+)\+", re.MULTILINE)
BF16 = torch.bfloat16
LENGTHS = (70, 0, 1, 133)
# two tiles and a part of a third, in every family of kernels
CASES = {
    "triton": {
        "plain": Case(150, heads=(8, 2), head_dim=64, dtype=BF16, dlse=True),
        "packed": Case(sum(LENGTHS), heads=(8, 2), head_dim=128, dtype=BF16, lengths_q=LENGTHS),
        "padding softcap": Case(90, batch=2, heads=(4, 2), head_dim=256, dtype=BF16, padding="left", softcap=5.0),
        "odd": Case(50, 77, heads=(3, 1), head_dim=(37, 20), dtype=torch.float16, layout="sliced"),
        "fp32": Case(70, heads=(4, 1), head_dim=64, window=(20, 0)),
        "key_ranges": Case(150, ranges="random", causal=False, heads=(8, 2), head_dim=64, dtype=BF16, batch=2),
        "packed key_ranges": Case(
            sum(LENGTHS), ranges="random", heads=(6, 3), head_dim=(40, 24), dtype=BF16, lengths_q=LENGTHS
        ),
        "D 512": Case(70, heads=(2, 1), head_dim=512, dtype=BF16),
    },
    "triton_window": {
        "window": Case(200, heads=(8, 1), head_dim=64, dtype=BF16, window=(127, 0)),
        "window in one kernel": Case(1100, heads=(8, 1), head_dim=64, dtype=BF16, window=(127, 0)),
        "packed": Case(sum(LENGTHS), heads=(8, 2), head_dim=80, dtype=BF16, window=(30, 0), lengths_q=LENGTHS),
    },
    "triton_hopper": {
        "D 64": Case(300, heads=(8, 2), head_dim=64, dtype=BF16),
        "D 128": Case(300, heads=(4, 1), head_dim=128, dtype=BF16, dlse=True),
        "D 256": Case(200, heads=(4, 2), head_dim=256, dtype=BF16),
        "packed": Case(sum(LENGTHS), heads=(8, 2), head_dim=64, dtype=BF16, lengths_q=LENGTHS, window=(60, 0)),
        "packed D 192/128": Case(sum(LENGTHS), heads=(4, 2), head_dim=(192, 128), dtype=BF16, lengths_q=LENGTHS),
    },
    "triton_decode": {
        "split": Case(1, 3000, batch=2, heads=(8, 1), head_dim=64, dtype=BF16, used=(3000, 7)),
        "queries": Case(5, 700, heads=(4, 2), head_dim=128, dtype=BF16, window=(200, 0)),
    },
}
PAGED = Drawn(
    Case(2, 300, batch=2, heads=(8, 2), head_dim=64, dtype=BF16, used=(300, 41)),
    leftpad=(3, 0),
    page_size=16,
    leaves=(),
    implementation="triton_decode",
)


def work(check: Callable = assert_within_budget, tool: str | None = None) -> list[str]:
    """Run every call that this card supports and ``tool`` can judge; what ran.

    ``check`` raises AssertionError if a result is wrong.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ran = []
    for implementation, cases in CASES.items():
        if implementation in UNSEEN.get(tool, ()):
            continue
        for name, case in cases.items():
            if device == "cpu":
                case = replace(case, dtype=torch.float32)
            drawn = Drawn(case, deterministic=False, implementation=implementation)
            inputs = make_inputs(case, device)
            q, k, v = ((x.squeeze(0) if inputs.mask.packed else x) for x in (inputs.q, inputs.k, inputs.v))
            served = served_by(drawn, q, k, v, inputs.sinks, arguments(drawn, inputs))
            if device == "cuda" and served != implementation:
                continue
            results = run(case, inputs, implementation if device == "cuda" else "reference", False)
            check(case, inputs, results, tiny=True, rounded_delta=implementation == "triton_hopper")
            ran.append(f"{implementation} {name}")
    if device == "cuda":
        inputs = inputs_of(PAGED, device)
        check(PAGED.case, inputs, run_drawn(PAGED, inputs)[1], tiny=True)
        append(device)
        ran += ["triton_decode pages", "append", *([] if tool in UNSEEN else trees(device, check))]
    return ran


def trees(device: str, check: Callable) -> list[str]:
    """Samples that share prompts: their parts and the merge of them, forward and backward."""
    tree, ran = SharedPrefixes((150, 70, 0, 33, 40, 3), (-1, 0, 0, 0, -1, 4)), []
    for left, heads, dims in ((-1, (8, 2), (64, 64)), (127, (8, 2), (64, 64)), (40, (6, 3), (40, 24))):
        case = Case(tree.total, causal=False, heads=heads, head_dim=dims, dtype=BF16)
        inputs = replace(make_inputs(case, device), mask=Visible(tree_visible(tree, left, device)))

        def attend(q, k, v, sinks, left=left):
            found = shared_prefix_attention(q[0], k[0], v[0], sinks, tree=tree, window_size=(left, 0), return_lse=True)
            return tuple(x[None] for x in found)

        check(case, inputs, differentiated(case, inputs, attend), tiny=True, rounded_delta=True)
        ran.append(f"shared prefixes, window {left}, D {dims[0]}")
    return ran


def append(device: str) -> None:
    from triton_attention_sink_hf.implementations.triton_decode.append import append_keys

    pages = [torch.zeros(6, 16, 2, 64, dtype=BF16, device=device) for _ in range(2)]
    new = [torch.ones(2, 3, 2, 64, dtype=BF16, device=device) for _ in range(2)]
    used = torch.tensor([15, 20], dtype=torch.int32, device=device)
    table = torch.tensor([[4, 1], [0, 5]], dtype=torch.int32, device=device)
    append_keys(*pages, *new, used, table)
    assert all(int((x != 0).sum()) == 2 * 3 * 2 * 64 for x in pages)


def below(tool: str, sanitizer: str) -> dict:
    """What the tool finds in ``work``."""
    command = [sanitizer, "--tool", tool, "--print-limit", "10000", sys.executable, __file__, "--work", "--tool", tool]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    begun = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    text = done.stdout + done.stderr
    said = [line for line in text.splitlines() if line.startswith("=========")]
    return {
        "seconds": round(time.monotonic() - begun, 1),
        "errors": errors(text),
        "status": done.returncode,
        "calls": next((json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")), []),
        "kernels": dict(Counter(REPORT.findall(text))),
        "said": said[:60],
    }


def errors(text: str) -> int | None:
    """Of the tool's summary; None if it wrote none."""
    found = re.search(r"ERROR SUMMARY: (\d+) error", text) or re.search(r"RACECHECK SUMMARY: (\d+) hazard", text)
    return int(found[1]) if found else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for sanitizer-TOOL.json")
    parser.add_argument("--tool", choices=TOOLS)
    parser.add_argument(
        "--sanitizer", default=shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    )
    parser.add_argument("--work", action="store_true", help="run the calls and print which")
    given = parser.parse_args()
    if given.work:
        print(json.dumps(work(lambda *results, **how: None, given.tool)))
        return 0
    if given.tool and shutil.which(given.sanitizer) is None:
        print(
            f"--sanitizer must be NVIDIA's compute-sanitizer, got {given.sanitizer}: no such program",
            file=sys.stderr,
        )
        return 2
    from triton_attention_sink_hf.bench.measure import environment

    found = {"calls": work(), "tool": given.tool}
    found["environment"] = environment() if torch.cuda.is_available() else {}
    if given.tool:
        found |= below(given.tool, given.sanitizer)
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        file = given.output / f"sanitizer-{given.tool or 'none'}.json"
        file.write_text(json.dumps(found, indent=1) + "\n")
    bad = bool(given.tool) and (found["errors"] != 0 or found["status"] != 0)
    print("\n".join(found.get("said", [])[-20:]))
    print(f"{len(found['calls'])} calls, {found.get('errors', 'no tool')} errors")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
