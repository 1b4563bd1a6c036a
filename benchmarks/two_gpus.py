"""Ulysses on two GPUs: is it right, what does it cost, how much longer may a sample be?

    torchrun --nproc-per-node 2 benchmarks/two_gpus.py            # outputs/two_gpus.json
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --smoke    # tiny, also on a CPU; writes nothing unless --out

Trains a gpt-oss of a few layers (random weights) with verl's actor worker, or where verl cannot be imported with FSDP2
alone, and compares ``sp`` 1 (each GPU its own rows) with 2 (both share every row) at the same total work:

* log-probs and all gradients in fp32, against one GPU with the same attention; status 1 if they differ by over 1e-4
* seconds of a step in bf16 (forward and backward of the same two rows, no optimizer), peak memory of each GPU, and the
  share of the all-to-alls, which are timed in steps of their own and include waiting for the other GPU
* the longest sample that fits: extrapolated from the peaks at two lengths, then run at 90 % of that
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import sharded_trainers as trainers  # noqa: E402

TOLERANCE = 1e-4
FULL = trainers.Size(4, 2880, 64, 8, 64, 128, experts=4, vocabulary=8192)
TINY = trainers.Size(2, 64, 8, 2, 16, 8, experts=2, vocabulary=128)
# uneven samples, none of which ends at the middle of its row
CHECKED = {False: [[1023, 1, 1500, 777], [2100, 331, 900]], True: [[13, 1, 29, 2], [17, 40, 8]]}
TIMED = {False: [[9000, 3000, 14000, 6768], [20000, 900, 11868]], True: [[70, 30, 28], [100, 28]]}
PROBED = {False: (16384, 32768), True: (64, 128)}


def main() -> int:
    arguments = _arguments()
    device = _start(arguments.trainer)
    smoke, size = arguments.smoke, TINY if arguments.smoke else FULL
    result = {"environment": _environment(device), "trainer": arguments.trainer, "size": vars(size), "sp": {}}
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        checkpoint = Path(shared[0])
        if dist.get_rank() == 0:
            size.write(checkpoint)
        dist.barrier()
        make = {"verl": trainers.VerlActor, "fsdp2": trainers.Fsdp2}[arguments.trainer]
        checked = trainers.batch(CHECKED[smoke], size.vocabulary)
        timed = trainers.batch(TIMED[smoke], size.vocabulary)

        truth = trainers.OneDevice(checkpoint, device, torch.float32)
        want = (truth.step(checked), truth.gradients())
        del truth
        for sp in (1, 2):
            row = result["sp"][sp] = {}
            trainer = make(checkpoint, device, torch.float32, sp)
            row["distance"] = _worst(distances(trainer, checked, *want))
            trainer = None
            _free(device)
            trainer = make(checkpoint, device, torch.bfloat16 if device.type == "cuda" else torch.float32, sp)
            row |= cost(trainer, timed, device, repeats=2 if smoke else 10)
            row["longest"] = longest(trainer, PROBED[smoke], size.vocabulary, device)
            trainer = None
            _free(device)
            _write(result, arguments)
        if device.type == "cuda":  # last, as one GPU that runs out of memory ends both processes
            for sp in (2, 1):
                trainer = make(checkpoint, device, torch.bfloat16, sp)
                length = int(0.9 * result["sp"][sp]["longest"]["extrapolated"])
                trainer.step(trainers.batch([[length]] * 2, size.vocabulary))
                result["sp"][sp]["longest"]["ran"] = length
                trainer = None
                _free(device)
                _write(result, arguments)
        dist.barrier()
    wrong = [sp for sp, row in result["sp"].items() if not max(row["distance"].values()) <= TOLERANCE]
    if dist.get_rank() == 0:
        print(json.dumps(result, indent=1))
        print(f"FAILED: sp {wrong} differ by more than {TOLERANCE}" if wrong else "OK: equal to one device")
    dist.destroy_process_group()
    return 1 if wrong else 0


def distances(trainer, rows: list, log_probs: list, gradients: dict) -> dict[str, float]:
    """Largest differences from one device, relative to the largest element."""
    found = trainer.step(rows)
    weights = [torch.cat([sample.weights for sample in row]) != 0 for row in trainer.rows(rows)]
    got = torch.cat([x[real] for x, real in zip(found, weights, strict=True)])
    want = torch.cat([x[real] for x, real in zip(trainer.rows(log_probs), weights, strict=True)])
    each = {name: _distance(x, gradients[name]) for name, x in trainer.gradients().items()}
    assert each.keys() == gradients.keys()
    return {
        "log_probs": _distance(got, want),
        "gradients": max(each.values()),
        "sinks": max(each[name] for name in each if name.endswith("sinks")),
    }


def cost(trainer, rows: list, device: torch.device, repeats: int) -> dict:
    """Seconds, bytes and the share of the all-to-alls, of one step."""
    trainer.step(rows)
    peak = _peak(device, lambda: trainer.step(rows))
    seconds = [_seconds(device, lambda: trainer.step(rows)) for _ in range(repeats)]
    with timed_exchanges(device) as exchanges:
        total = sum(_seconds(device, lambda: trainer.step(rows)) for _ in range(repeats))
    tokens = sum(len(sample.ids) for row in rows for sample in row)
    return {
        "tokens": tokens,
        "resident_bytes": _of_all_ranks(torch.cuda.memory_allocated(device) if device.type == "cuda" else 0),
        "seconds": statistics.median(seconds),
        "seconds_all": seconds,
        "peak_bytes": _of_all_ranks(peak),
        "all_to_all_share": _of_all_ranks(sum(exchanges()) / total),
        "all_to_alls_per_step": len(exchanges()) / repeats,
    }


def longest(trainer, lengths: tuple[int, int], vocabulary: int, device: torch.device) -> dict | None:
    """The longest single sample whose step fits the smaller GPU, from a line through the peaks at two lengths."""
    if device.type != "cuda":
        for length in lengths:
            trainer.step(trainers.batch([[length]] * 2, vocabulary))
        return None
    peaks = []
    for length in lengths:
        rows = trainers.batch([[length]] * 2, vocabulary)
        peaks.append(max(_of_all_ranks(_peak(device, lambda rows=rows: trainer.step(rows)))))
    slope = (peaks[1] - peaks[0]) / (lengths[1] - lengths[0])
    memory = min(_of_all_ranks(torch.cuda.get_device_properties(device).total_memory))
    return {
        "peak_bytes": dict(zip(lengths, peaks, strict=True)),
        "bytes_per_token": slope,
        "extrapolated": int(lengths[0] + (0.95 * memory - peaks[0]) / slope),
    }


class timed_exchanges:
    """Calls of ``all_to_all_single``: entering gives a function that returns the seconds of each on this rank."""

    def __init__(self, device: torch.device):
        self.device, self.marks = device, []

    def __enter__(self) -> Callable[[], list[float]]:
        self.original = dist.all_to_all_single

        def timed(*args, **kwargs):
            begin = self._mark()
            work = self.original(*args, **kwargs)
            self.marks.append((begin, self._mark()))
            return work

        dist.all_to_all_single = timed
        return self._seconds

    def __exit__(self, *_) -> None:
        dist.all_to_all_single = self.original

    def _mark(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self) -> list[float]:
        if self.device.type != "cuda":
            return [end - begin for begin, end in self.marks]
        torch.cuda.synchronize(self.device)
        return [begin.elapsed_time(end) / 1e3 for begin, end in self.marks]


def _seconds(device: torch.device, run: Callable) -> float:
    dist.barrier()
    _synchronize(device)
    begin = time.perf_counter()
    run()
    _synchronize(device)
    return time.perf_counter() - begin


def _peak(device: torch.device, run: Callable) -> int:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _of_all_ranks(value: float) -> list[float]:
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _worst(own: dict[str, float]) -> dict[str, float]:
    found = _of_all_ranks(own)
    return {name: max(each[name] for each in found) for name in own}


def _write(result: dict, arguments: argparse.Namespace) -> None:
    if dist.get_rank() == 0 and arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def _environment(device: torch.device) -> dict:
    if device.type == "cuda":
        from triton_attention_sink_hf.bench.measure import environment

        return environment() | {"nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return {"card": "CPU", "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def _start(trainer: str) -> torch.device:
    """This rank's device, with the process group begun; on a CPU also verl's hooks for one."""
    torch.backends.cuda.matmul.allow_tf32 = False
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        return device
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if trainer == "verl":
        sys.path.insert(0, str(trainers.CPU_PLATFORM))
        hooks = {"VERL_USE_EXTERNAL_MODULES": "verl_cpu_platform", "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
        os.environ.update(hooks)
    return torch.device("cpu")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; the only ones that a CPU is offered")
    parser.add_argument("--trainer", choices=("verl", "fsdp2"), help="default: verl if it is installed")
    parser.add_argument("--out", type=Path, help="JSON file; default outputs/two_gpus.json")
    arguments = parser.parse_args()
    if os.environ.get("WORLD_SIZE") != "2":
        parser.error(f"torchrun --nproc-per-node must be 2, got {os.environ.get('WORLD_SIZE', 'no torchrun')}")
    if not arguments.smoke and torch.cuda.device_count() < 2:
        parser.error(f"the machine must have 2 GPUs, got {torch.cuda.device_count()}: use --smoke")
    if arguments.trainer is None:
        found = all(importlib.util.find_spec(name) for name in ("verl", "ray"))
        arguments.trainer = "verl" if found else "fsdp2"
    if arguments.out is None and not arguments.smoke:
        arguments.out = Path("outputs/two_gpus.json")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
