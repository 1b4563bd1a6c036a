"""Launch numbers of the decode kernels, each with its reason, and the number of splits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...masks import MAX_ROWS as MAX_KEYS
from ..common.problem import ceil_div, multiprocessors, next_power_of_2

MAX_QUERIES = 16  # from more on, the forward kernels reuse a loaded key often enough


@dataclass(frozen=True)
class DecodeConfig:
    """Launch numbers of the split kernel.

    Attributes:
        block_n: keys of a tile. num_warps, num_stages: see Triton; all but one stage are bytes in flight.
        per_sm: programs that an SM holds at once.
        max_rows: of a tile, tokens times heads; more would not fit the registers.
    """

    block_n: int
    num_warps: int
    num_stages: int
    per_sm: int
    max_rows: int = 64


# An H100 needs about 40 KB in flight per SM: 3.35 TB/s times 1.5 us of latency under load, over 132 SMs.
_CONFIGS = {
    "narrow": DecodeConfig(64, num_warps=2, num_stages=3, per_sm=2),
    "medium": DecodeConfig(64, num_warps=4, num_stages=3, per_sm=1),
    "wide": DecodeConfig(32, num_warps=4, num_stages=2, per_sm=2, max_rows=32),
    "huge": DecodeConfig(16, num_warps=8, num_stages=2, per_sm=2, max_rows=16),
    "fp32 narrow": DecodeConfig(32, num_warps=4, num_stages=2, per_sm=4, max_rows=32),
    "fp32 medium": DecodeConfig(16, num_warps=8, num_stages=2, per_sm=2, max_rows=16),
    "fp32 wide": DecodeConfig(16, num_warps=8, num_stages=2, per_sm=2, max_rows=16),
    "fp32 huge": DecodeConfig(16, num_warps=8, num_stages=1, per_sm=2, max_rows=16),
}

START = 2  # tiles that a program's start and end cost: its loads wait for nothing before them
REDUCE = 4  # tiles that the second launch costs
MAX_REDUCE = 64  # partial results that a program of the reduction holds at once, of up to 256 columns


def decode_config(problem) -> DecodeConfig:
    width = max(problem.block_d, problem.block_dv)
    name = "narrow" if width <= 64 else "medium" if width <= 128 else "wide" if width <= 256 else "huge"
    config = _CONFIGS[f"fp32 {name}" if problem.call.q.element_size() == 4 else name]
    rows = block_m(problem, config)
    if rows > 16:  # more rows, more registers
        config = replace(config, num_warps=max(config.num_warps, 8 if rows > 32 and width > 64 else 4))
    if problem.target.startswith("gfx"):
        config = replace(config, num_stages=2)  # 64 KB of shared memory
    return config


def pack(problem, config: DecodeConfig) -> int:
    """Query heads in the rows of one tile: all of a key head's, or its largest divisor that fits."""
    group = problem.heads_q // problem.heads_k
    return next(n for n in range(min(group, config.max_rows), 0, -1) if group % n == 0)


def block_m(problem, config: DecodeConfig) -> int:
    """Rows of a tile, tokens times heads; a matrix product takes at least 16."""
    return min(max(next_power_of_2(problem.seqlen_q * pack(problem, config)), 16), config.max_rows)


def most_keys(problem, tokens: int) -> int:
    """Keys that a tile of ``tokens`` queries may see, as far as the host knows."""
    mask, most = problem.call.mask, MAX_KEYS
    if mask.left >= 0 and mask.right >= 0:
        most = mask.left + mask.right + min(tokens, problem.seqlen_q)
    return min(most, problem.seqlen_k)


def splits(problem, config: DecodeConfig) -> int:
    """Programs that share the keys of one batch row and key head.

    Made of sizes that the host knows, so a CUDA graph may be captured. What fills whole waves of programs wins: the
    time is that of the waves, each as long as a program's tiles.
    """
    heads = pack(problem, config)
    tokens = block_m(problem, config) // heads
    programs = problem.batch * (problem.heads_q // heads) * ceil_div(problem.seqlen_q, tokens)
    slots = multiprocessors(problem.call.q.device) * config.per_sm
    tiles = max(ceil_div(most_keys(problem, tokens), config.block_n), 1)

    def time(n: int) -> float:
        waves = ceil_div(programs * n, slots)
        return waves * (ceil_div(tiles, n) + START) + (REDUCE if n > 1 else 0)

    return min(range(1, min(tiles, max(8 * slots // programs, 1)) + 1), key=time)
