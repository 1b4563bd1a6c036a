"""The decode kernels, interpreted on a CPU in fp32 and fp16: few queries on a cache, against fp64.

The interpreter counts as a GPU with 4 SMs, so most calls here are split. Memory that nobody wrote is NaN, and a load or
a store outside the tensors fails.
"""

from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from cases import Case, call, make_inputs, run

from triton_attention_sink_hf import attention_sink, explain
from triton_attention_sink_hf.call import Call
from triton_attention_sink_hf.implementations import triton_decode
from triton_attention_sink_hf.implementations.common.problem import Problem
from triton_attention_sink_hf.implementations.triton_decode import config, forward
from triton_attention_sink_hf.masks import Mask
from triton_attention_sink_hf.ops import attention_forward

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "bounds_checked"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy on exp2 and log2 of -inf
]

FP16 = torch.float16
CASES = {
    "one query": Case(1, 260),
    "one key": Case(1, 1),
    "batch": Case(1, 150, batch=3, heads=(8, 2)),
    "no sinks": Case(1, 150, sinks=None),
    "4 queries": Case(4, 133, batch=2),
    "16 queries": Case(16, 200, heads=(4, 2)),
    "more queries than a tile": Case(40, 150, heads=(4, 1), head_dim=16),
    "more queries than keys": Case(9, 5),
    "bidirectional": Case(3, 150, causal=False),
    "window": Case(1, 260, window=(127, 0)),
    "window of one": Case(2, 150, window=(0, 0)),
    "window, 5 queries": Case(5, 200, batch=2, window=(63, 0)),
    "window both sides": Case(3, 200, causal=False, window=(100, 2)),
    "window right only": Case(5, 150, causal=False, window=(-1, 3)),
    "window larger than the cache": Case(2, 90, window=(1000, 0)),
    "lengths": Case(1, 200, batch=4, used=(200, 0, 1, 129)),
    "lengths, 3 queries": Case(3, 200, batch=4, used=(2, 0, 200, 65), window=(50, 0)),
    "left padding": Case(1, 150, batch=3, padding="left"),
    "right padding": Case(2, 150, batch=2, padding="right"),
    "holes and lengths": Case(2, 150, batch=2, padding="holes", used=(122, 150)),
    "softcap": Case(2, 150, softcap=3.0),
    "scale of 0": Case(2, 100, softmax_scale=0.0),
    "negative scale": Case(2, 100, softmax_scale=-0.3, window=(40, 0)),
    "values narrower": Case(2, 150, head_dim=(40, 24)),
    "values wider": Case(2, 150, head_dim=(16, 80)),
    "D 64": Case(1, 200, heads=(8, 1), head_dim=64),
    "D 80": Case(1, 150, heads=(8, 2), head_dim=80),
    "D 128": Case(1, 150, heads=(8, 2), head_dim=128),
    "D 192/128": Case(1, 200, heads=(8, 1), head_dim=(192, 128)),
    "D 256": Case(2, 200, heads=(2, 1), head_dim=256),
    "D 512": Case(2, 200, heads=(8, 1), head_dim=(512, 320)),
    "D 1": Case(1, 200, head_dim=1),
    "heads before tokens": Case(2, 150, batch=2, layout="bhsd"),
    "sliced": Case(2, 150, batch=2, layout="sliced"),
    "expanded": Case(2, 150, batch=2, layout="expanded"),
    "fp16": Case(1, 200, batch=2, heads=(8, 1), head_dim=64, dtype=FP16),
    "fp16 16 queries": Case(16, 150, heads=(8, 1), head_dim=64, dtype=FP16, window=(100, 0)),
    "fp16 lengths": Case(1, 150, batch=3, dtype=FP16, used=(0, 150, 20)),
    **{f"group of {n}": Case(2, 100, heads=(2 * n, 2), head_dim=16) for n in (1, 2, 3, 5)},
    **{f"group of {n}": Case(2, 100, heads=(n, 1), head_dim=16) for n in (7, 8, 12, 16)},
    "group of 80": Case(1, 40, heads=(80, 1), head_dim=16),
}  # fmt: skip


def forward_of(case: Case, inputs, implementation: str = "triton_decode") -> dict[str, torch.Tensor]:
    out, lse = call(case, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks, implementation)
    return {"out": out, "lse": lse}


@pytest.mark.parametrize("name", CASES)
def test_exactness(name):
    case = CASES[name]
    inputs = make_inputs(case)
    found = forward_of(case, inputs)
    assert_within_budget(case, inputs, found)
    again = forward_of(case, inputs)
    assert all(torch.equal(found[key], again[key]) for key in found)


@pytest.mark.parametrize("n_splits", [1, 2, 7, 64])
@pytest.mark.parametrize("name", ["batch", "lengths, 3 queries", "window", "no sinks", "fp16"])
def test_any_number_of_splits(name, n_splits, monkeypatch):
    """More splits than tiles, too: empty shares write no accumulator."""
    monkeypatch.setattr(forward, "splits", lambda problem, config: n_splits)
    inputs = make_inputs(CASES[name])
    assert_within_budget(CASES[name], inputs, forward_of(CASES[name], inputs))


@pytest.mark.parametrize("n_splits", [1, 3])
def test_sinks_far_below_and_far_above(n_splits, monkeypatch):
    monkeypatch.setattr(forward, "splits", lambda problem, config: n_splits)
    case = Case(2, 300, batch=2, heads=(8, 2), used=(300, 0))
    sinks = torch.tensor([float("-inf"), -1e30, torch.finfo(torch.float32).min, -1e9, 0.0, 300.0, 1e30, 5.0])
    inputs = replace(make_inputs(case), sinks=sinks)
    found = forward_of(case, inputs)
    assert bool(found["out"].isfinite().all())
    nothing = replace(case, sinks=None)
    without = forward_of(nothing, replace(inputs, sinks=None))
    for head in range(4):
        assert torch.equal(found["out"][:, :, head], without["out"][:, :, head])
    assert torch.equal(found["lse"][0, :4], without["lse"][0, :4])
    # the second row sees no key
    assert bool((found["out"][1] == 0.0).all()) and bool((without["lse"][1] == float("-inf")).all())
    assert torch.equal(found["lse"][1], sinks[:, None].expand(8, 2))
    assert bool((found["out"][:, :, 6] == 0.0).all()) and bool((found["lse"][:, 6] == 1e30).all())


def paged(k, v, page_size: int, seed: int = 0):
    """(k pages, v pages, block_table) of caches (B, Sk, Hkv, D), the pages in any order among unused ones of NaN."""
    batch, seqlen = k.shape[:2]
    n = -(-seqlen // page_size)
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(2 * batch * n + 1, generator=generator)[: batch * n].view(batch, n).to(torch.int32)
    pages = []
    for x in (k, v):
        x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, n * page_size - seqlen), value=float("nan"))
        stored = torch.full((2 * batch * n + 1, page_size, *x.shape[2:]), float("nan"), dtype=x.dtype)
        stored[table.long()] = x.unflatten(1, (n, page_size))
        pages.append(stored)
    return *pages, table


@pytest.mark.parametrize("page_size", [1, 5, 16, 64, 100, 256])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 150, batch=3, used=(150, 0, 77)),
        Case(5, 150, batch=2, used=(150, 3), window=(50, 0), heads=(2, 1)),
        Case(2, 130, batch=2, used=(130, 64), heads=(8, 1), head_dim=(64, 24), dtype=FP16, softcap=4.0),
    ],
    ids=["one query", "window", "fp16 softcap"],
)
def test_pages(case, page_size):
    inputs = make_inputs(case)
    k, v, table = paged(inputs.k, inputs.v, page_size)
    found = {}
    for implementation in ("triton_decode", "reference"):
        out, lse = attention_sink(
            inputs.q, k, v, inputs.sinks, window_size=case.window, softcap=case.softcap,
            seqused_k=inputs.mask.seqused_k, block_table=table, return_lse=True, implementation=implementation,
        )  # fmt: skip
        found[implementation] = {"out": out, "lse": lse}
        assert_within_budget(case, inputs, found[implementation])
    # entries behind the keys in use may hold anything
    used = -(-inputs.mask.seqused_k // page_size)
    wild = torch.where(torch.arange(table.shape[1]) < used[:, None], table, -7)
    for implementation, want in found.items():
        out = attention_sink(
            inputs.q, k, v, inputs.sinks, window_size=case.window, softcap=case.softcap,
            seqused_k=inputs.mask.seqused_k, block_table=wild, implementation=implementation,
        )  # fmt: skip
        assert torch.equal(out, want["out"])


def test_strided_block_table():
    case = Case(1, 96, batch=2)
    inputs = make_inputs(case)
    k, v, table = paged(inputs.k, inputs.v, 16)
    for strided in (table.t().contiguous().t(), torch.cat([table, table], 1)[:, :6]):
        out = attention_sink(inputs.q, k, v, inputs.sinks, block_table=strided, implementation="triton_decode")
        torch.testing.assert_close(out, forward_of(case, inputs)["out"])


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("window", [(-1, 0), (40, 0)])
def test_left_padding(page_size, window):
    """A row that starts late, against the row alone; slots before it may hold NaN."""
    case = Case(3, 200, batch=4, window=window)
    inputs = make_inputs(case)
    leftpad, used = torch.tensor([0, 70, 197, 200], dtype=torch.int32), torch.tensor([200, 150, 200, 200])
    k, v = inputs.k.clone(), inputs.v.clone()
    for b in range(4):
        for x in (k, v):
            x[b, : leftpad[b]] = x[b, used[b] :] = float("nan")
    table = None
    if page_size is not None:
        k, v, table = paged(k, v, page_size)
    for implementation in ("triton_decode", "triton", "reference"):
        out, lse = attention_sink(
            inputs.q, k, v, inputs.sinks, window_size=window, seqused_k=used.to(torch.int32), leftpad_k=leftpad,
            block_table=table, return_lse=True, implementation=implementation,
        )  # fmt: skip
        for b in range(4):
            alone = slice(int(leftpad[b]), int(used[b]))
            want, want_lse = attention_sink(
                inputs.q[b : b + 1].double(), inputs.k[b : b + 1, alone].double(), inputs.v[b : b + 1, alone].double(),
                inputs.sinks.double(), window_size=window, return_lse=True,
            )  # fmt: skip
            torch.testing.assert_close(out[b : b + 1].double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(lse[b : b + 1].double(), want_lse, rtol=1e-5, atol=1e-5)


def test_what_is_not_in_use_is_not_read():
    case = Case(1, 300, batch=2, used=(100, 201), window=(50, 0))
    inputs = make_inputs(case)
    want = forward_of(case, inputs)["out"]
    for b, (first, last) in enumerate(((49, 100), (150, 201))):
        for x in (inputs.k, inputs.v):
            x[b, :first] = x[b, last:] = float("nan")
    assert torch.equal(forward_of(case, inputs)["out"], want)


@pytest.mark.parametrize("used", [(-5, 400), (10**6, 3), (2**31 - 1, -(2**31))], ids=str)
@pytest.mark.parametrize("leftpad", [(-9, 17), (2**31 - 1, 200), (-(2**31), -1)], ids=str)
@pytest.mark.parametrize("page", [0, -1, 99, 2**31 - 1, -(2**31)])
def test_wrong_values_stay_inside_their_tensors(used, leftpad, page):
    """The operator below the checks, as on a GPU, where nobody has looked at the values; addresses are checked."""
    inputs = make_inputs(Case(2, 64, batch=2, heads=(2, 1), head_dim=16))
    for page_size in (16, 64):
        k, v = (x.reshape(-1, page_size, 1, 16) for x in (inputs.k, inputs.v))
        table = torch.full((2, 64 // page_size), page, dtype=torch.int32)
        lengths = [torch.tensor(x, dtype=torch.int32) for x in (used, leftpad)]
        masks = (*(None,) * 3, *lengths, table, None)
        out, _ = attention_forward(inputs.q, k, v, inputs.sinks, *masks, 31, 0, 0.25, 0.0, True, "triton_decode")
        assert not bool(out.isnan().any())


def test_gradients_are_the_portable_kernels():
    case = Case(3, 150, batch=2, heads=(8, 2), used=(150, 40), window=(100, 0), dlse=True)
    inputs = make_inputs(case)
    found = run(case, inputs, "triton_decode")
    assert_within_budget(case, inputs, found)


@pytest.mark.parametrize("implementation", ["auto", "triton_decode", "triton", "reference"])
def test_gradients_through_pages_and_left_padding(implementation):
    inputs = make_inputs(Case(2, 48, batch=2, heads=(4, 2), head_dim=16))
    k, v, table = paged(inputs.k, inputs.v, 16)
    leftpad, used = (torch.tensor(x, dtype=torch.int32) for x in ((0, 9), (48, 40)))
    leaves = [x.requires_grad_() for x in (inputs.q, k, v, inputs.sinks)]
    options = dict(seqused_k=used, leftpad_k=leftpad)
    out = attention_sink(*leaves, **options, block_table=table, implementation=implementation)
    found = torch.autograd.grad(out, leaves, inputs.dout)
    gathered = [inputs.q.detach(), inputs.k, inputs.v, inputs.sinks.detach()]
    gathered = [x.detach().double().requires_grad_() for x in gathered]
    want = torch.autograd.grad(attention_sink(*gathered, **options), gathered, inputs.dout.double())
    pages = torch.zeros_like(k), torch.zeros_like(v)
    for x, grad in zip(pages, want[1:3], strict=True):
        x[table.long()] = grad.float().unflatten(1, (3, 16))
    for a, b in zip(found, (want[0], *pages, want[3]), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=2e-4, atol=1e-5)


SAMPLES = {"plain": Case(1, 100, batch=2), "used": Case(2, 100, batch=2, used=(100, 3)), "pages": Case(2, 96, batch=2)}


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    case = SAMPLES[name]
    inputs = make_inputs(case)
    k, v, table = paged(inputs.k, inputs.v, 16) if name == "pages" else (inputs.k, inputs.v, None)
    torch.library.opcheck(
        attention_forward,
        (inputs.q, k, v, inputs.sinks, None, None, None, inputs.mask.seqused_k, None, table, None, -1, 0, 0.25, 0.0,
         True, "triton_decode"),
    )  # fmt: skip


@pytest.mark.parametrize("pages", [False, True])
def test_compiled(pages):
    case = Case(1, 96, batch=2, used=(96, 20))
    inputs = make_inputs(case)
    k, v, table = paged(inputs.k, inputs.v, 16) if pages else (inputs.k, inputs.v, None)

    def step(q, k, v, used):
        return attention_sink(q, k, v, inputs.sinks, seqused_k=used, block_table=table, implementation="triton_decode")

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for used in ((96, 20), (30, 50)):
        arguments = (inputs.q, k, v, torch.tensor(used, dtype=torch.int32))
        assert torch.equal(compiled(*arguments), step(*arguments))
    torch._dynamo.reset()


def _problem(batch, seqlen_q, seqlen_k, heads, head_dim, window=-1, **mask):
    q = torch.empty(batch, seqlen_q, heads[0], head_dim, dtype=torch.bfloat16, device="meta")
    k = torch.empty(batch, seqlen_k, heads[1], head_dim, dtype=torch.bfloat16, device="meta")
    return Problem(Call(q, k, k, None, Mask(window, 0, **mask), 1.0, 0.0, False))


@pytest.mark.parametrize("sms", [132, 108, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_splits_fill_the_card(head_dim, sms, monkeypatch):
    """By sizes alone: the tensors have no values. A split has work, and idle SMs are no more than need be."""
    monkeypatch.setattr(config, "multiprocessors", lambda device: sms)
    used = torch.empty(1, dtype=torch.int32, device="meta")
    for batch, keys in ((32, 8192), (4, 32768), (1, 131072), (1, 4096), (256, 1024), (1, 1), (7, 5000)):
        problem = _problem(batch, 1, keys, (64, 8), head_dim, seqused_k=used.expand(batch))
        numbers = config.decode_config(problem)
        n = config.splits(problem, numbers)
        tiles = -(-keys // numbers.block_n)
        assert 1 <= n <= tiles
        slots = sms * numbers.per_sm
        waves = -(-batch * 8 * n // slots)
        if batch * 8 * tiles > 8 * slots:
            ideal = batch * 8 * tiles / slots
            assert waves * -(-tiles // n) < 1.25 * ideal, (batch, keys, n)


def test_a_window_is_not_split_further_than_it_reaches(monkeypatch):
    monkeypatch.setattr(config, "multiprocessors", lambda device: 132)
    problem = _problem(32, 1, 8192, (64, 8), 64, window=127)
    assert config.splits(problem, config.decode_config(problem)) == 1
    problem = _problem(1, 1, 10**6, (8, 8), 64, window=4095)
    numbers = config.decode_config(problem)
    assert config.splits(problem, numbers) <= 4096 // numbers.block_n


def test_what_auto_holds_against_it():
    q, k = torch.empty(2, 17, 4, 16), torch.empty(2, 100, 2, 16)
    cu = torch.tensor([0, 17], dtype=torch.int32)
    table = torch.zeros(2, 3, dtype=torch.int32)
    assert "at most 16 queries" in triton_decode.slower_reason(Call(q, k, k, None, Mask(-1, 0), 1.0, 0.0, False))
    few = Call(q[:, :16], k, k, None, Mask(-1, 0), 1.0, 0.0, False)
    assert triton_decode.supports(few) is None and triton_decode.slower_reason(few) is None
    paged_call = Call(q, k, k, None, Mask(-1, 0), 1.0, 0.0, False, block_table=table)
    assert triton_decode.supports(paged_call) is None and triton_decode.slower_reason(paged_call) is None
    packed = Call(q[:1], k[:1], k[:1], None, Mask(-1, 0, cu, cu), 1.0, 0.0, False)
    assert "packed rows" in triton_decode.supports(packed)
    reasons = explain(q, k[:, :16], k[:, :16], block_table=table).reasons
    assert reasons["triton_decode"] is None
    assert "block_table" in reasons["triton"]
