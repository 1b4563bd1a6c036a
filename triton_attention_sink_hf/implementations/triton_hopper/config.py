"""Launch numbers of the Hopper kernels, measured on an H100 with triton 3.6 (``benchmarks/LOG.md``).

A consumer is a warpgroup. It has 64 rows, because wgmma has. Registers are given per thread.
"""

from __future__ import annotations

from typing import NamedTuple

from ..common.problem import Problem
from ..common.relaunch import TRITON

TARGETS = ("sm90",)
TRITON_VERSIONS = ((3, 6), (3, 9))  # Gluon's interface moves; the tests compile with these
MIN_QUERIES = 64  # fewer leave most of a tile empty
MIB = 2**20


def triton_version() -> tuple[int, int]:
    return TRITON


class ForwardConfig(NamedTuple):
    """Launch numbers of a forward.

    Attributes:
        block_n, stages: keys of a slot and slots of the K and V rings.
        q_buffers: 2 let the next tile's queries load during this one; 3 let the output leave through one meanwhile.
        registers: of a consumer, of the producer.
        l2_bytes: K and V of the heads that are worked on side by side.
        pingpong: consumers take turns at the tensor cores; they always do up to D 64.
        exact_keys: tiles that see no more keep exact maxima throughout; above D 64.
    """

    block_n: int
    stages: int
    q_buffers: int
    registers: tuple[int, int]
    l2_bytes: int
    pingpong: bool = True
    exact_keys: int | None = None


FORWARD = ForwardConfig(block_n=128, stages=3, q_buffers=3, registers=(160, 32), l2_bytes=16 * MIB)
# By the wider padded head dimension. A consumer needs 240 registers a thread, and two such fill an SM.
_WIDE_FORWARD = {
    128: ForwardConfig(128, 2, 3, registers=(240, 24), l2_bytes=64 * MIB, pingpong=False, exact_keys=1024),
    # shared memory holds one q buffer and two slots of 64 keys
    256: ForwardConfig(64, 2, 1, registers=(240, 24), l2_bytes=32 * MIB, exact_keys=1024),
}


def wide_forward_config(problem: Problem) -> ForwardConfig:
    return _WIDE_FORWARD[max(problem.block_d, problem.block_dv)]


class BackwardConfig(NamedTuple):
    """Launch numbers of the fused backward.

    Attributes:
        stages: slots of the q and dout ring.
        registers: of a consumer, of the dq warpgroup.
        block_m: queries of a slot.
        keys: of a program; 64 for each of two consumers.
    """

    stages: int
    registers: tuple[int, int]
    block_m: int = 64
    keys: int = 128


MAX_FUSED_DIM = 128  # wider dk and dv do not fit the registers of two consumers beside dq
BACKWARD_L2_KEYS = 16384  # of the key heads that are worked on side by side
_BACKWARD = {
    64: BackwardConfig(stages=3, registers=(216, 72)),
    128: BackwardConfig(stages=3, registers=(216, 72)),
}


def backward_config(problem: Problem) -> BackwardConfig:
    return _BACKWARD[max(problem.block_d, problem.block_dv, 64)]


class WideConfig(NamedTuple):
    """Launch numbers of the backward above MAX_FUSED_DIM.

    Attributes:
        block: queries of a slot (dk, dv), keys of a slot (dq); rows of a consumer.
        queries: of a program of the dq kernel; 64 for each of two consumers.
        registers: of a consumer.
        l2_bytes: what the heads that are worked on side by side read.
    """

    block: int
    queries: int
    registers: int
    l2_bytes: int


WIDE = WideConfig(block=64, queries=128, registers=240, l2_bytes=256 * MIB)


class WindowConfig(NamedTuple):
    """Launch numbers of the window backward.

    Attributes:
        rows: of a step: tokens times the heads of a group.
        tile: keys of a consumer.
        block_d: columns of every tile.
        stages: steps in shared memory.
        slots: tiles of keys in shared memory: the three that a step sees, and the next.
        registers: of a consumer.
        groups: query heads of a key head. With fewer, tiles change before the next one is there.
    """

    rows: int
    tile: int
    block_d: int
    stages: int
    slots: int
    registers: int
    groups: tuple[int, ...]

    @property
    def halo(self) -> int:
        """Tokens after a chunk whose windows begin in it."""
        return 2 * self.tile


WINDOW = WindowConfig(rows=64, tile=64, block_d=64, stages=3, slots=4, registers=160, groups=(4, 8, 16))
# Below these the two kernels of triton_window are faster (H200): most of the three tiles is masked, or SMs are idle.
MIN_LEFT = 65
MIN_TOKENS = 1024  # of all rows of the batch
MIN_SEQLEN = 64
MAX_BATCH = 65535  # third dimension of a grid

ROWWISE_ROWS = 128  # rows of a program before and after the backward's products; both are memory-bound
STATISTICS_ALIGN = 4  # TMA loads fp32 rows from multiples of 16 bytes


class TableConfig(NamedTuple):
    """Launch numbers of the tile table.

    Attributes:
        block: tiles that a program ranks.
        others: tiles that it compares them with at a time; each round waits for two dependent loads.
    """

    block: int
    others: int
    num_warps: int


TABLE = TableConfig(block=32, others=512, num_warps=8)
