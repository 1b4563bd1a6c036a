"""Random forwards of tiny Hugging Face models: logits and gradients are those of eager attention, sample by sample."""

from dataclasses import dataclass
from functools import partial
from random import Random

import pytest
import torch
from hf_models import CAUSAL, MODELS, VERSION, make_pair, transformers, weights
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

QUICK = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
LONG = settings(QUICK, max_examples=600, derandomize=False)
KNOWN = [name for name in CAUSAL if hasattr(transformers, MODELS[name][1])]
WITH_WINDOWS = [name for name in KNOWN if "sliding_window" in MODELS[name][2]]
# Their layers are not told the positions, and transformers tells the mask function only where there is no mask.
UNTOLD = ("ministral3", "persimmon", "gpt_bigcode")


@dataclass(frozen=True)
class Forward:
    """A model and what it is given.

    Attributes:
        rows: lengths of the samples of each row, in order.
        padding: tokens before and after the samples of each row that are not real.
        said: what tells the samples: "positions" (with a mask if there is padding), "numbers" (a mask of sample
            numbers too), "cu_seqlens"; None for rows of one sample.
        cache: None, "dynamic" or "static": the row goes in by ``chunks``, without gradients.
    """

    model: str
    window: int | None
    heads: tuple[int, int]
    rows: tuple[tuple[int, ...], ...]
    padding: tuple[tuple[int, int], ...]
    said: str | None = None
    cache: str | None = None
    chunks: tuple[int, ...] = ()
    compiled: bool = False
    seed: int = 0

    @property
    def width(self) -> int:
        return sum(self.rows[0]) + sum(self.padding[0])


def drawn_forward(pick: Random, compiled: bool = False) -> Forward:
    name = pick.choice(KNOWN)
    heads_k = pick.choice((1, 2, 4))
    heads = (heads_k * pick.choice((1, 2)), heads_k)  # most models want a divisor of 64
    window = pick.choice((1, 2, 5, 9, 64)) if name in WITH_WINDOWS else None
    kind = pick.choice(("packed", "packed", "padded", "padded", "cache", "plain"))
    n = pick.choice((1, 1, 2, 3))
    width = pick.randint(3, 24)
    cut = partial(_cut, pick)
    common = {"compiled": compiled and kind != "cache" and pick.random() < 0.3, "seed": pick.randrange(2**16)}
    common |= {"model": name, "window": window, "heads": heads}
    if kind == "packed":
        said = pick.choice(("positions", "positions", "numbers", "cu_seqlens"))
        n = 1 if said == "cu_seqlens" else n
        if name in UNTOLD and said == "numbers":
            said = "positions"
        padded = said == "numbers" or (said == "positions" and name not in UNTOLD and pick.random() < 0.4)
        padding = tuple(cut(pick.randint(0, width // 2), 2) if padded else (0, 0) for _ in range(n))
        rows = tuple(cut(width - sum(pad), None) for pad in padding)
        return Forward(**common, rows=rows, padding=padding, said=said)
    if kind == "padded":
        side = pick.choice(("left", "right"))
        lost = [pick.randint(0, width - 1) for _ in range(n)]
        padding = tuple((x, 0) if side == "left" else (0, x) for x in lost)
        return Forward(**common, rows=tuple((width - x,) for x in lost), padding=padding)
    rows, padding = ((width,),) * n, ((0, 0),) * n
    if kind == "cache":
        # transformers' own dynamic cache keeps every key where the window is 1, and its masks do not
        cache = "static" if window == 1 else pick.choice(("dynamic", "static"))
        return Forward(**common, rows=rows, padding=padding, cache=cache, chunks=cut(width, None))
    return Forward(**common, rows=rows, padding=padding)


@st.composite
def forwards(draw, compiled: bool = False):
    return drawn_forward(draw(st.randoms(use_true_random=False)), compiled)


def _cut(pick: Random, total: int, parts: int | None) -> tuple[int, ...]:
    """Lengths that add up to total: so many, perhaps 0; or any number of them, none of 0."""
    if parts is not None:
        first = pick.randint(0, total)
        return first, total - first
    lengths = []
    while total:
        lengths.append(pick.randint(1, min(total, pick.choice((2, 8, 24)))))
        total -= lengths[-1]
    return tuple(lengths)


def check(forward: Forward) -> None:
    overrides = {"num_attention_heads": forward.heads[0], "num_key_value_heads": forward.heads[1]}
    if forward.model in ("gpt_bigcode", "persimmon"):  # whose head dimension follows from them
        overrides = {}
    if forward.window is not None:
        overrides["sliding_window"] = forward.window
    eager, ours, tolerance = make_pair(forward.model, torch.float64, **overrides)
    generator = torch.Generator().manual_seed(forward.seed)
    x = torch.randint(2, 97, (len(forward.rows), forward.width), generator=generator)
    found = cached(forward, ours, x) if forward.cache else whole(forward, ours, x)
    same = partial(torch.testing.assert_close, rtol=100 * tolerance, atol=100 * tolerance)
    loss = 0.0
    for row, (lengths, (first, _)) in enumerate(zip(forward.rows, forward.padding, strict=True)):
        for n in lengths:
            expected = eager(x[row : row + 1, first : first + n]).logits[0]
            same(found[row, first : first + n], expected)
            loss = loss + (expected * weights(found)[row, first : first + n]).sum()
            first += n
    if forward.cache:
        return
    loss.backward()
    real = torch.zeros_like(x, dtype=torch.bool)
    for row, (lengths, (first, _)) in enumerate(zip(forward.rows, forward.padding, strict=True)):
        real[row, first : first + sum(lengths)] = True
    (found * weights(found))[real].sum().backward()
    gradients = dict(ours.named_parameters())
    wanted = {name: x.grad for name, x in eager.named_parameters() if x.grad is not None}
    largest = max(gradient.abs().max() for gradient in wanted.values())
    for name, gradient in wanted.items():
        scale = gradient.abs().max().clamp_min(0.01 * largest)  # eager's softmax in fp32 is noise in what cancels
        same(gradients[name].grad / scale, gradient / scale)


def whole(forward: Forward, model, x: torch.Tensor) -> torch.Tensor:
    """Logits of all rows in one forward."""
    positions, numbers = torch.zeros_like(x), torch.zeros_like(x)
    for row, (lengths, (first, _)) in enumerate(zip(forward.rows, forward.padding, strict=True)):
        for number, n in enumerate(lengths, 1):
            positions[row, first : first + n] = torch.arange(n)
            numbers[row, first : first + n] = number
            first += n
    told = {"position_ids": positions}
    if forward.said == "cu_seqlens":
        cu = torch.tensor([0, *forward.rows[0]]).cumsum(0).to(torch.int32)
        longest = max(forward.rows[0])
        told |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": longest, "max_length_k": longest}
    elif forward.said == "numbers":
        told["attention_mask"] = numbers
    elif any(sum(pad) for pad in forward.padding):
        told["attention_mask"] = (numbers > 0).long()
    if forward.compiled:
        torch._dynamo.reset()
        model = torch.compile(model, backend="eager")
    return model(x, use_cache=False, **told).logits


@torch.no_grad()
def cached(forward: Forward, model, x: torch.Tensor) -> torch.Tensor:
    """Logits of all rows, a chunk after the other."""
    if forward.cache == "static":
        cache = transformers.StaticCache(config=model.config, max_cache_len=forward.width + 3)
    else:
        cache = transformers.DynamicCache(config=model.config)
    start, found = 0, []
    for n in forward.chunks:
        positions = torch.arange(start, start + n)
        told = {"cache_position": positions} if VERSION < (5, 0) else {}
        chunk = x[:, start : start + n]
        found.append(model(chunk, past_key_values=cache, position_ids=positions[None], **told).logits)
        start += n
    return torch.cat(found, dim=1)


def reproduced(forward: Forward) -> None:
    note(f'PYTHONPATH=.:tests python -c "from test_fuzz_hf import *; check({forward!r})"')
    check(forward)


@QUICK
@given(forward=forwards())
def test_a_random_forward_is_eagers_sample_by_sample(forward):
    reproduced(forward)


@pytest.mark.exhaustive
@LONG
@given(forward=forwards(compiled=True))
def test_many_forwards_are_eagers_sample_by_sample(forward):
    reproduced(forward)
