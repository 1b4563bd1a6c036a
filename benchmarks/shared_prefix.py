"""Attention of answers that share a prompt: as a tree, beside the packed row with a copy of the prompt for each answer.

``python shared_prefix.py --output h100-shared-prefix.json`` checks each case, then times forward and backward of both
forms in turns: prompts of 1k to 8k tokens, 8 and 16 answers of 512 and 1024, gpt-oss's heads (64 and 8, D 64), window
128 and full. bf16, one GPU, under 3 minutes. A case's check compares out and all four gradients of the tree with those
of the packed form, whose kernels the package's tests and ``bench`` compare with fp64.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from triton_attention_sink_hf import SharedPrefixes, attention_sink, shared_prefix_attention

HEADS_Q, HEADS_K, HEAD_DIM = 64, 8, 64
PROMPTS, ANSWERS, LENGTHS, WINDOWS = (1024, 2048, 4096, 8192), (8, 16), (512, 1024), (128, None)
# Norm of the difference over norm. Both forms round to bf16: the packed one each answer's part of a prompt's gradient,
# the tree both parts of its output.
LIMIT = {"out": 0.01, "dq": 0.015, "dk": 0.015, "dv": 0.015, "dsinks": 0.05}
TURNS = 3


@dataclass(frozen=True)
class Case:
    prompt: int
    answers: int
    length: int
    window: int | None
    heads: tuple[int, int] = (HEADS_Q, HEADS_K)
    head_dim: int = HEAD_DIM

    @property
    def name(self) -> str:
        window = "full" if self.window is None else f"window {self.window}"
        return f"prompt {self.prompt}, {self.answers} answers of {self.length}, {window}"

    @property
    def tree(self) -> SharedPrefixes:
        return SharedPrefixes((self.prompt, *(self.length,) * self.answers), (-1, *(0,) * self.answers))

    def path_rows(self) -> Tensor:
        """int64 (packed tokens,): the tree's row of each packed row."""
        prompt = torch.arange(self.prompt)
        starts = [self.prompt + i * self.length for i in range(self.answers)]
        return torch.cat([torch.cat([prompt, start + torch.arange(self.length)]) for start in starts])


class Form:
    """One of the two forms, with its inputs: ``forward`` and ``backward`` run once."""

    def __init__(self, attend: Callable, inputs: dict[str, Tensor]):
        self.attend, self.dout = attend, inputs["dout"]
        self.leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v", "sinks")]
        self.out: Tensor | None = None

    def forward(self) -> Tensor:
        return self.attend(*self.leaves)

    def backward(self) -> tuple[Tensor, ...]:
        if self.out is None:
            self.out = self.forward()
        return torch.autograd.grad(self.out, self.leaves, self.dout, retain_graph=True)


def make_forms(case: Case, device: str, dtype: torch.dtype) -> dict[str, Form]:
    generator = torch.Generator(device).manual_seed(0)
    tree, rows = case.tree, case.path_rows().to(device)

    def normal(heads: int) -> Tensor:
        return torch.randn(tree.total, heads, case.head_dim, device=device, generator=generator).to(dtype)

    inputs = {"q": normal(case.heads[0]), "k": normal(case.heads[1]), "v": normal(case.heads[1])}
    inputs |= {"sinks": torch.linspace(-3, 8, case.heads[0], device=device), "dout": normal(case.heads[0])}
    packed = {name: x if name == "sinks" else x[rows] for name, x in inputs.items()}
    # the prompt's own dout counts once
    copies = torch.arange(len(rows), device=device) % (case.prompt + case.length) < case.prompt
    copies[: case.prompt] = False
    packed["dout"][copies] = 0.0
    step = case.prompt + case.length
    cu = torch.arange(0, len(rows) + 1, step, device=device, dtype=torch.int32)
    window = (-1, -1) if case.window is None else (case.window - 1, 0)
    return {
        "tree": Form(lambda *x: shared_prefix_attention(*x, tree=tree, window_size=window), inputs),
        "packed": Form(lambda *x: attention_sink(*x, window_size=window, cu_seqlens_q=cu, cu_seqlens_k=cu), packed),
    }


def check(case: Case, forms: dict[str, Form]) -> dict[str, float]:
    """Relative difference of out and each gradient between the forms."""
    rows = case.path_rows().to(forms["tree"].dout.device)

    def relative(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    with torch.no_grad():
        found = {"out": relative(forms["tree"].forward()[rows], forms["packed"].forward())}
    gradients = {name: form.backward() for name, form in forms.items()}
    for name, a, b in zip(("dq", "dk", "dv", "dsinks"), gradients["tree"], gradients["packed"], strict=True):
        if name != "dsinks":
            b = torch.zeros(a.shape, device=a.device).index_add_(0, rows, b.float())
        found[name] = relative(a, b)
    return found


def measure(case: Case) -> list[dict]:
    """A row for each form and direction."""
    from triton_attention_sink_hf.bench.measure import device_ms, extra_memory, host_us, spread

    gc.collect()
    torch.cuda.empty_cache()
    forms = make_forms(case, "cuda", torch.bfloat16)
    errors = check(case, forms)
    bad = {name: error for name, error in errors.items() if not error <= LIMIT[name]}
    if bad:
        return [{"case": case.name, "problem": f"wrong: relative difference {bad}"}]
    timed = [(name, way, getattr(form, way), []) for name, form in forms.items() for way in ("forward", "backward")]
    for turn in range(TURNS):
        for *_, function, samples in timed[:: -1 if turn % 2 else 1]:
            samples += device_ms(function)
    return [
        {
            "case": case.name, "form": name, "direction": way, "tokens": forms[name].leaves[0].shape[0],
            "errors": errors, **spread(samples), "host_us": host_us(function, calls=10),
            "extra_bytes": extra_memory(function),
        }
        for name, way, function, samples in timed
    ]  # fmt: skip


def speedups(rows: list[dict]) -> list[dict]:
    """The packed form's time over the tree's, by case and direction, and of both directions."""
    times = {(row["case"], row["form"], row["direction"]): row["ms"] for row in rows if "ms" in row}
    found = []
    for case in dict.fromkeys(name for name, *_ in times):
        forms = {form: [times[case, form, way] for way in ("forward", "backward")] for form in ("tree", "packed")}
        forward, backward = (a / b for a, b in zip(forms["packed"], forms["tree"], strict=True))
        both = sum(forms["packed"]) / sum(forms["tree"])
        found.append({"case": case, "forward": forward, "backward": backward, "both": both})
    return found


def main() -> int:
    from triton_attention_sink_hf.bench.measure import environment

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    cases = [Case(*x) for x in product(PROMPTS, ANSWERS, LENGTHS, WINDOWS)]
    rows, began = [], time.perf_counter()
    for case in [case for case in cases if arguments.cases in case.name]:
        rows += measure(case)
        arguments.output.write_text(
            json.dumps({"environment": environment(), "rows": rows, "speedups": speedups(rows)}, indent=1)
        )
        last = speedups(rows[-4:])
        said = (
            f"x {last[0]['forward']:.2f} forward, {last[0]['backward']:.2f} backward" if last else rows[-1]["problem"]
        )
        print(f"{time.perf_counter() - began:4.0f} s  {case.name}: {said}", flush=True)
    return int(any("problem" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
