"""``attach_learned_sinks``: trainable sinks for models without, saved, loaded and sharded with the other parameters."""

import copy

import pytest
import torch
import torch.distributed as dist
from hf_models import COMMON, EXPERTS, NAME, assert_close, tokens, transformers, weights

from triton_attention_sink_hf import attach_learned_sinks

NAMES = tuple(f"model.layers.{i}.self_attn.sinks" for i in range(2))
SPREAD = torch.tensor([[-3.0, 0.0, 2.0, 4.0], [1.0, -1.0, 5.0, -20.0]])


def tiny(kind="Llama", dtype=torch.float64, attention=NAME, **settings):
    config = getattr(transformers, f"{kind}Config")(**COMMON, **settings)
    config._attn_implementation = attention
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def spread(model):
    """The model with sinks that differ by layer and head."""
    attach_learned_sinks(model)
    with torch.no_grad():
        for name, values in zip(NAMES, SPREAD, strict=True):
            model.get_parameter(name).copy_(values)
    return model


def loss_of(model):
    logits = model(tokens(2, 13)).logits
    return (logits * weights(logits)).sum()


def eager_with_sinks(module, query, key, value, attention_mask, scaling, **kwargs):
    """gpt-oss's own eager attention, called by a llama."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    return eager_attention_forward(module, query, key, value, attention_mask, scaling, **kwargs)


def test_a_llama_with_attached_sinks_equals_eager():
    transformers.AttentionInterface.register("eager_with_sinks", eager_with_sinks)
    transformers.AttentionMaskInterface.register("eager_with_sinks", transformers.masking_utils.eager_mask)
    ours = spread(tiny())
    eager = copy.deepcopy(ours)
    eager.set_attn_implementation("eager_with_sinks")
    found, expected = loss_of(ours), loss_of(eager)
    assert abs(expected - loss_of(tiny())) > 1e-3 * abs(expected)
    assert_close(found, expected, 1e-6, "loss")
    found.backward(), expected.backward()
    grads = {name: p.grad for name, p in ours.named_parameters()}
    assert set(NAMES) <= set(grads)
    for name, p in eager.named_parameters():
        assert_close(grads[name], p.grad, 1e-5, name)


def test_dtype_names_and_a_second_call():
    model = tiny(dtype=torch.bfloat16)
    assert attach_learned_sinks(model, -2) == NAMES and model.config.attention_sink == "learned"
    before = [model.get_parameter(name) for name in NAMES]
    assert all(p.dtype == torch.bfloat16 and p.shape == (4,) and (p == -2).all() and p.requires_grad for p in before)
    assert attach_learned_sinks(model, 7.0) == NAMES
    assert all(model.get_parameter(name) is p for name, p in zip(NAMES, before, strict=True))


def test_saved_and_loaded_with_the_checkpoint(tmp_path):
    model = spread(tiny(dtype=torch.float32))
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    with pytest.raises(ValueError, match=r"has no sinks, got 'learned'.*attach_learned_sinks"):
        again(tokens(1, 5))  # not without them, in silence
    attach_learned_sinks(again)
    assert torch.equal(loss_of(again), loss_of(model))
    fresh = tiny(dtype=torch.float32)
    attach_learned_sinks(fresh, tmp_path)
    assert torch.equal(loss_of(fresh), loss_of(model))
    empty = tmp_path / "empty"
    with pytest.raises(ValueError, match=f"init must be a number or a folder .* without {NAMES[0]}"):
        attach_learned_sinks(tiny(), empty)


def test_an_auto_class_may_attach_them(tmp_path):
    """The recipe of the guide for hosts that build the model themselves, as verl does."""

    class LlamaWithSinks(transformers.LlamaForCausalLM):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model = transformers.LlamaForCausalLM.from_pretrained(*args, **kwargs)
            attach_learned_sinks(model)
            return model

    mapping = transformers.AutoModelForCausalLM._model_mapping
    try:
        transformers.AutoModelForCausalLM.register(transformers.LlamaConfig, LlamaWithSinks, exist_ok=True)
        tiny(dtype=torch.float32).save_pretrained(tmp_path / "without")
        spread(tiny(dtype=torch.float32)).save_pretrained(tmp_path / "with")
        for folder, first in (("without", 0.0), ("with", -3.0)):
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation=NAME)
            assert model.get_parameter(NAMES[0])[0] == first
            loss_of(model).backward()
            assert model.get_parameter(NAMES[0]).grad.abs().max() > 0
    finally:
        mapping._extra_content.pop(transformers.LlamaConfig, None)


def test_trained_by_an_optimizer_under_fsdp2_and_its_state_dict():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        plain = spread(tiny(dtype=torch.float32))
        sharded = copy.deepcopy(plain)
        for block in sharded.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        assert hasattr(sharded.get_parameter(NAMES[0]), "placements")
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
            loss_of(model).backward()
            optimizer.step()
        state = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
        for name, start in zip(NAMES, SPREAD, strict=True):
            torch.testing.assert_close(state[name], plain.get_parameter(name).detach())
            assert not torch.equal(state[name], start)
        with pytest.raises(ValueError, match="model must not be sharded yet"):
            fresh = tiny(dtype=torch.float32)
            fully_shard(fresh, mesh=mesh)
            attach_learned_sinks(fresh)
    finally:
        dist.destroy_process_group()


def test_sinks_beside_a_constant():
    model = tiny()
    model.config.attention_sink = "learned+0.0"
    attach_learned_sinks(model, 0.0)
    assert model.config.attention_sink == "learned+0.0"
    one = loss_of(model)
    model.config.attention_sink = "learned"
    for name in NAMES:
        model.get_parameter(name).data.fill_(torch.tensor(2.0).log())  # two sinks of 0 are one of log 2
    torch.testing.assert_close(loss_of(model), one)


def constant():
    model = tiny()
    model.config.attention_sink = 0.0
    return model


REFUSED = [
    (lambda: tiny("GptOss", **EXPERTS), {}, ValueError, "model must be one without sinks, got GptOssForCausalLM"),
    (lambda: tiny(attention="eager"), {}, ValueError, "attn_implementation must be 'triton_attention_sink' for attach"),
    (constant, {}, ValueError, "attention_sink must be None, 'learned' or 'learned+0.0' for attached sinks, got 0.0"),
    (lambda: torch.nn.Linear(2, 2), {}, TypeError, "model must be a transformers model, got Linear"),
    (tiny, {"init": True}, TypeError, "init must be None, a number or the folder of a checkpoint, got bool"),
    (
        lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(d_model=8, d_kv=4, num_layers=1, d_ff=8)),
        {}, ValueError, "model must be a decoder or an encoder alone, got T5ForConditionalGeneration",
    ),
]  # fmt: skip


@pytest.mark.parametrize("make, arguments, error, message", REFUSED, ids=[message for *_, message in REFUSED])
def test_refusals(make, arguments, error, message):
    with pytest.raises(error) as raised:
        attach_learned_sinks(make(), **arguments)
    assert message in str(raised.value)
