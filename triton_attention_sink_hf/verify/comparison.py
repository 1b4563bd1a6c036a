"""How far a run is from eager in fp32, and how far it may be."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from .models import DTYPES
from .passes import Outcome
from .report import Row

FP32_TOLERANCE = 1e-4
FACTOR, DEVIATIONS = 2.0, 4.0
LOG_PROBS = "log-probs"
SMALL = 1e-2  # a gradient below this fraction of the usual one is measured against that fraction


def errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Relative norm of the difference by name: log-probs, then the gradient of every parameter that has one."""
    (log_probs, gradients), (true_log_probs, true_gradients) = found, exact
    relative = {LOG_PROBS: _norm(log_probs - true_log_probs) / _norm(true_log_probs)}
    usual = _usual(true_gradients)
    for name, true in true_gradients.items():
        difference = gradients[name] - true if name in gradients else true
        relative[name] = _norm(difference) / max(_norm(true), SMALL * usual * math.sqrt(true.numel()), 1e-30)
    for name in gradients.keys() - true_gradients.keys():
        relative[name] = math.inf if gradients[name].any() else 0.0
    return relative


def compare(found: dict[str, float], eager: dict[str, float] | None, exact: Outcome, dtype: str) -> list[Row]:
    """A row for the log-probs, then one per gradient.

    Args:
        found, eager: ``errors`` of ours and of eager in ``dtype``; eager is None in fp32.
        exact: eager in fp32.
    """
    counted = {LOG_PROBS: exact[0]} | exact[1]
    rounding = torch.finfo(DTYPES[dtype]).eps
    rows = []
    for name, error in found.items():
        true = counted.get(name, torch.zeros(1))
        own, allowed = None, FP32_TOLERANCE
        if eager is not None:
            own = eager.get(name, 0.0)
            namesakes = [x for other, x in eager.items() if _kind(other) == _kind(name)] or [0.0]
            usual = math.sqrt(sum(x * x for x in namesakes) / len(namesakes))
            unlucky = 1.0 + DEVIATIONS / math.sqrt(2 * true.numel())
            allowed = FACTOR * unlucky * max(own, usual) + (FP32_TOLERANCE if name == LOG_PROBS else rounding)
        rows.append(Row(name, _norm(true), error, own, allowed))
    return rows


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _usual(gradients: dict[str, Tensor]) -> float:
    """Root mean square over the elements of all gradients."""
    squares = sum(_norm(x) ** 2 for x in gradients.values())
    return math.sqrt(squares / max(sum(x.numel() for x in gradients.values()), 1))


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double() if x.numel() < 2**20 else x).item()
