"""Compile the kernels for one architecture on a machine without it: ``python compile_target.py TARGET [CASE...]``.

The launchers themselves run, on tensors without memory. A stand-in for Triton's driver names the target, and every
launch only compiles. So the arguments, their specialisation and the configs are the real ones. Prints one JSON object
per line: kernel, case, warps, registers a thread, shared memory in bytes, spilled registers (CUDA: stack bytes per
thread), wrong descriptors (``sass.py``; Hopper only). ``--launcher MODULE``: that launcher alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from cases import Case
from launchers import LAUNCHERS, meta_call, meta_pages
from sass import disassemble, misplaced, unwritten
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from triton_attention_sink_hf.implementations.common import problem as common_problem
from triton_attention_sink_hf.implementations.common.problem import Problem

BF16, FP32 = torch.bfloat16, torch.float32
GPT_OSS = Case(1024, heads=(64, 8), head_dim=64, dtype=BF16, window=(127, 0))
LENGTHS = (1000, 24)
# Every size class of the configs, and every feature in the class where it is met most.
CASES = {
    "narrow window": GPT_OSS,
    "narrow packed window": Case(
        1024, heads=(64, 8), head_dim=64, dtype=BF16, window=(127, 0), lengths_q=LENGTHS, dlse=True
    ),
    "narrow padding softcap": Case(1024, heads=(8, 8), head_dim=64, dtype=BF16, padding="left", softcap=9.0),
    "medium": Case(1024, heads=(32, 8), head_dim=128, dtype=BF16, sinks=None),
    "medium D 80": Case(1024, heads=(32, 8), head_dim=80, dtype=BF16, window=(127, 0), layout="bhsd"),
    "window D 40/128": Case(1024, heads=(8, 1), head_dim=(40, 128), dtype=BF16, window=(127, 0), sinks=None),
    "wide 192/128": Case(1024, heads=(64, 4), head_dim=(192, 128), dtype=BF16, window=(127, 0)),
    "wide 256 padding": Case(1024, heads=(16, 4), head_dim=256, dtype=BF16, padding="left", softcap=9.0, dlse=True),
    "huge 512": Case(1024, heads=(64, 1), head_dim=512, dtype=BF16, window=(127, 0)),
    "huge 320/500": Case(1024, heads=(16, 4), head_dim=(320, 500), dtype=BF16, padding="left", softcap=9.0, dlse=True),
    "fp32 narrow": Case(1024, heads=(64, 8), head_dim=64, dtype=FP32, window=(127, 0), lengths_q=LENGTHS),
    "fp32 medium": Case(1024, heads=(32, 8), head_dim=128, dtype=FP32, sinks=None),
    "fp32 wide": Case(1024, heads=(16, 4), head_dim=256, dtype=FP32, padding="left", softcap=9.0, dlse=True),
    "fp32 huge": Case(1024, heads=(64, 1), head_dim=512, dtype=FP32, lengths_q=LENGTHS, dlse=True),
    "narrow ranges": Case(1024, heads=(64, 8), head_dim=64, dtype=BF16, causal=False, ranges="blocks"),
    "medium packed ranges": Case(
        1024, heads=(32, 8), head_dim=128, dtype=BF16, causal=False, ranges="random", lengths_q=LENGTHS
    ),
    "wide packed ranges": Case(
        1024, heads=(16, 4), head_dim=256, dtype=BF16, causal=False, ranges="random", lengths_q=LENGTHS
    ),
    "fp32 medium ranges": Case(1024, heads=(32, 8), head_dim=128, dtype=FP32, causal=False, ranges="blocks"),
    "narrow decode": Case(1, 8192, heads=(16, 2), head_dim=64, dtype=BF16, used=(8000,)),
    "medium decode": Case(4, 8192, heads=(32, 8), head_dim=128, dtype=BF16, window=(4000, 0)),
    "wide decode softcap": Case(1, 8192, heads=(14, 2), head_dim=256, dtype=BF16, padding="left", softcap=9.0),
    "huge decode": Case(1, 8192, heads=(64, 1), head_dim=512, dtype=BF16, used=(8000,)),
    "fp32 huge decode": Case(1, 8192, heads=(64, 1), head_dim=512, dtype=FP32, used=(8000,)),
    "narrow D 40/24 packed softcap": Case(
        1024, heads=(6, 3), head_dim=(40, 24), dtype=BF16, window=(127, 0), lengths_q=LENGTHS, softcap=9.0, dlse=True
    ),
    "one query, one key": Case(1, 1, heads=(1, 1), head_dim=16, dtype=BF16, used=(1,)),
}
# for the exhaustive run: features against size classes
ALL = {
    f"{name} {feature}": Case(**{**CASES[name].__dict__, "lengths_q": None, "padding": None, "softcap": 0.0, **changes})
    for name in (
        "narrow window",
        "medium",
        "wide 192/128",
        "wide 256 padding",
        "huge 512",
        "fp32 narrow",
        "fp32 medium",
        "fp32 wide",
        "fp32 huge",
    )
    for feature, changes in {
        "causal": {"window": (-1, -1)},
        "bidirectional": {"window": (-1, -1), "causal": False},
        "window": {"window": (127, 0), "sinks": "learned"},
        "packed": {"window": (-1, -1), "lengths_q": LENGTHS, "dlse": True},
        "padding softcap": {"padding": "left", "softcap": 9.0, "sinks": None},
        "decode": {"seqlen_q": 1, "seqlen_k": 4096, "used": (4000,)},
    }.items()
}
ALL |= {
    f"narrow window, group of {group}": Case(1024, heads=(16, 16 // group), head_dim=48, dtype=BF16, window=(100, 0))
    for group in (4, 16)
}


class Driver:
    """What Triton's JIT asks of a driver when it compiles for ``target`` and launches nothing."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def target_of(name: str) -> GPUTarget:
    """ "sm90" or "gfx942"."""
    if name.startswith("sm"):
        return GPUTarget("cuda", int(name.removeprefix("sm")), 32)
    return GPUTarget("hip", name, 64)


def compile_case(case: Case, only: str | None = None) -> list[tuple[str, object]]:
    """Kernel names and compiled kernels of every launcher that serves ``case``, or of the module ``only``."""
    compiled = []
    run = triton.JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self.fn.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.JITFunction.run = compile_only
    try:
        problem = Problem(meta_call(case))
        q, k, v = problem.call.q, problem.call.k, problem.call.v
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=FP32)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        gradients.append(None if problem.call.sinks is None else problem.call.sinks.new_empty(q.shape[2]))
        for launcher in LAUNCHERS:
            if only not in (None, launcher.module) or not launcher.serves(case, problem.target):
                continue
            if launcher.is_forward:
                launcher.launch(problem, out, lse)
                if launcher.backend == "triton_decode":
                    _compile_pages(launcher, case, out, lse)
            else:
                dlse = lse if case.dlse else None
                launcher.launch(problem, out, lse, torch.empty_like(out), dlse, *gradients)
    finally:
        triton.JITFunction.run = run
    return compiled


def _compile_pages(launcher, case: Case, out: torch.Tensor, lse: torch.Tensor) -> None:
    """What a cache in pages takes: pages that hold whole tiles, pages that do not, and the kernel that appends."""
    from triton_attention_sink_hf.implementations.triton_decode.append import append_keys

    for page_size in (16, 256):
        call = meta_pages(case, page_size)
        launcher.launch(Problem(call), out, lse)
    new_k, new_v = (x.new_empty(case.batch, 1, *x.shape[2:]) for x in (call.k, call.v))
    append_keys(call.k, call.v, new_k, new_v, call.mask.seqused_k, call.block_table)


def registers(kernel) -> tuple[int, int]:
    """Registers of a thread and those in memory, by cuobjdump (of Triton's own wheel) or the AMD assembler."""
    if "amdgcn" in kernel.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", kernel.asm["amdgcn"]))
        return int(found["vgpr_count"]), int(found["vgpr_spill_count"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", usage.stdout + usage.stderr)
    assert found, f"cuobjdump says nothing about registers: {usage.stdout}"
    return int(found[1]), int(found[2]) + int(found[3])


def main(target: str, cases: dict[str, Case], only: str | None = None) -> None:
    driver.set_active(Driver(target_of(target)))
    common_problem.target_name = lambda device: target
    for name, case in cases.items():
        for kernel_name, kernel in compile_case(case, only):
            used, spilled = registers(kernel)
            row = {"kernel": kernel_name, "case": name, "warps": kernel.metadata.num_warps, "registers": used}
            row |= {"shared": kernel.metadata.shared, "spilled": spilled}
            if target == "sm90":
                with tempfile.TemporaryDirectory() as folder:
                    listing = disassemble(kernel.asm["cubin"], Path(folder))
                row["wrong"] = unwritten(listing)[:3] + misplaced(listing)[:3]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--launcher")
    arguments = parser.parse_args()
    every = {**CASES, **ALL}
    main(arguments.target, {name: every[name] for name in arguments.cases} or every, arguments.launcher)
