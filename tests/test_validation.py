"""Bad input raises before a kernel starts; the message names the argument, what it must be, and what it is."""

import re

import pytest
import torch

from triton_attention_sink_hf import attention_sink, explain

B, S, HQ, HK, D = 2, 6, 4, 2, 16
INT = torch.int32


def _good() -> dict:
    return {
        "q": torch.randn(B, S, HQ, D),
        "k": torch.randn(B, S, HK, D),
        "v": torch.randn(B, S, HK, D),
        "sinks": torch.zeros(HQ),
    }


def _packed(**changes) -> dict:
    cu = torch.tensor([0, 4, 12], dtype=INT)
    good = {name: x.flatten(0, 1) if name != "sinks" else x for name, x in _good().items()}
    return {**good, "cu_seqlens_q": cu, "cu_seqlens_k": cu, **changes}


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=INT)


CASES = {
    # tensors
    "q a list": (TypeError, {"q": [1.0]}, "q must be a torch.Tensor, got list"),
    "k None": (TypeError, {"k": None}, "k must be a torch.Tensor, got NoneType"),
    "q of ints": (TypeError, {"q": torch.zeros(B, S, HQ, D, dtype=INT)}, "q must be bfloat16.*got torch.int32"),
    "dtypes differ": (TypeError, {"k": torch.zeros(B, S, HK, D).half()}, "k must have q's dtype.*got torch.float16"),
    "v's dtype": (TypeError, {"v": torch.zeros(B, S, HK, D).bfloat16()}, "v must have q's dtype.*got torch.bfloat16"),
    "device": (ValueError, {"k": torch.zeros(B, S, HK, D, device="meta")}, "k must be on q's device cpu, got meta"),
    "q 3-D": (ValueError, {"q": torch.zeros(S, HQ, D)}, r"q must be \(B, S, H, D\), got shape \(6, 4, 16\)"),
    "v 3-D": (ValueError, {"v": torch.zeros(S, HK, D)}, r"v must be \(B, S, H, D\), got shape"),
    "heads": (ValueError, {"q": torch.zeros(B, S, 3, D)}, "q's heads must be a multiple of k's heads, got 3 and 2"),
    "no key heads": (
        ValueError,
        {"k": torch.zeros(B, S, 0, D), "v": torch.zeros(B, S, 0, D)},
        "multiple of k's heads, got 4 and 0",
    ),
    "k's D": (ValueError, {"k": torch.zeros(B, S, HK, 24)}, "k's head dimension must be q's 16, got 24"),
    "D 0": (ValueError, {"q": torch.zeros(B, S, HQ, 0)}, "q's head dimension must be from 1 to 512, got 0"),
    "D 513": (ValueError, {"q": torch.zeros(B, S, HQ, 513)}, "q's head dimension must be from 1 to 512, got 513"),
    "Dv 513": (ValueError, {"v": torch.zeros(B, S, HK, 513)}, "v's head dimension must be from 1 to 512, got 513"),
    "v's length": (ValueError, {"v": torch.zeros(B, 5, HK, D)}, r"v must be \(2, 6, 2\) \+ \(Dv,\) as k, got"),
    "batch": (
        ValueError,
        {"k": torch.zeros(3, S, HK, D), "v": torch.zeros(3, S, HK, D)},
        "k's batch must be q's 2, got 3",
    ),
    # sinks
    "sinks a float": (TypeError, {"sinks": 0.0}, "sinks must be a torch.Tensor, got float"),
    "sinks of ints": (TypeError, {"sinks": _ints(0, 0, 0, 0)}, "sinks must be a floating dtype, got torch.int32"),
    "sinks too few": (ValueError, {"sinks": torch.zeros(2)}, r"sinks must be \(Hq,\) = \(4,\), got \(2,\)"),
    "sinks 2-D": (ValueError, {"sinks": torch.zeros(1, 4)}, r"or \(B, Hq, Sq\) = \(2, 4, 6\), got \(1, 4\)"),
    # numbers
    "window -2": (ValueError, {"window_size": (-2, 0)}, r"window_size must be >= -1.*got \(-2, 0\)"),
    "window an int": (TypeError, {"window_size": 128}, "window_size must be a pair.*got 128"),
    "window of three": (TypeError, {"window_size": (1, 2, 3)}, "window_size must be a pair"),
    "window of floats": (TypeError, {"window_size": (1.0, 0)}, "window_size must be a pair of ints"),
    "scale inf": (ValueError, {"softmax_scale": float("inf")}, "softmax_scale must be finite, got inf"),
    "scale NaN": (ValueError, {"softmax_scale": float("nan")}, "softmax_scale must be finite, got nan"),
    "scale a string": (TypeError, {"softmax_scale": "1"}, "softmax_scale must be a float, got str"),
    "softcap negative": (ValueError, {"softcap": -1.0}, "softcap must be >= 0, got -1.0"),
    "softcap inf": (ValueError, {"softcap": float("inf")}, "softcap must be finite, got inf"),
    "causal an int": (TypeError, {"causal": 1}, "causal must be a bool, got 1"),
    "deterministic a string": (TypeError, {"deterministic": "yes"}, "deterministic must be a bool, got 'yes'"),
    # masks
    "padding of ints": (
        TypeError,
        {"key_padding_mask": torch.ones(B, S, dtype=INT)},
        "key_padding_mask must be torch.bool",
    ),
    "padding shape": (
        ValueError,
        {"key_padding_mask": torch.ones(B, 5, dtype=torch.bool)},
        r"key_padding_mask must be \(B, Sk\) = \(2, 6\), got \(2, 5\)",
    ),
    "used int64": (TypeError, {"seqused_k": torch.tensor([1, 2])}, "seqused_k must be torch.int32, got torch.int64"),
    "used too long": (ValueError, {"seqused_k": _ints(7, 1)}, r"seqused_k must be between 0 and Sk = 6, got 1\.\.7"),
    "used negative": (ValueError, {"seqused_k": _ints(-1, 1)}, r"seqused_k must be between 0 and Sk = 6, got -1\.\.1"),
    "leftpad too long": (ValueError, {"leftpad_k": _ints(7, 1)}, r"leftpad_k must be between 0 and Sk = 6, got 1\.\.7"),
    "leftpad float": (TypeError, {"leftpad_k": torch.zeros(2)}, "leftpad_k must be torch.int32, got torch.float32"),
    "pages int64": (
        TypeError,
        {"block_table": torch.zeros(2, 1).long()},
        "block_table must be torch.int32, got torch.int64",
    ),
    "pages flat": (ValueError, {"block_table": _ints(0, 1)}, r"block_table must be \(B, n\) with B = 2, got \(2,\)"),
    "page unknown": (ValueError, {"block_table": _ints(0, 2).view(2, 1)}, r"block_table must name pages .*got 0\.\.2"),
    "page negative": (
        ValueError,
        {"block_table": _ints(0, 1, 0, -1).view(2, 2), "seqused_k": _ints(6, 7)},
        r"block_table must name pages from 0 to 1 where keys are in use, got -1\.\.0",
    ),
    "pages and padding": (
        ValueError,
        {"block_table": _ints(0, 1).view(2, 1), "key_padding_mask": torch.ones(2, 6, dtype=torch.bool)},
        "key_padding_mask must be None where block_table is given",
    ),
    "used of three": (ValueError, {"seqused_k": _ints(1, 1, 1)}, r"seqused_k must be \(B,\) = \(2,\), got \(3,\)"),
    "ranges int64": (
        TypeError,
        {"key_ranges": torch.zeros(B, S, 2, dtype=torch.int64)},
        "key_ranges must be torch.int32, got torch.int64",
    ),
    "ranges shape": (
        ValueError,
        {"key_ranges": torch.zeros(S, 2, dtype=INT)},
        r"key_ranges must be \(B, Sq, 2\) = \(2, 6, 2\), got \(6, 2\)",
    ),
    "packed ranges": (
        ValueError,
        _packed(key_ranges=torch.zeros(1, 12, 2, dtype=INT)),
        r"key_ranges must be \(Tq, 2\) = \(12, 2\), got \(1, 12, 2\)",
    ),
    # packed rows
    "one cu_seqlens": (ValueError, _packed(cu_seqlens_k=None), "cu_seqlens_k must be given when the other"),
    "cu int64": (
        TypeError,
        _packed(cu_seqlens_q=torch.tensor([0, 12])),
        "cu_seqlens_q must be torch.int32, got torch.int64",
    ),
    "cu a list": (TypeError, _packed(cu_seqlens_q=[0, 12]), "cu_seqlens_q must be a torch.Tensor, got list"),
    "cu 2-D": (ValueError, _packed(cu_seqlens_q=_ints(0, 12)[None]), "cu_seqlens_q must have one dimension"),
    "cu too short": (ValueError, _packed(cu_seqlens_q=_ints(0)), r"cu_seqlens_q must be \(N \+ 1,\) with N >= 1"),
    "cu not from 0": (ValueError, _packed(cu_seqlens_k=_ints(1, 4, 12)), "cu_seqlens_k must start at 0, got 1"),
    "cu decreases": (
        ValueError,
        _packed(cu_seqlens_q=_ints(0, 9, 4)),
        r"cu_seqlens_q must not decrease, got \[0, 9, 4\]",
    ),
    "cu beyond T": (
        ValueError,
        _packed(cu_seqlens_q=_ints(0, 4, 13)),
        "cu_seqlens_q must end at or before T = 12, got 13",
    ),
    "cu lengths differ": (
        ValueError,
        _packed(cu_seqlens_k=_ints(0, 12)),
        "cu_seqlens_k must have cu_seqlens_q's shape",
    ),
    "max_seqlen too small": (
        ValueError,
        _packed(max_seqlen_q=7),
        "max_seqlen_q must be >= the longest segment 8, got 7",
    ),
    "max_seqlen a float": (TypeError, _packed(max_seqlen_k=8.0), "max_seqlen_k must be an int, got 8.0"),
    "packed 4-D": (
        ValueError,
        _packed(q=torch.zeros(B, S, HQ, D)),
        r"q must be \(T, H, D\) or \(1, T, H, D\) with cu_seqlens, got shape",
    ),
    "packed padding": (
        ValueError,
        _packed(key_padding_mask=torch.ones(1, 12, dtype=torch.bool)),
        r"key_padding_mask must be \(T,\) = \(12,\), got \(1, 12\)",
    ),
    "packed leftpad": (ValueError, _packed(leftpad_k=_ints(3)), "leftpad_k must be None for packed rows"),
    "packed pages": (ValueError, _packed(block_table=_ints(3)), "block_table must be None for packed rows"),
    "packed used": (ValueError, _packed(seqused_k=_ints(3)), "seqused_k must be None for packed rows"),
    # implementations
    "implementation": (ValueError, {"implementation": "cuda"}, "implementation must be one of .*'auto'.*got 'cuda'"),
    "implementation of another type": (TypeError, {"implementation": ["triton"]}, "implementation must be a str, got"),
    "implementation that cannot": (
        ValueError,
        {name: _good()[name].double() for name in "qkv"} | {"implementation": "triton"},
        "implementation must be one that supports this call, got 'triton'.*float64",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name):
    error, changes, message = CASES[name]
    with pytest.raises(error) as caught:
        attention_sink(**{**_good(), **changes})
    assert re.search(message, str(caught.value)), f"{caught.value!s} does not say {message!r}"


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("implementation")])
def test_explain_refuses_the_same(name):
    error, changes, _ = CASES[name]
    with pytest.raises(error):
        explain(**{**_good(), **changes})


def test_good_input_passes():
    assert attention_sink(**_good()).shape == (B, S, HQ, D)
    assert attention_sink(**_packed(max_seqlen_q=8, max_seqlen_k=100)).shape == (B * S, HQ, D)


@pytest.mark.parametrize("by_token", [False, True])
def test_packed_rows_keep_a_batch_dimension_of_one(by_token):
    flat = _packed()
    if by_token:
        flat["sinks"] = torch.randn(HQ, B * S)
    out, lse = attention_sink(**flat, return_lse=True)
    rows = {name: flat[name][None] for name in "qkv"}
    whole = attention_sink(**{**flat, **rows}, return_lse=True)
    assert torch.equal(whole[0], out[None]) and torch.equal(whole[1], lse[None])
    with pytest.raises(ValueError, match="q must be"):
        attention_sink(**{**flat, "q": rows["q"]})


def test_positional_arguments_end_at_sinks():
    good = _good()
    with pytest.raises(TypeError, match="positional"):
        attention_sink(*good.values(), True)


class _Unreadable(torch.Tensor):
    """A CPU tensor that claims to lie on a GPU, to test what may be read there."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize("checked", [False, True])
def test_values_on_a_gpu_are_read_only_when_asked(monkeypatch, checked):
    from triton_attention_sink_hf.validation import CHECK_VARIABLE, readable

    assert CHECK_VARIABLE == "TRITON_ATTENTION_SINK_CHECK"
    monkeypatch.setenv(CHECK_VARIABLE, "1" if checked else "0")
    assert readable(_ints(0, 1))
    assert readable(_ints(0, 1).as_subclass(_Unreadable)) is checked


def test_errors_do_not_depend_on_assertions():
    """Checks are statements that raise: ``python -O`` keeps them."""
    import inspect

    from triton_attention_sink_hf import interface, validation

    for module in (interface, validation):
        assert not re.search(r"^\s*assert ", inspect.getsource(module), re.MULTILINE), module


HAZARDS = {
    # equal as keys, or of one memo, and yet not what was checked before
    "causal": ({}, {"causal": 1}, "causal must be a bool"),
    "window": ({"window_size": (3, 0)}, {"window_size": (3.0, 0)}, "window_size must be a pair of ints"),
    "scale": ({"softmax_scale": 1.0}, {"softmax_scale": True}, "softmax_scale must be a float"),
    "softcap": ({}, {"softcap": False}, "softcap must be a float"),
    "deterministic": ({"deterministic": False}, {"deterministic": 0}, "deterministic must be a bool"),
    "used": ({"seqused_k": _ints(6, 1)}, {"seqused_k": _ints(7, 1)}, "seqused_k must be between 0 and Sk"),
    "cu": (_packed(), _packed(cu_seqlens_k=_ints(1, 4, 12)), "cu_seqlens_k must start at 0"),
    "shared cu": (_packed(), {"cu_seqlens_q": _ints(0, 4, 13)}, "cu_seqlens_q must end at or before"),
    "max_seqlen": (_packed(max_seqlen_k=8), {"max_seqlen_k": 8.0}, "max_seqlen_k must be an int"),
    "max_seqlen too small": (_packed(max_seqlen_k=8), {"max_seqlen_k": 7}, "max_seqlen_k must be >= the longest"),
    "device": ({}, {"k": torch.zeros(B, S, HK, D, device="meta")}, "k must be on q's device cpu, got meta"),
}


@pytest.mark.parametrize("name", HAZARDS)
def test_what_was_checked_before_hides_nothing(name):
    changes, then, message = HAZARDS[name]
    good = {**_good(), **changes}
    for _ in range(2):
        attention_sink(**good)
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=message):
            attention_sink(**{**good, **then})
    attention_sink(**good)


def test_memos_tell_calls_apart():
    """Whatever may change a check, the choice of kernels or a launch leads to another memo."""
    from triton_attention_sink_hf.call import memo_of

    x = torch.zeros(1, 8, 2, 17)
    same = memo_of((x[..., :16], None), (1, 0))
    assert memo_of((torch.zeros(1, 8, 2, 17)[..., :16], None), (1, 0)) is same
    others = [
        memo_of((x[..., 1:], None), (1, 0)),  # an address that is no multiple of 16
        memo_of((x[..., :16].contiguous(), None), (1, 0)),
        memo_of((x[..., :16].to(torch.float16, memory_format=torch.preserve_format), None), (1, 0)),
        memo_of((x[:, :7, :, :16], None), (1, 0)),
        memo_of((x[..., :16].to("meta"), None), (1, 0)),
        memo_of((x[..., :16], x), (1, 0)),
        memo_of((None, x[..., :16]), (1, 0)),
        memo_of((x[..., :16], None), (1, -1)),
    ]
    assert len({id(memo) for memo in (same, *others)}) == 1 + len(others)


def test_a_subclass_has_no_memo():
    """Its operations may be anything, so it takes the operator, and every check at each call."""
    from triton_attention_sink_hf.call import traced

    x = torch.zeros(2)
    assert not traced(x, None, torch.nn.Parameter(x)) and traced(x, x.as_subclass(_Unreadable))


def _swapped(heads_q, heads_k, seqlen_q, seqlen_k, **others):
    """Arguments in scaled_dot_product_attention's layout."""
    q, k = torch.zeros(B, heads_q, seqlen_q, D), torch.zeros(B, heads_k, seqlen_k, D)
    return {"q": q, "k": k, "v": k, **others}


def _swapped_packed(**others):
    q, k, cu = torch.zeros(HQ, 50, D), torch.zeros(HK, 50, D), _ints(0, 20, 50)
    return {"q": q, "k": k, "v": k, "cu_seqlens_q": cu, "cu_seqlens_k": cu, **others}


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (_swapped(32, 8, 100, 100, sinks=torch.zeros(32)), "looks like (B, H, S, D)"),
        (_swapped(32, 8, 20, 20, sinks=torch.zeros(32)), "looks like (B, H, S, D)"),
        (_swapped(8, 8, 100, 77), "looks like (B, H, S, D)"),
        (_swapped(8, 1, 60, 100), "looks like (B, H, S, D)"),
        (_swapped(4, 2, 50, 50, key_padding_mask=torch.ones(B, 50, dtype=torch.bool)), "looks like (B, H, S, D)"),
        (_swapped_packed(sinks=torch.zeros(HQ)), "looks like (H, T, D)"),
        (_swapped_packed(), "looks like (H, T, D)"),
    ],
)
def test_the_other_layout_is_named(arguments, hint):
    with pytest.raises(ValueError, match=re.escape(hint)) as error:
        attention_sink(**arguments)
    assert "transpose(" in str(error.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"sinks": torch.zeros(3)},
        {"q": torch.zeros(B, S, 3, D)},
        {"k": torch.zeros(B, S, 0, D), "v": torch.zeros(B, S, 0, D)},
        {"q": torch.zeros(B, 7, 3, D), "k": torch.zeros(B, 2, 2, D), "v": torch.zeros(B, 2, 2, D)},
    ],
)
def test_other_mistakes_are_not_taken_for_the_layout(changes):
    with pytest.raises(ValueError) as error:
        attention_sink(**{**_good(), **changes})
    assert "looks like" not in str(error.value)
