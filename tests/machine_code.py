"""Whether two checkouts compile to the same machine code, without a GPU.

``python machine_code.py write CHECKOUT FILE [TARGET] [CASE...]`` compiles the kernels of CHECKOUT and writes their
hashes. ``python machine_code.py compare BEFORE AFTER`` names the kernels that differ and exits 1 if any does.

A hash covers the instructions and the shared memory of a kernel, not its name nor its lines: kernels may be renamed,
moved and launched in another order.

Triton 3.6 is not deterministic: it compiles ``_attn_bwd_dkv_kernel`` to one of two codes, run by run, from one source.
Before you believe a difference, write both files again with an empty TRITON_CACHE_DIR.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

WINDOW = {"window": (127, 0)}
BOTH_SIDES = {"causal": False, "window": (300, 200)}
PACKED = {"lengths_q": (1000, 24)}
# What the kernels are specialised by: head dimensions, sides of the window, packed rows, sinks, dlse.
CASES = {
    "64 window": {"heads": (64, 8), "head_dim": 64, **WINDOW},
    "64 packed window dlse": {"heads": (64, 8), "head_dim": 64, "dlse": True, **WINDOW, **PACKED},
    "64": {"heads": (64, 8), "head_dim": 64},
    "64 packed": {"heads": (64, 8), "head_dim": 64, **PACKED},
    "64 packed both sides no sink": {"heads": (8, 8), "head_dim": 64, "sinks": None, **BOTH_SIDES, **PACKED},
    "64 padding softcap": {"heads": (8, 8), "head_dim": 64, "padding": "left", "softcap": 9.0},
    "96 window": {"heads": (12, 4), "head_dim": 96, **WINDOW},
    "128 bidirectional no sink": {"heads": (32, 8), "head_dim": 128, "causal": False, "sinks": None},
    "128 packed": {"heads": (32, 8), "head_dim": 128, **PACKED},
    "128 both sides": {"heads": (32, 8), "head_dim": 128, **BOTH_SIDES},
    "192/128 packed": {"heads": (64, 4), "head_dim": (192, 128), **PACKED},
    "256 window": {"heads": (16, 4), "head_dim": 256, **WINDOW},
    "256 packed bidirectional": {"heads": (16, 4), "head_dim": 256, "causal": False, **PACKED},
    "64 fp32 used": {"heads": (64, 8), "head_dim": 64, "dtype": "fp32", "used": (900,)},
}


def write(checkout: Path, file: Path, target: str, names: list[str]) -> None:
    sys.path[:0] = [str(checkout), str(checkout / "tests")]
    import compile_target
    import torch
    from cases import Case
    from sass import disassemble
    from triton.runtime.driver import driver

    package = "triton_attention_sink_hf"
    assert Path(sys.modules[package].__file__).is_relative_to(checkout), sys.modules[package].__file__
    driver.set_active(compile_target.Driver(compile_target.target_of(target)))
    for name, module in list(sys.modules.items()):
        if name.startswith(package) and hasattr(module, "target_name"):
            module.target_name = lambda device: target
    hashes, start = {}, time.monotonic()
    for name in names or CASES:
        options = {"dtype": "bf16", **CASES[name]}
        options["dtype"] = {"bf16": torch.bfloat16, "fp32": torch.float32}[options["dtype"]]
        rows = hashes[name] = []
        for kernel_name, kernel in compile_target.compile_case(Case(1024, **options)):
            with tempfile.TemporaryDirectory() as folder:
                code = re.findall(r"/\* (0x[0-9a-f]{16}) \*/", disassemble(kernel.asm["cubin"], Path(folder)))
            assert code
            rows.append((kernel_name, hashlib.sha256(f"{kernel.metadata.shared} {code}".encode()).hexdigest()[:16]))
    file.write_text(json.dumps(hashes, indent=1))
    print(f"{sum(map(len, hashes.values()))} kernels in {time.monotonic() - start:.0f} s")


def compare(before: dict, after: dict) -> int:
    """Prints what differs, case by case; the number of kernels that do."""
    same = different = 0
    for case in before.keys() & after.keys():
        hashes = [Counter(value for _, value in kernels[case]) for kernels in (before, after)]
        same += (hashes[0] & hashes[1]).total()
        for kernels, other in ((before, hashes[1]), (after, hashes[0])):
            changed = [name for name, value in kernels[case] if value not in other]
            if changed:
                print(f"{case}: only {'before' if kernels is before else 'after'}: {', '.join(changed)}")
        different += max((hashes[0] - hashes[1]).total(), (hashes[1] - hashes[0]).total())
    print(f"{same} kernels the same, {different} different")
    return different


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]).resolve(), Path(sys.argv[3]), *(sys.argv[4:5] or ["sm90"]), sys.argv[5:])
    else:
        sys.exit(bool(compare(*(json.loads(Path(name).read_text()) for name in sys.argv[2:4]))))
