"""Tiles of the Hopper kernels, measured on an H100 with triton 3.6 (``benchmarks/LOG.md``)."""

from __future__ import annotations

from typing import NamedTuple

from ..common.problem import Problem
from ..common.relaunch import TRITON

TARGETS = ("sm90",)
TRITON_VERSIONS = ((3, 6), (3, 9))  # Gluon's interface moves; these are compiled in the tests


def triton_version() -> tuple[int, int]:
    return TRITON


class ForwardConfig(NamedTuple):
    """A tile has 64 query rows for each consumer; the ring has ``stages`` slots of ``block_n`` keys."""

    consumers: int
    block_n: int
    stages: int
    q_buffers: int
    turns: bool  # consumers take turns at the tensor cores
    registers: tuple[int, int]  # of a lane of a consumer, of the producer
    l2_bytes: int  # K and V of the heads that are worked on side by side


MIB = 2**20
# by the larger of the padded head dimensions of q, k and of v
_FORWARD = {
    64: ForwardConfig(3, block_n=128, stages=3, q_buffers=2, turns=True, registers=(160, 32), l2_bytes=16 * MIB),
    128: ForwardConfig(2, block_n=128, stages=2, q_buffers=2, turns=False, registers=(240, 24), l2_bytes=64 * MIB),
    256: ForwardConfig(2, block_n=64, stages=2, q_buffers=1, turns=False, registers=(240, 24), l2_bytes=64 * MIB),
}
BACKWARD_L2_KEYS = 16384
WIDE_L2_BYTES = 256 * MIB  # what the heads that are worked on side by side read, backward above MAX_FUSED_DIM
MIN_QUERIES = 64  # fewer leave most of a tile empty


def forward_config(problem: Problem) -> ForwardConfig:
    return _FORWARD[max(problem.block_d, problem.block_dv, 64)]


class BackwardConfig(NamedTuple):
    """The ring of q and dout has ``stages`` slots of 64 queries."""

    stages: int
    registers: tuple[int, int]  # of a lane of a consumer, of the dq warpgroup


MAX_FUSED_DIM = 128  # dk and dv of wider heads do not fit the registers of two consumers beside dq
_BACKWARD = {
    64: BackwardConfig(stages=4, registers=(216, 72)),
    128: BackwardConfig(stages=2, registers=(216, 72)),
}


def backward_config(problem: Problem) -> BackwardConfig:
    return _BACKWARD[max(problem.block_d, problem.block_dv, 64)]
