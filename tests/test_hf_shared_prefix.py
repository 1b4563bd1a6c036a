"""``model(..., shared_prefixes=tree)``: logits and every gradient equal eager's, sample by sample. The example runs."""

import importlib.util
import re

import pytest
import torch
from hf_models import make_pair, tokens
from processes import ROOT

from triton_attention_sink_hf import SharedPrefixes, flash_attention_triton_sink
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

TREE = SharedPrefixes((7, 4, 0, 9, 5, 3, 6), (-1, 0, 0, 0, -1, -1, 5))


def separate_logits(model, row):
    """(T, vocabulary): those of each segment behind its prompt."""
    segments, found = row[0].split(TREE.lengths), []
    for segment, prefix in zip(segments, TREE.prefix_of, strict=True):
        path = segment if prefix < 0 else torch.cat([segments[prefix], segment])
        logits = model(path[None], use_cache=False).logits[0]
        found.append(logits[len(path) - len(segment) :])
    return torch.cat(found)


def tree_logits(model, row, **keywords):
    return model(row, position_ids=TREE.position_ids(), use_cache=False, shared_prefixes=TREE, **keywords).logits[0]


@pytest.mark.parametrize("name", ["gpt_oss", "llama", "mistral", "gemma2", "ministral3"])
def test_a_tree_equals_separate_samples(name):
    eager, ours, tolerance = make_pair(name)
    row = tokens(1, TREE.total)
    want = separate_logits(eager, row)
    dout = torch.randn_like(want)
    want.backward(dout)
    if name == "gpt_oss":
        ours.gradient_checkpointing_enable({"use_reentrant": False})
        ours.train()
    got = tree_logits(ours, row)
    got.backward(dout)
    assert (got - want).abs().max() < tolerance * want.abs().max()
    for (key, a), b in zip(eager.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            # a model's norms are in fp32, also backward: there eager rounds once a sample, a tree once a prompt
            assert (a.grad - b.grad).abs().max() <= 1e-5 * max(a.grad.abs().max(), 1e-3), key


def test_what_a_tree_cannot_be_joined_with():
    _, ours, _ = make_pair("gpt_oss", torch.float32)
    row, positions = tokens(1, TREE.total), TREE.position_ids()
    padding = torch.ones_like(row)
    padding[0, :3] = 0
    cu = torch.tensor([0, TREE.total], dtype=torch.int32)
    for error, keywords, message in (
        (TypeError, {"shared_prefixes": {"lengths": [40]}}, "shared_prefixes must be a SharedPrefixes, got dict"),
        (ValueError, {"position_ids": torch.arange(TREE.total)[None]}, "position_ids must be those of shared_prefixes"),
        (ValueError, {"position_ids": None}, "position_ids must be those of shared_prefixes"),
        (ValueError, {"attention_mask": padding}, "attention_mask must be None or without padding where shared"),
        (ValueError, {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}, "cu_seq_lens_q must be None where shared_prefixes"),
        (ValueError, {"shared_prefixes": SharedPrefixes((9,), (-1,))}, "shared_prefixes must be of one row .* total 9"),
    ):
        with pytest.raises(error, match=message):
            ours(row, **{"position_ids": positions, "shared_prefixes": TREE, "use_cache": False, **keywords})
    cache = ours(row).past_key_values
    with pytest.raises(ValueError, match="without a cache, got total 34"):
        ours(row, position_ids=positions, shared_prefixes=TREE, past_key_values=cache)
    tree_logits(ours, row, attention_mask=torch.ones_like(row))  # no padding, so nothing is said

    encoder, _, _ = make_pair("privacy_filter", torch.float32)
    encoder.set_attn_implementation("triton_attention_sink")
    with pytest.raises(ValueError, match="shared_prefixes must be None for layers that are not causal"):
        encoder(row, position_ids=positions, shared_prefixes=TREE)


def test_sequence_parallelism_and_continuous_batches_refuse_a_tree(monkeypatch):
    q, layer = torch.randn(1, 2, TREE.total, 16), torch.nn.Module()
    monkeypatch.setattr(flash_attention_triton_sink, "active_group", lambda rows: object())
    with pytest.raises(ValueError, match="shared_prefixes must be None under sequence parallelism"):
        attention_forward(layer, q, q, q, shared_prefixes=TREE)
    with pytest.raises(ValueError, match="shared_prefixes must be None in continuous batching"):
        attention_forward(layer, q, q, q, shared_prefixes=TREE, cache=object(), read_index=[0], write_index=[0])


def test_the_example_agrees(capsys):
    spec = importlib.util.spec_from_file_location("train_step", ROOT / "examples" / "shared_prefix" / "train_step.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.main() < 1e-5
    found = re.findall(r"(\d+) tokens, loss (\S+)", capsys.readouterr().out)
    assert [n for n, _ in found] == ["192", "84"]
    assert abs(float(found[0][1]) - float(found[1][1])) < 1e-5
