"""flash-attn's names: each call equals the attention_sink call it stands for; what cannot be honoured raises."""

import inspect

import numpy
import pytest
import torch

from triton_attention_sink_hf import (
    attention_sink,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

B, S, H, HKV, D = 2, 9, 4, 2, 16
SINKS = torch.tensor([-10.0, 0.0, 5.0, 20.0])


def inputs(batch=B, seqlen=S, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, seqlen, n, D, generator=generator, dtype=dtype) for n in (H, HKV, HKV))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window_size", [(-1, -1), (3, 3)])
def test_func(causal, window_size):
    q, k, v = inputs()
    options = dict(softmax_scale=0.3, causal=causal, window_size=window_size, softcap=2.0)
    found = flash_attn_func(q, k, v, s_aux=SINKS, deterministic=True, **options)
    torch.testing.assert_close(found, attention_sink(q, k, v, SINKS, **options), rtol=0, atol=0)
    assert not torch.equal(found, flash_attn_func(q, k, v, **options))


def test_func_is_differentiable_in_the_sinks():
    q, k, v = inputs(dtype=torch.float64)
    sinks = SINKS.double().requires_grad_()
    (gradient,) = torch.autograd.grad(flash_attn_func(q, k, v, causal=True, s_aux=sinks).square().sum(), sinks)
    assert (gradient != 0).all()


def test_defaults_are_flash_attns():
    q, k, v = inputs()
    torch.testing.assert_close(flash_attn_func(q, k, v), attention_sink(q, k, v, causal=False), rtol=0, atol=0)


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache])
@pytest.mark.parametrize(
    "window_size",
    [[2, 1], torch.tensor([2, 1]), torch.tensor([2, 1], dtype=torch.int32), numpy.array([2, 1]),
     (numpy.int64(2), torch.tensor(1)), [numpy.int32(2), 1]],
    ids=str,
)  # fmt: skip
def test_windows_in_every_form(function, window_size):
    """Whatever flash-attn's callers pass for a pair of ints."""
    q, k, v = inputs()
    arguments = {}
    if function is flash_attn_varlen_func:
        cu = torch.tensor([0, 7, 18], dtype=torch.int32)
        q, k, v, arguments = *(x.flatten(0, 1) for x in (q, k, v)), dict(cu_seqlens_q=cu, cu_seqlens_k=cu)
    want = function(q, k, v, window_size=(2, 1), s_aux=SINKS, **arguments)
    assert torch.equal(function(q, k, v, window_size=window_size, s_aux=SINKS, **arguments), want)
    assert not torch.equal(function(q, k, v, s_aux=SINKS, **arguments), want)


@pytest.mark.parametrize(
    "window_size", [128, None, (1, 2, 3), torch.tensor([1.0, 2.0]), numpy.array(3), (1.5, 0)], ids=str
)
def test_windows_that_are_no_pair_of_ints(window_size):
    with pytest.raises(TypeError, match="window_size must be a pair"):
        flash_attn_func(*inputs(), window_size=window_size)


def test_windows_beyond_32_bits():
    """What means "unlimited" in configs."""
    for window_size in ((2**31 - 1, 2**31 - 1), torch.tensor([2**31 - 1, 2**40])):
        assert torch.equal(flash_attn_func(*inputs(), window_size=window_size), flash_attn_func(*inputs()))


def test_varlen_func():
    q, k, v = (x.flatten(0, 1) for x in inputs())
    cu = torch.tensor([0, 4, 11, 18], dtype=torch.int32)
    found = flash_attn_varlen_func(q, k, v, cu, cu, 7, torch.tensor(7), causal=True, window_size=[2, 0], s_aux=SINKS)
    for start, end in ((0, 4), (4, 11), (11, 18)):
        rows = (x[None, start:end] for x in (q, k, v))
        expected = attention_sink(*rows, SINKS, window_size=(2, 0))[0]
        torch.testing.assert_close(found[start:end], expected)


@pytest.mark.parametrize("causal", [False, True])
def test_kvcache_appends_in_place(causal):
    q, k, v = inputs(seqlen=3)
    k_cache, v_cache = torch.full((B, 8, HKV, D), 1e3), torch.full((B, 8, HKV, D), 1e3)
    lengths = (2, 4)
    _, old_k, old_v = inputs(seqlen=4)
    for row, n in enumerate(lengths):
        k_cache[row, :n], v_cache[row, :n] = old_k[row, :n], old_v[row, :n]
    address = k_cache.data_ptr()
    seqlens = torch.tensor(lengths, dtype=torch.int32)
    found, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=seqlens, causal=causal, s_aux=SINKS, return_softmax_lse=True
    )
    assert k_cache.data_ptr() == address and seqlens.tolist() == list(lengths)
    for row, n in enumerate(lengths):
        keys, values = torch.cat([old_k[row, :n], k[row]])[None], torch.cat([old_v[row, :n], v[row]])[None]
        torch.testing.assert_close(k_cache[row, : n + 3], keys[0])
        torch.testing.assert_close(v_cache[row, : n + 3], values[0])
        assert (k_cache[row, n + 3 :] == 1e3).all()
        expected, expected_lse = attention_sink(q[row : row + 1], keys, values, SINKS, causal=causal, return_lse=True)
        torch.testing.assert_close(found[row : row + 1], expected)
        torch.testing.assert_close(lse[row : row + 1], expected_lse)


def test_kvcache_reads_only():
    q, k, v = inputs(seqlen=6)
    q = q[:, :1]
    torch.testing.assert_close(flash_attn_with_kvcache(q, k, v, s_aux=SINKS), attention_sink(q, k, v, SINKS))
    found = flash_attn_with_kvcache(q, k, v, cache_seqlens=4, s_aux=SINKS)
    torch.testing.assert_close(found, attention_sink(q, k[:, :4], v[:, :4], SINKS))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_flow_through_an_append(causal):
    """No detaching behind the caller's back: the new keys get the gradient they have in the cache."""
    q, k, v = inputs(seqlen=2, dtype=torch.float64)
    k.requires_grad_()
    k_cache, v_cache = torch.zeros(B, 4, HKV, D).double(), torch.zeros(B, 4, HKV, D).double()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=0, causal=causal, s_aux=SINKS.double())
    (found,) = torch.autograd.grad(out.square().sum(), k)
    expected = attention_sink(q, k, v, SINKS.double(), causal=causal)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), k)[0])


INTS = dict(dtype=torch.int32)


@pytest.mark.parametrize("causal", [False, True])
def test_kvcache_in_pages(causal):
    """Appended to pages and read from them, as from a cache in one piece; other pages stay as they were."""
    q, k, v = inputs(seqlen=3)
    _, old_k, old_v = inputs(seqlen=8)
    seqlens, table = torch.tensor((2, 5), **INTS), torch.tensor([[3, 0], [4, 1]], **INTS)
    caches = [x.clone() for x in (old_k, old_v)]
    pages = [torch.full((6, 4, HKV, D), float("nan")) for _ in range(2)]
    for cache, x in zip(pages, caches, strict=True):
        cache[table.long()] = x.unflatten(1, (2, 4))
    options = dict(cache_seqlens=seqlens, causal=causal, s_aux=SINKS, return_softmax_lse=True)
    found, lse = flash_attn_with_kvcache(q, *pages, k, v, block_table=table, **options)
    expected, expected_lse = flash_attn_with_kvcache(q, *caches, k, v, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lse, expected_lse)
    for cache, x in zip(pages, caches, strict=True):
        assert torch.equal(cache[table.long()].flatten(1, 2), x) and bool(cache[[2, 5]].isnan().all())


def test_kvcache_rows_by_index():
    q, k, v = inputs(seqlen=1)
    _, old_k, old_v = inputs(batch=5, seqlen=8)
    index, seqlens = torch.tensor((4, 1), **INTS), torch.tensor((2, 7), **INTS)
    caches = [x[index.long()].clone() for x in (old_k, old_v)]
    expected = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=seqlens, s_aux=SINKS)
    found = flash_attn_with_kvcache(q, old_k, old_v, k, v, cache_seqlens=seqlens, cache_batch_idx=index, s_aux=SINKS)
    torch.testing.assert_close(found, expected)
    assert torch.equal(old_k[index.long()], caches[0]) and torch.equal(old_v[index.long()], caches[1])


@pytest.mark.parametrize("window_size", [(-1, -1), (2, 0)])
def test_kvcache_with_left_padding(window_size):
    """Each row as the row alone without its first slots."""
    q, k, v = inputs(seqlen=2)
    _, old_k, old_v = inputs(seqlen=9)
    leftpad, lengths = (3, 0), (6, 4)
    options = dict(causal=True, window_size=window_size, s_aux=SINKS)
    alone = [
        flash_attn_with_kvcache(
            q[row : row + 1], old_k[row : row + 1, pad:].clone(), old_v[row : row + 1, pad:].clone(),
            k[row : row + 1], v[row : row + 1], cache_seqlens=n - pad, **options,
        )
        for row, (pad, n) in enumerate(zip(leftpad, lengths, strict=True))
    ]  # fmt: skip
    old_k[0, :3] = old_v[0, :3] = float("nan")
    found = flash_attn_with_kvcache(
        q, old_k, old_v, k, v, cache_seqlens=torch.tensor(lengths, **INTS),
        cache_leftpad=torch.tensor(leftpad, **INTS), **options,
    )  # fmt: skip
    torch.testing.assert_close(found, torch.cat(alone))
    torch.testing.assert_close(old_k[0, 6:8], k[0])


@pytest.mark.parametrize("page_size", [None, 1, 3, 8])
@pytest.mark.parametrize("heads", [1, 3])
def test_the_kernel_that_appends(page_size, heads, bounds_checked):
    """What a GPU uses, interpreted, against the assignment that a CPU uses. It writes no key that does not fit."""
    pytest.importorskip("triton")
    from triton_attention_sink_hf.flash_attn_api import _append
    from triton_attention_sink_hf.implementations.triton_decode.append import append_keys

    seqlens = torch.tensor((2, 0, 19), **INTS)
    k, v = torch.randn(3, 5, heads, 12), torch.randn(3, 5, 2 * heads, 20)[:, :, ::2]
    pages, table = (3, 24), None
    if page_size is not None:
        n = 24 // page_size
        pages, table = (4 * n, page_size), torch.randperm(4 * n)[: 3 * n].view(3, n).to(torch.int32)
    found = [torch.full((*pages, heads, size), float("nan")) for size in (12, 20)]
    expected = [x.clone() for x in found]
    append_keys(*found, k, v, seqlens, table)
    _append(*expected, k, v, seqlens, table)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and bool((~a.isnan()).any())
    append_keys(*found, -k, -v, torch.tensor((-5, 24, 2**31 - 9), **INTS), table)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
    if table is not None:
        table[:] = torch.tensor((-1, 4 * n, 2**31 - 1))[:, None]
        append_keys(*found, -k, -v, seqlens, table)
        assert torch.equal(found[0].nan_to_num(7.0), expected[0].nan_to_num(7.0))
        with pytest.raises(IndexError, match="a page for every new key"):
            _append(*expected, k, v, seqlens, table)


TENSOR = torch.zeros(1)
REFUSED = [
    (flash_attn_func, dict(dropout_p=0.1), "dropout_p must be 0.0, got 0.1"),
    (flash_attn_func, dict(alibi_slopes=TENSOR), "alibi_slopes must be None, got a tensor"),
    (flash_attn_func, dict(return_attn_probs=True), "return_attn_probs must be False, got True"),
    (flash_attn_func, dict(s_aux=torch.zeros(3)), "sinks must be (Hq,) = (4,)"),
    (flash_attn_varlen_func, dict(dropout_p=0.1), "dropout_p must be 0.0, got 0.1"),
    (flash_attn_varlen_func, dict(block_table=TENSOR), "block_table must be None, got a tensor"),
    (flash_attn_varlen_func, dict(alibi_slopes=TENSOR), "alibi_slopes must be None, got a tensor"),
    (flash_attn_varlen_func, dict(return_attn_probs=True), "return_attn_probs must be False, got True"),
    (flash_attn_with_kvcache, dict(rotary_cos=TENSOR), "rotary_cos must be None, got a tensor"),
    (flash_attn_with_kvcache, dict(rotary_sin=TENSOR), "rotary_sin must be None, got a tensor"),
    (flash_attn_with_kvcache, dict(block_table=torch.zeros(3, 1, **INTS)), "block_table must be (B, n) with B = 2"),
    (flash_attn_with_kvcache, dict(block_table=torch.full((2, 1), 2, **INTS)), "pages from 0 to 1 where keys are in"),
    (flash_attn_with_kvcache, dict(cache_batch_idx=TENSOR), "cache_batch_idx must be int32 (B,) = (2,), got (1,)"),
    (
        flash_attn_with_kvcache,
        dict(cache_batch_idx=torch.zeros(2, **INTS), block_table=TENSOR),
        "cache_batch_idx must be None where block_table is given",
    ),
    (flash_attn_with_kvcache, dict(cache_leftpad=torch.tensor([0, 10], **INTS)), "leftpad_k must be between 0 and Sk"),
    (flash_attn_with_kvcache, dict(alibi_slopes=TENSOR), "alibi_slopes must be None, got a tensor"),
    (flash_attn_with_kvcache, dict(cache_seqlens=S + 1), "seqused_k must be between 0 and Sk = 9, got 10..10"),
    (flash_attn_with_kvcache, dict(k=inputs()[1]), "k and v must both be given"),
    (flash_attn_with_kvcache, dict(k=inputs()[1], v=inputs()[2]), "cache_seqlens must be given"),
    (flash_attn_with_kvcache, dict(k=TENSOR, v=TENSOR, cache_seqlens=0), "k must be (2, 'Snew', 2, 16)"),
    (
        flash_attn_with_kvcache,
        dict(k=inputs()[1], v=inputs()[2][:, :1], cache_seqlens=0),
        "v must have k's 9 new keys, got 1",
    ),
    (
        flash_attn_with_kvcache,
        dict(k=inputs()[1], v=inputs()[2], cache_seqlens=torch.zeros(B)),
        "cache_seqlens must be an int or int32 (B,) = (2,)",
    ),
]


@pytest.mark.parametrize("function, arguments, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_refusals(function, arguments, message):
    q, k, v = inputs()
    if function is flash_attn_varlen_func:
        cu = torch.tensor([0, B * S], dtype=torch.int32)
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        arguments = dict(cu_seqlens_q=cu, cu_seqlens_k=cu, **arguments)
    with pytest.raises(ValueError) as error:
        function(q, k, v, **arguments)
    assert message in str(error.value)


def test_new_keys_that_do_not_fit_the_cache_raise():
    q, k, v = inputs()
    with pytest.raises((IndexError, ValueError)):
        flash_attn_with_kvcache(q, k.clone(), v.clone(), k, v, cache_seqlens=1)


@pytest.mark.parametrize("function", [flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache])
def test_parameters_that_transformers_looks_for(function):
    """Its wrapper of a Hub kernel passes what it finds in the signature: sinks would be dropped without s_aux."""
    parameters = inspect.signature(function).parameters
    assert {"softmax_scale", "causal", "window_size", "softcap", "s_aux"} <= parameters.keys()
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
