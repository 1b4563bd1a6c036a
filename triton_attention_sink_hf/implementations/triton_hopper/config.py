"""Tiles of the Hopper kernels, measured on an H100 with triton 3.6 (``benchmarks/NOTES.md``)."""

from __future__ import annotations

from typing import NamedTuple

import triton

from ..triton.launch import Problem

TARGETS = ("sm90",)
TRITON_VERSIONS = ((3, 6), (3, 9))  # Gluon's interface moves; these are compiled in the tests


def triton_version() -> tuple[int, int]:
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


class ForwardConfig(NamedTuple):
    """A tile has 64 query rows for each consumer; the ring has ``stages`` slots of ``block_n`` keys."""

    consumers: int
    block_n: int
    stages: int
    turns: bool
    consumer_registers: int
    producer_registers: int


# by the larger of the padded head dimensions of q, k and of v
_FORWARD = {
    64: ForwardConfig(consumers=3, block_n=128, stages=3, turns=True, consumer_registers=160, producer_registers=32),
    128: ForwardConfig(consumers=2, block_n=128, stages=2, turns=False, consumer_registers=240, producer_registers=24),
    256: ForwardConfig(consumers=2, block_n=64, stages=2, turns=False, consumer_registers=240, producer_registers=24),
}
_SHORT = ForwardConfig(consumers=2, block_n=128, stages=4, turns=False, consumer_registers=240, producer_registers=24)
SHORT_SEQUENCE = 2048  # keys, where two consumers without turns win at D 64


def forward_config(problem: Problem) -> ForwardConfig:
    block = max(problem.block_d, problem.block_dv, 64)
    if block == 64 and problem.seqlen_k <= SHORT_SEQUENCE:
        return _SHORT
    return _FORWARD[block]


class BackwardConfig(NamedTuple):
    """The ring of q and dout has ``stages`` slots of 64 queries."""

    stages: int
    consumer_registers: int
    dq_registers: int


MAX_FUSED_DIM = 128  # dk and dv of wider heads do not fit the registers of two consumers
_BACKWARD = {
    64: BackwardConfig(stages=4, consumer_registers=216, dq_registers=72),
    128: BackwardConfig(stages=2, consumer_registers=216, dq_registers=72),
}


def backward_config(problem: Problem) -> BackwardConfig:
    return _BACKWARD[max(problem.block_d, problem.block_dv, 64)]
