"""Shared memory of every kernel over all head dimensions: ``python compile_grid.py TARGET [PART OF]``.

As ``compile_target.py``, but compilation stops when Triton has allocated shared memory, which saves most of the time.
Prints one JSON object per line: kernel, case, shared memory in bytes. With the numbers PART and OF it takes every OF-th
case, from case PART on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from itertools import product

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # nobody can run what is compiled here

import torch
from cases import Case
from compile_target import LENGTHS, Driver, compile_case, target_of
from triton.backends.nvidia import compiler
from triton.runtime.driver import driver

from triton_attention_sink_hf.implementations.common import problem as common_problem

# Both padded to a power of two; 12 short of it, rows are no multiple of 16 bytes, so loads are narrow and without TMA.
DIMS = (4, 16, 32, 52, 64, 116, 128, 244, 256, 500, 512)
DTYPES = (torch.bfloat16, torch.float32)  # fp16 is as bf16
FEATURES = {
    "window": {"window": (127, 0)},
    "short window": {"window": (20, 0), "dlse": True},
    "packed window": {"window": (127, 0), "lengths_q": LENGTHS, "sinks": None},
    "packed": {"lengths_q": LENGTHS, "dlse": True},
    "padding softcap": {"padding": "left", "softcap": 9.0},
}


class _Allocated(Exception):
    """Raised where Triton would hand a kernel to LLVM, with its shared memory allocated."""


def stop_after_allocation() -> None:
    """Make Triton skip LLVM and the assembler: "compiled" kernels are empty, but ``metadata.shared`` is right."""

    class Llvm:
        def __getattr__(self, name):
            raise _Allocated

    def add_stages(self, stages, *rest):
        original(self, stages, *rest)
        make_llir = stages["llir"]

        def allocate(src, metadata):
            try:
                make_llir(src, metadata)
            except _Allocated:
                metadata["shared"] = src.get_int_attr("ttg.shared")
                metadata["name"] = "empty"
                return ""
            raise RuntimeError("this Triton allocates shared memory elsewhere")

        stages.update(llir=allocate, ptx=lambda src, metadata: "", cubin=lambda src, metadata: b"")

    original = compiler.CUDABackend.add_stages
    compiler.CUDABackend.add_stages = add_stages
    compiler.llvm = Llvm()


def cases(target: str) -> dict[str, Case]:
    grid = product(DIMS, DIMS, (1, 2, 4, 8), DTYPES, FEATURES)
    return {
        f"{name} D {d}/{dv} {str(dtype).removeprefix('torch.')} group {group}": Case(
            1024, heads=(16, 16 // group), head_dim=(d, dv), dtype=dtype, **FEATURES[name]
        )
        for d, dv, group, dtype, name in grid
    }


def main(target: str, part: int = 0, of: int = 1) -> None:
    stop_after_allocation()
    driver.set_active(Driver(target_of(target)))
    common_problem.target_name = lambda device: target
    for name, case in list(cases(target).items())[part::of]:
        for kernel_name, kernel in compile_case(case):
            print(json.dumps({"kernel": kernel_name, "case": name, "shared": kernel.metadata.shared}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
