"""Launch numbers per architecture, each with its reason. Tuning is opt-in and ends here as data.

Rows of a query tile are tokens times packed heads. Shared memory holds the query side once and the key side
``num_stages`` times, so tiles shrink as D grows: 227 KB on sm90 and sm100, 163 on sm80, 99 on sm86, sm89 and sm120,
64 on gfx942.

"huge" (D above 256) is made to be right and to fit, not tuned. On NVIDIA its fp32 dq spills 2 KB a thread: a product in
fp32 holds a row of 512 columns of q and one of dout in a thread's registers, with any tile that was tried.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class KernelConfig:
    """Tile sizes in rows and keys; warps per program and depth of the load pipeline, for Triton.

    ``tma``: the loop's tiles are loaded by TMA where their strides allow it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False

    def __post_init__(self):
        for name in ("block_m", "block_n", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}")
        if self.num_stages < 1:
            raise ValueError(f"num_stages must be >= 1, got {self.num_stages}")


def _size_class(problem) -> str:
    """Tile sizes follow the wider side's padded head dimension (up to 64, 128, 256, 512), and fp32 stands apart."""
    width = max(problem.block_d, problem.block_dv)
    name = "narrow" if width <= 64 else "medium" if width <= 128 else "wide" if width <= 256 else "huge"
    return f"fp32 {name}" if problem.call.q.element_size() == 4 else name


# tests/test_compile_targets.py holds these to no spilled registers and to each architecture's shared memory.
# fp32 multiplies outside the tensor cores, its operands in registers: small tiles over 8 warps are what does not spill.
_FORWARD = {
    "narrow": KernelConfig(128, 64, 4, 3),
    "medium": KernelConfig(128, 64, 8, 2),
    "wide": KernelConfig(64, 32, 4, 2),
    "huge": KernelConfig(32, 32, 8, 1),
    "fp32 narrow": KernelConfig(64, 32, 8, 2),
    "fp32 medium": KernelConfig(32, 16, 8, 1),
    "fp32 wide": KernelConfig(32, 16, 8, 1),
    "fp32 huge": KernelConfig(16, 16, 8, 1),
}
_DQ = {
    "narrow": KernelConfig(64, 64, 4, 2),
    "medium": KernelConfig(64, 32, 4, 2),
    "wide": KernelConfig(32, 32, 4, 1),
    "huge": KernelConfig(32, 16, 8, 1),
    "fp32 narrow": KernelConfig(32, 32, 8, 1),
    "fp32 medium": KernelConfig(16, 16, 8, 1),
    "fp32 wide": KernelConfig(16, 16, 8, 1),
    "fp32 huge": KernelConfig(8, 16, 8, 1),
}
# dk and dv are two accumulators of block_n rows: with 4 warps those of D = 128 spill.
_DKV = {
    "narrow": KernelConfig(64, 64, 4, 2),
    "medium": KernelConfig(32, 64, 8, 2),
    "wide": KernelConfig(32, 32, 8, 1),
    "huge": KernelConfig(16, 16, 8, 1),
    "fp32 narrow": KernelConfig(32, 32, 8, 1),
    "fp32 medium": KernelConfig(16, 32, 8, 1),
    "fp32 wide": KernelConfig(16, 16, 8, 1),
    "fp32 huge": KernelConfig(16, 8, 8, 1),
}


# Without warpgroup instructions operands pass through registers: fewer rows or more warps.
_MMA_SYNC = {
    "forward": {
        "narrow": KernelConfig(128, 64, 8, 2),
        "medium": KernelConfig(64, 32, 4, 2),
        "wide": KernelConfig(32, 32, 4, 2),
    },
    "dq": {"narrow": KernelConfig(64, 64, 8, 2)},
    "dkv": {"narrow": KernelConfig(32, 64, 4, 2)},
}
# A wave of 64 lanes: 8 warps are 512 threads, which halves the registers of each.
_CDNA = {
    "forward": {"huge": KernelConfig(32, 32, 4, 1), "fp32 huge": KernelConfig(16, 16, 4, 1)},
    "dq": {
        "huge": KernelConfig(32, 16, 4, 1),
        "fp32 wide": KernelConfig(16, 16, 4, 1),
        "fp32 huge": KernelConfig(16, 16, 4, 1),
    },
    "dkv": {
        "narrow": KernelConfig(32, 32, 4, 2),
        "medium": KernelConfig(16, 64, 4, 2),
        "wide": KernelConfig(32, 16, 4, 1),
        "huge": KernelConfig(16, 16, 4, 1),
        "fp32 wide": KernelConfig(16, 16, 4, 1),
        "fp32 huge": KernelConfig(16, 16, 4, 1),
    },
}
# Measured on an H100 (benchmarks/LOG.md). Some keep a few registers in memory and are still the fastest tiles.
_HOPPER = {
    "forward": {"medium": KernelConfig(128, 64, 8, 3), "wide": KernelConfig(128, 64, 8, 2)},
    "dq": {
        "narrow": KernelConfig(128, 64, 4, 3, tma=True),
        "medium": KernelConfig(128, 64, 8, 3),
        "wide": KernelConfig(64, 32, 4, 2, tma=True),
    },
    "dkv": {
        "narrow": KernelConfig(64, 64, 4, 3, tma=True),
        "medium": KernelConfig(64, 128, 8, 3, tma=True),
        "wide": KernelConfig(64, 64, 8, 2, tma=True),
    },
}
# Not measured: more warps than on Hopper, because triton 3.6 otherwise spills a few registers.
_BLACKWELL = {
    "forward": {"narrow": KernelConfig(128, 64, 8, 3)},
    "dkv": {"narrow": KernelConfig(64, 64, 8, 2), "medium": KernelConfig(32, 32, 8, 2)},
}
_DEFAULT = {"forward": _FORWARD, "dq": _DQ, "dkv": _DKV}
_OVERRIDES = dict.fromkeys(("sm80", "sm86", "sm87", "sm89", "sm120", "sm121"), _MMA_SYNC)
_OVERRIDES |= {"sm90": _HOPPER, "sm100": _BLACKWELL, "sm103": _BLACKWELL}
_OVERRIDES |= dict.fromkeys(("gfx90a", "gfx942", "gfx950"), _CDNA)


MIN_TMA_PACK = 4  # heads in a tile of dk, dv: TMA copies rows of at least 16 bytes, here fp32 statistics


def _config(kernel: str, problem) -> KernelConfig:
    name = _size_class(problem)
    overrides = _OVERRIDES.get(problem.target, {}).get(kernel, {})
    if problem.target == "sm90" and problem.call.softcap > 0.0:
        overrides = {}  # these tiles leave no registers for a softcap
    if problem.target == "sm90" and kernel == "dkv" and name != "narrow" and problem.call.mask.key_ranges is not None:
        overrides = {}  # nor these for the ranges of a tile's queries
    return overrides.get(name, _DEFAULT[kernel][name])


def _shrink(config: KernelConfig, problem, most_rows: int) -> KernelConfig:
    """Fewer rows for calls with few query rows (decoding), so that a tile is not mostly padding; at least 16."""
    block_m = config.block_m
    while block_m > 16 and block_m // 2 >= max(most_rows, problem.pack):
        block_m //= 2
    return replace(config, block_m=block_m)


def forward_config(problem) -> KernelConfig:
    return _shrink(_config("forward", problem), problem, problem.seqlen_q * problem.pack)


def dq_config(problem) -> KernelConfig:
    return _shrink(_config("dq", problem), problem, problem.seqlen_q * problem.pack)


def dkv_config(problem) -> KernelConfig:
    config = _config("dkv", problem)
    if problem.call.softcap > 0.0 and problem.target.startswith("sm"):  # its slope is one more tile in registers
        return replace(config, num_warps=8)
    return config
