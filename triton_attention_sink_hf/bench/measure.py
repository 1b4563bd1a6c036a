"""Check, then time: one case after another, every implementation in the same run on the same card."""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor

from ..processes import module_command
from .cases import Case
from .oracle import errors, oracles
from .peers import GRADIENTS, PEERS, Runner, Unsupported

# Relative errors. A wrong kernel is off by 0.1 or more; a correct one stays below 0.02 in bf16 for these shapes.
LIMIT = {"out": 0.01, "dq": 0.01, "dk": 0.01, "dv": 0.01, "dsink": 0.05}
# A card clocks lower as it warms. Taking turns times each implementation in every state.
TURNS, WARMUP_MS, REPEAT_MS, MIN_REPEATS, MAX_REPEATS = 3, 15, 40, 3, 100
CYCLES_PER_US = 2000  # no card clocks higher, so no wait is too short
L2_BYTES = 256 * 2**20  # more than any card's L2


def make_tensors(case: Case, seed: int = 0, device: str = "cuda") -> dict[str, Tensor]:
    """Random q, k, v, dout in bf16 (B, S, H, D) and sinks fp32 from -3 to 8, exact in bf16. q, dout: B, Sq."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(seqlen: int, heads: int) -> Tensor:
        shape = (case.batch, seqlen, heads, case.head_dim)
        return torch.randn(shape, device=device, generator=generator, dtype=torch.float32).bfloat16()

    sinks = torch.linspace(-3, 8, case.heads_q, device=device).bfloat16().float()
    q, dout = (normal(case.seqlen_q, case.heads_q) for _ in range(2))
    k, v = (normal(case.seqlen, case.heads_k) for _ in range(2))
    return {"q": q, "k": k, "v": v, "sinks": sinks, "dout": dout}


def device_ms(function: Callable, clean: bool = False) -> list[float]:
    """Times on the device in ms, one per call, L2 flushed before each.

    ``clean``: L2 holds no lines that are still to be written back. They would take 15 us of the memory's time from a
    kernel, as much as a tenth of what decoding takes.

    Like ``triton.testing.do_bench``, but the device is kept busy until the host has issued the call: in training, too,
    the host runs ahead. Otherwise a short window kernel's time would be its launch time, which ``host_us`` measures.
    """
    host = host_us(function, calls=5)
    idle_cycles = int(1.5 * host * CYCLES_PER_US)
    flush = torch.zeros(L2_BYTES, dtype=torch.int8, device="cuda")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once() -> float:
        if clean:
            flush.view(torch.int32).amax()
        else:
            flush.zero_()
        torch.cuda._sleep(idle_cycles)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    estimate = sorted(once() for _ in range(3))[1]
    for _ in range(max(1, int(WARMUP_MS / estimate))):
        once()
    return [once() for _ in range(min(max(MIN_REPEATS, int(REPEAT_MS / estimate)), MAX_REPEATS))]


def spread(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of times in ms."""
    median, low, high = torch.tensor(samples).quantile(torch.tensor([0.5, 0.2, 0.8])).tolist()
    return {"ms": median, "ms_p20": low, "ms_p80": high}


def host_us(function: Callable, calls: int = 50) -> float:
    """Median host time of a call in microseconds. The device is idle before each."""
    function()
    torch.cuda.synchronize()
    samples = []
    for _ in range(calls):
        start = time.perf_counter()
        function()
        samples.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return sorted(samples)[calls // 2] * 1e6


def extra_memory(function: Callable) -> int:
    """Peak memory of a call in bytes, without what it returns."""
    function()
    torch.cuda.synchronize()
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = function()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del result
    return torch.cuda.max_memory_allocated() - before - held


def measure(case: Case, names: Iterable[str], log: Callable[[str], None]) -> Iterator[dict]:
    """One row per implementation and direction. A failed check or call gives a row with ``problem`` and no time.

    All are checked first, then timed in turns.
    """
    gc.collect()  # memory of the previous case
    torch.cuda.empty_cache()
    tensors = make_tensors(case)
    want = oracles(case, tensors)
    timed: list[tuple[dict, Callable, list[float]]] = []
    for name in names:
        row = {"case": case.name, "implementation": name}
        began = time.perf_counter()
        try:
            runner = PEERS[name](case, tensors)
            row["errors"] = _check(runner, want)
        except (ImportError, Unsupported) as reason:
            yield {**row, "problem": str(reason)}
            continue
        except Exception as error:  # a peer may fail in any way; the table says how
            yield {**row, "problem": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        log(f"{case.name}: {name} built and checked ({time.perf_counter() - began:.1f} s)")
        bad = {key: value for key, value in row["errors"].items() if not value <= LIMIT[key]}
        if bad:
            yield {**row, "problem": f"wrong: relative error {bad}"}
            continue
        for direction in ("forward", "backward"):
            if function := getattr(runner, direction):
                timed.append(({**row, "direction": direction}, function, []))
    del want
    torch.cuda.empty_cache()
    clock = partial(device_ms, clean=True) if case.queries else device_ms
    for turn in range(TURNS):
        began = time.perf_counter()
        for _, function, samples in timed[:: -1 if turn % 2 else 1]:
            samples += clock(function)
        log(f"{case.name}: turn {turn + 1} of {TURNS} ({time.perf_counter() - began:.1f} s)")
    for row, function, samples in timed:
        yield {**row, **spread(samples), "host_us": host_us(function), "extra_bytes": extra_memory(function)}


def _check(runner: Runner, want: dict[int, dict[str, Tensor]]) -> dict[str, float]:
    with torch.no_grad():
        got = {"out": runner.forward()}
    if runner.backward is not None:
        got.update(zip(GRADIENTS, runner.backward(), strict=True))
    return errors(got, want)


def run_once(case: Case, names: Iterable[str]) -> None:
    """Run forward and backward once, to fill the compilers' caches. ``measure`` reports what fails."""
    tensors = make_tensors(case)
    for name in names:
        with contextlib.suppress(Exception):
            runner = PEERS[name](case, tensors)
            runner.forward()
            if runner.backward is not None:
                runner.backward()
            torch.cuda.synchronize()


def compile_all(
    cases: list[Case], names: list[str], extra_path: list[Path], processes: int, log: Callable[[str], None]
) -> None:
    """``run_once`` for every case and implementation, each in a process of its own, ``processes`` at a time."""
    command = module_command("cli", "bench", "--compile-only")
    for path in extra_path:
        command += ["--extra-path", str(path)]
    variables = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # else each process has a pool of its own

    def compile_one(job: tuple[Case, str]) -> None:
        case, name = job
        start = time.perf_counter()
        chosen = ["--cases", case.name, "--implementations", name]
        subprocess.run([*command, *chosen], capture_output=True, check=False, env=variables)
        log(f"compiled {case.name}: {name}, {time.perf_counter() - start:.0f} s")

    slowest_first = sorted(names, key=lambda name: name != "FlexAttention")
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(compile_one, [(case, name) for name in slowest_first for case in cases]))


def ceilings() -> dict[str, float]:
    """The card's copy rate (read + written, TB/s) and bf16 matrix rate (TFLOP/s), measured now."""
    x = torch.empty(2**30, dtype=torch.bfloat16, device="cuda").normal_()
    y = torch.empty_like(x)
    copy = 2 * x.numel() * 2 / spread(device_ms(lambda: y.copy_(x)))["ms"] / 1e9
    a = torch.randn(8192, 8192, device="cuda").bfloat16()
    b = torch.randn(8192, 8192, device="cuda").bfloat16()
    matmul = 2 * 8192**3 / spread(device_ms(lambda: a @ b))["ms"] / 1e9
    return {"copy_tb_s": copy, "matmul_tflop_s": matmul}


def environment() -> dict[str, str]:
    """Card, driver, versions and commit: what a reader needs to judge a number."""

    def output(*command: str, cwd: Path | None = None) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    here = Path(__file__).parent
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": output("git", "describe", "--always", "--dirty", cwd=here),
        "date": time.strftime("%Y-%m-%d"),
    }
