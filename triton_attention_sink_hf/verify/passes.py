"""One forward and backward of the samples, one at a time or as one packed row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .routing import Routing
from .samples import Samples

# log-probs (T,) of all samples, concatenated; gradients by parameter name. All fp32 on the CPU.
Outcome = tuple[Tensor, dict[str, Tensor]]


def by_sample(model, samples: Samples, routing: Routing) -> Outcome:
    """One sample per forward."""
    log_probs, gradients = [], {}
    for index, (ids, weights) in enumerate(zip(samples.ids, samples.weights, strict=True)):
        with routing.of([index]):
            log_probs.append(_forward_backward(model, ids, weights, torch.arange(len(ids))))
        for name, gradient in _take_gradients(model):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return torch.cat(log_probs), gradients


def packed(model, samples: Samples, routing: Routing) -> Outcome:
    """All samples in one forward."""
    positions = torch.cat([torch.arange(len(ids)) for ids in samples.ids])
    with routing.of(range(len(samples.ids))):
        log_probs = _forward_backward(model, torch.cat(samples.ids), torch.cat(samples.weights), positions)
    return log_probs, dict(_take_gradients(model))


def _forward_backward(model, ids: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """log-probs (S,) of one row of tokens. As in verl, under autocast unless the parameters are fp32."""
    ids, weights, positions = (x.to(model.device) for x in (ids, weights, positions))
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        logits = model(ids[None], attention_mask=None, position_ids=positions[None], use_cache=False).logits[0]
    log_probs = -torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1), reduction="none")
    (log_probs * weights).sum().backward()
    return torch.where(weights == 0, 0.0, log_probs.detach()).cpu()


def _take_gradients(model) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.float().cpu()
            parameter.grad = None


@contextmanager
def exact_fp32() -> Iterator[None]:
    """No tf32 in fp32 matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
