"""What all stand-ins call: this package's attention, counted, and with a fault if the run asks for one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from triton_attention_sink_hf import attention_sink as _attention_sink
from triton_attention_sink_hf import flash_attention_triton_sink, flash_attn_api

calls = 0


def _doubled(x: Tensor | None) -> Tensor | None:
    """x, with twice its gradient."""
    return None if x is None else 2 * x - x.detach()


def _joined(cu_seqlens: Tensor | None) -> Tensor | None:
    """Without the border between the first two samples."""
    return None if cu_seqlens is None else torch.cat([cu_seqlens[:1], cu_seqlens[2:]])


# What a run with --fault does to the arguments of attention_sink; the peers' tests have to notice.
FAULTS: dict[str, Callable[[dict], dict]] = {
    "no-sink": lambda a: a | {"sinks": None},
    "dsinks": lambda a: a | {"sinks": _doubled(a["sinks"])},
    "dq": lambda a: a | {"q": _doubled(a["q"])},
    "scale": lambda a: a | {"softmax_scale": 0.8 * (a.get("softmax_scale") or a["q"].shape[-1] ** -0.5)},
    "window": lambda a: a | {"window_size": tuple(w + (w > 0) for w in a.get("window_size", (-1, -1)))},
    "future": lambda a: a | {"causal": False, "window_size": (a.get("window_size", (-1, -1))[0], -1)},
    "joined": lambda a: a | {name: _joined(a.get(name)) for name in ("cu_seqlens_q", "cu_seqlens_k")},
}
_fault = FAULTS.get(os.environ.get("PEERS_FAULT", ""))


@functools.wraps(_attention_sink)
def attention_sink(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None, **options):
    global calls
    if _fault is not None:
        arguments = _fault(dict(q=q, k=k, v=v, sinks=sinks, **options))
        q, k, v, sinks = (arguments.pop(name) for name in ("q", "k", "v", "sinks"))
        options = arguments
    found = _attention_sink(q, k, v, sinks, **options)
    if not torch.compiler.is_compiling():  # a number that changes would compile every call anew
        calls += 1
    return found


def install() -> None:
    """Lead the package's own callers of attention_sink here, too."""
    flash_attn_api.attention_sink = flash_attention_triton_sink.attention_sink = attention_sink


def refuse(**arguments: object) -> None:
    """Raise for the first argument that is given: attention_sink has no such feature."""
    flash_attn_api._refuse(**{name: (value, None) for name, value in arguments.items()})
