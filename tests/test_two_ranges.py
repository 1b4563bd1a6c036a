"""Two ranges of keys a query: merged parts, first keys beside a window, shared prefixes.

The kernels are interpreted; the reference computes the same. The oracle is one softmax over all keys, in fp64 by the
reference: with a dense mask made for each case, or sample by sample.
"""

import pickle

import pytest
import torch
from cases import cu_seqlens
from processes import ROOT
from visibility import Visible, first_and_window, first_and_window_of_segments, path_of

from triton_attention_sink_hf import (
    SharedPrefixes,
    attention_sink,
    first_keys_attention,
    merge_attention,
    reference_attention,
    shared_prefix_attention,
)

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty", "bounds_checked"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

IMPLEMENTATIONS = ("triton", "reference")
# paths of the host code alone: an interpreted kernel would add time and nothing else
HOST = ("all in the window", "short of all first keys", "no first keys", "groups, window of all", "no branches")


def pairs(cases):
    return [(name, x) for name in cases for x in IMPLEMENTATIONS if x == "reference" or name not in HOST]


def tensors(tokens, heads=(4, 2), dims=(16, 16), batch=(), seqlen_k=None, seed=0):
    """q, k, v, sinks, and a gradient each for out and lse."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*batch, *shape, generator=generator)

    keys = tokens if seqlen_k is None else seqlen_k
    q, k, v = normal(tokens, heads[0], dims[0]), normal(keys, heads[1], dims[0]), normal(keys, heads[1], dims[1])
    return q, k, v, torch.linspace(-3, 4, heads[0]), normal(tokens, heads[0], dims[1]), normal(heads[0], tokens)


def outputs(function, leaves, gradients):
    """out, lse and the gradients of the leaves."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse = function(*leaves)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, gradients)]


def assert_equal(got, want, tolerance=1e-5):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), got, want, strict=False):
        error, size = (a.double() - b).nan_to_num(0.0, 0.0, 0.0).abs().max(), b.nan_to_num(0.0, 0.0, 0.0).abs().max()
        assert error <= tolerance * max(size, 1.0), f"{name}: {error:.2g} of {size:.2g}"
        assert torch.equal(a.isinf(), b.isinf()), name


# merge_attention


@pytest.mark.parametrize("merge", ["torch", "kernel"])
@pytest.mark.parametrize("sinks", [True, False])
def test_merged_parts_are_the_whole(merge, sinks):
    """Keys in two sets, of which some rows see one and some neither."""
    q, k, v, sink, dout, dlse = tensors(21, batch=(2,), heads=(6, 2), dims=(16, 20), seqlen_k=30)
    visible = torch.rand(2, 21, 30, generator=torch.Generator().manual_seed(1)) < 0.5
    visible[:, 3], visible[:, 4, :11], visible[:, 5, 11:] = False, False, False
    leaves = [q, k, v, sink] if sinks else [q, k, v]
    if not sinks:
        dlse[:, :, 3] = 0.0  # of -inf

    def attend(q, k, v, sink, visible):
        return reference_attention(q, k, v, sink, Visible(visible), softmax_scale=0.3)

    def parts(q, k, v, sink=None):
        outs, lses = zip(
            attend(q, k[:, :11], v[:, :11], None, visible[..., :11]),
            attend(q, k[:, 11:], v[:, 11:], sink, visible[..., 11:]), strict=True,
        )  # fmt: skip
        if merge == "torch":
            return merge_attention(outs, lses)
        from triton_attention_sink_hf.implementations.common.merge import merge as kernel

        return kernel(*outs, *lses)

    want = outputs(
        lambda q, k, v, sink=None: attend(q, k, v, sink, visible),
        [x.double() for x in leaves], (dout.double(), dlse.double()),
    )  # fmt: skip
    got = outputs(parts, leaves, (dout, dlse))
    assert_equal(got, want)
    assert all(x.isfinite().all() for x in got[2:])
    # through one output alone
    for i, gradient in enumerate((dout, dlse)):
        fresh = [x.detach().requires_grad_() for x in leaves]
        whole = [x.detach().double().requires_grad_() for x in leaves]
        a = torch.autograd.grad(parts(*fresh)[i], fresh, gradient)
        b = torch.autograd.grad(attend(*whole, *(() if sinks else (None,)), visible)[i], whole, gradient.double())
        assert_equal([a[0], a[0], *a], [b[0], b[0], *b])


def test_three_packed_parts():
    q, k, v, sink, dout, dlse = tensors(12)
    cu = cu_seqlens((12,))

    def parts(q, k, v, sink):
        found = []
        for first, last in ((0, 4), (4, 5), (5, 12)):
            ranges = torch.tensor([[first, last]], dtype=torch.int32).expand(12, 2)
            found.append(
                attention_sink(
                    q, k, v, sink if first == 4 else None, cu_seqlens_q=cu, cu_seqlens_k=cu, key_ranges=ranges,
                    return_lse=True, implementation="reference",
                )
            )  # fmt: skip
        return merge_attention(*zip(*found, strict=True))

    want = outputs(
        lambda *x: attention_sink(*x, cu_seqlens_q=cu, cu_seqlens_k=cu, return_lse=True),
        [x.double() for x in (q, k, v, sink)], (dout.double(), dlse.double()),
    )  # fmt: skip
    assert_equal(outputs(parts, (q, k, v, sink), (dout, dlse)), want)


def test_bad_parts():
    out, lse = torch.zeros(1, 3, 2, 8), torch.zeros(1, 2, 3)
    for outs, lses, message in (
        ([], [], "outs and lses must be of one length, at least 1, got 0 and 0"),
        ([out], [lse, lse], "outs and lses must be of one length, at least 1, got 1 and 2"),
        ([out[0, 0]], [lse], r"outs must be \(B, S, H, Dv\) or \(T, H, Dv\), got shape \(2, 8\)"),
        ([out, out.half()], [lse, lse], r"outs must be .* as the first, got \(1, 3, 2, 8\) torch.float16"),
        ([out], [lse.transpose(1, 2)], r"lses must be \(1, 2, 3\) torch.float32, got \(1, 3, 2\) torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_attention(outs, lses)


# first_keys_attention


FIRST = {
    "dense": (40, 40, 3, 9, {}),
    "window and first keys overlap": (20, 20, 6, 4, {}),
    "all in the window": (20, 20, 6, 30, {}),
    "short of all first keys": (12, 12, 9, 7, {}),
    "no first keys": (12, 12, 0, 5, {}),
    "more keys": (9, 40, 4, 6, {}),
    "more queries": (30, 20, 4, 6, {}),
    "left padding": (24, 24, 3, 5, {"real": (0, 9)}),
    "used": (7, 30, 3, 5, {"seqused_k": (30, 11)}),
    "left padding of a cache": (7, 30, 3, 5, {"seqused_k": (30, 17), "leftpad_k": (4, 0)}),
}


@pytest.mark.parametrize(("name", "implementation"), pairs(FIRST))
def test_first_keys(name, implementation):
    seqlen_q, seqlen_k, n, left, masks = FIRST[name]
    q, k, v, sink, dout, dlse = tensors(seqlen_q, batch=(2,), heads=(2, 1), seqlen_k=seqlen_k)
    used = torch.tensor(masks.get("seqused_k", (seqlen_k,) * 2))
    start = torch.tensor(masks.get("leftpad_k", masks.get("real", (0, 0))))[:, None]
    position = torch.arange(seqlen_q) + used[:, None] - seqlen_q
    visible = first_and_window(position, start, n, left, seqlen_k)
    options = {name: torch.tensor(x, dtype=torch.int32) for name, x in masks.items() if name != "real"}
    if "real" in masks:
        options["key_padding_mask"] = torch.arange(seqlen_k) >= start
    want = outputs(
        lambda q, k, v, sink: reference_attention(q, k, v, sink, Visible(visible), softmax_scale=0.25),
        [x.double() for x in (q, k, v, sink)], (dout.double(), dlse.double()),
    )  # fmt: skip
    got = outputs(
        lambda q, k, v, sink: first_keys_attention(
            q, k, v, sink, first_keys=n, window_size=(left, 0), return_lse=True, implementation=implementation,
            **options,
        ),
        (q, k, v, sink), (dout, dlse),
    )  # fmt: skip
    assert_equal(got, want)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths_k", [None, (11, 5, 33, 2)])
def test_first_keys_of_packed_segments(lengths_k, implementation):
    lengths, n, left = (7, 0, 30, 12), 3, 6
    keys = lengths if lengths_k is None else lengths_k
    q, k, v, sink, dout, dlse = tensors(sum(lengths) + 2, heads=(2, 1), seqlen_k=sum(keys) + 3)
    cu_q = cu_seqlens(lengths)
    cu_k = cu_q if lengths_k is None else cu_seqlens(keys)
    visible = first_and_window_of_segments(cu_q, cu_k, (q.shape[0], k.shape[0]), n, left)
    want = outputs(
        lambda q, k, v, sink: tuple(
            x[0]
            for x in reference_attention(q[None], k[None], v[None], sink, Visible(visible), softmax_scale=0.25)
        ),
        [x.double() for x in (q, k, v, sink)], (dout.double(), dlse.double()),
    )  # fmt: skip
    got = outputs(
        lambda *x: first_keys_attention(
            *x, first_keys=n, window_size=(left, 0), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, return_lse=True,
            implementation=implementation,
        ),
        (q, k, v, sink), (dout, dlse),
    )  # fmt: skip
    assert_equal(got, want)


def test_bad_first_keys():
    q = torch.zeros(1, 3, 2, 8)
    for error, options, message in (
        (TypeError, {"first_keys": True}, "first_keys must be an int, got True"),
        (ValueError, {"first_keys": -1}, "first_keys must be >= 0, got -1"),
        (TypeError, {"window_size": 4}, "window_size must be a pair"),
        (ValueError, {"window_size": (4, -1)}, r"window_size must be \(left, 0\) with left >= 0, got \(4, -1\)"),
        (ValueError, {"window_size": (-1, 0)}, r"window_size must be \(left, 0\) with left >= 0, got \(-1, 0\)"),
    ):
        with pytest.raises(error, match=message):
            first_keys_attention(q, q, q, **{"first_keys": 1, "window_size": (4, 0), **options})


# shared_prefix_attention


def separate_samples(tree, window, q, k, v, sinks, softcap):
    """out (T, H, Dv) and lse (H, T) of samples one by one, by the reference."""
    outs, lses = [], []
    for segment in range(len(tree.lengths)):
        rows, path = path_of(tree, segment)
        out, lse = attention_sink(
            q[None, rows], k[None, path], v[None, path], sinks, window_size=(window, 0), softcap=softcap,
            return_lse=True, implementation="reference",
        )  # fmt: skip
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, 1)


GROUPS = SharedPrefixes((9, 5, 0, 12, 0, 4, 7, 3, 3, 6), (-1, 0, 0, 0, -1, 4, -1, -1, 7, 7))
TREES = {
    "groups": (GROUPS, -1, {}),
    "groups, short window": (GROUPS, 4, {}),
    "groups, window past the prompt": (GROUPS, 11, {"heads": (2, 2)}),
    "groups, window of all": (GROUPS, 20, {}),
    "window of one key": (GROUPS, 0, {}),
    "one branch": (SharedPrefixes((20, 9), (-1, 0)), -1, {"sinks": False}),
    "many branches": (SharedPrefixes((30, *(1 + i % 5 for i in range(16))), (-1, *(0,) * 16)), 7, {"heads": (8, 1)}),
    "no branches": (SharedPrefixes((8, 0, 5), (-1, -1, -1)), 3, {}),
    "window 128, shorter than the prompt": (
        SharedPrefixes((140, 21, 130), (-1, 0, 0)), 127, {"heads": (2, 1), "sinks": False},
    ),
    "D 64, softcap": (SharedPrefixes((40, 30, 17), (-1, 0, 0)), 33, {"heads": (2, 1), "dims": (64, 64), "softcap": 3}),
    "D 128/40": (SharedPrefixes((40, 30, 17), (-1, 0, 0)), -1, {"heads": (2, 1), "dims": (128, 40)}),
    "D 23": (SharedPrefixes((14, 10, 7), (-1, 0, 0)), 6, {"heads": (2, 1), "dims": (23, 23)}),
}  # fmt: skip


@pytest.mark.parametrize(("name", "implementation"), pairs(TREES))
def test_a_tree_equals_separate_samples(name, implementation):
    tree, window, options = TREES[name]
    heads, dims, softcap = options.get("heads", (4, 2)), options.get("dims", (16, 16)), options.get("softcap", 0.0)
    *leaves, dout, dlse = tensors(tree.total, heads, dims)
    if not options.get("sinks", True):
        leaves = leaves[:3]
    want = outputs(
        lambda q, k, v, sinks=None: separate_samples(tree, window, q, k, v, sinks, softcap),
        [x.double() for x in leaves], (dout.double(), dlse.double()),
    )  # fmt: skip
    got = outputs(
        lambda *x: shared_prefix_attention(
            *x, tree=tree, window_size=(window, 0), softcap=softcap, return_lse=True, implementation=implementation
        ),
        leaves, (dout, dlse),
    )  # fmt: skip
    assert_equal(got, want)


def test_positions_and_previous_rows_follow_the_path():
    tree = SharedPrefixes((3, 2, 0, 2, 0, 2), (-1, 0, 0, 0, -1, 4))
    assert tree.position_ids().tolist() == [[0, 1, 2, 3, 4, 3, 4, 0, 1]]
    assert tree.previous_rows().tolist() == [-1, 0, 1, 2, 3, 2, 5, -1, 7]


def test_a_tree_is_copied_without_what_was_derived_of_it():
    tree = SharedPrefixes(torch.tensor([3, 2]), torch.tensor([-1, 0]))
    tree.cu_seqlens(torch.device("cpu"))
    copied = pickle.loads(pickle.dumps(tree))
    assert repr(copied) == repr(tree) == "SharedPrefixes(lengths=(3, 2), prefix_of=(-1, 0))"
    assert tree._derived and not copied._derived


def test_bad_trees():
    for error, arguments, message in (
        (ValueError, ((3,), (-1, 0)), "lengths and prefix_of must be of one length, at least 1, got 1 and 2"),
        (ValueError, ((), ()), "lengths and prefix_of must be of one length, at least 1, got 0 and 0"),
        (ValueError, ((3, -2), (-1, 0)), "lengths must be >= 0, got -2"),
        (TypeError, ((3, 2.0), (-1, 0)), "lengths and prefix_of must be ints, got float"),
        (ValueError, ((3, 2), (0, 0)), r"prefix_of\[0\] must be -1"),
        (ValueError, ((3, 2, 2), (-1, 0, 1)), r"prefix_of\[2\] must be -1 or 0, the last segment .* got 1"),
        (ValueError, ((3, 2, 2), (-1, -1, 0)), r"prefix_of\[2\] must be -1 or 1, the last segment .* got 0"),
    ):
        with pytest.raises(error, match=message):
            SharedPrefixes(*arguments)
    q, tree = torch.zeros(5, 2, 8), SharedPrefixes((3, 2), (-1, 0))
    for error, arguments, message in (
        (TypeError, {"tree": [3, 2]}, "tree must be a SharedPrefixes, got list"),
        (ValueError, {"q": q[:4]}, r"q must be \(T, H, D\) with T = 5, as tree.total, got \(4, 2, 8\)"),
        (ValueError, {"window_size": (3, 3)}, r"window_size must be \(left, 0\) or \(left, -1\), got \(3, 3\)"),
        (TypeError, {"window_size": 3}, "window_size must be a pair"),
    ):
        with pytest.raises(error, match=message):
            shared_prefix_attention(**{"q": q, "k": q, "v": q, "tree": tree, **arguments})


def test_the_benchmark_checks_before_it_times(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import shared_prefix as benchmark

    for window in (4, None):
        case = benchmark.Case(9, 3, 5, window, heads=(4, 2), head_dim=16)
        forms = benchmark.make_forms(case, "cpu", torch.float32)
        assert max(benchmark.check(case, forms).values()) < 1e-5
        forms["tree"].leaves[1].data[3] += 0.1
        forms["tree"].out = None
        assert any(error > benchmark.LIMIT[name] for name, error in benchmark.check(case, forms).items())
    rows = [
        {"case": "a", "form": form, "direction": way, "ms": ms}
        for form, way, ms in (("tree", "forward", 1), ("tree", "backward", 2), ("packed", "forward", 4))
    ]
    rows.append({"case": "a", "form": "packed", "direction": "backward", "ms": 5})
    assert benchmark.speedups(rows) == [{"case": "a", "forward": 4.0, "backward": 2.5, "both": 3.0}]
