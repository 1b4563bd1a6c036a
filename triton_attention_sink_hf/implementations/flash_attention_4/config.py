"""Where FlashAttention-4 serves, and where "auto" prefers it."""

from __future__ import annotations

from dataclasses import dataclass

# Its kernels take a sink, forward and backward, on these alone.
TARGETS = ("sm90", "sm100", "sm103")
# No kernel of this package is tuned for these: "auto" gives FlashAttention-4 whatever it supports there.
UNTUNED = ("sm100", "sm103")
# Its backward's workspace has up to this many rows more for each entry of cu_seqlens ...
ROWS_PER_ENTRY = 128
# ... which may double a row's workspace, or reach this many rows where that is more. A Hugging Face row that says its
# cuts by position_ids alone has an entry for every token.
FREE_ROWS = 8192


@dataclass(frozen=True)
class Measured:
    """Causal calls that a committed measurement shows to be faster with FlashAttention-4 than with any kernel here.

    Attributes:
        target: the card's architecture. head_dims: (D, Dv).
        window: whether a window hides keys. packed: whether cu_seqlens cut the rows. min_queries: from how many on.
        source: the file in benchmarks/results.
    """

    target: str
    head_dims: tuple[int, int]
    window: bool
    packed: bool
    min_queries: int
    source: str


# Empty for Hopper: at D 128, full causal, FlashAttention-4 called directly took 0.92 of our time in h100.json, but our
# kernels are faster since. Through attention_sink it has not been timed.
FASTER: tuple[Measured, ...] = ()
