"""The same bits, whatever else runs: repeated, captured, on two streams, in two threads, with one ``position_ids``.

    python benchmarks/determinism.py --output OUT            # on a GPU, about a minute; OUT/determinism.json
    python benchmarks/determinism.py --output OUT --smoke    # tiny and by the reference, on a CPU

Every case runs forward and backward with ``deterministic=True``, once alone; then

* ``repeated``: 100 times, while matrix products and copies run on a second stream;
* ``graph``: as a CUDA graph, replayed 20 times beside the same noise;
* ``streams``: with other inputs on another stream at once, 25 times;
* ``threads``: the same in two Python threads, each with its stream.

``positions``: two streams run mask function and layers of a model on one ``position_ids`` tensor, at once. A row counts
the runs whose bits differ from the first run's; status 1 if any does. ``free_order`` is for information: runs of which
dq differs where determinism was not asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import hf_route  # noqa: E402
from cases import Case, Inputs, make_inputs, run  # noqa: E402

from triton_attention_sink_hf import attention_sink  # noqa: E402
from triton_attention_sink_hf.bench.cases import Case as Layer  # noqa: E402
from triton_attention_sink_hf.bench.measure import environment  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BF16 = torch.bfloat16
PACKED = (700, 0, 1, 300, 1500, 547)
CASES = {
    "full D 64": Case(3000, heads=(64, 8), head_dim=64, dtype=BF16, dlse=True),
    "full D 128": Case(2000, heads=(32, 8), head_dim=128, dtype=BF16),
    "full D 256": Case(1500, heads=(16, 4), head_dim=256, dtype=BF16),
    "window 128": Case(3000, heads=(64, 8), head_dim=64, dtype=BF16, window=(127, 0)),
    "packed": Case(sum(PACKED), heads=(64, 8), head_dim=64, dtype=BF16, lengths_q=PACKED),
    "packed window 128": Case(sum(PACKED), heads=(64, 8), head_dim=64, dtype=BF16, lengths_q=PACKED, window=(127, 0)),
    "padding softcap": Case(1500, batch=2, heads=(16, 4), head_dim=128, dtype=BF16, padding="left", softcap=20.0),
    "fp32": Case(700, heads=(8, 2), head_dim=64, dlse=True),
    "decode": Case(1, 20_000, batch=4, heads=(64, 8), head_dim=64, dtype=BF16, used=(20_000, 1, 7_000, 0)),
}
SMALL = {
    "full": Case(20, heads=(4, 2), head_dim=16),
    "packed": Case(20, heads=(4, 2), head_dim=16, lengths_q=(7, 0, 9)),
}
Results = dict[str, Tensor]


def same(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def compute(case: Case, inputs: Inputs, deterministic: bool = True) -> Results:
    return run(case, inputs, "auto" if GPU else "reference", deterministic)


@contextlib.contextmanager
def on(stream) -> Iterator[None]:
    """What runs inside is done at the end."""
    if stream is None:
        yield
        return
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()


def new_stream():
    return torch.cuda.Stream() if GPU else None


class Noise:
    """Work for other SMs and for memory, a few milliseconds at each ``make``, on a stream of its own."""

    def __init__(self):
        if GPU:
            self.stream = torch.cuda.Stream()
            self.a = torch.randn(2048, 2048, device=DEVICE, dtype=BF16)
            self.b = torch.empty(2**26, device=DEVICE)

    def make(self) -> None:
        if GPU:
            with torch.cuda.stream(self.stream):
                for _ in range(3):
                    self.a @ self.a
                self.b.copy_(self.b.flip(0))

    def end(self) -> None:
        if GPU:
            self.stream.synchronize()


def repeated(work: Callable[[], Results], first: Results, noise: Noise, times: int) -> int:
    different = 0
    for _ in range(times):
        noise.make()
        different += not same(work(), first)
    noise.end()
    return different


def graph(work: Callable[[], Results], first: Results, noise: Noise, times: int) -> int:
    if not GPU:
        return 0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with on(stream):
        work()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        results = work()
    different = 0
    for _ in range(times):
        for x in results.values():
            x.zero_()
        noise.make()
        captured.replay()
        different += not same(results, first)
    noise.end()
    return different


def at_once(works: list[Callable[[], Results]], firsts: list[Results], times: int, threads: bool) -> int:
    """Each work on a stream of its own, at the same time; by one thread, or each by its own."""
    streams = [new_stream() for _ in works]
    different = [0] * len(works)
    if GPU:
        torch.cuda.synchronize()
    if not threads:
        for _ in range(times):
            found = []
            for work, stream in zip(works, streams, strict=True):
                with torch.cuda.stream(stream) if GPU else contextlib.nullcontext():
                    found.append(work())
            if GPU:
                torch.cuda.synchronize()
            for i, results in enumerate(found):
                different[i] += not same(results, firsts[i])
        return sum(different)
    failures = []

    def body(i: int) -> None:
        try:
            for _ in range(times):
                with on(streams[i]):
                    results = works[i]()
                with on(streams[i]):
                    different[i] += not same(results, firsts[i])
        except Exception as error:
            failures.append(error)

    started = [threading.Thread(target=body, args=(i,)) for i in range(len(works))]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if failures:
        raise failures[0]
    return sum(different)


def check_case(case: Case, noise: Noise, smoke: bool) -> dict[str, int]:
    """Of each check, the runs whose bits differ."""
    times = 3 if smoke else 100
    inputs = [make_inputs(case, DEVICE, seed) for seed in (0, 1)]
    works = [lambda i=i: compute(case, inputs[i]) for i in range(2)]
    firsts = [work() for work in works]
    assert not same(*firsts), "other inputs must give other bits"
    free = compute(case, inputs[0], False)
    orders = sum(not same(compute(case, inputs[0], False), free) for _ in range(times // 10))
    return {
        "repeated": repeated(works[0], firsts[0], noise, times),
        "graph": graph(works[0], firsts[0], noise, times // 5),
        "streams": at_once(works, firsts, max(times // 4, 2), threads=False),
        "threads": at_once(works, firsts, max(times // 4, 2), threads=True),
        "free_order": orders,
    }


def shared_positions(smoke: bool, noise: Noise) -> dict[str, int]:
    """Two streams, two models' forwards of two layers each, one position_ids tensor that nobody copies."""
    lengths = (7, 1, 12) if smoke else PACKED
    layer = Layer("packed", 1, sum(lengths), *((4, 2, 16) if smoke else (64, 8, 64)), None, lengths)
    model = hf_route.Model(layer)
    case = Case(layer.seqlen, heads=(layer.heads_q, layer.heads_k), head_dim=layer.head_dim, dtype=BF16)
    inputs = [make_inputs(case, DEVICE, seed) for seed in (0, 1)]
    positions = model.positions

    def work(x: Inputs) -> Results:
        leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v, x.sinks)]
        mask = model.mask(positions)
        first = model.layer(*leaves, mask, positions)
        out = model.layer(first, *leaves[1:], mask, positions)
        gradients = torch.autograd.grad(out, leaves, x.dout)
        return {"out": out.detach(), **{f"d{i}": gradient for i, gradient in enumerate(gradients)}}

    works = [lambda i=i: work(inputs[i]) for i in range(2)]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        firsts = [work() for work in works]
        times = 2 if smoke else 50
        noise.make()
        found = {"streams": at_once(works, firsts, times, False), "threads": at_once(works, firsts, times, True)}
    finally:
        torch.use_deterministic_algorithms(before)
    noise.end()
    expected = alone(inputs[0], lengths)
    found["wrong"] = int((works[0]()["out"].float() - expected).abs().max() > 0.05 * expected.abs().max())
    return found


def alone(inputs: Inputs, lengths: tuple[int, ...]) -> Tensor:
    """What two layers give for samples apart from each other."""
    parts, start = [], 0
    for n in lengths:
        rows = slice(start, start + n)
        q, k, v = (x[:, rows].float() for x in (inputs.q, inputs.k, inputs.v))
        for _ in range(2):
            q = attention_sink(q, k, v, inputs.sinks, implementation="reference")
        parts.append(q)
        start += n
    return torch.cat(parts, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for determinism.json")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--cases", default="", help="part of the names of the cases to run")
    arguments = parser.parse_args()
    noise, rows = Noise(), {}
    for name, case in (SMALL if arguments.smoke else CASES).items():
        if arguments.cases in name:
            rows[name] = check_case(case, noise, arguments.smoke)
            print(f"{name}: {rows[name]}", flush=True)
    rows["positions"] = shared_positions(arguments.smoke, noise)
    print(f"positions: {rows['positions']}", flush=True)
    bad = {name: row for name, row in rows.items() if any(n for check, n in row.items() if check != "free_order")}
    data = {"environment": environment() if GPU else {}, "different": rows, "failed": sorted(bad)}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "determinism.json").write_text(json.dumps(data, indent=1) + "\n")
    print(f"{len(bad)} of {len(rows)} cases differ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
