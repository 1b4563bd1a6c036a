"""Random calls of ``attention_sink`` over all its arguments, each against fp64, forward and gradients.

    python benchmarks/random_calls.py --output OUT              # 4,000 calls on a GPU, OUT/random_calls.json
    python benchmarks/random_calls.py --output OUT --smoke      # a few small ones; on a CPU kernels are interpreted
    python benchmarks/random_calls.py --seed 0 --only 17:3      # one call again, of structure 17 the third

A structure is what kernels are compiled for: head dimensions, heads, dtype, kind of mask, layout, which gradients. Its
``--values`` calls differ in lengths, windows, sinks and data. A structure and a call depend only on the seed and their
numbers. ``--workers`` processes share the structures and the compiler's cache; one that crashes or hangs is replaced.

A call fails if it raises, if an output exceeds its budget (``tests/budget.py``), or if it should repeat bit for bit and
does not. A ValueError or TypeError is a refusal: it is counted, but it checks nothing. ``beyond_strict`` counts outputs
that exceed the budget for chosen cases and keep the wider one for random calls. Status 1 if a call failed.
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
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from budget import measure  # noqa: E402
from cases import Case, Inputs, call, make_inputs  # noqa: E402

from triton_attention_sink_hf import explain  # noqa: E402

NAMES = ("dq", "dk", "dv", "dsink")
LIMIT_S = 240  # for the calls of one structure; then the worker counts as hung
FEW = 4  # draws of the yardstick that most calls are judged by; they take most of the time
ELEMENTS = 2**24  # scores of one call, at most, so that fp64 fits beside eleven others


@dataclass(frozen=True)
class Structure:
    """``case`` has everything but lengths and the window's size. The other fields are what a ``Case`` cannot hold."""

    case: Case
    packed: str | None  # "alike", "T + 1" (entries as many as tokens), "cross" (keys cut otherwise), None
    padding: str | None
    used: bool
    window: str | None  # "one", "short", "long", "both", "right", "huge", None
    more_keys: bool
    sinks: str  # "spread", or "wild": -inf, the smallest float, 20 and others by head
    loss: str  # of "out", "lse" or "both"
    leaves: tuple[str, ...]
    deterministic: bool | None
    implementation: str


def structure(seed: int, index: int, smoke: bool = False) -> Structure:
    pick = random.Random(f"{seed} {index}")
    sizes = ((16, 16), (24, 40), (64, 64)) if smoke else USUAL
    d, dv = pick.choice(sizes)
    if not smoke and pick.random() < 0.25:
        step = pick.choice((1, 8))
        d, dv = (step * pick.randrange(1, 256 // step + 1) for _ in range(2))
        dv = pick.choice((d, dv))
    heads_k = pick.choice((1, 1, 2, 2, 4, 8))
    group = pick.choice((1, 2, 3, 4, 4, 5, 7, 8, 8, 16))
    if smoke:
        heads_k, group = min(heads_k, 2), min(group, 3)
    dtype = pick.choice((torch.bfloat16,) * 4 + (torch.float16,) * 2 + (torch.float32,) * 2)
    if not GPU and dtype == torch.bfloat16:
        dtype = torch.float16  # Triton's interpreter multiplies bf16 wrongly
    causal = pick.random() < 0.75
    packed = pick.choice((None, None, None, "alike", "alike", "T + 1", "cross"))
    loss = pick.choice(("out", "out", "both", "both", "lse"))
    sinks = pick.choice(("learned", "learned", "learned", "frozen", None))
    leaves = [name for name in NAMES if name != "dsink" or sinks == "learned"]
    if pick.random() < 0.3:
        leaves = [name for name in leaves if pick.random() < 0.5] or [pick.choice(leaves)]
    case = Case(
        1, 1, heads=(heads_k * group, heads_k), head_dim=(d, dv), dtype=dtype, causal=causal,
        softmax_scale=pick.choice((None,) * 6 + (0.2, 0.03, -0.2, 0.0)),
        softcap=pick.choice((0.0,) * 6 + (5.0, 30.0)),
        sinks=sinks, sink_dtype=pick.choice((torch.float32, torch.float32, torch.bfloat16 if GPU else torch.float16)),
        dlse=loss != "out", layout=pick.choice(("bshd", "bshd", "bhsd", "bhsd", "sliced", "expanded")),
    )  # fmt: skip
    windows = (None, None, "one", "short", "short", "long", "huge") + (() if causal else ("both", "both", "right"))
    return Structure(
        case, packed,
        padding=None if packed else pick.choice((None,) * 5 + ("left", "right", "holes")),
        used=not packed and pick.random() < 0.15,
        window=pick.choice(windows), more_keys=pick.random() < 0.3,
        sinks=pick.choice(("spread", "spread", "wild")), loss=loss, leaves=tuple(leaves),
        deterministic=pick.choice((None, None, True)),
        implementation=pick.choice(IMPLEMENTATIONS),
    )  # fmt: skip


# on a CPU auto would take the reference
IMPLEMENTATIONS = ("auto",) * 4 + ("triton", "triton", "triton_hopper", "triton_window") if GPU else ("triton",)
USUAL = (
    *((64, 64),) * 6, *((128, 128),) * 6, *((256, 256),) * 3, *((192, 128),) * 2, *((96, 96),) * 2, *((80, 80),) * 2,
    (16, 16), (32, 32), (40, 40), (48, 48), (72, 72), (112, 112), (160, 160), (192, 192), (224, 224), (40, 128),
    (64, 128), (128, 64), (256, 64), (256, 128), (24, 64),
)  # fmt: skip


def values(form: Structure, seed: int, index: int, number: int, smoke: bool = False) -> Case:
    """The structure's case with lengths and windows."""
    pick = random.Random(f"{seed} {index} {number}")
    longest = 48 if smoke else pick.choice((40, 150, 300, 700, 700, 2000))

    def length(least: int = 1) -> int:
        near = pick.choice((16, 32, 64, 128, 192, 256, 512)) + pick.choice((-1, 0, 0, 1))  # where tiles end
        n = pick.choice((near, pick.randint(least, longest), round(longest ** pick.random())))
        return max(least, min(n, longest))

    left, right = {
        None: (-1, -1), "one": (0, 0), "short": (pick.choice((1, 15, 63, 64, 100, 126, 127, 128)), 0),
        "long": (pick.randrange(129, 1000), 0), "both": (pick.randrange(300), pick.randrange(300)),
        "right": (-1, pick.randrange(200)),
        "huge": (pick.choice((2**31 - 2, 2**31 - 1, 2**31 - 100, 2**30, 2**31, 2**40)), pick.choice((0, 2**31 - 1))),
    }[form.window]  # fmt: skip
    if smoke and form.window == "short":
        left = pick.randrange(1, 20)
    if form.window in ("one", "short", "long") and not form.case.causal:
        right = pick.choice((0, -1, left))
    common = {"window": (left, right)}
    if form.packed is not None:
        segments = pick.choice((1, 2, 3, 5, 9))
        rows = [
            pick.choice((0, 1, length(), length() // segments + 1, length() // segments + 1)) for _ in range(segments)
        ]
        other = [max(0, n + pick.choice((0, 0, -n, pick.randint(-n, n + 9)))) for n in rows]
        total = max(1, sum(rows) + pick.choice((0, 0, 0, 5)))  # rows past the last segment see nothing
        keys = max(1, sum(other) + pick.choice((0, 0, 7))) if form.packed == "cross" else total
        if form.packed == "T + 1":
            rows += [0] * (total - segments)
        common |= {"lengths_q": tuple(rows), "seqlen_q": total, "seqlen_k": keys}
        if form.packed == "cross":
            common["lengths_k"] = tuple(other)
    else:
        queries = pick.choice((1, length(), length(), length()))
        keys = queries + length() if form.more_keys else pick.choice((queries,) * 4 + (length(),))
        batch = pick.choice((1, 1, 2, 3))
        used = tuple(pick.randint(0, keys) for _ in range(batch)) if form.used else None
        common |= {"seqlen_q": queries, "seqlen_k": keys, "batch": batch, "used": used, "padding": form.padding}
    case = replace(form.case, **common)
    scores = case.batch * case.seqlen_q * case.seqlen_k * case.heads[0] // case.heads[1]
    return case if scores <= ELEMENTS else values(form, seed, index, number + 10_000, smoke)


def inputs_of(form: Structure, case: Case, seed: int) -> Inputs:
    inputs = make_inputs(case, DEVICE, seed)
    if inputs.sinks is not None and form.sinks == "wild":
        least = torch.finfo(case.sink_dtype).min
        choices = torch.tensor([float("-inf"), least, -1e10, -30.0, 0.0, 5.0, 20.0])
        generator = torch.Generator().manual_seed(seed)
        chosen = choices[torch.randint(len(choices), inputs.sinks.shape, generator=generator)]
        inputs = replace(inputs, sinks=chosen.to(DEVICE, case.sink_dtype))
    if form.loss == "lse":
        inputs = replace(inputs, dout=torch.zeros_like(inputs.dout))
    return inputs


def run(form: Structure, case: Case, inputs: Inputs, implementation: str) -> dict[str, torch.Tensor]:
    """out, lse and the gradients of the structure's leaves."""
    tensors = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dsink": inputs.sinks}
    tensors = {n: x if x is None else x.detach().requires_grad_(n in form.leaves) for n, x in tensors.items()}
    out, lse = call(case, inputs, *tensors.values(), implementation, form.deterministic)
    outputs = {"out": (out, inputs.dout), "lse": (lse, inputs.dlse)}
    used = [outputs[name] for name in outputs if form.loss in (name, "both")]
    gradients = torch.autograd.grad(
        [x for x, _ in used], [tensors[name] for name in form.leaves], [dx for _, dx in used]
    )
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(form.leaves, gradients, strict=True))}


def served_by(form: Structure, case: Case, inputs: Inputs) -> str:
    """The requested implementation if it supports the call, else the one that "auto" takes."""
    mask = inputs.mask
    q, k, v = ((x.squeeze(0) if mask.packed else x) for x in (inputs.q, inputs.k, inputs.v))
    said = explain(
        q, k, v, inputs.sinks, causal=case.causal, window_size=case.window, softmax_scale=case.softmax_scale,
        softcap=case.softcap, cu_seqlens_q=mask.cu_seqlens_q, cu_seqlens_k=mask.cu_seqlens_k,
        key_padding_mask=mask.key_padding_mask, seqused_k=mask.seqused_k, deterministic=form.deterministic,
    )  # fmt: skip
    return form.implementation if said.reasons.get(form.implementation, "") is None else said.implementation


def one(seed: int, index: int, number: int, smoke: bool) -> dict:
    """A call's verdict: "checked", "refused" or "failed", and what there is to say."""
    form = structure(seed, index, smoke)
    case = values(form, seed, index, number, smoke)
    found = {"call": f"{index}:{number}", "verdict": "checked", "implementation": None, "strict": []}
    try:
        inputs = inputs_of(form, case, number)
        name = found["implementation"] = served_by(form, case, inputs)
        asked = name if form.implementation == name else "auto"
        got = run(form, case, inputs, asked)
        again = run(form, case, inputs, asked) if number % 5 == 0 else got
        rounded = name == "triton_hopper"
        rows = measure(case, inputs, got, rounded, FEW)
        if not all(row.error <= row.allowed_at_random for row in rows):
            rows = measure(case, inputs, got, rounded)  # few draws may all be small by luck: all of them decide
        found["strict"] = [str(row) for row in rows if not row.error <= row.allowed]
        problems = [str(row) for row in rows if not row.error <= row.allowed_at_random]
        loose = ("dq",) if rounded and not form.deterministic else ()
        problems += [f"{x} differs when called again" for x in got if x not in loose and not _same(got[x], again[x])]
        if problems:
            found |= {"verdict": "failed", "problem": "; ".join(problems)}
    except Exception as error:
        refused = isinstance(error, (ValueError, TypeError)) and _raised_by_us(error)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        found |= {"verdict": "refused" if refused else "failed", "problem": text if refused else f"crash, {text}"}
    if found["verdict"] == "failed":
        found |= {"seed": seed, "form": repr(form), "case": repr(case)}
    return found


def _raised_by_us(error: Exception) -> bool:
    """Whether this package refused the call; else something below it broke."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).resolve().is_relative_to(ROOT / "triton_attention_sink_hf")


def _same(a, b) -> bool:
    return torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def work(connection, seed: int, numbers: int, smoke: bool) -> None:
    """A worker: structure numbers in, (index, verdict) of each call out. It ends where the device is beyond repair."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    while (index := connection.recv()) is not None:
        for number in range(numbers):
            found = one(seed, index, number, smoke)
            try:
                if GPU:
                    torch.cuda.synchronize()
                connection.send(found)
            except RuntimeError as error:
                problem = f"crash, {type(error).__name__}: {str(error).splitlines()[0]}"
                connection.send(found | {"verdict": "failed", "problem": problem, "fatal": True})
                return
        connection.send(None)
        if GPU:
            torch.cuda.empty_cache()


class Pool:
    """Workers, each with a structure in hand; ``results`` holds what came back."""

    def __init__(self, arguments: argparse.Namespace):
        self.arguments, self.results, self.workers = arguments, [], {}
        self.context = multiprocessing.get_context("spawn")
        self.next, self.begun = 0, time.monotonic()

    def left(self) -> bool:
        """Whether another structure is to be started."""
        checked = sum(found["verdict"] != "refused" for found in self.results)
        underway = self.arguments.values * (len(self.workers) - 1)
        in_time = time.monotonic() - self.begun < self.arguments.budget
        return in_time and checked + underway < self.arguments.calls

    def start(self) -> None:
        ours, theirs = self.context.Pipe()
        a = self.arguments
        process = self.context.Process(target=work, args=(theirs, a.seed, a.values, a.smoke), daemon=True)
        process.start()
        theirs.close()
        self.workers[ours] = [process, None, 0, 0.0]
        self.hand_out(ours)

    def hand_out(self, connection) -> None:
        if not self.left():
            process = self.workers.pop(connection)[0]
            connection.send(None)
            process.join(20)
            return
        self.workers[connection][1:] = [self.next, 0, time.monotonic()]
        connection.send(self.next)
        self.next += 1

    def lose(self, connection, why: str) -> None:
        """A worker that died or hung: the call that it was at has failed, and another takes its place."""
        process, index, number, _ = self.workers.pop(connection)
        process.kill()
        if why:
            found = {
                "call": f"{index}:{number}",
                "verdict": "failed",
                "implementation": None,
                "problem": why,
                "strict": [],
            }
            self.note(found | {"seed": self.arguments.seed})
        if self.left():
            self.start()

    def note(self, found: dict) -> None:
        self.results.append(found)
        if found["verdict"] == "failed":
            print(f"FAILED --seed {self.arguments.seed} --only {found['call']}: {found['problem']}", flush=True)
            print(f"       {found['implementation']} {found.get('case', '')[:400]}", flush=True)
        if len(self.results) % 250 == 0:
            print(f"[{time.monotonic() - self.begun:4.0f} s] {len(self.results)} calls", flush=True)

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
    strict = [f"{found['call']} {found['implementation']} {row}" for found in done for row in found["strict"]]
    return {
        "environment": environment(),
        "seed": arguments.seed, "values_per_structure": arguments.values, "seconds": round(seconds, 1),
        "structures": len({found["call"].split(":")[0] for found in done}),
        "calls": len(done), "checked": sum(found["verdict"] == "checked" for found in done),
        "failed": [found for found in done if found["verdict"] == "failed"],
        "implementations": dict(Counter(str(found["implementation"]) for found in done)),
        "refused": dict(refused.most_common()), "beyond_strict": len(strict), "beyond_strict_rows": strict[:200],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="folder for random_calls.json")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=4000, help="at least so many that were not refused")
    parser.add_argument("--values", type=int, default=20, help="calls of one structure")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no new structure is started")
    parser.add_argument("--only", help="STRUCTURE:CALL, run here and printed in full")
    parser.add_argument("--smoke", action="store_true", help="small sizes, two workers, 24 calls")
    arguments = parser.parse_args()
    if arguments.only:
        index, number = map(int, arguments.only.split(":"))
        print(structure(arguments.seed, index, arguments.smoke))
        found = one(arguments.seed, index, number, arguments.smoke)
        print(json.dumps(found, indent=1))
        return found["verdict"] == "failed"
    if arguments.smoke:
        arguments.calls, arguments.values, arguments.workers = 24, 4, 2
    pool = Pool(arguments)
    with contextlib.suppress(KeyboardInterrupt):
        pool.run()
    data = summary(arguments, pool.results, time.monotonic() - pool.begun)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "random_calls.json").write_text(json.dumps(data, indent=1) + "\n")
    print(
        json.dumps(
            {name: data[name] for name in ("structures", "calls", "checked", "implementations", "refused")}, indent=1
        )
    )
    print(f"{len(data['failed'])} of {data['calls']} failed, {data['beyond_strict']} outputs beyond the strict budget")
    return 1 if data["failed"] or not data["calls"] else 0


if __name__ == "__main__":
    sys.exit(main())
