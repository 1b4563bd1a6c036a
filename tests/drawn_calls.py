"""Random calls of ``attention_sink`` over all its arguments: one place where they are drawn, for every fuzzer.

A ``Structure`` is what kernels are compiled for: head dimensions, heads, dtype, kind of mask, layout, which lengths are
multiples of 16, which gradients. ``values`` adds lengths, windows, sinks and data: a ``Drawn``. Both take a
``random.Random``: a seeded one for the script that runs on a GPU, hypothesis's for the tests, which shrinks what fails.
A ``Drawn`` prints itself as an expression, so a failure is one line that anyone can paste.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from random import Random

import torch
from budget import assert_within_budget
from cases import Case, Inputs, make_inputs
from torch import Tensor

from triton_attention_sink_hf import attention_sink, explain

__all__ = ["Case", "Drawn", "inf", "reproduce", "torch"]

GPU = torch.cuda.is_available()
NAMES = ("dq", "dk", "dv", "dsink")
ELEMENTS = 2**26  # scores of one call, over all heads
USUAL = (
    *((64, 64),) * 6, *((128, 128),) * 6, *((256, 256),) * 3, *((192, 128),) * 2, *((96, 96),) * 2, *((80, 80),) * 2,
    (16, 16), (32, 32), (40, 40), (48, 48), (72, 72), (112, 112), (160, 160), (192, 192), (224, 224), (40, 128),
    (64, 128), (128, 64), (256, 64), (256, 128), (24, 64), (512, 512), (320, 512),
)  # fmt: skip
SMALL = ((16, 16), (24, 40), (64, 64), (1, 33), (8, 15), (32, 4), (33, 1))
# on a CPU auto would take the reference
ON_GPU = ("auto",) * 4 + ("triton", "triton", "triton_hopper", "triton_window", "triton_decode")
INTERPRETED = ("triton", "triton", "triton_decode")


@dataclass(frozen=True)
class Drawn:
    """A call. ``case`` has what a ``Case`` can hold.

    Attributes:
        sinks: logits by head, None = those of ``case``.
        leftpad: hidden slots of each batch row. page_size: the cache is in pages of so many slots.
        loss: what the gradient comes from: "out", "lse" or "both".
        leaves: which of dq, dk, dv, dsink are asked for; none of them = a forward under ``torch.no_grad``.
        deterministic, implementation: as ``attention_sink`` takes them.
        seed: of the tensors' values.
    """

    case: Case
    sinks: tuple[float, ...] | None = None
    leftpad: tuple[int, ...] | None = None
    page_size: int | None = None
    loss: str = "out"
    leaves: tuple[str, ...] = NAMES
    deterministic: bool | None = None
    implementation: str = "triton"
    seed: int = 0

    @property
    def is_cache(self) -> bool:
        return self.page_size is not None or self.leftpad is not None


@dataclass(frozen=True)
class Structure:
    """``call`` has everything but lengths, windows, sinks and data; the other fields say of what kind those are."""

    call: Drawn
    packed: str | None  # "alike", "T + 1" (entries as many as tokens), "cross" (keys cut otherwise), None
    queries: str  # "one" and "few" (decoding), or "many"
    more_keys: bool
    used: bool
    leftpad: bool
    window: str | None  # "one", "short", "long", "both", "right", "huge", None
    sinks: str  # "spread", or "wild": infinities, the smallest float, 20 and others by head
    aligned: tuple[bool, bool, bool]  # numbers of queries, of keys and of a window are multiples of 16, or never


def structure(pick: Random, small: bool = False) -> Structure:
    """``small``: what Triton's interpreter runs in a fraction of a second. Else half suit Hopper's kernels."""
    plain = not small and pick.random() < 0.5
    d, dv = pick.choice(SMALL if small else USUAL)
    if not small and pick.random() < 0.25:
        step = pick.choice((1, 8))
        d, dv = (step * pick.randrange(1, 256 // step + 1) for _ in range(2))
        dv = pick.choice((d, dv))
    heads_k = pick.choice((1, 1, 2, 2) if small else (1, 1, 2, 2, 4, 8))
    group = pick.choice((1, 2, 3, 4, 6) if small else (1, 2, 3, 4, 4, 5, 7, 8, 8, 16))
    dtypes = (torch.bfloat16,) * 4 + (torch.float16,) * 2 + (torch.float32,) * 2
    if small:  # Triton's interpreter multiplies bf16 wrongly
        dtypes = (torch.float16, torch.float32)
    if plain:
        dtypes = (torch.bfloat16, torch.float16)
    causal = pick.random() < 0.75
    packed = pick.choice((None, None, None, None, "alike", "alike", "T + 1", "cross"))
    queries = "many" if packed or plain else pick.choice(("one", "few", "many", "many"))
    loss = pick.choice(("out", "out", "both", "both", "lse"))
    sinks = pick.choice(("learned", "learned", "learned", "frozen", None))
    leaves = [name for name in NAMES if name != "dsink" or sinks == "learned"]
    if pick.random() < 0.3:
        leaves = [name for name in leaves if pick.random() < 0.5] or [pick.choice(leaves)]
    if queries != "many" and pick.random() < 0.6:
        leaves = []
    cache = packed is None and not plain and pick.random() < 0.3
    pages = pick.choice((None, 1, 5, 16, 64, 100, 256)) if cache else None
    leftpad = cache and pick.random() < 0.5
    used = packed is None and not plain and (pages is not None or pick.random() < 0.2)
    padding = None if packed or pages or plain else pick.choice((None,) * 5 + ("left", "right", "holes"))
    ranges = None if cache or padding or plain else pick.choice((None,) * 5 + ("random",))
    case = Case(
        1, 1, heads=(heads_k * group, heads_k), head_dim=(d, dv), batch=1 if packed else pick.choice((1, 1, 2, 3)),
        dtype=pick.choice(dtypes), causal=causal, padding=padding, ranges=ranges,
        softmax_scale=pick.choice((None,) * 6 + ((0.2, 0.03) if plain else (0.2, 0.03, -0.2, 0.0))),
        softcap=0.0 if plain else pick.choice((0.0,) * 6 + (5.0, 30.0)), sinks=sinks,
        sink_dtype=pick.choice((torch.float32, torch.float32, torch.float16 if small else torch.bfloat16)),
        dlse=loss != "out", layout=pick.choice(("bshd", "bshd", "bhsd", "bhsd", "sliced", "expanded")),
    )  # fmt: skip
    windows = (None, None, "one", "short", "short", "long", "huge") + (() if causal else ("both", "both", "right"))
    names = ("auto", "auto", "triton_hopper", "triton_window") if plain else ON_GPU
    drawn = Drawn(
        case, page_size=pages, loss=loss, leaves=tuple(leaves), deterministic=pick.choice((None, None, True)),
        implementation=pick.choice(INTERPRETED if small or not GPU else names),
    )  # fmt: skip
    return Structure(
        drawn, packed, queries, more_keys=pick.random() < 0.3, used=used, leftpad=leftpad, window=pick.choice(windows),
        sinks=pick.choice(("spread", "spread", "wild")),
        aligned=tuple(pick.random() < 0.5 for _ in range(3)),
    )  # fmt: skip


def values(form: Structure, pick: Random, small: bool = False) -> Drawn:
    """A call of this structure. What has too many scores is drawn again."""
    while True:
        drawn = _values(form, pick, small)
        case = drawn.case
        if case.batch * case.seqlen_q * case.seqlen_k * case.heads[0] <= ELEMENTS:
            return drawn


def _values(form: Structure, pick: Random, small: bool) -> Drawn:
    longest = pick.choice((8, 30, 48) if small else (40, 150, 300, 700, 700, 2000))
    align_q, align_k, align_window = form.aligned

    def aligned(n: int, wanted: bool) -> int:
        """n, moved to what Triton specialises a kernel for, so that one structure is compiled once."""
        if wanted:
            return max(n // 16 * 16, 16)
        return n + 1 if n % 16 == 0 or n == 1 else n

    def length() -> int:
        near = pick.choice((16, 32, 64, 128, 192, 256, 512)) + pick.choice((-1, 0, 0, 1))  # where tiles end
        n = pick.choice((near, pick.randint(1, longest), round(longest ** pick.random())))
        return max(1, min(n, longest))

    case = form.call.case
    short = pick.randrange(20) if small else pick.choice((2, 15, 63, 64, 100, 112, 126, 127, 128))
    left, right = {
        None: (-1, -1), "one": (0, 0), "short": (aligned(short, align_window), 0),
        "long": (aligned(pick.randrange(129, 1000), align_window), 0),
        "both": (aligned(pick.randrange(300), align_window), aligned(pick.randrange(300), align_window)),
        "right": (-1, aligned(pick.randrange(200), align_window)),
        "huge": (pick.choice((2**31 - 2, 2**31 - 1, 2**31 - 100, 2**30, 2**31, 2**40)), pick.choice((0, 2**31 - 1))),
    }[form.window]  # fmt: skip
    if form.window in ("one", "short", "long") and not case.causal:
        right = pick.choice((0, -1, left))
    common = {"window": (left, right)}
    if form.packed is not None:
        segments = pick.choice((1, 2, 3, 5, 9))
        part = longest // segments + 1
        rows = [pick.choice((0, 1, length(), min(length(), part), min(length(), part))) for _ in range(segments)]
        other = [max(0, n + pick.choice((0, 0, -n, pick.randint(-n, n + 9)))) for n in rows]
        # rows past the last segment see nothing
        total = aligned(max(2, sum(rows) + pick.choice((0, 0, 0, 5))) + 15 * align_q, align_q)
        keys = aligned(max(2, sum(other) + pick.choice((0, 0, 7))) + 15 * align_k, align_k)
        if form.packed == "T + 1":
            rows += [0] * (total - segments)
        common |= {"lengths_q": tuple(rows), "seqlen_q": total}
        common |= {"lengths_k": tuple(other), "seqlen_k": keys} if form.packed == "cross" else {"seqlen_k": total}
    else:
        queries = {"one": 1, "few": pick.randint(2, 15), "many": aligned(length(), align_q)}[form.queries]
        keys = length() if form.queries == "many" and not form.more_keys else queries + length()
        keys = queries if form.queries == "many" and pick.random() < 0.7 and not form.more_keys else keys
        keys = aligned(keys, align_k)
        common |= {"seqlen_q": queries, "seqlen_k": keys}
        if form.used:
            common["used"] = tuple(pick.choice((0, keys, pick.randint(0, keys))) for _ in range(case.batch))
    case = replace(case, **common)
    leftpad = sinks = None
    if form.leftpad:
        leftpad = tuple(pick.randint(0, n) for n in case.used or (case.seqlen_k,) * case.batch)
    if form.sinks == "wild" and case.sinks is not None:
        least = torch.finfo(case.sink_dtype).min
        kinds = (-inf, least, -1e4, -30.0, -10.0, 0.0, 5.0, 20.0)
        sinks = tuple(pick.choice(kinds) for _ in range(case.heads[0]))
        if pick.random() < 0.05:
            sinks = (inf, *sinks[1:])
    return replace(form.call, case=case, leftpad=leftpad, sinks=sinks, seed=pick.randrange(2**20))


def inputs_of(drawn: Drawn, device: str = "cpu") -> Inputs:
    """The tensors of a call; its cache not yet in pages."""
    inputs = make_inputs(drawn.case, device, drawn.seed)
    if inputs.sinks is not None and drawn.sinks is not None:
        inputs = replace(inputs, sinks=torch.tensor(drawn.sinks, device=device).to(drawn.case.sink_dtype))
    if drawn.loss == "lse":
        inputs = replace(inputs, dout=torch.zeros_like(inputs.dout))
    if drawn.leftpad is not None:
        leftpad = torch.tensor(drawn.leftpad, dtype=torch.int32, device=device)
        inputs = replace(inputs, mask=replace(inputs.mask, leftpad_k=leftpad))
    return inputs


def arguments(drawn: Drawn, inputs: Inputs) -> dict:
    """Everything that ``attention_sink`` and ``explain`` take after q, k, v and sinks."""
    case, mask = drawn.case, inputs.mask
    ranges = mask.key_ranges.squeeze(0) if mask.packed and case.ranges else mask.key_ranges
    return {
        "causal": case.causal, "window_size": case.window, "softmax_scale": case.softmax_scale,
        "softcap": case.softcap, "cu_seqlens_q": mask.cu_seqlens_q, "cu_seqlens_k": mask.cu_seqlens_k,
        "key_padding_mask": mask.key_padding_mask, "seqused_k": mask.seqused_k, "leftpad_k": mask.leftpad_k,
        "key_ranges": ranges, "deterministic": drawn.deterministic,
    }  # fmt: skip


def run(drawn: Drawn, inputs: Inputs) -> tuple[str, dict[str, Tensor]]:
    """Name of the implementation; out, lse and the gradients of the call's leaves, always with a batch axis."""
    case, packed = drawn.case, inputs.mask.packed
    tensors = {"dq": inputs.q, "dk": inputs.k, "dv": inputs.v, "dsink": inputs.sinks}
    leaves = {n: x if x is None else x.detach().requires_grad_(n in drawn.leaves) for n, x in tensors.items()}
    with torch.set_grad_enabled(bool(drawn.leaves)):
        q, k, v = (x.squeeze(0) if packed else x for x in (leaves["dq"], leaves["dk"], leaves["dv"]))
        options = arguments(drawn, inputs)
        if drawn.page_size is not None:
            k, v, options["block_table"] = paged(k, v, drawn.page_size, case.used, drawn.seed)
        name = served_by(drawn, q, k, v, leaves["dsink"], options)
        out, lse = attention_sink(q, k, v, leaves["dsink"], **options, return_lse=True, implementation=name)
        if packed:
            out, lse = out.unsqueeze(0), lse.unsqueeze(0)
    results = {"out": out.detach(), "lse": lse.detach()}
    if drawn.leaves:
        used = [(out, inputs.dout)] * (drawn.loss != "lse") + [(lse, inputs.dlse)] * (drawn.loss != "out")
        gradients = torch.autograd.grad(
            [x for x, _ in used], [leaves[name] for name in drawn.leaves], [dx for _, dx in used]
        )
        results |= zip(drawn.leaves, gradients, strict=True)
    return name, results


def served_by(drawn: Drawn, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, options: dict) -> str:
    """The call's implementation if it supports the call, else what "auto" takes; on a CPU the portable kernels."""
    wanted = drawn.implementation
    if drawn.is_cache:
        if drawn.leaves or wanted == "triton":  # both get a copy without pages and padding
            return "triton"
        return "triton_decode"
    said = explain(q, k, v, sinks, **options)
    if said.reasons.get(wanted, "") is None:
        return wanted
    return said.implementation if q.is_cuda else "triton"


def paged(k: Tensor, v: Tensor, page_size: int, used: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(k pages, v pages, block_table) of caches (B, Sk, Hkv, D), differentiable, among unused pages of NaN.

    Entries for pages without a key in use name no page.
    """
    batch, seqlen = k.shape[:2]
    n = -(-seqlen // page_size)
    order = torch.randperm(2 * batch * n + 1, generator=torch.Generator().manual_seed(seed))
    table = order[: batch * n].view(batch, n).to(k.device)
    pages = []
    for x in (k, v):
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n * page_size - seqlen), value=float("nan"))
        stored = x.new_full((2 * batch * n + 1, page_size, *x.shape[2:]), float("nan"))
        pages.append(stored.index_put((table,), x.unflatten(1, (n, page_size))))
    first = torch.arange(n, device=k.device) * page_size
    unused = first >= torch.tensor(used, device=k.device)[:, None]
    return *pages, table.masked_fill(unused, 2**31 - 1).to(torch.int32)


def without_infinities(drawn: Drawn) -> Drawn:
    """The call with 20 in place of sinks of +inf, whose heads are NaN."""
    if drawn.sinks is None:
        return drawn
    return replace(drawn, sinks=tuple(20.0 if sink == inf else sink for sink in drawn.sinks))


def pasteable(drawn: Drawn) -> str:
    """A shell command for the repository's root that runs one call again."""
    return f'PYTHONPATH=.:tests python -c "from drawn_calls import *; reproduce({drawn!r})"'


def reproduce(drawn: Drawn, check: Callable = assert_within_budget) -> None:
    """Run one call, on the GPU if there is one, and hold it to the budget of random calls."""
    drawn = without_infinities(drawn)
    inputs = inputs_of(drawn, "cuda" if GPU else "cpu")
    name, results = run(drawn, inputs)
    print(name, "serves", drawn)
    check(drawn.case, inputs, results, tiny=True, rounded_delta=name == "triton_hopper")
