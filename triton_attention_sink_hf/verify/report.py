"""What ``verify`` found: one ``Row`` per comparison, all of them in a ``Report``."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are relative norms; ``eager_error`` is that of eager in the same dtype, None in fp32."""

    name: str
    size: float
    error: float
    eager_error: float | None
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN fails

    @property
    def excess(self) -> float:
        """Error over allowed error; above 1 is a failure."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed


@dataclass
class Report:
    """The result of ``verify``. ``problem``: why ours could not run, else None."""

    model: str
    attention: str
    device: str
    dtype: str
    parameters: int
    lengths: list[int]
    notes: list[str] = field(default_factory=list)
    sinks: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> smallest, largest
    log_prob_mean: float = math.nan  # absolute difference from fp32 eager, in nats
    log_prob_max: float = math.nan
    rows: list[Row] = field(default_factory=list)
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def log_probs(self) -> Row:
        return self.rows[0]

    def sink_rows(self) -> list[Row]:
        return [row for row in self.rows if row.name in self.sinks]

    def worst(self, n: int) -> list[Row]:
        """The n gradients, without those of sinks, with the largest ``excess``."""
        others = [row for row in self.rows[1:] if row.name not in self.sinks]
        return sorted(others, key=lambda row: row.excess, reverse=True)[:n]

    def as_dict(self) -> dict:
        rows = [asdict(row) | {"passed": row.passed} for row in self.rows]
        return asdict(self) | {"rows": rows, "passed": self.passed}
