"""Which sinks a layer has: those that its model passes, and what the key ``attention_sink`` of its config says.

==============  ======================================================================================================
absent, None    what the model passes: one logit per head, one per token, or none
a number c      a constant logit c for every head; 0 is off-by-one softmax. Refused for layers that have sinks
"learned"       the model's own, or those of ``attach_learned_sinks``. Refused for layers that have none
"learned+c"     both, in one logit: logaddexp(learned, c)
"first:n"       the first n keys of a row or packed sample, beside the window of layers that have one (StreamingLLM);
                alone or behind the others: "learned+first:4", "0.0+first:4"
==============  ======================================================================================================

The value is a number or a short string: verl's ``override_config`` sets it in one line, transformers saves it in
config.json. For models of several parts it belongs to the config of the text model, which its layers hold.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..call import traced
from ..tracing import constant_result

KEY, LEARNED, FIRST = "attention_sink", "learned", "first:"


def layer_sinks(module, query: Tensor, s_aux: Tensor | None, sinks: Tensor | None) -> tuple[Tensor | None, int]:
    """The sinks of one layer: (Hq,), one per head; (B, Hq, Sq), one per token; or None. And the number of first keys.

    Args:
        module: the layer; its ``config`` and ``sinks`` are read.
        query: (B, Hq, Sq, D). s_aux, sinks: what the model passes, (Hq,), (B, Hq, Sq) or (B, Hq, Sq, 1).

    Raises:
        ValueError, TypeError: sinks of another shape; a key that is malformed or does not fit the layer.
    """
    if s_aux is not None and sinks is not None:
        raise ValueError("sinks must be None where s_aux is given, got both")
    name, given = ("s_aux", s_aux) if sinks is None else ("sinks", sinks)
    value = getattr(getattr(module, "config", None), KEY, None)
    if value is None:
        if given is None and isinstance(getattr(module, "sinks", None), Tensor):
            raise ValueError(
                f"{name} must be the sinks that {type(module).__name__} owns, got None: they would be ignored"
            )
        return _shaped(name, given, query), 0
    learned, constant, first = parse(value)
    if given is None and learned:
        name, given = "sinks", _own(module, value)
    if given is not None and not learned:
        raise ValueError(
            f"{KEY} must be '{LEARNED}' or '{LEARNED}+{value}' for {type(module).__name__}, which has sinks of its "
            f"own, got {value!r}"
        )
    given = _shaped(name, given, query)
    if constant is None:
        return given, first
    every = _constant(constant, query)
    if given is None:
        return every, first
    every = every if given.dim() == 1 else every[:, None]
    given = given.to(torch.promote_types(given.dtype, torch.float32))
    return torch.logaddexp(given, every.to(given.device)), first


@constant_result
def parse(value: object) -> tuple[bool, float | None, int]:
    """(whether there are learned sinks, the constant logit or None, the first keys) of a value of the key.

    Raises:
        TypeError: neither a number nor a string. ValueError: not one of the forms above.
    """
    return _parse(value) if isinstance(value, str) else (False, _number(value, value), 0)


@functools.lru_cache
def _parse(value: str) -> tuple[bool, float | None, int]:
    rest, first = value, 0
    head, _, last = value.rpartition("+")
    if last.strip().startswith(FIRST) and last.strip().removeprefix(FIRST).isdecimal():
        first = int(last.strip().removeprefix(FIRST))
        if not head.strip():
            return False, None, first
        rest = head
    learned, plus, number = rest.partition("+")
    if learned.strip() != LEARNED:
        return False, _number(rest, value), first
    return True, _number(number, value) if plus else None, first


def _number(text: object, value: object) -> float:
    must = (
        f"{KEY} must be a finite number (0 = off-by-one softmax), '{LEARNED}', '{LEARNED}+' and a number, or "
        f"'{FIRST}N', alone or behind '+'"
    )
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise TypeError(f"{must}, got {type(value).__name__} {value!r}")
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not -math.inf < number < math.inf:
        raise ValueError(f"{must}, got {value!r}")
    return number


def _own(module, value: object) -> Tensor | None:
    """The layer's parameter; None for a layer whose model says that it has none, as some layers of MiMo-V2-Flash."""
    if not hasattr(module, "sinks"):
        raise ValueError(
            f"{KEY} must be None or a number for {type(module).__name__}, which has no sinks, got {value!r}: to add "
            "sinks, or to load those of a checkpoint, call triton_attention_sink_hf.attach_learned_sinks(model)"
        )
    return module.sinks


def _shaped(name: str, sinks: Tensor | None, query: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    shape, by_token = tuple(sinks.shape), tuple(query.shape[:3])
    if shape == (*by_token, 1):
        return sinks.squeeze(-1)
    if shape not in ((query.shape[1],), by_token):
        raise ValueError(
            f"{name} must be (Hq,) = ({query.shape[1]},), one sink per head, or (B, Hq, Sq) = {by_token}, one per "
            f"token, got {shape}"
        )
    return sinks


def _constant(value: float, query: Tensor) -> Tensor:
    """(Hq,) fp32. Remembered, because filling it would be one more launch a layer."""
    heads, device = query.shape[1], query.device
    if traced(query) or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.full((heads,), value, device=device)  # else it would belong to the graph
    return _remembered(value, heads, device)


@functools.cache
def _remembered(value: float, heads: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whose tensors no later backward may save
        return torch.full((heads,), value, device=device)
