"""What the route through Hugging Face costs: the attention function as a model calls it, against ``attention_sink``.

    python benchmarks/hf_route.py --output OUT            # OUT/hf_route.json
    python benchmarks/hf_route.py --output OUT --smoke    # tiny, on a CPU

Packed rows in bf16 with sinks. The model passes only ``position_ids`` that restart. Three ways:

* ``attention_sink``: with the true ``cu_seqlens``, N + 1 entries. The baseline.
* ``layer``: ``attention_forward`` with the mask of transformers' mask function. Another layer has used that mask
  before, as in all layers but a model's first.
* ``alone``: a single ``attention_forward`` without a mask.

All are checked against fp64, then timed in turns in one run: device time of each call, forward and backward. A turn's
ratio is that of its medians; the result is the median over the turns. ``forward of a model`` is wall time: the mask
function and ``--layers`` layers, until the device is done, against as many calls of ``attention_sink``. Status 1 if a
way is wrong; a ratio above 1.03 is a result, not a failure.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from triton_attention_sink_hf import attention_sink
from triton_attention_sink_hf.bench.cases import RL, SHORT, Case
from triton_attention_sink_hf.bench.measure import (
    LIMIT,
    device_ms,
    environment,
    host_us,
    make_tensors,
    spread,
)
from triton_attention_sink_hf.bench.oracle import errors, oracles
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
YARDSTICK, LAYER, ALONE = "attention_sink", "layer", "alone"
TARGET = 1.03
ROWS = {"one": (8192,), "four": (2048,) * 4, "rl": RL, "short": SHORT}
SMALL = {"one": (64,), "four": (16,) * 4, "rl": (7, 20, 1, 36), "short": (2,) * 32}
# query heads, key heads, head dimension, window
HEADS = {
    "d64": (64, 8, 64, None),
    "d64-window128": (64, 8, 64, 128),
    "d128": (32, 8, 128, None),
    "d256": (16, 4, 256, None),
}


def cases(smoke: bool) -> list[Case]:
    rows = SMALL if smoke else ROWS
    return [
        Case(f"{row}-{name}", 1, sum(lengths), *heads, lengths)
        for name, heads in HEADS.items()
        for row, lengths in rows.items()
    ]


class Model:
    """What a model hands to the attention function for one packed row.

    gpt-oss (D 64) tells its positions to the layers alone, a Llama (D 128, 256) to the mask function too.
    """

    def __init__(self, case: Case):
        from transformers import GptOssConfig, LlamaConfig, masking_utils

        is_gpt_oss = case.head_dim == 64
        self.config = (GptOssConfig if is_gpt_oss else LlamaConfig)(sliding_window=case.window)
        self.config._attn_implementation = "triton_attention_sink"
        self.make = masking_utils.create_sliding_window_causal_mask if case.window else masking_utils.create_causal_mask
        self.embeddings = torch.empty(1, case.seqlen, 1, dtype=torch.bfloat16, device=DEVICE)
        self.positions = torch.cat([torch.arange(n) for n in case.lengths])[None].to(DEVICE)
        self.tells_mask = not is_gpt_oss
        self.module = SimpleNamespace(is_causal=True, training=True)
        self.options = {"scaling": case.head_dim**-0.5, "sliding_window": case.window}

    def mask(self, positions):
        told = {"position_ids": positions} if self.tells_mask else {}
        return self.make(
            config=self.config, inputs_embeds=self.embeddings, attention_mask=None, past_key_values=None, **told
        )

    def layer(self, q, k, v, sinks, mask, positions):
        """q, k, v (1, S, H, D) -> (1, S, H, D)."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return attention_forward(self.module, q, k, v, mask, s_aux=sinks, position_ids=positions, **self.options)[0]


def ways(case: Case, model: Model) -> dict[str, Callable]:
    """Name -> function of q, k, v, sinks."""
    cu = torch.tensor([0, *case.lengths]).cumsum(0).to(DEVICE, torch.int32)
    window = (-1, -1) if case.window is None else (case.window - 1, 0)

    def direct(q, k, v, sinks):
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        return attention_sink(q, k, v, sinks, cu_seqlens_q=cu, cu_seqlens_k=cu, window_size=window).unsqueeze(0)

    mask = model.mask(model.positions)
    return {
        YARDSTICK: direct,
        LAYER: lambda *x: model.layer(*x, mask, model.positions),
        ALONE: lambda *x: model.layer(*x, None, model.positions),
    }


def measure(case: Case, turns: int, layers: int) -> tuple[list[dict], dict]:
    """Rows of the three ways and directions, and the row of a model's forward."""
    tensors, model = make_tensors(case, device=DEVICE), Model(case)
    want = oracles(case, tensors)
    leaves = [tensors[name].requires_grad_() for name in ("q", "k", "v", "sinks")]
    functions = ways(case, model)
    timed: list[tuple[dict, Callable, list[list[float]]]] = []
    for name, function in functions.items():
        function(*leaves)  # of LAYER the one before
        calls = directions(function, leaves, tensors["dout"])
        found = dict(
            zip(("out", "dq", "dk", "dv", "dsink"), (calls["forward"]().detach(), *calls["backward"]()), strict=True)
        )
        row = {"case": case.name, "way": name, "errors": errors(found, want)}
        for direction, call in calls.items():
            timed.append(({**row, "direction": direction, "kernels": kernels(call)}, call, []))
    del want, found
    for turn in range(turns):
        for _, call, samples in timed[:: -1 if turn % 2 else 1]:
            samples.append(milliseconds(call))
    yardstick = {row["direction"]: samples for row, _, samples in timed if row["way"] == YARDSTICK}
    rows = []
    for row, call, samples in timed:
        ratios = [median(a) / median(b) for a, b in zip(samples, yardstick[row["direction"]], strict=True)]
        row |= spread([ms for turn in samples for ms in turn]) | {"host_us": host(call)}
        rows.append(row | {"ratio": median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)})
    return rows, {"case": case.name} | whole(model, functions[YARDSTICK], [x.detach() for x in leaves], layers)


def directions(function: Callable, leaves, dout) -> dict[str, Callable]:
    out = function(*leaves)
    return {
        "forward": lambda: function(*leaves),
        "backward": lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True),
    }


def whole(model: Model, direct: Callable, leaves, layers: int) -> dict:
    """Milliseconds of a model's forward, the mask function and every layer, and of as many direct calls."""

    def route():
        positions = model.positions.clone()  # a forward has its own
        mask = model.mask(positions)
        for _ in range(layers):
            model.layer(*leaves, mask, positions)

    def yardstick():
        for _ in range(layers):
            direct(*leaves)

    found = {}
    for name, function in (("route", route), ("direct", yardstick)):
        samples = []
        for _ in range(12 if DEVICE == "cuda" else 2):
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            samples.append((time.perf_counter() - start) * 1e3)
        found[name] = spread(samples[1:])
    return found | {"layers": layers, "ratio": found["route"]["ms"] / found["direct"]["ms"]}


def milliseconds(function: Callable) -> list[float]:
    if DEVICE == "cuda":
        return device_ms(function)
    start = time.perf_counter()
    function()
    return [(time.perf_counter() - start) * 1e3]


def host(function: Callable) -> float | None:
    return host_us(function) if DEVICE == "cuda" else None


def kernels(function: Callable) -> list[str]:
    """Names of the Triton kernels that a call launches."""
    if DEVICE != "cuda":
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        synchronize()
    return sorted({event.key for event in profile.key_averages() if event.key.startswith("_")})


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def table(rows: list[dict]) -> str:
    """The worst ratio last."""
    lines = [f"{'case':<20} {'direction':<9} {'way':<6} {'ms':>8} {'direct':>8} {'ratio':>6}  {'turns':<13} host us"]
    direct = {(row["case"], row["direction"]): row for row in rows if row["way"] == YARDSTICK}
    for row in sorted((row for row in rows if row["way"] != YARDSTICK), key=lambda row: row["ratio"]):
        other = direct[row["case"], row["direction"]]
        turns = f"{row['ratio_min']:.3f}-{row['ratio_max']:.3f}"
        hosts = f"{row['host_us']:.0f} / {other['host_us']:.0f}" if row["host_us"] else ""
        lines.append(
            f"{row['case']:<20} {row['direction']:<9} {row['way']:<6} {row['ms']:8.3f} {other['ms']:8.3f} "
            f"{row['ratio']:6.3f}  {turns:<13} {hosts}{'' if row['kernels'] == other['kernels'] else '  other kernels'}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for hf_route.json")
    parser.add_argument("--cases", default="", help="comma-separated parts of case names; all if empty")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--budget", type=float, default=420, help="seconds after which no new case is started")
    parser.add_argument("--smoke", action="store_true", help="short rows, two turns")
    arguments = parser.parse_args()
    begun, turns = time.monotonic(), 2 if arguments.smoke else arguments.turns
    data = {"environment": environment(), "target": TARGET, "rows": [], "forward of a model": [], "problems": []}
    for case in cases(arguments.smoke):
        if arguments.cases and not any(part in case.name for part in arguments.cases.split(",")):
            continue
        if time.monotonic() - begun > arguments.budget:
            data["problems"].append(f"{case.name}: not measured, the budget of {arguments.budget} s is spent")
            continue
        rows, forward = measure(case, turns, 2 if arguments.smoke else arguments.layers)
        data["rows"] += rows
        data["forward of a model"].append(forward)
        for row in rows:
            bad = {name: error for name, error in row["errors"].items() if not error <= LIMIT[name]}
            if bad and row["direction"] == "forward":
                data["problems"].append(f"{case.name}, {row['way']}: wrong, relative error {bad}")
        worst = max((error, row["way"], name) for row in rows for name, error in row["errors"].items())
        print(f"[{time.monotonic() - begun:5.0f} s] {case.name}: largest error {worst}", flush=True)
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "hf_route.json").write_text(json.dumps(data, indent=1) + "\n")
        gc.collect()
    for row in data["forward of a model"]:
        times = f"{row['route']['ms']:.2f} ms, direct {row['direct']['ms']:.2f}, ratio {row['ratio']:.3f}"
        print(f"{row['case']:<20} mask and {row['layers']} layers {times}")
    print("\n".join([table(data["rows"]), *data["problems"]]))
    within = [row["ratio"] <= TARGET for row in data["rows"] if row["way"] == LAYER]
    print(f"layer: {sum(within)} of {len(within)} within {TARGET}")
    return 1 if any("wrong" in problem for problem in data["problems"]) else 0


if __name__ == "__main__":
    sys.exit(main())
