"""The kernels on a GPU: exactness at the shapes of real models, sizes past 2^31, graphs, memory, synchronisation.

Over 400 lines: all that needs a GPU is one file, whose tests share compiled kernels and a card's memory.
"""

import gc
import random
import traceback
import warnings
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from budget import assert_within_budget
from cases import Case, Inputs, call, cu_seqlens, make_inputs, run
from launchers import backends

from triton_attention_sink_hf import Mask, attention_sink, explain
from triton_attention_sink_hf.call import N_TENSORS
from triton_attention_sink_hf.ops import attention_forward

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_empty", "memory_returned")]


@pytest.fixture
def memory_returned():
    """Give cached memory back after a test: its next user may be another process."""
    yield
    gc.collect()
    torch.cuda.empty_cache()


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# sums to 4090 of 4096 rows: the last six belong to no segment
RL_LENGTHS = (0, 1, 15, 16, 17, 127, 128, 129, 0, 1200, 63, 700, 64, 1503)
GPT_OSS = {"heads": (64, 8), "head_dim": 64}
CASES = {
    "gpt-oss window": Case(2048, window=(127, 0), **GPT_OSS),
    "gpt-oss full": Case(2048, **GPT_OSS),
    "gpt-oss packed window": Case(4096, lengths_q=RL_LENGTHS, window=(127, 0), layout="bhsd", **GPT_OSS),
    "gpt-oss packed full": Case(4096, lengths_q=RL_LENGTHS, dlse=True, **GPT_OSS),
    "gpt-oss packed aligned": Case(4096, lengths_q=(1024, 640, 2432), layout="bhsd", **GPT_OSS),
    "gpt-oss long": Case(3000, heads=(8, 1), head_dim=64),
    "gpt-oss left padding": Case(777, batch=3, padding="left", window=(127, 0), layout="bhsd", **GPT_OSS),
    "gpt-oss right padding": Case(515, batch=2, padding="right", **GPT_OSS),
    "gpt-oss decode": Case(1, 1999, batch=3, used=(1999, 1, 700), window=(127, 0), **GPT_OSS),
    "llama": Case(1024, batch=2, heads=(32, 8), head_dim=128, sinks=None, layout="bhsd"),
    "llama softcap": Case(700, 900, heads=(32, 8), head_dim=128, softcap=15.0, dlse=True),
    "mimo": Case(1500, heads=(64, 4), head_dim=(192, 128), window=(128, 0), dlse=True),
    "mimo full": Case(1024, heads=(64, 4), head_dim=(192, 128)),
    "privacy filter": Case(1500, batch=2, heads=(14, 2), head_dim=64, causal=False, window=(128, 128)),
    "d256": Case(900, heads=(16, 4), head_dim=256, window=(500, 0)),
    "deepseek v4": Case(700, heads=(64, 1), head_dim=512, window=(127, 0), layout="bhsd"),
    "d512": Case(500, batch=2, heads=(4, 2), head_dim=512, dlse=True),
    "d320": Case(450, 600, heads=(4, 1), head_dim=320, padding="left", softcap=9.0, dlse=True),
    "d512 dv64 packed": Case(600, lengths_q=(1, 399, 0, 190), heads=(4, 2), head_dim=(512, 64), dlse=True),
    "d96 dv320 packed": Case(600, lengths_q=(1, 399, 0, 190), heads=(4, 4), head_dim=(96, 320), causal=False),
    "d96": Case(700, heads=(12, 4), head_dim=96, dlse=True, layout="bhsd"),
    "d40 dv128": Case(450, 600, batch=2, heads=(6, 2), head_dim=(40, 128), dlse=True),
    "more queries than keys": Case(700, 300, heads=(8, 2), head_dim=64, dlse=True),
    "bidirectional packed": Case(1000, lengths_q=(100, 0, 700, 150), heads=(6, 6), head_dim=128, causal=False),
    # no tile needs a mask at its right edge, so the kernels' first loops are skipped
    "bidirectional aligned": Case(768, heads=(8, 2), head_dim=64, causal=False),
    "bidirectional aligned d128": Case(768, heads=(8, 2), head_dim=128, causal=False, window=(300, -1)),
    "bidirectional packed aligned": Case(1152, lengths_q=(384, 768), heads=(8, 2), head_dim=64, causal=False),
    "cross packed": Case(800, 1100, lengths_q=(300, 450, 50), lengths_k=(900, 20, 180), heads=(8, 4), head_dim=64),
    "wide window packed": Case(
        3000, lengths_q=(2000, 800, 1, 199), window=(600, 0), heads=(16, 2), head_dim=64, dlse=True
    ),
    "no keys": Case(200, lengths_q=(100, 100), lengths_k=(0, 100), seqlen_k=100, heads=(8, 2), head_dim=64),
    "odd": Case(333, 200, batch=2, heads=(21, 3), head_dim=(40, 80), padding="holes", dlse=True, layout="sliced"),
    "negative scale": Case(300, heads=(8, 1), head_dim=96, softmax_scale=-0.2, causal=False),
}
# fp16 differs from bf16 in the operands' type alone, so a few cases suffice
FP16_CASES = ("gpt-oss window", "gpt-oss packed full", "llama", "mimo", "odd", "d512")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in CASES for dtype in (BF16, FP32)] + [(name, FP16) for name in FP16_CASES],
    ids=lambda x: str(x).removeprefix("torch."),
)
def test_exactness(name, dtype):
    case = Case(**{**CASES[name].__dict__, "dtype": dtype})
    inputs = make_inputs(case, "cuda")
    for implementation in implementations(case):
        results = run(case, inputs, implementation)
        assert_within_budget(case, inputs, results, rounded_delta=implementation == "triton_hopper")
        again = run(case, inputs, implementation)
        for key, value in results.items():
            _assert_repeated(value, again[key], implementation, key)


@pytest.mark.parametrize("head_dim", [64, 128, 256, (192, 128)])
@pytest.mark.parametrize("mask", ["causal", "window", "bidirectional", "more keys", "packed", "packed window"])
def test_random_lengths(mask, head_dim):
    """Tiles that end anywhere. A warpgroup's share of one may be empty or wholly hidden."""
    pick = random.Random(f"{mask} {head_dim}")
    for seed in range(10):
        lengths = tuple(
            pick.choice((pick.randrange(1, 70), pick.randrange(1, 400))) for _ in range(pick.randrange(1, 6))
        )
        total = sum(lengths)
        features = {
            "causal": {},
            "window": {"window": (pick.randrange(129, 400), 0)},
            "bidirectional": {"causal": False},
            "more keys": {"seqlen_k": total + pick.randrange(1, 300)},
            "packed": {"lengths_q": lengths},
            "packed window": {"lengths_q": lengths, "window": (pick.randrange(129, 400), 0)},
        }[mask]
        case = Case(total, heads=(4, 2), head_dim=head_dim, dtype=BF16, **features)
        inputs = make_inputs(case, "cuda", seed)
        for implementation in implementations(case):
            results = run(case, inputs, implementation)
            assert_within_budget(case, inputs, results, rounded_delta=implementation == "triton_hopper")


@pytest.mark.parametrize("head_dim", [64, 96, 128, (192, 128), 256])
@pytest.mark.parametrize("mask", ["causal", "bidirectional", "window"])
def test_packed_rows_of_as_many_entries_as_tokens(mask, head_dim):
    """What a Hugging Face row hands over: T + 1 entries, most of them empty segments. Short segments share tiles."""
    pick = random.Random(f"{mask} {head_dim}")
    features = {"causal": {}, "bidirectional": {"causal": False}, "window": {"window": (300, 0)}}[mask]
    for seed, sizes in enumerate((((1, 41),), ((1, 41), (200, 1500)), ((1, 41), (1, 41), (1, 300), (200, 1500)))):
        lengths = []
        while sum(lengths) < 2500:
            lengths.append(pick.randrange(*pick.choice(sizes)))
        total = sum(lengths)
        case = Case(
            total, heads=(8, 2), head_dim=head_dim, dtype=BF16, dlse=seed == 1,
            lengths_q=(*lengths, *(0,) * (total - len(lengths))), **features,
        )  # fmt: skip
        inputs = make_inputs(case, "cuda", seed)
        few = cu_seqlens(tuple(lengths), "cuda")
        assert inputs.mask.cu_seqlens_q.numel() == total + 1
        same = replace(inputs, mask=replace(inputs.mask, cu_seqlens_q=few, cu_seqlens_k=few))
        answers = [
            explain(inputs.q[0], inputs.k[0], inputs.v[0], cu_seqlens_q=cu, cu_seqlens_k=cu)
            for cu in (few, inputs.mask.cu_seqlens_q)
        ]
        for answer in answers:
            answer.reasons.pop("flash_attention_4")  # whose workspace grows with the entries
        assert answers[0] == answers[1]
        if "triton_hopper" in implementations(case):
            assert answers[0].implementation == "triton_hopper"
        for implementation in implementations(case):
            results = run(case, inputs, implementation)
            assert_within_budget(case, inputs, results, rounded_delta=implementation == "triton_hopper")
            again = run(case, same, implementation)
            for key, value in results.items():
                if max(case.dims) > 128:
                    assert torch.equal(value, again[key]), (implementation, key)
                else:
                    _assert_repeated(value, again[key], implementation, key)


FAR_BELOW = (-1e9, -1e10, -1e30, torch.finfo(BF16).min, torch.finfo(FP32).min, float("-inf"), 0.0, 5.0)
SINK_CASES = {
    "window": Case(1100, head_dim=64, window=(127, 0)),
    "window packed": Case(1100, head_dim=64, window=(127, 0), lengths_q=(700, 5, 395)),
    "window dlse": Case(1100, head_dim=64, window=(127, 0), dlse=True),
    **{f"full {d}": Case(500, head_dim=d, dlse=True) for d in (64, 128, (192, 128), 256)},
    **{f"packed {d}": Case(500, head_dim=d, lengths_q=(3, 450, 20)) for d in (64, 128, (192, 128), 256)},
    **{f"more queries {d}": Case(500, 300, head_dim=d, dlse=True) for d in (64, 128, (192, 128), 256)},
}


@pytest.mark.parametrize("sink_dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", SINK_CASES)
def test_sinks_far_below(name, sink_dtype):
    """Very low sinks, as people write "off", act as none: their gradient is 0. Rows without a key have lse = sink."""
    case = replace(SINK_CASES[name], heads=(16, 2), dtype=BF16, sink_dtype=sink_dtype)
    inputs = make_inputs(case, "cuda")
    unseeing = ~inputs.mask.dense(case.seqlen_q, inputs.k.shape[1], inputs.k.device)[0].any(1)
    sinks = torch.tensor(FAR_BELOW * 2, device="cuda").to(sink_dtype)
    if bool(unseeing.any()):  # lse and sink of -inf: eager has no gradient there to compare with
        sinks = sinks.clamp(min=torch.finfo(sink_dtype).min)
    inputs = replace(inputs, sinks=sinks)
    for implementation in implementations(case):
        results = run(case, inputs, implementation)
        assert_within_budget(case, inputs, results, rounded_delta=implementation == "triton_hopper")
        below = sinks < -1e8
        for key in ("out", "dq", "dk", "dv", "dsink"):
            assert bool(results[key].isfinite().all()), (implementation, key)
        if not (case.dlse and unseeing.any()):
            assert bool((results["dsink"][below] == 0.0).all()), (implementation, results["dsink"])
        lse = results["lse"][0, :, unseeing]
        assert torch.equal(lse, sinks.float()[:, None].expand_as(lse)), implementation


@pytest.mark.parametrize("group", [4, 8, 16])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_window_backward_in_one_kernel(packed, group, monkeypatch):
    """Chunks, tiles and segments that end anywhere, and sizes for which two kernels are faster."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    from triton_attention_sink_hf.implementations.triton_hopper import backward_window

    launched = []
    launch = backward_window.launch_backward
    monkeypatch.setattr(backward_window, "launch_backward", lambda *a: (launched.append(1), launch(*a)))
    for name in ("MIN_LEFT", "MIN_TOKENS"):
        monkeypatch.setattr(backward_window, name, 0)
    pick = random.Random(f"{group} {packed}")
    for seed in range(12):
        length = 64 * pick.choice((1, 1, 2, 3, 7))
        monkeypatch.setattr(backward_window, "chunk_length", lambda *_, length=length: length)
        lengths = [pick.choice((pick.randrange(1, 70), pick.randrange(1, 400))) for _ in range(pick.randrange(1, 6))]
        total = max(sum(lengths), 64)
        case = Case(
            total, batch=1 if packed else pick.randrange(1, 4), heads=(2 * group, 2), dtype=pick.choice((BF16, FP16)),
            head_dim=pick.choice((64, 48, (40, 64))), window=(pick.choice((0, 1, 63, 64, 100, 127, 128)), 0),
            lengths_q=tuple(lengths) if packed else None, layout=pick.choice(("bshd", "bhsd")),
            sinks=pick.choice(("learned", "learned", None)),
        )  # fmt: skip
        inputs = make_inputs(case, "cuda", seed)
        results = run(case, inputs, "triton_window")
        assert_within_budget(case, inputs, results)
        again = run(case, inputs, "triton_window")
        assert all(torch.equal(value, again[key]) for key, value in results.items()), case
    assert len(launched) == 24


def implementations(case: Case) -> list[str]:
    """The kernels that must serve ``case`` on this card."""
    return backends(case, "sm{}{}".format(*torch.cuda.get_device_capability()))


@pytest.mark.xdist_group("40 GB")
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_more_than_2_31_elements(layout):
    """q, out, dout and dq of 2.2e9 elements; rows around the 2^31st element and at both ends against fp64."""
    S, W = 540_000, 128
    case = Case(S, window=(W - 1, 0), dtype=BF16, layout=layout, **GPT_OSS)

    def tensor(heads):
        shape = (1, S, heads, 64) if layout == "bshd" else (1, heads, S, 64)
        x = torch.randn(shape, dtype=BF16, device="cuda")
        return x if layout == "bshd" else x.transpose(1, 2)

    q, k, v, dout = tensor(64), tensor(8), tensor(8), tensor(64)
    assert q.numel() > 2**31
    sinks = torch.linspace(-10, 20, 64, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    out, lse = attention_sink(*leaves, window_size=case.window, return_lse=True, implementation="triton")
    dq, dk, dv, dsink = torch.autograd.grad(out, leaves, dout)
    assert bool(dsink.isfinite().all())
    middle = 2**31 // (64 * 64)  # the token at the 2^31st element of a (B, S, H, D) tensor
    for first, last in ((0, 100), (middle - 50, middle + 50), (S - 100, S)):
        # gradients of keys [first, last) need the queries up to last + W, and those the keys from first - W on
        start, stop = max(first - W, 0), min(last + W, S)
        piece, mask = slice(start, stop), Mask(W - 1, 0)
        small = Inputs(*(x.detach()[:, piece] for x in (q, k, v)), sinks.detach(), dout[:, piece], None, mask)
        rows = slice(first - start, last - start)
        _assert_rows(case, small, rows, [x.detach()[:, first:last] for x in (out, dq, dk, dv)], lse[..., first:last])


def _assert_rows(case: Case, small: Inputs, rows: slice, got, lse) -> None:
    """Some rows of a large call against the same call on the small piece around them, which is checked itself."""
    results = run(case, small)
    assert_within_budget(case, small, results)
    for name, value in zip(("out", "dq", "dk", "dv"), got, strict=True):
        exact = results[name][:, rows].float()
        # same kernel, other tile boundaries: one rounding of the dtype apart at most, in the norm
        difference = torch.linalg.vector_norm(value.float() - exact) / torch.linalg.vector_norm(exact)
        assert difference < 2**-8, f"{name} of rows {rows} is off by {difference}"
    torch.testing.assert_close(lse.detach(), results["lse"][..., rows], rtol=1e-5, atol=1e-5)


def test_long_context_in_hugging_face_layout_is_supported():
    q, k = (torch.empty(1, h, 262_144, 128, dtype=BF16, device="cuda").transpose(1, 2) for h in (8, 2))
    assert explain(q, k, k).reasons["triton"] is None


def _packed_inputs(dtype=BF16):
    case = Case(4096, lengths_q=RL_LENGTHS, window=(127, 0), dtype=dtype, **GPT_OSS)
    return case, make_inputs(case, "cuda")


@pytest.mark.parametrize("implementation", ["triton", "triton_window", "triton_hopper"])
def test_no_host_synchronisation(implementation):
    case, inputs = _packed_inputs()
    _skip_unless_served(case, implementation)
    expected = run(case, inputs, implementation)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(case, inputs, implementation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in results.items():
        _assert_repeated(value, expected[name], implementation, name)


@contextmanager
def synchronisations():
    """Collects the Python stack of everything inside that waits for the device, in a list."""
    stacks = []

    def seen(message, *_args, **_kwargs):
        if "synchronizing CUDA operation" in str(message):
            stacks.append(traceback.extract_stack())

    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield stacks
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module", params=["gpt_oss", "llama"])
def deep_model(request):
    """A tiny model of 24 layers, bf16."""
    transformers = pytest.importorskip("transformers")
    size = dict(
        vocab_size=97, hidden_size=128, intermediate_size=64, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, pad_token_id=0, attn_implementation="triton_attention_sink",
    )  # fmt: skip
    if request.param == "gpt_oss":
        config = transformers.GptOssConfig(num_local_experts=2, num_experts_per_tok=2, sliding_window=128, **size)
    else:
        config = transformers.LlamaConfig(**size)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=BF16).to("cuda").train()


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("row", ["unpacked", "one sample", "packed", "padded", "not padded"])
def test_layers_never_wait_for_the_device(deep_model, row, backward):
    """The mask function waits at most once per forward. Waits of transformers itself do not count."""
    S = 640

    def inputs():
        found = {"input_ids": torch.randint(3, 90, (2, S) if "padded" in row else (1, S), device="cuda")}
        if row in ("one sample", "packed"):
            lengths = (S,) if row == "one sample" else (200, 1, 300, 139)
            found["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None].to("cuda")
        if "padded" in row:
            found["attention_mask"] = torch.ones(2, S, dtype=torch.long, device="cuda")
            found["attention_mask"][0, : 100 if row == "padded" else 0] = 0
        return found

    def step(inputs):
        loss = deep_model(**inputs, use_cache=False).logits.float().square().mean()
        if backward:
            loss.backward()

    step(inputs())  # compiles
    batch = inputs()
    with synchronisations() as stacks:
        step(batch)
    package = str(Path(explain.__code__.co_filename).parent)
    ours = [stack for stack in stacks if any(frame.filename.startswith(package) for frame in stack)]
    in_mask = [stack for stack in ours if any(frame.name == "attention_mask" for frame in stack)]
    in_layers = [stack for stack in ours if stack not in in_mask]
    assert not in_layers, "".join(in_layers[0].format())
    assert len(in_mask) <= 1, "".join(in_mask[-1].format())


def test_what_waits_for_the_device_is_seen():
    """Tests the counting: in the forward, in a function of ours, and in the backward's thread."""

    class Waits(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dout):
            dout.sum().item()
            return dout * 2

    x = torch.ones(3, device="cuda", requires_grad=True)
    with synchronisations() as stacks:
        y = Waits.apply(x).sum()
        assert not stacks
        y.item()
        assert len(stacks) == 1
        y.backward()
    assert len(stacks) == 2 and any(frame.name == "backward" for frame in stacks[1])


@pytest.mark.parametrize("implementation", ["triton", "triton_window", "triton_hopper"])
def test_cuda_graph(implementation):
    case, inputs = _packed_inputs()
    _skip_unless_served(case, implementation)
    other = make_inputs(case, "cuda", seed=1)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(case, inputs, implementation)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(case, inputs, implementation)
    for name in ("q", "k", "v", "dout"):
        getattr(inputs, name).copy_(getattr(other, name))
    graph.replay()
    for name, value in run(case, other, implementation).items():
        _assert_repeated(captured[name], value, implementation, name)


def _skip_unless_served(case: Case, implementation: str) -> None:
    if implementation not in implementations(case):
        pytest.skip(f"{implementation} does not serve this card")


def _assert_repeated(value, expected, implementation: str, name: str) -> None:
    """Bit for bit, except dq of the Hopper kernels, which is summed in no fixed order."""
    if (implementation, name) == ("triton_hopper", "dq"):
        difference = torch.linalg.vector_norm(value.float() - expected.float())
        assert difference < 2**-8 * torch.linalg.vector_norm(expected.float())
    else:
        assert torch.equal(value, expected), f"{implementation}: {name} differs between two equal calls"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_inductor(dynamic):
    compiled = torch.compile(
        lambda q, k, v, sinks: attention_sink(q * 1.0, k, v, sinks, window_size=(127, 0)) * 2.0,  # no rounding to fuse
        fullgraph=True, dynamic=dynamic,
    )  # fmt: skip
    for seqlen in (256, 300):
        inputs = make_inputs(Case(seqlen, dtype=BF16, **GPT_OSS), "cuda")
        leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
        out = compiled(*leaves)
        expected = attention_sink(*leaves, window_size=(127, 0)) * 2.0
        torch.testing.assert_close(out, expected)
        got, want = (torch.autograd.grad(x, leaves, inputs.dout) for x in (out, expected))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("implementation", ["triton", "triton_window"])
def test_memory_of_backward_is_statistics_and_gradients(implementation):
    case = Case(8192, window=(127, 0), dtype=BF16, **GPT_OSS)
    inputs = make_inputs(case, "cuda")
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]

    def peak(step):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = step()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    def size(*tensors):
        return sum(x.numel() * x.element_size() for x in tensors)

    def forward():
        return attention_sink(*leaves, window_size=case.window, return_lse=True, implementation=implementation)

    torch.autograd.grad(forward()[0], leaves, inputs.dout)  # compiles
    (out, lse), used = peak(forward)
    slack = 2**20
    assert used <= size(out, lse) + slack
    gradients, used = peak(lambda: torch.autograd.grad(out, leaves, inputs.dout))
    statistics = 2 * size(lse)  # lse and delta in the order in which the second kernel reads them
    sink_parts = size(lse) // 8  # one number per tile of at least 8 tokens and head
    assert used <= size(*gradients) + statistics + sink_parts + slack


@pytest.mark.parametrize("implementation", ["triton", "triton_hopper"])
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("poisoned", ["decreasing", "beyond T", "negative", "huge"])
def test_wrong_cu_seqlens_stay_inside_their_tensors(poisoned, head_dim, implementation):
    """Values on a GPU are not checked, so whatever they hold, nothing outside is read (as NaN) or written."""
    values = {
        "decreasing": [0, 90, 30, 128],
        "beyond T": [0, 50, 128, 100_000],
        "negative": [-500, 20, -3, 128],
        "huge": [0, 2**31 - 1, -(2**31), 128],
    }[poisoned]
    cu = torch.tensor(values, dtype=torch.int32, device="cuda")
    T, guard = 128, 256
    case = Case(T, heads=(8, 2), head_dim=head_dim, dtype=BF16)
    _skip_unless_served(case, implementation)
    inputs = make_inputs(case, "cuda")

    def fenced(x):
        fence = torch.full((1, T + 2 * guard, *x.shape[2:]), float("nan"), dtype=x.dtype, device="cuda")
        fence[:, guard : guard + T] = x
        return fence[:, guard : guard + T].requires_grad_()

    q, k, v = map(fenced, (inputs.q, inputs.k, inputs.v))
    good = cu_seqlens((T,), "cuda")
    for cu_q, cu_k in ((cu, cu), (good.expand(2), cu[:2]), (cu[1:3], good)):
        out, lse = attention_forward(
            q, k, v, inputs.sinks, cu_q, cu_k, *(None,) * 5, 31, 0, case.scale, 0.0, False, implementation
        )
        gradients = torch.autograd.grad(out, (q, k, v), inputs.dout)
        for x in (out, lse, *gradients):
            assert bool(x.isfinite().all())


def test_auto_takes_a_kernel_on_a_gpu():
    inputs = make_inputs(Case(128, dtype=BF16, **GPT_OSS), "cuda")
    explanation = explain(inputs.q, inputs.k, inputs.v, inputs.sinks)
    assert explanation.implementation != "reference"


@pytest.mark.parametrize("head_dim", [64, (192, 128)])
def test_deterministic_gradients_are_bit_exact(head_dim):
    """Kernels that sum dq in no fixed order do not serve the call, and are refused if named."""
    case = Case(2048, dtype=BF16, lengths_q=(1500, 548), heads=(64, 8), head_dim=head_dim)
    inputs = make_inputs(case, "cuda")
    first, second = (run(case, inputs, "auto", deterministic=True) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    if torch.cuda.get_device_capability() == (9, 0) and head_dim == 64:
        with pytest.raises(ValueError, match="no fixed order"):
            run(case, inputs, "triton_hopper", deterministic=True)


def test_checks_of_values_are_opt_in(monkeypatch):
    inputs = _packed_inputs()[1]
    cu = inputs.mask.cu_seqlens_q.flip(0).contiguous()
    q, k, v = (x.squeeze(0) for x in (inputs.q, inputs.k, inputs.v))
    attention_sink(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)
    monkeypatch.setenv("TRITON_ATTENTION_SINK_CHECK", "1")
    with pytest.raises(ValueError, match=f"cu_seqlens_q must start at 0, got {int(cu[0])}"):
        attention_sink(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu)


def test_opcheck():
    case = Case(96, heads=(4, 2), head_dim=32, dtype=FP16)
    inputs = make_inputs(case, "cuda")
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]
    torch.library.opcheck(
        attention_forward, (*leaves, *(None,) * (N_TENSORS - 4), 31, 0, case.scale, 0.0, True, "triton")
    )


def test_checkpoint_and_autocast():
    case = Case(200, dtype=FP32, dlse=True, **GPT_OSS)
    inputs = make_inputs(case, "cuda")
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v, inputs.sinks)]

    def forward(*args):
        with torch.autocast("cuda", dtype=BF16):
            return call(case, inputs, *args)

    out, lse = forward(*leaves)
    assert out.dtype == BF16
    kept = torch.utils.checkpoint.checkpoint(forward, *leaves, use_reentrant=False)
    dout = inputs.dout.to(BF16)
    expected = torch.autograd.grad((out, lse), leaves, (dout, inputs.dlse))
    for a, b in zip(torch.autograd.grad(kept, leaves, (dout, inputs.dlse)), expected, strict=True):
        assert a.dtype == FP32 and torch.equal(a, b)
