"""Launch numbers of the window kernels, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.problem import multiprocessors, next_power_of_2

TARGETS = ("sm90", "cpu")  # where the numbers below were measured, and the interpreter
MAX_LEFT = 128  # at 64 rows, the registers of 4 warps hold 144 fp32 scores per row
ROWS = 64  # one warpgroup's matrix instruction


@dataclass(frozen=True)
class WindowConfig:
    """Launch numbers of a kernel.

    Attributes:
        tokens: of a query tile. keys: of a key tile, for dk and dv.
        parts: a tile's rows are computed in so many passes.
        per_sm: resident programs per SM of a persistent kernel.
        late: the last part's P V and its stores are issued after the loads of the next tile.
    """

    tokens: int
    num_warps: int
    num_stages: int
    parts: int = 1
    keys: int = 0
    per_sm: int = 1
    late: bool = False


def band_size(problem) -> int:
    """Keys loaded before a tile's own: the window's left side, rounded up to a power of two."""
    return max(next_power_of_2(problem.call.mask.left), 32)


def forward_config(problem) -> WindowConfig:
    """Two passes of 64 rows share one load of the keys. Two programs of 4 warps hide each other's latency (H100)."""
    tokens = max(16, ROWS // problem.pack)
    parts = tokens * problem.pack // ROWS
    return WindowConfig(tokens, num_warps=4, num_stages=2, parts=parts, per_sm=2, late=parts > 1)


def dq_config(problem) -> WindowConfig:
    """128 rows over 8 warps hold scores and dP of whole rows in registers (H100)."""
    tokens = max(16, ROWS // problem.pack)
    warps = 8 if tokens * problem.pack > ROWS else 4
    wide = max(problem.block_d, problem.block_dv) > 64
    return WindowConfig(tokens, num_warps=warps, num_stages=1 if wide else 3)


def dkv_config(problem) -> WindowConfig:
    """64 keys, steps of 64 rows, three steps in flight (H100). Wider heads would spill with 4 warps."""
    wide = max(problem.block_d, problem.block_dv) > 64
    return WindowConfig(ROWS // problem.pack, num_warps=8 if wide else 4, num_stages=2 if wide else 3, keys=64)


def programs(problem, config: WindowConfig) -> int:
    """Grid of a persistent kernel: as many programs as the GPU runs at once."""
    return multiprocessors(problem.call.q.device) * config.per_sm
