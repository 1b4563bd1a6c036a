"""The same experts in every run, so that runs differ by their attention alone."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Routing(TorchFunctionMode):
    """Records the experts that the first run of each sample chooses, and imposes them on later runs.

    Routers choose with ``torch.topk`` over the experts. Calls of any other width pass through.
    """

    EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

    def __init__(self, config):
        super().__init__()
        self.widths = {getattr(config, name, None) for name in self.EXPERTS} - {None, 0, 1}
        self.chosen: dict[int, list[Tensor]] = {}  # sample -> (its tokens, k) for every router in turn
        self.samples: list[int] = []
        self.turn = 0
        self.changed = self.decisions = 0

    @contextmanager
    def of(self, samples):
        """Record the choices of one new sample, or impose those of known samples (concatenated, in this order)."""
        self.samples, self.turn = list(samples), 0
        self.recording = self.samples[0] not in self.chosen
        if self.recording:
            self.chosen[self.samples[0]] = []
        self.changed = self.decisions = 0
        with self:
            yield

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, Tensor.topk) or args[0].shape[-1] not in self.widths:
            return result
        if self.recording:
            self.chosen[self.samples[0]].append(result.indices)
            return result
        known = torch.cat([self.chosen[sample][self.turn] for sample in self.samples]).view_as(result.indices)
        self.turn += 1
        self.changed += (known.sort(-1).values != result.indices.sort(-1).values).any(-1).sum().item()
        self.decisions += known[..., 0].numel()
        return torch.return_types.topk((args[0].gather(-1, known), known))

    @property
    def notes(self) -> list[str]:
        """About the last run."""
        if not self.decisions:
            return []
        return [f"routing as in fp32; by itself it would have differed in {self.changed} of {self.decisions} choices"]
