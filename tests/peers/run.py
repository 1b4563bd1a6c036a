"""``make peer-tests``: other people's test suites against this package.

Takes checkouts of FlashAttention, flash-linear-attention and transformers. Their tests run unchanged, by pytest, with
stand-ins that lead the calls of their kernels to this package (plugin.py). Without a GPU the reference serves, and
"cuda" in a test means the CPU. transformers' tests want the checkout of the installed version.

Prints for each peer: passed (and of these, those that called this package), refused as expected.py says, failed,
skipped, calls. Exits 1 if a test failed, a refusal was not expected, or no call reached this package.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FAULTS = ("no-sink", "dsinks", "dq", "scale", "window", "future", "joined")  # served.FAULTS, which imports torch

# What runs of each peer's suite, if nothing else is said.
SUITES = {
    "flash-attention": ("tests/cute/test_flash_attn.py", "tests/cute/test_flash_attn_varlen.py",
                        "tests/test_flash_attn.py"),
    "fla": ("tests/ops/test_attn.py", "tests/ops/test_attn_sink.py"),
    "transformers": tuple(f"tests/models/{model}/test_modeling_{model}.py"
                          for model in ("gpt_oss", "llama", "mistral", "qwen3")),
}  # fmt: skip


def run(peer: str, checkout: Path, options: argparse.Namespace) -> dict:
    """The peer's tests in a process of their own: the sum of its processes' reports."""
    tests = [test for test in options.tests or SUITES[peer] if (checkout / test.split("::")[0]).exists()]
    if not tests:
        return {"failed": {str(checkout): f"has none of {', '.join(options.tests or SUITES[peer])}"}}
    with tempfile.TemporaryDirectory() as reports:
        variables = {
            "PEERS_NAME": peer, "PEERS_CHECKOUT": f"{checkout}", "PEERS_REPORTS": reports,
            "PEERS_SAMPLE": f"{options.sample}", "PEERS_FAULT": options.fault or "", "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(map(str, filter(None, (ROOT, HERE, os.environ.get("PYTHONPATH"))))),
        }  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "-p", "no:cacheprovider", "-q", "--tb=short", *tests]
        if peer != "transformers":  # whose tests are packages; FlashAttention has two files of one name
            command.append("--import-mode=importlib")
        status = subprocess.run([*command, *options.pytest], cwd=checkout, env=os.environ | variables).returncode
        found = [json.loads(file.read_text()) for file in Path(reports).iterdir()]
    total = {key: sum(report[key] for report in found) for key in ("passed", "served", "skipped", "calls")}
    for key in ("refused", "left_out"):
        total[key] = dict(sum((Counter(report[key]) for report in found), Counter()))
    total["failed"] = {name: message for report in found for name, message in report["failed"].items()}
    if status not in (0, 1):  # killed, interrupted, or no tests
        total["failed"]["pytest"] = f"ended with {status}"
    if not total["calls"]:
        total["failed"][peer] = "no call reached this package"
    return total


def summary(peer: str, found: dict) -> str:
    lines = [
        f"{peer}: {found.get('passed', 0)} passed ({found.get('served', 0)} of them served), "
        f"{sum(found.get('refused', {}).values())} refused as expected, {len(found['failed'])} failed, "
        f"{found.get('skipped', 0)} skipped, {found.get('calls', 0)} calls"
    ]
    for key in ("refused", "left_out"):
        lines += [f"  {key.replace('_', ' ')}: {n} for {reason}" for reason, n in sorted(found.get(key, {}).items())]
    return "\n".join(lines + [f"  FAILED {name}: {message}" for name, message in found["failed"].items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for peer in SUITES:
        parser.add_argument(f"--{peer}", type=Path, metavar="CHECKOUT")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="in the checkouts; default: " + str(SUITES))
    parser.add_argument("--sample", type=int, default=0, help="cases of each test function; default: all")
    parser.add_argument("--fault", choices=FAULTS, help="plant a fault in front of this package: tests must fail")
    parser.add_argument("--output", type=Path, help="write the summary as JSON")
    parser.add_argument("pytest", nargs="*", metavar="-- PYTEST_ARGUMENT")
    options = parser.parse_args()
    checkouts = {peer: getattr(options, peer.replace("-", "_")) for peer in SUITES}
    found = {peer: run(peer, path.resolve(), options) for peer, path in checkouts.items() if path is not None}
    if not found:
        parser.error(f"give at least one of {', '.join(f'--{peer}' for peer in SUITES)}")
    print("", *(summary(peer, result) for peer, result in found.items()), sep="\n")
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))
    raise SystemExit(any(result["failed"] for result in found.values()))


if __name__ == "__main__":
    main()
