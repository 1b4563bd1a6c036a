"""One actor step of a gpt-oss on long packed rows: ours and Hugging Face's eager, FlexAttention and FlashAttention-4.

    python benchmarks/long_context.py --output OUT             # verl's actor worker if verl is there, else plain HF
    python benchmarks/long_context.py --output OUT --smoke     # tiny, on a CPU
    python benchmarks/long_context.py --output OUT --worker hf # times: without flash-attn's cross entropy verl's worker
                                                               # spends seconds on log-probs, token by token
    python benchmarks/long_context.py --output OUT --extra-path FOLDER   # FlashAttention-4 (flash-attn-4) from there

The model is a random gpt-oss with the real one's attention (64/8 heads of 64, window 128 in every other layer, sinks
from -10 to 20). Its experts are small, so that attention is most of the work, and every token goes to every expert, so
that no routing can flip. A micro-batch is one row of packed samples of uneven lengths: position_ids restart, and there
is no mask. The loss is a weighted sum of log-probs. bf16, activation checkpointing. The worker is verl's
(``TrainingWorker``, FSDP2 on one rank) or a Hugging Face model with bf16 parameters under autocast, as FSDP2 runs it.

Measured for each implementation: the errors of its log-probs and gradients, the time of a step, peak memory, and the
longest single sample that fits. Errors are against eager in fp32 in the same worker, one sample and one key head at a
time. Eager and FlexAttention get a mask that cuts the samples. gpt-oss in transformers does not give them one, and
without it they are fast and wrong. FlashAttention-4 is ``attn_implementation: flash_attention_4`` with the keywords for
packed rows; it is left out if flash-attn-4 is not installed. A failure is recorded, and the run goes on.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import math
import os
import site
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch starts: fewer false OOMs

import packed_peers
import torch
from actor_step import DEVICE, Batch, HuggingFaceWorker, VerlActor, uneven, write_model
from packed_peers import FLASH, NAMES, YARDSTICK, missing
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def by_sample(worker, batch: Batch) -> Tensor:
    """Log-probs of the whole batch, one sample after the other; gradients add up."""
    return torch.cat([worker.step(part) for part in batch.single()])


def errors(log_probs: Tensor, gradients: dict[str, Tensor], truth, batch: Batch) -> dict:
    """Against the truth: absolute differences of log-probs that the loss sees; relative norms of gradients."""
    true_log_probs, true_gradients = truth
    counted = torch.cat(batch.weights) != 0
    difference = (log_probs.float().cpu() - true_log_probs)[counted].abs()
    relative = {name: ((gradients[name] - g).norm() / g.norm()).item() for name, g in true_gradients.items()}
    others = [name for name in true_gradients if not name.endswith("sinks")]
    wrong = sum((gradients[name] - true_gradients[name]).square().sum().item() for name in others)
    size = sum(true_gradients[name].square().sum().item() for name in others)
    return {
        "log_prob_mean": difference.mean().item(),
        "log_prob_max": difference.max().item(),
        "sinks_worst": max(error for name, error in relative.items() if name.endswith("sinks")),
        "others": math.sqrt(wrong / size),  # all together: a few, such as the keys' bias, are nearly zero by themselves
        "parameters": relative,
    }


def timed(step: Callable[[], object], zero: Callable[[], None], repeats: int) -> dict:
    """Milliseconds of a step, and the peak of the device's memory in one (parameters and gradients included)."""
    times = []
    for _ in range(repeats):
        zero()
        synchronize()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        step()
        synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    times.sort()
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else float("nan")
    return {"ms": times[len(times) // 2], "ms_min": times[0], "ms_max": times[-1], "peak_gib": peak}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def forget() -> None:
    """Free what a step left on the device, also one that ran out of memory."""
    packed_peers.forget()
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()


class Run:
    """Everything measured so far, written after each row, so that an interrupted run keeps it.

    Attributes:
        make: (checkpoint folder, attn_implementation) -> worker. kind: which one, "verl" or "hf".
    """

    def __init__(self, arguments: argparse.Namespace, make: Callable, kind: str):
        self.arguments, self.make, self.begun = arguments, make, time.monotonic()
        self.path = arguments.output / "long_context.json"
        self.data = {"environment": environment(kind), "rows": [], "longest": {}}
        self.folder = Path()

    def left(self) -> float:
        return self.begun + self.arguments.budget - time.monotonic()

    def say(self, line: str) -> None:
        print(f"[{time.monotonic() - self.begun:6.1f} s] {line}", flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n")

    def attempt(self, measure: Callable[[], dict]) -> dict:
        """measure(), or why it failed: one implementation that cannot run must not end the run."""
        try:
            found = measure()
        except torch.OutOfMemoryError:
            found = {"problem": "out of memory"}
        except Exception as error:
            found = {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
        forget()
        return found

    def everything(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            self.folder = Path(folder)
            self.vocabulary = write_model(self.folder, self.arguments.smoke)
            for tokens in self.arguments.tokens:
                self.rows(tokens)
            for name in self.arguments.implementations if self.arguments.limit else ():
                if self.left() <= 0:
                    return self.say("budget spent")
                self.say(f"longest sample that fits, {name}")
                self.data["longest"][name] = found = self.longest(name)
                self.say(f"  {found}")
                self.write()

    def rows(self, tokens: int) -> None:
        """One row for the yardstick and for each implementation."""
        batch, truth = Batch(uneven(tokens), self.vocabulary), None
        self.say(f"{tokens} tokens in samples of {uneven(tokens)}: fp32 eager by sample")

        def exact() -> dict:
            worker = HuggingFaceWorker(self.folder, NAMES[YARDSTICK], torch.float32)
            return {"truth": (by_sample(worker, batch).float().cpu(), worker.gradients())}

        def measure() -> dict:
            worker = self.make(self.folder, NAMES[name])
            worker.zero()
            step = (lambda: by_sample(worker, batch)) if name == YARDSTICK else (lambda: worker.step(batch))
            found = {"errors": errors(step(), worker.gradients(), truth, batch)}  # also the warm-up
            return found | timed(step, worker.zero, 1 if name == YARDSTICK else self.arguments.repeats)

        found = self.attempt(exact)
        truth = found.get("truth")
        if truth is None:
            return self.say(f"  no truth: {found['problem']}")
        for name in (YARDSTICK, *self.arguments.implementations):
            if self.left() <= 0:
                return self.say("budget spent")
            self.say(f"{tokens} tokens, {name}")
            held = torch.cuda.memory_allocated() / 2**30 if DEVICE == "cuda" else 0.0  # by nothing, if all was freed
            row = {"tokens": tokens, "implementation": name, "held_gib": held} | self.attempt(measure)
            self.say(f"  {row['problem']}" if "problem" in row else f"  {row['ms']:.1f} ms, {row['peak_gib']:.1f} GiB")
            self.data["rows"].append(row)
            self.write()

    def longest(self, name: str) -> dict:
        """Tokens of the longest single sample whose step fits: doubling, then two bisections, while time lasts."""
        worker, seconds = None, 0.0

        def fits(tokens: int) -> str | None:
            nonlocal worker, seconds

            def step() -> dict:
                nonlocal worker
                worker = worker or self.make(self.folder, NAMES[name])
                worker.zero()
                worker.step(Batch([tokens], self.vocabulary))
                synchronize()
                return {}

            begun = time.perf_counter()
            problem = self.attempt(step).get("problem")
            seconds = time.perf_counter() - begun
            self.say(f"  {tokens} tokens: {problem or 'fits'}, {seconds:.1f} s")
            if problem:
                worker = None  # FSDP does not recover from a step cut short
                forget()
            return problem

        most, least, problem, tokens = 0, None, None, self.arguments.start
        while tokens <= self.arguments.limit and 5 * seconds < self.left():
            problem = fits(tokens)
            if problem:
                least = tokens
                break
            most, tokens = tokens, 2 * tokens
        for _ in range(2 if least and most else 0):
            middle = (most + least) // 2
            if 2 * seconds > self.left():
                break
            if fits(middle):
                least = middle
            else:
                most = middle
        return {"fits": most, "fails": least, "why": problem or f"not tried: {tokens}"}

    def table(self) -> str:
        head = ("tokens", "implementation", "log-prob mean", "max", "sinks grad", "other grads", "ms", "min-max", "GiB")
        lines = [head]
        for row in self.data["rows"]:
            cells = [str(row["tokens"]), row["implementation"]]
            if "problem" in row:
                lines.append((*cells, row["problem"][:60], *[""] * 6))
                continue
            cells += [f"{row['errors'][key]:.1e}" for key in ("log_prob_mean", "log_prob_max", "sinks_worst", "others")]
            cells += [f"{row['ms']:.1f}", f"{row['ms_min']:.1f}-{row['ms_max']:.1f}", f"{row['peak_gib']:.1f}"]
            lines.append(tuple(cells))
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        text += [f"longest sample that fits, {name}: {found}" for name, found in self.data["longest"].items()]
        return "\n".join(line.rstrip() for line in text)


def environment(kind: str) -> dict:
    """What a reader needs to judge a number."""
    from triton_attention_sink_hf.bench.measure import environment as of_the_card

    names = ("transformers", *(["verl"] if kind == "verl" else []), *([] if FLASH in missing() else ["flash-attn-4"]))
    return {"worker": kind, **of_the_card(), **{name: importlib.metadata.version(name) for name in names}}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for long_context.json")
    parser.add_argument("--tokens", type=int, nargs="+", default=[16384, 32768], help="tokens per micro-batch")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=NAMES,
        help="default: ours, eager, and FlexAttention and FlashAttention-4 if there",
    )
    parser.add_argument("--worker", choices=("auto", "verl", "hf"), default="auto")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps per implementation")
    parser.add_argument("--start", type=int, default=4096, help="first length of the search for the longest sample")
    parser.add_argument("--limit", type=int, default=262144, help="last length of that search; 0: no search")
    parser.add_argument("--budget", type=float, default=480, help="seconds after which nothing new is started")
    parser.add_argument("--extra-path", type=Path, action="append", default=[], help="folder with packages, put first")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and short rows")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.tokens, arguments.start, arguments.limit, arguments.repeats = [192, 320], 64, 256, 2
    return arguments


def main() -> None:
    arguments = parse()
    for path in reversed(arguments.extra_path):
        sys.path.insert(0, str(path))
        site.addsitedir(str(path))  # for its .pth files
    if not arguments.implementations:
        arguments.implementations = [name for name in NAMES if name not in (YARDSTICK, *missing())]
    make, kind = HuggingFaceWorker, "hf"
    if arguments.worker != "hf":
        try:
            VerlActor.start()
            make, kind = VerlActor, "verl"
        except Exception as error:
            if arguments.worker == "verl":
                raise
            print(f"plain Hugging Face worker, as verl cannot be used: {type(error).__name__}: {error}", flush=True)
    packed_peers.register()
    torch._dynamo.config.cache_size_limit = 64  # FlexAttention compiles again for new lengths
    run = Run(arguments, make, kind)
    run.say(f"{run.data['environment']}")
    run.everything()
    run.write()
    print(run.table(), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
