"""Benchmark cases as data, with the least operations and bytes that each needs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Case:
    """Causal attention with one sink per head, bf16.

    Attributes:
        name: the row's name in tables and files.
        batch, seqlen: B and S; a packed case has B = 1 and S = the sum of ``lengths``.
        heads_q, heads_k, head_dim: Hq, Hkv, D.
        window: a query sees this many keys, its own included; None = all before it.
        lengths: segment lengths of a packed row; None = dense.
        queries: decoding: each row has so many queries, at the end of its S keys, and no gradient; 0 = S.
    """

    name: str
    batch: int
    seqlen: int
    heads_q: int = 64
    heads_k: int = 8
    head_dim: int = 64
    window: int | None = None
    lengths: tuple[int, ...] | None = None
    queries: int = 0

    @property
    def seqlen_q(self) -> int:
        return self.queries or self.seqlen

    @cached_property
    def visible_scores(self) -> int:
        """Pairs of query and key that are computed, over batch and heads."""
        if self.queries:
            seen = (min(self.window or self.seqlen, self.seqlen - i) for i in range(self.queries))
            return sum(seen) * self.batch * self.heads_q
        segments = self.lengths or (self.seqlen,) * self.batch
        window = self.window or max(segments)
        pairs = 0
        for n in segments:
            w = min(window, n)
            pairs += w * (w + 1) // 2 + (n - w) * w
        return pairs * self.heads_q

    def flops(self, direction: str) -> int:
        """Operations of the visible scores: two products forward, five backward."""
        return (4 if direction == "forward" else 10) * self.head_dim * self.visible_scores

    def bytes(self, direction: str) -> int:
        """Each input read once, each output written once (bf16; lse and delta fp32)."""
        tokens, keys = self.batch * self.seqlen_q, self.batch * self.seqlen
        if self.queries and self.window:
            keys = self.batch * min(self.window + self.queries - 1, self.seqlen)  # the others are not read
        query_side = tokens * self.heads_q * self.head_dim * 2
        key_side = keys * self.heads_k * self.head_dim * 2
        statistics = tokens * self.heads_q * 4
        if direction == "forward":
            return 2 * query_side + 2 * key_side + statistics  # q, out; k, v; lse
        return 4 * query_side + 4 * key_side + statistics  # q, out, dout, dq; k, v, dk, dv; lse


def rl_lengths(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths as in an RL batch: log-normal (median 700, sigma 1), clipped to [32, longest], summing to total."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        n = min(max(int(generator.lognormvariate(6.55, 1.0)), 32), longest)
        lengths.append(min(n, total - sum(lengths)))
    return tuple(lengths)


RL = rl_lengths(32768, 8192)
# from one token to a 16k response in one call: the hardest case for balancing load over the SMs
UNEVEN = (16384, 1, 1, 7, 31, 64, 129, 500, 1023, 4096, *rl_lengths(32768 - 22236, 4096, seed=1))
SHORT = (32,) * 1000

CASES = (
    Case("full-2k", 8, 2048),
    Case("full-8k", 2, 8192),
    Case("full-32k", 1, 32768),
    Case("window128-2k", 8, 2048, window=128),
    Case("window128-8k", 2, 8192, window=128),
    Case("window128-32k", 1, 32768, window=128),
    Case("d128-8k", 2, 8192, 32, 8, 128),
    Case("d128-window4096-16k", 1, 16384, 32, 8, 128, window=4096),
    Case("d256-4k", 2, 4096, 16, 4, 256),
    Case("packed-rl", 1, 32768, lengths=RL),
    Case("packed-rl-window128", 1, 32768, window=128, lengths=RL),
    Case("packed-uneven", 1, 32768, lengths=UNEVEN),
    Case("packed-uneven-window128", 1, 32768, window=128, lengths=UNEVEN),
    Case("packed-short", 1, 32000, lengths=SHORT),
    Case("packed-short-window128", 1, 32000, window=128, lengths=SHORT),
)

DECODE_CASES = (
    Case("decode-32x8k", 32, 8192, queries=1),
    Case("decode-4x32k", 4, 32768, queries=1),
    Case("decode-1x128k", 1, 131072, queries=1),
    Case("decode-32x8k-window128", 32, 8192, window=128, queries=1),
    Case("decode-8q-32x8k", 32, 8192, queries=8),
    Case("decode-d128-32x8k", 32, 8192, head_dim=128, queries=1),
    Case("decode-d128-1x128k", 1, 131072, head_dim=128, queries=1),
)
ALL_CASES = (*CASES, *DECODE_CASES)

# a gpt-oss layer pair is one full and one windowed layer, forward and backward
GPT_OSS_PAIR = ("full-8k", "window128-8k")
