"""Random calls of ``attention_sink`` over all its arguments, each against fp64, forward and gradients.

    python benchmarks/random_calls.py --output OUT              # 10,000 calls on a GPU, OUT/random_calls.json
    python benchmarks/random_calls.py --output OUT --smoke      # a few small ones; on a CPU kernels are interpreted
    python benchmarks/random_calls.py --seed 0 --only 17:3      # one call again, of structure 17 the third

``tests/drawn_calls.py`` draws the calls: a structure is what kernels are compiled for, and its calls differ in
lengths, windows, sinks and data. Both depend on the seed and their numbers alone. ``--workers`` processes share the
structures and the compiler's cache; one that crashes or hangs is replaced. After ``--compile`` seconds no new structure
begins, and those that are compiled get more calls.

A call fails if it raises, if an output exceeds its budget, or if it should repeat bit for bit and does not. A failure
is printed as a command that runs the call alone. A ValueError or TypeError of ours is a refusal: it is counted, but it
checks nothing. The yardstick is one eager computation for all heads (``tests/formulas.py``). What it finds suspicious
is measured with the sixteen draws of ``tests/budget.py``, which decide (``measured_closely``). Status 1 if one failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import sys
import time
import traceback
import warnings
from collections import Counter, deque
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from budget import HEAD_AXIS, measure  # noqa: E402
from cases import Inputs  # noqa: E402
from drawn_calls import Drawn, inputs_of, pasteable, run, structure, values, without_infinities  # noqa: E402
from formulas import by_formula  # noqa: E402
from torch import Tensor  # noqa: E402

LIMIT_S = 240  # for the calls of one structure; then the worker counts as hung


def drawn_call(seed: int, index: int, number: int, smoke: bool) -> Drawn:
    form = structure(random.Random(f"{seed} {index}"), smoke)
    return values(form, random.Random(f"{seed} {index} {number}"), smoke)


def one(seed: int, index: int, number: int, smoke: bool) -> dict:
    """A call's verdict: "checked", "refused" or "failed", and what there is to say."""
    drawn = drawn_call(seed, index, number, smoke)
    found = {"call": f"{index}:{number}", "verdict": "checked", "implementation": None, "close": False}
    try:
        inputs = inputs_of(drawn, DEVICE)
        name, got = run(drawn, inputs)
        found["implementation"] = name
        problems = []
        if number % 5 == 0:
            _, again = run(drawn, inputs)
            loose = ("dq",) if name == "triton_hopper" and not drawn.deterministic else ()
            differs = [x for x in got if x not in loose and not _same(got[x], again[x])]
            problems = [f"{x} differs when called again" for x in differs]
        if suspicious(drawn, inputs, got):
            found["close"] = True
            problems += exceeded(drawn)
        if problems:
            found |= {"verdict": "failed", "problem": "; ".join(problems)}
    except Exception as error:
        refused = isinstance(error, (ValueError, TypeError)) and _raised_by_us(error)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        found |= {"verdict": "refused" if refused else "failed", "problem": text if refused else f"crash, {text}"}
    if found["verdict"] == "failed":
        found |= {"seed": seed, "reproduce": pasteable(drawn)}
    return found


def suspicious(drawn: Drawn, inputs: Inputs, got: dict[str, Tensor]) -> bool:
    """Whether an output's error exceeds ten times that of one eager computation, in any head. One wait for the GPU."""
    visible = inputs.mask.dense(inputs.q.shape[1], inputs.k.shape[1], inputs.q.device)
    want = by_formula(drawn.case, inputs, visible)
    eager = by_formula(drawn.case, inputs, visible, drawn.case.dtype)
    endless = torch.zeros(inputs.q.shape[2], dtype=torch.bool, device=inputs.q.device)
    if inputs.sinks is not None:
        endless = inputs.sinks == float("inf")  # in these heads alone out is NaN or 0, and lse NaN or inf
    bad = []
    for name, axis in HEAD_AXIS.items():
        if name not in got:
            continue

        def norms(x: Tensor, axis: int = axis) -> Tensor:
            """(heads,)"""
            return torch.linalg.vector_norm(x.movedim(axis, 0).reshape(x.shape[axis], -1), dim=1)

        exact, result = want[name], got[name].double()
        assert result.shape == exact.shape, f"{name}: {result.shape} instead of {exact.shape}"
        skipped = endless if name not in ("dk", "dv") else endless.view(exact.shape[axis], -1).any(1)
        wrong = torch.zeros_like(skipped)
        if name == "lse":  # rows that see neither key nor sink
            nothing = exact == float("-inf")
            wrong = norms((nothing & (result != exact)).double()) > 0
            exact, result = exact.masked_fill(nothing, 0.0), result.masked_fill(nothing, 0.0)
            eager[name] = eager[name].masked_fill(nothing, 0.0)
        difference = eager[name] - exact
        extra = 2**-21 * norms(exact)
        if name == "dsink":  # a sum of few numbers may be right by luck; its terms are not
            difference = eager["dsink terms"] - want["dsink terms"]
            seen = want["lse"].masked_fill(want["lse"] == float("-inf"), 0.0).abs().movedim(1, 0).flatten(1)
            exponent = torch.maximum(torch.nn.functional.pad(seen, (0, 1)).amax(1), inputs.sinks.double().abs())
            extra = extra + exact.abs() * exponent.clamp(max=1000.0) * 2**-24
            allowed = 10 * torch.linalg.vector_norm(difference, dim=1)
        else:
            allowed = 10 * norms(difference)
        allowed = allowed + extra + norms(exact.to(got[name].dtype).double() - exact)
        wrong = (wrong | ~(norms(result - exact) <= allowed)) & ~skipped
        if name == "lse":
            wrong = wrong | (skipped & (norms(result.isfinite().double()) > 0))
        bad.append(wrong.any())
    return bool(torch.stack(bad).any())


def exceeded(drawn: Drawn) -> list[str]:
    """What exceeds the budget of random calls, by all draws of the yardstick."""
    drawn = without_infinities(drawn)
    inputs = inputs_of(drawn, DEVICE)
    name, got = run(drawn, inputs)
    rows = measure(drawn.case, inputs, got, rounded_delta=name == "triton_hopper")
    return [str(row) for row in rows if not row.error <= row.allowed_at_random]


def _raised_by_us(error: Exception) -> bool:
    """Whether this package refused the call; else something below it broke."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).resolve().is_relative_to(ROOT / "triton_attention_sink_hf")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def work(connection, seed: int, numbers: int, smoke: bool) -> None:
    """A worker: (structure, first call) in, a verdict of each call out. It ends where the device is beyond repair."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    while (task := connection.recv()) is not None:
        index, first = task
        for number in range(first, first + numbers):
            found = one(seed, index, number, smoke)
            try:
                if GPU:
                    torch.cuda.synchronize()
                connection.send(found)
            except RuntimeError as error:
                problem = f"crash, {type(error).__name__}: {str(error).splitlines()[0]}"
                reproduce = pasteable(drawn_call(seed, index, number, smoke))
                found |= {"verdict": "failed", "problem": problem, "seed": seed, "reproduce": reproduce}
                connection.send(found | {"fatal": True})
                return
        connection.send(None)
        if GPU:
            torch.cuda.empty_cache()


class Pool:
    """Workers, each with a structure in hand; ``results`` holds what came back."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.results, self.workers = arguments, [], {}
        self.context = multiprocessing.get_context("spawn")
        self.begun = self.said = time.monotonic()
        self.next, self.compiled = 0, deque()  # number of the next structure; (structure, its next call)
        self.checked = self.failed = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def task(self) -> tuple[int, int] | None:
        """The next structure and its first call; None if nothing is left to do."""
        underway = self.arguments.values * sum(task is not None for _, task, _, _ in self.workers.values())
        if self.seconds >= self.arguments.budget or self.checked + underway >= self.arguments.calls:
            return None
        if self.seconds < self.arguments.compile or not self.compiled:
            self.next += 1
            return self.next - 1, 0
        return self.compiled.popleft()

    def start(self) -> None:
        ours, theirs = self.context.Pipe()
        a = self.arguments
        process = self.context.Process(target=work, args=(theirs, a.seed, a.values, a.smoke), daemon=True)
        process.start()
        theirs.close()
        self.workers[ours] = [process, None, 0, 0.0]
        self.hand_out(ours)

    def hand_out(self, connection) -> None:
        self.workers[connection][1] = None
        task = self.task()
        connection.send(task)
        if task is None:
            self.workers.pop(connection)[0].join(20)
        else:
            self.workers[connection][1:] = [task, 0, time.monotonic()]

    def lose(self, connection, why: str) -> None:
        """A worker that died or hung: the call that it was at has failed, and another takes its place."""
        process, (index, first), done, _ = self.workers.pop(connection)
        process.kill()
        if why:
            a, number = self.arguments, first + done
            found = {"call": f"{index}:{number}", "verdict": "failed", "implementation": None, "close": False}
            reproduce = pasteable(drawn_call(a.seed, index, number, a.smoke))
            self.note(found | {"problem": why, "seed": a.seed, "reproduce": reproduce})
        if self.seconds < self.arguments.budget and self.checked < self.arguments.calls:
            self.start()

    def note(self, found: dict) -> None:
        self.results.append(found)
        self.checked += found["verdict"] != "refused"
        if found["verdict"] == "failed":
            self.failed += 1
            print(f"FAILED {found['call']} by {found['implementation']}: {found['problem']}", flush=True)
            print(found["reproduce"], flush=True)
        if time.monotonic() - self.said > 10:
            self.said = time.monotonic()
            print(
                f"[{self.seconds:4.0f} s] {self.checked} of {self.arguments.calls} calls, {self.next} structures, "
                f"{self.failed} failed", flush=True,
            )  # fmt: skip

    def run(self) -> list[dict]:
        for _ in range(self.arguments.workers):
            self.start()
        while self.workers:
            ready = multiprocessing.connection.wait(list(self.workers), timeout=5)
            for connection in ready:
                try:
                    found = connection.recv()
                except (EOFError, ConnectionError):
                    self.lose(connection, "crash, the process ended")
                    continue
                if found is None:
                    index, first = self.workers[connection][1]
                    self.compiled.append((index, first + self.arguments.values))
                    self.hand_out(connection)
                    continue
                fatal = found.pop("fatal", False)
                self.note(found)
                self.workers[connection][2] += 1
                if fatal:
                    self.lose(connection, "")
            for connection, (_, _, _, since) in list(self.workers.items()):
                if time.monotonic() - since > LIMIT_S:
                    self.lose(connection, f"hang, no end after {LIMIT_S} s")
        return self.results


def summary(arguments: argparse.Namespace, results: list[dict], seconds: float) -> dict:
    from triton_attention_sink_hf.bench.measure import environment

    done = [found for found in results if found["verdict"] != "refused"]
    refused = Counter(found["problem"].split(", got")[0][:120] for found in results if found["verdict"] == "refused")
    return {
        "environment": environment(),
        "seed": arguments.seed, "seconds": round(seconds, 1),
        "structures": len({found["call"].split(":")[0] for found in done}),
        "calls": len(done), "checked": sum(found["verdict"] == "checked" for found in done),
        "failed": [found for found in done if found["verdict"] == "failed"],
        "implementations": dict(Counter(str(found["implementation"]) for found in done)),
        "refused": dict(refused.most_common()),
        "measured_closely": sum(found["close"] for found in done),
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for random_calls.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=10_000, help="at least so many that were not refused")
    parser.add_argument("--values", type=int, default=50, help="calls of a structure before the next one")
    parser.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16))
    parser.add_argument("--compile", type=float, default=200, help="seconds after which no new structure begins")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which nothing begins")
    parser.add_argument("--only", help="STRUCTURE:CALL, run here and printed in full")
    parser.add_argument("--smoke", action="store_true", help="small sizes, two workers, 24 calls")
    arguments = parser.parse_args()
    if arguments.only:
        index, number = map(int, arguments.only.split(":"))
        print(pasteable(drawn_call(arguments.seed, index, number, arguments.smoke)))
        found = one(arguments.seed, index, number, arguments.smoke)
        print(json.dumps(found, indent=1))
        return found["verdict"] == "failed"
    if arguments.smoke:
        arguments.calls, arguments.values, arguments.workers = 24, 4, 2
    pool = Pool(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        pool.run()
    data = summary(arguments, pool.results, pool.seconds)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "random_calls.json").write_text(json.dumps(data, indent=1) + "\n")
    print(json.dumps({name: x for name, x in data.items() if name not in ("environment", "failed")}, indent=1))
    print(f"{len(data['failed'])} of {data['calls']} failed in {data['seconds']:.0f} s")
    return 1 if data["failed"] or not data["calls"] else 0


if __name__ == "__main__":
    sys.exit(main())
