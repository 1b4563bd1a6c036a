"""What the mask function hands to the layers: its contents, its lifetime, and what other code sees of it."""

import gc
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

masking_utils = pytest.importorskip("transformers.masking_utils", reason="transformers is not installed")

from triton_attention_sink_hf import attention_sink  # noqa: E402
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward  # noqa: E402
from triton_attention_sink_hf.integrations import forward_mask, mask_function  # noqa: E402
from triton_attention_sink_hf.integrations.blocks import key_ranges_of_blocks  # noqa: E402
from triton_attention_sink_hf.integrations.forward_mask import GAPS, NO_PADDING, RUNS, ForwardMask  # noqa: E402
from triton_attention_sink_hf.integrations.mask_function import attention_mask  # noqa: E402

CAUSAL = masking_utils.causal_mask_function
needs_blocks = pytest.mark.skipif(
    not hasattr(masking_utils, "blockwise_overlay"), reason="this transformers has no blockwise_overlay"
)


@pytest.fixture(autouse=True)
def first_forward():
    """No forward has begun in this thread."""
    forward_mask._CURRENT.forward = None


def rows(batch=2, seqlen=8, heads=2, d=16):
    return torch.zeros(batch, seqlen, heads, d)


def real_tokens(*lengths, seqlen=8, side="left"):
    """bool (B, S): so many tokens of each row, padded on a side."""
    place = torch.arange(seqlen)
    return torch.stack([place >= seqlen - n if side == "left" else place < n for n in lengths])


def test_a_whole_sequence_hides_nothing():
    for mask in (attention_mask(2, 8, 8), attention_mask(2, 8, 8, attention_mask=real_tokens(8, 8))):
        assert (mask.shape, mask.causal, mask.window) == ((2, 1, 8, 8), True, (-1, -1))
        assert mask.padding() == NO_PADDING
        assert mask.visibility(rows(), rows(), None) == (None, None, None)


@pytest.mark.parametrize(
    ("lengths", "side", "expected"), [((8, 8), "left", NO_PADDING), ((5, 8), "left", RUNS), ((5, 0), "right", RUNS)]
)
def test_padding_of_a_whole_sequence(lengths, side, expected):
    real = real_tokens(*lengths, side=side)
    for dtype in (torch.bool, torch.int64):
        assert attention_mask(2, 8, 8, attention_mask=real.to(dtype)).padding() == expected


def test_padding_between_tokens():
    real = real_tokens(8, 8)
    real[1, 3] = False
    mask = attention_mask(2, 8, 8, attention_mask=real)
    assert mask.padding() == GAPS
    assert mask.visibility(rows(), rows(), None)[1] is mask.real


@pytest.mark.parametrize("offset", [3, torch.tensor(3), torch.tensor([3])], ids=str)
def test_keys_in_use_of_a_static_cache(offset):
    real = real_tokens(2, 5, seqlen=5)
    mask = attention_mask(2, 10, 2, q_offset=offset, attention_mask=real)
    cu, padding, used = mask.visibility(rows(seqlen=2), rows(seqlen=10), torch.arange(2)[None])
    assert cu is None and used.dtype == torch.int32 and used.tolist() == [5, 5]
    assert torch.equal(padding, torch.nn.functional.pad(real, (0, 5)))
    assert attention_mask(2, 10, 2, q_offset=offset).visibility(rows(seqlen=2), rows(seqlen=10), None)[1] is None


def test_transformers_4_tells_where_the_queries_stand_in_the_cache():
    mask = attention_mask(2, 10, cache_position=torch.tensor([3, 4]))
    assert mask.shape == (2, 1, 2, 10)
    assert mask.visibility(rows(seqlen=2), rows(seqlen=10), None)[2].tolist() == [5, 5]


def test_a_sliding_caches_offset_shifts_the_padding():
    assert attention_mask(2, 5, 2, q_offset=7, kv_offset=4).visibility(rows(seqlen=2), rows(seqlen=5), None)[2] is None
    real = real_tokens(3, 8)
    assert torch.equal(attention_mask(2, 6, 1, q_offset=7, kv_offset=2, attention_mask=real).real, real[:, 2:])


def test_a_bidirectional_pattern_does_not_count_queries():
    """Cross-attention: 3 queries, 8 keys of the encoder, none hidden but the padding."""
    real = real_tokens(5, 8, side="right")
    mask = attention_mask(2, 8, 3, attention_mask=real, allow_is_bidirectional_skip=True)
    assert not mask.causal and mask.used is None and torch.equal(mask.real, real)


@pytest.mark.parametrize(
    ("local_size", "bidirectional", "window"),
    [(None, False, (-1, -1)), (5, False, (4, 0)), (1, False, (0, 0)), (5, True, (5, 5)), (None, True, (-1, -1))],
)
def test_windows(local_size, bidirectional, window):
    skip = {"allow_is_bidirectional_skip": True} if bidirectional else {}
    assert attention_mask(1, 8, 8, local_size=local_size, **skip).window == window


@pytest.mark.parametrize("window", [0, -1])
def test_windows_that_show_nothing_are_refused(window):
    with pytest.raises(ValueError, match="sliding_window must be at least 1"):
        attention_mask(1, 8, 8, local_size=window)


@pytest.mark.parametrize("window", [None, 3])
def test_a_packed_pattern_is_cut(window):
    samples = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 1]])
    pattern = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
    pattern = masking_utils.and_masks(pattern, masking_utils.packed_sequence_mask_function(samples))
    mask = attention_mask(2, 8, 8, mask_function=pattern, local_size=window)
    cu = mask.visibility(rows(), rows(), None)[0]
    assert cu.tolist() == [0, 3, 5, 8, 9, *[16] * 12]


def test_blocks_inside_a_packed_pattern_are_seen_when_compiled():
    """transformers 5.24 puts the packed pattern around them, and a compiled function cannot be taken apart."""
    samples, blocks = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]]), torch.tensor([[-1, -1, -1, -1, 3, 3, -1, -1]])

    def cuts(samples, blocks):
        pattern = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(blocks))
        pattern = masking_utils.and_masks(pattern, masking_utils.packed_sequence_mask_function(samples))
        return attention_mask(1, 8, 8, mask_function=pattern, device=samples.device).cuts

    compiled = torch.compile(cuts, backend="eager", fullgraph=True)
    assert compiled(samples, torch.full_like(blocks, -1))[0].nonzero().flatten().tolist() == [3]
    with pytest.raises(RuntimeError, match="must be causal, got tokens that see the one after them"):
        compiled(samples, blocks)
    torch._dynamo.reset()


def block_mask(blocks, window=None, kv_length=8, **keywords):
    pattern = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
    pattern = masking_utils.or_masks(pattern, masking_utils.blockwise_overlay(torch.tensor(blocks)))
    return attention_mask(len(blocks), kv_length, 8, mask_function=pattern, local_size=window, **keywords)


def dense_of(ranges):
    j = torch.arange(8)
    return (j >= ranges[..., :1]) & (j < ranges[..., 1:])


@needs_blocks
@pytest.mark.parametrize("window", [None, 3])
def test_blocks_are_one_interval_a_query(window):
    """As eager's dense mask shows them: neighbours of different numbers, of any length, at both ends."""
    mask = block_mask([[0, 0, 0, 0, 0, 1, 1, -1], [-1, -1, 7, -1, 2, 2, 2, 2]], window)
    ranges = mask.key_ranges(False, torch.device("cpu"))
    assert torch.equal(dense_of(ranges), mask.dense[:, 0] == 0)
    flat = mask.key_ranges(True, torch.device("cpu"))
    assert torch.equal(flat, (ranges + torch.tensor([0, 8])[:, None, None]).flatten(0, 1))


@needs_blocks
def test_a_window_that_hides_a_part_of_a_block():
    """As transformers 5.24 has it in Gemma 3's sliding layers, built by hand."""
    blocks = masking_utils.blockwise_overlay(torch.tensor([[0, 0, 0, 0, 0, 1, 1, -1]]))
    pattern = masking_utils.or_masks(CAUSAL, blocks)
    pattern = masking_utils.and_masks(pattern, masking_utils.sliding_window_overlay(3))
    mask = attention_mask(1, 8, 8, mask_function=pattern, use_vmap=True)
    found = key_ranges_of_blocks(mask.blocks, 2, windowed=True)
    assert torch.equal(mask.key_ranges(False, torch.device("cpu")), found)
    index = torch.arange(8)
    want = pattern(torch.zeros((), dtype=torch.int64), None, index[:, None], index[None])
    assert torch.equal(dense_of(found)[0], want)
    for other in (masking_utils.and_masks(pattern, CAUSAL), masking_utils.or_masks(CAUSAL, lambda *x: True), CAUSAL):
        with pytest.raises(ValueError, match="a mask function of the user's"):
            attention_mask(1, 8, 8, mask_function=other, use_vmap=True)


@needs_blocks
def test_blocks_that_are_not_served():
    assert block_mask([[-1] * 8]).key_ranges(False, torch.device("cpu")) is None
    with pytest.raises(ValueError, match="of which one lies in two places of a row"):
        block_mask([[0, 0, -1, 0, 0, -1, -1, -1]])
    padding = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]])  # a number of padding too, which no one sees
    found = block_mask([[0, 0, -1, 0, 0, -1, -1, -1]], attention_mask=padding).key_ranges(False, torch.device("cpu"))
    assert found[0, :3].tolist() == [[0, 2], [0, 2], [0, 3]]
    with pytest.raises(ValueError, match="in a cache of another length"):
        block_mask([[0, 0, -1, -1, -1, -1, -1, -1, -1]], kv_length=9)
    with pytest.raises(ValueError, match="under sequence parallelism"):
        block_mask([[0, 0, -1, -1, -1, -1, -1, -1]]).for_gathered_rows(16)


@needs_blocks
def test_packed_samples_do_not_see_each_others_blocks():
    """Their cuts come from positions; the call takes both."""
    mask = block_mask([[-1, 0, 0, 0, -1, 1, 1, -1]])
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    out, _ = attention_forward(torch.nn.Module(), q, k, v, mask, position_ids=positions)
    for rows, blocks in ((slice(0, 4), [[-1, 0, 0, 0]]), (slice(4, 8), [[-1, 1, 1, -1]])):
        ranges = key_ranges_of_blocks(torch.tensor(blocks), -1)
        alone = attention_sink(*(x[:, :, rows].transpose(1, 2) for x in (q, k, v)), causal=False, key_ranges=ranges)
        torch.testing.assert_close(out[:, rows], alone)


def test_cuts_and_padding_in_one_row():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    real = real_tokens(7, side="right")
    cu, padding, _ = attention_mask(1, 8, 8, attention_mask=real).visibility(rows(1), rows(1), positions)
    assert padding is None and cu.tolist() == [0, 3, 7, *[8] * 6]
    real[0, 4] = False  # between two tokens of a sample, which still see each other
    cu, padding, _ = attention_mask(1, 8, 8, attention_mask=real).visibility(rows(1), rows(1), positions)
    assert torch.equal(padding, real[0]) and cu.tolist() == [0, 3, *[8] * 7]


def test_nothing_outlives_its_forward():
    positions, q = torch.tensor([[0, 1, 0, 1]]), rows(1, 4)
    mask = attention_mask(1, 4, 4)
    first = mask.visibility(q, q, positions)[0]
    assert mask.visibility(q, q, positions)[0] is first  # the next layer
    positions.numpy()[:] = [[0, 0, 1, 2]]  # which counts as no change
    assert attention_mask(1, 4, 4).visibility(q, q, positions)[0].tolist() == [0, 1, 4, 4, 4]
    derived, positions_alive = weakref.ref(first), weakref.ref(positions)
    del mask, first, positions
    forward_mask._CURRENT.forward = None
    gc.collect()
    assert derived() is None and positions_alive() is None


def test_masks_of_one_forward_share_what_they_derive():
    positions, q = torch.tensor([[0, 1, 0, 1]]), rows(1, 4)
    full, sliding = attention_mask(1, 4, 4), attention_mask(1, 4, 4, local_size=2)
    assert full.forward is sliding.forward
    assert full.visibility(q, q, positions)[0] is sliding.visibility(q, q, positions)[0]
    assert attention_mask(1, 4, 4).forward is not full.forward  # layers have run: the next forward


def test_masks_of_one_forward_with_other_padding_do_not_share():
    positions, q = torch.tensor([[0, 1, 0, 1]]), rows(1, 4)
    ones, zeros = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, True, True, False]])
    one, other = attention_mask(1, 4, 4, attention_mask=ones), attention_mask(1, 4, 4, attention_mask=zeros)
    assert one.forward is other.forward
    assert one.visibility(q, q, positions)[0].tolist() == [0, 2, 4, 4, 4]
    assert other.visibility(q, q, positions)[0].tolist() == [0, 2, 3, 4, 4]


def test_a_forward_belongs_to_its_thread():
    found = []
    here = attention_mask(1, 4, 4)
    thread = threading.Thread(target=lambda: found.append(attention_mask(1, 4, 4)))
    thread.start()
    thread.join()
    assert found[0].forward is not here.forward


@pytest.mark.parametrize("kinds", [None, ["full_attention", "full_attention", "sliding_attention"]])
def test_what_must_be_read_is_read_at_once(monkeypatch, kinds):
    """One wait for the device, after the last mask of a forward: one for each kind of layer."""
    reads, real, stack = [], real_tokens(5, 8), torch.stack
    monkeypatch.setattr(torch, "stack", lambda tensors: reads.append(len(tensors)) or stack(tensors))
    config = SimpleNamespace(layer_types=kinds)
    sizes = (None, 4) if kinds else (None,)
    masks = [attention_mask(2, 8, 8, attention_mask=real, local_size=size, config=config) for size in sizes]
    assert reads == [len(sizes)]
    assert [mask.padding() for mask in masks for _ in range(3)] == [RUNS] * 3 * len(sizes)
    assert len(reads) == 1


def test_masks_that_are_fewer_than_kinds_of_layers_are_read_by_the_first_layer():
    config = SimpleNamespace(layer_types=["full_attention", "sliding_attention"])
    mask = attention_mask(2, 8, 8, attention_mask=real_tokens(5, 8), config=config)
    assert mask.padding() == RUNS


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    mask = attention_mask(2, 8, 8, attention_mask=real_tokens(5, 8))
    for module in (forward_mask, mask_function):
        monkeypatch.setattr(module, "is_recorded", lambda tensor: True)
    assert mask.padding() == GAPS
    assert attention_mask(2, 8, 8, attention_mask=real_tokens(8, 8)).padding() == GAPS
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    first, second = (mask.visibility(rows(), rows(), positions)[0] for _ in range(2))
    assert first is not second and torch.equal(first, second)


def test_a_layer_with_other_keys_than_the_mask_is_refused():
    mask = attention_mask(1, 8, 8)
    mask.check(8, 8)
    for seqlen_q, seqlen_k in ((8, 10), (8, 7), (7, 8)):
        with pytest.raises(
            ValueError, match=f"the layer's {seqlen_q} queries and {seqlen_k} keys, got one for 8 and 8"
        ):
            mask.check(seqlen_q, seqlen_k)


@pytest.mark.parametrize("window", [None, 3])
def test_other_code_sees_eagers_mask(window):
    real = real_tokens(5, 8)
    pattern = CAUSAL if window is None else masking_utils.sliding_window_causal_mask_function(window)
    arguments = dict(
        batch_size=2, q_length=8, kv_length=8, q_offset=0, kv_offset=0, mask_function=pattern, attention_mask=real,
        allow_is_causal_skip=True, dtype=torch.float32, config=None, use_vmap=False, device=torch.device("cpu"),
    )  # fmt: skip
    mask, expected = attention_mask(**arguments, local_size=window), masking_utils.eager_mask(**arguments)
    scores = torch.randn(2, 3, 8, 8)
    assert torch.equal(scores + mask, scores + expected)
    assert torch.equal(mask + scores, scores + expected)
    assert torch.equal(torch.cat([mask, scores[:, :1]], dim=1), torch.cat([expected, scores[:, :1]], dim=1))
    assert torch.equal(mask[:, :, -1, :], expected[:, :, -1, :])
    assert torch.equal(mask[:, :, :, :5], expected[:, :, :, :5])
    assert torch.equal(torch.nn.functional.pad(mask, (0, 2)), torch.nn.functional.pad(expected, (0, 2)))
    assert torch.equal(mask.bool(), expected.bool()) and torch.equal(mask == 0, expected == 0)
    assert mask.size(-1) == 8 and mask.dim() == mask.ndim == 4 and mask.dtype == torch.float32
    assert torch.equal(mask.to(torch.float64), expected.double())


def test_other_code_sees_eagers_mask_where_nothing_is_hidden():
    """eager's own function may skip a bidirectional mask."""
    arguments = dict(mask_function=masking_utils.bidirectional_mask_function, allow_is_bidirectional_skip=True)
    mask = attention_mask(2, 8, 8, q_offset=0, dtype=torch.float32, device=torch.device("cpu"), **arguments)
    scores = torch.randn(2, 3, 8, 8)
    assert torch.equal(scores + mask, scores)


def test_a_static_caches_counter_may_move_on():
    counter = torch.tensor(3)
    arguments = dict(q_offset=counter, kv_offset=0, dtype=torch.float32, device=torch.device("cpu"))
    mask = attention_mask(1, 10, 2, mask_function=CAUSAL, **arguments)
    counter += 2
    assert ((mask[0, 0] == 0).sum(-1) == torch.tensor([4, 5])).all() and mask.used == 5


def test_it_is_handed_on_whole_where_nothing_is_cut_off():
    mask = attention_mask(1, 8, 8)
    assert mask[:, :, :, :8] is mask and mask[..., :9] is mask
    assert attention_mask(1, 8, 8, attention_mask=mask) is mask
    moved = mask.to("cpu")
    assert isinstance(moved, ForwardMask) and moved.forward is mask.forward
    assert isinstance(mask.to(torch.device("meta"), non_blocking=True), ForwardMask)


def test_it_is_no_tensor():
    assert not isinstance(attention_mask(1, 8, 8), torch.Tensor)
