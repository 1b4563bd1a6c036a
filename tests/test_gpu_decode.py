"""The decode kernels on a GPU: exactness at the shapes of real models, pages, graphs, sizes past 2^31, appending."""

import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from budget import assert_within_budget
from cases import Case, call, make_inputs

from triton_attention_sink_hf import attention_sink, explain, flash_attn_with_kvcache

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty")]

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPT_OSS = {"heads": (64, 8), "head_dim": 64}
CASES = {
    "gpt-oss": Case(1, 8192, batch=2, **GPT_OSS),
    "gpt-oss window": Case(1, 8192, batch=4, window=(127, 0), **GPT_OSS),
    "gpt-oss lengths": Case(1, 3000, batch=5, used=(3000, 0, 1, 1027, 64), **GPT_OSS),
    "gpt-oss 8 queries": Case(8, 5000, batch=2, **GPT_OSS),
    "gpt-oss 16 queries, window": Case(16, 3000, batch=2, window=(127, 0), **GPT_OSS),
    "gpt-oss left padding": Case(1, 1999, batch=3, padding="left", layout="bhsd", **GPT_OSS),
    "llama": Case(1, 20000, heads=(32, 8), head_dim=128, sinks=None),
    "llama 4 queries": Case(4, 2000, batch=2, heads=(32, 8), head_dim=128, layout="bhsd"),
    "mimo": Case(1, 4000, batch=2, heads=(64, 4), head_dim=(192, 128), window=(128, 0)),
    "gemma": Case(2, 3000, heads=(16, 4), head_dim=256, softcap=30.0),
    "deepseek v4": Case(1, 3000, batch=2, heads=(64, 1), head_dim=512, used=(3000, 700)),
    "d320 dv500": Case(3, 700, heads=(6, 2), head_dim=(320, 500), softcap=9.0),
    "group of 7": Case(3, 1500, heads=(14, 2), head_dim=64),
    "group of 48": Case(2, 1500, heads=(48, 1), head_dim=128),
    "odd": Case(5, 777, batch=2, heads=(15, 3), head_dim=(40, 80), padding="holes", layout="sliced"),
}


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_exactness(name, dtype):
    case = replace(CASES[name], dtype=dtype)
    inputs = make_inputs(case, "cuda")
    found = [call(case, inputs, inputs.q, inputs.k, inputs.v, inputs.sinks, "triton_decode") for _ in range(2)]
    assert_within_budget(case, inputs, dict(zip(("out", "lse"), found[0], strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_auto_takes_it_for_few_queries_on_a_cache():
    for case in CASES.values():
        inputs = make_inputs(replace(case, dtype=BF16, seqlen_k=700, used=None, padding=None), "cuda")
        options = dict(causal=case.causal, window_size=case.window, softcap=case.softcap)
        assert explain(inputs.q, inputs.k, inputs.v, inputs.sinks, **options).implementation == "triton_decode"


def paged(inputs, page_size: int):
    """(k pages, v pages, block_table), the pages in any order."""
    batch, seqlen = inputs.k.shape[:2]
    n = seqlen // page_size
    table = torch.randperm(batch * n, device="cuda").view(batch, n).to(torch.int32)
    pages = []
    for x in (inputs.k, inputs.v):
        stored = torch.full((batch * n, page_size, *x.shape[2:]), float("nan"), dtype=x.dtype, device="cuda")
        stored[table.long()] = x[:, : n * page_size].unflatten(1, (n, page_size))
        pages.append(stored)
    return *pages, table


@pytest.mark.parametrize("page_size", [1, 16, 48, 256])
@pytest.mark.parametrize("window", [(-1, 0), (127, 0)])
def test_pages(page_size, window):
    case = Case(2, 2304, batch=3, used=(2304, 1000, 3), window=window, dtype=BF16, **GPT_OSS)
    inputs = make_inputs(case, "cuda")
    k, v, table = paged(inputs, page_size)
    out, lse = attention_sink(
        inputs.q, k, v, inputs.sinks, window_size=window, seqused_k=inputs.mask.seqused_k, block_table=table,
        return_lse=True,
    )  # fmt: skip
    assert_within_budget(case, inputs, {"out": out, "lse": lse})


def _step(q, k_cache, v_cache, k, v, lengths, leftpad, table, sinks):
    return flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths, cache_leftpad=leftpad, block_table=table, causal=True,
        s_aux=sinks,
    )  # fmt: skip


@pytest.mark.parametrize("pages", [False, True], ids=["rows", "pages"])
def test_a_step_in_a_cuda_graph_follows_its_lengths(pages):
    """Captured once with short rows; replayed with other lengths, pages and tokens. It never waits for the device."""
    case = Case(1, 4096, batch=4, dtype=BF16, **GPT_OSS)
    inputs = make_inputs(case, "cuda")
    k_cache, v_cache, table = paged(inputs, 256) if pages else (inputs.k.clone(), inputs.v.clone(), None)
    lengths, leftpad = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ((5, 9, 1, 30), (0, 3, 1, 0)))
    new = [torch.randn(4, 1, 8, 64, dtype=BF16, device="cuda") for _ in range(2)]
    arguments = (inputs.q, k_cache, v_cache, *new, lengths, leftpad, table, inputs.sinks)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _step(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(*arguments)
    for seed, values in enumerate(((4095, 100, 1, 2000), (17, 3000, 4095, 129))):
        other = make_inputs(case, "cuda", seed + 1)
        inputs.q.copy_(other.q)
        lengths.copy_(torch.tensor(values))
        if table is not None:
            table.copy_(table.flip(1))
        graph.replay()
        out = captured.clone()
        assert torch.equal(out, _step(*arguments))  # appends the same keys to the same slots
        keys, values = ((x if table is None else x[table.long()].flatten(1, 2)).double() for x in (k_cache, v_cache))
        want = attention_sink(
            inputs.q.double(), keys, values, inputs.sinks.double(), seqused_k=lengths + 1, leftpad_k=leftpad,
            implementation="reference",
        )  # fmt: skip
        assert (out.double() - want).norm() < 5e-3 * want.norm()


@pytest.mark.parametrize("page_size", [None, 16])
def test_new_keys_that_do_not_fit_fail_an_assertion(page_size):
    """In a process of its own, whose device is lost by it."""
    table = "None" if page_size is None else "torch.zeros(1, 4, dtype=torch.int32, device='cuda')"
    code = f"""
        import torch
        from triton_attention_sink_hf import flash_attn_with_kvcache
        q, new = (torch.randn(1, 1, 2, 64, device="cuda") for _ in range(2))
        cache = torch.zeros({1 if page_size is None else 5}, {page_size or 64}, 2, 64, device="cuda")
        lengths = torch.tensor([63], dtype=torch.int32, device="cuda")
        for n in range(2):
            flash_attn_with_kvcache(q, cache, cache.clone(), new, new, cache_seqlens=lengths + n, block_table={table})
            torch.cuda.synchronize()
            print("step", n)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.stdout.split("\n")[:-1] == ["step 0"], done.stdout + done.stderr
    assert "new keys must fit the cache" in done.stderr or "assert" in done.stderr


@pytest.mark.xdist_group("40 GB")
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "pages"])
def test_a_cache_of_more_than_2_31_elements(layout):
    """The last keys of a cache of 2.2e9 elements, and pages behind the 2^31st, against the same keys alone."""
    S, heads_k, d, window = 4_300_800, 8, 64, 1024
    shape = (1, heads_k, S, d) if layout == "bhsd" else (1, S, heads_k, d)
    k, v = (torch.randn(shape, dtype=BF16, device="cuda") for _ in range(2))
    if layout == "bhsd":
        k, v = k.transpose(1, 2), v.transpose(1, 2)
    assert k.numel() > 2**31
    q, sinks = torch.randn(1, 2, 64, d, dtype=BF16, device="cuda"), torch.linspace(-3, 5, 64, device="cuda")
    last = [x[:, S - window - 1 :] for x in (k, v)]
    table = None
    if layout == "pages":
        table = torch.arange(S // 256, dtype=torch.int32, device="cuda")[None]
        k, v = k.view(-1, 256, heads_k, d), v.view(-1, 256, heads_k, d)
    out = attention_sink(
        q, k, v, sinks, window_size=(window - 1, 0), block_table=table, implementation="triton_decode"
    )  # fmt: skip
    want = attention_sink(q.double(), *(x.double() for x in last), sinks.double(), window_size=(window - 1, 0))
    assert (out.double() - want).norm() < 5e-3 * want.norm()
