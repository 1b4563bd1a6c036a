"""Every kind of sink by the config key ``attention_sink``, and sinks by token, against plain autograd in fp64."""

import json
from types import SimpleNamespace

import pytest
import torch
from hf_models import COMMON, EXPERTS, NAME, assert_close, transformers
from torch.nn.functional import softmax

from triton_attention_sink_hf import attention_sink, explain
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward
from triton_attention_sink_hf.integrations import sinks as kinds
from triton_attention_sink_hf.integrations.sinks import parse

SPREAD = torch.tensor([-10.0, 0.0, 5.0, 20.0], dtype=torch.float64)  # so that any head's sink shows


def layer(value=None, **attributes):
    return SimpleNamespace(is_causal=True, training=False, config=SimpleNamespace(attention_sink=value), **attributes)


def inputs(dtype=torch.float64, seqlen=9):
    torch.manual_seed(3)
    return [torch.randn(2, heads, seqlen, 16, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]


def plain(q, k, v, *sinks, visible=None):
    """Softmax over the visible scores and one more column for each of sinks (H,) or (B, H, S). (B, S, H, D)."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if visible is None:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~visible, float("-inf"))
    columns = [(s if s.dim() == 3 else s[None, :, None]).expand(scores.shape[:3])[..., None].to(q.dtype) for s in sinks]
    return (softmax(torch.cat([scores, *columns], -1), -1)[..., : scores.shape[-1]] @ v).transpose(1, 2)


def assert_equal_with_gradients(found, expected, leaves, tolerance=1e-12):
    weights = torch.cos(torch.arange(expected.numel(), dtype=expected.dtype)).view(expected.shape)
    assert_close(found, expected, tolerance, "out")
    grads = [torch.autograd.grad((x * weights).sum(), leaves) for x in (found, expected)]
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        assert_close(ours, theirs, tolerance, "gradient")


BY_HEAD = SPREAD.clone().requires_grad_()
BY_TOKEN = (SPREAD[:, None] + torch.linspace(-3, 3, 9, dtype=torch.float64)).repeat(2, 1, 1).requires_grad_()
# two rows of two packed samples, and what their tokens may see
POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4, 5, 6, 7]])
SEGMENTS = (POSITIONS == 0).cumsum(-1)
SAME_SEGMENT = SEGMENTS[:, :, None] == SEGMENTS[:, None]
DISTANCE = torch.arange(9)[:, None] - torch.arange(9)
CAUSAL, NEAR = DISTANCE >= 0, DISTANCE < 3
# value of the key -> (what the model passes, attributes of the layer, columns beside the keys)
KINDS = {
    "nothing": (None, {}, {}, ()),
    "the model's": (None, {"s_aux": BY_HEAD}, {}, (BY_HEAD,)),
    "the model's, said": ("learned", {"s_aux": BY_HEAD}, {}, (BY_HEAD,)),
    "attached": ("learned", {}, {"sinks": BY_HEAD}, (BY_HEAD,)),
    "none in this layer": ("learned", {}, {"sinks": None}, ()),
    "off by one": (0.0, {}, {}, (torch.zeros(4),)),
    "constant": (-1.5, {}, {}, (torch.full((4,), -1.5),)),
    "constant in words": ("2", {}, {}, (torch.full((4,), 2.0),)),
    "both": ("learned+0.5", {"s_aux": BY_HEAD}, {}, (BY_HEAD, torch.full((4,), 0.5))),
    "attached and constant": ("learned + -1", {}, {"sinks": BY_HEAD}, (BY_HEAD, torch.full((4,), -1.0))),
    "by token": (None, {"sinks": BY_TOKEN}, {}, (BY_TOKEN,)),
    "by token and constant": ("learned+1", {"s_aux": BY_TOKEN}, {}, (BY_TOKEN, torch.ones(4))),
}  # fmt: skip


def trained(columns):
    return [x for x in (BY_HEAD, BY_TOKEN) if any(x is y for y in columns)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_plain_autograd(kind):
    value, passed, attributes, columns = KINDS[kind]
    leaves = inputs() + trained(columns)
    out, nothing = attention_forward(layer(value, **attributes), *leaves[:3], None, **passed)
    assert nothing is None
    assert_equal_with_gradients(out, plain(*leaves[:3], *columns), leaves)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_a_gpu_equals_fp64(kind):
    """The kernels that "auto" takes, in bf16, from the same rounded numbers: within the limits of ``bench``."""
    from triton_attention_sink_hf.bench.measure import LIMIT

    value, passed, attributes, columns = KINDS[kind]
    torch.manual_seed(3)
    q, k, v = (torch.randn(2, h, 300, 64, device="cuda", dtype=torch.bfloat16) for h in (4, 2, 2))

    def on_gpu(x):
        return x.detach().repeat(1, 1, 34)[..., :300].cuda() if x.dim() == 3 else x.detach().cuda()

    sinks = [on_gpu(x) for x in trained(columns)]
    constants = [x.cuda() for x in columns if not (x is BY_HEAD or x is BY_TOKEN)]
    found, expected = ([x.to(dtype).requires_grad_() for x in (q, k, v)] for dtype in (q.dtype, torch.float64))
    ours, exact = ([x.to(dtype).requires_grad_() for x in sinks] for dtype in (torch.float32, torch.float64))
    passed = {name: ours[0] for name in passed}
    attributes = {name: x if x is None else ours[0] for name, x in attributes.items()}
    out = attention_forward(layer(value, **attributes), *found, None, **passed)[0]
    want = plain(*expected, *exact, *constants)
    weights = torch.cos(torch.arange(want.numel(), device="cuda")).view(want.shape).to(q.dtype).double()
    grads = [torch.autograd.grad((x.double() * weights).sum(), leaves)
             for x, leaves in ((out, found + ours), (want, expected + exact))]  # fmt: skip
    names = ("out", "dq", "dk", "dv", *("dsink",) * len(ours))
    for name, ours_, theirs in zip(names, (out, *grads[0]), (want, *grads[1]), strict=True):
        error = (ours_.double() - theirs).norm() / theirs.norm()
        assert error < LIMIT[name], (name, error)


@pytest.mark.parametrize("kind", ["off by one", "both", "by token", "by token and constant"])
def test_every_kind_in_packed_rows_and_under_a_window(kind):
    value, passed, attributes, columns = KINDS[kind]
    leaves = inputs() + trained(columns)
    visible = SAME_SEGMENT & CAUSAL & NEAR
    out, _ = attention_forward(
        layer(value, **attributes), *leaves[:3], None, position_ids=POSITIONS, sliding_window=3, **passed
    )
    assert_equal_with_gradients(out, plain(*leaves[:3], *columns, visible=visible[:, None]), leaves)


@pytest.mark.parametrize("kind", ["nothing", "constant in words", "both", "by token and constant"])
def test_first_keys_beside_a_window_and_other_sinks(kind):
    """Of each packed sample; layers without a window see them anyway."""
    value, passed, attributes, columns = KINDS[kind]
    leaves = inputs() + trained(columns)
    visible = SAME_SEGMENT & CAUSAL & (NEAR | (POSITIONS[:, None] < 2))
    module = layer("first:2" if value is None else f"{value}+first:2", **attributes)
    out, _ = attention_forward(module, *leaves[:3], None, position_ids=POSITIONS, sliding_window=3, **passed)
    assert_equal_with_gradients(out, plain(*leaves[:3], *columns, visible=visible[:, None]), leaves)
    full, _ = attention_forward(module, *leaves[:3], None, **passed)
    assert_equal_with_gradients(full, plain(*leaves[:3], *columns), leaves)


def test_first_keys_need_all_keys():
    q, k, v = inputs()
    with pytest.raises(ValueError, match="must be without 'first:N' for a cache, whose sliding layers"):
        attention_forward(layer("first:2"), q[:, :, -1:], k, v, None, sliding_window=3)


def test_the_last_dimension_of_sinks_by_token_may_be_written_out():
    q, k, v = inputs()
    by_token = attention_forward(layer(), q, k, v, None, sinks=BY_TOKEN)[0]
    assert torch.equal(attention_forward(layer(), q, k, v, None, sinks=BY_TOKEN[..., None])[0], by_token)


WRONG = [
    ("off by one", {}, ValueError, "attention_sink must be a finite number (0 = off-by-one softmax), 'learned'"),
    ("first:-4", {}, ValueError, "got 'first:-4'"),
    ("first:4", {"s_aux": BY_HEAD}, ValueError, "attention_sink must be 'learned' or 'learned+first:4' for"),
    ("first:2", {"sliding_window": 3, "is_causal": False}, ValueError, "must be without 'first:N' for layers that are"),
    (float("inf"), {}, ValueError, "got inf"),
    ("learned+nan", {}, ValueError, "got 'learned+nan'"),
    ("learned+", {}, ValueError, "got 'learned+'"),
    (True, {}, TypeError, "got bool True"),
    ({"kind": "constant"}, {}, TypeError, "got dict"),
    ("learned", {}, ValueError, "attention_sink must be None or a number for SimpleNamespace, which has no sinks, got"),
    (0.0, {"s_aux": BY_HEAD}, ValueError, "attention_sink must be 'learned' or 'learned+0.0' for SimpleNamespace"),
    (None, {"sinks": torch.zeros(2, 4, 8)}, ValueError, "or (B, Hq, Sq) = (2, 4, 9), one per token, got (2, 4, 8)"),
    (None, {"s_aux": torch.zeros(4), "sinks": torch.zeros(4)}, ValueError, "sinks must be None where s_aux is given"),
]  # fmt: skip


@pytest.mark.parametrize("value, passed, error, message", WRONG, ids=[message for *_, message in WRONG])
def test_what_cannot_be_meant_is_refused(value, passed, error, message):
    with pytest.raises(error) as raised:
        attention_forward(layer(value), *inputs(), None, **passed)
    assert message in str(raised.value)


def test_numbers_that_hash_alike_are_told_apart():
    assert parse(1) == parse(1.0) == (False, 1.0, 0)
    with pytest.raises(TypeError, match="got bool True"):
        parse(True)


def test_a_constant_is_made_once(monkeypatch):
    """One launch a layer would show in a short window's time."""
    q, k, v = (x.detach() for x in inputs())
    with torch.inference_mode():
        attention_forward(layer(-0.25), q, k, v, None)
    monkeypatch.setattr(torch, "full", lambda *_, **__: pytest.fail("filled again"))
    q.requires_grad_()  # what was made in inference mode could not be saved for this
    attention_forward(layer(-0.25), q, k, v, None)[0].sum().backward()
    assert q.grad is not None
    assert kinds._remembered(-0.25, 4, q.device).dtype == torch.float32


@pytest.mark.parametrize("value, s", [(0.0, None), ("learned+0.0", SPREAD), (None, BY_TOKEN)])
def test_compiled_as_one_graph(value, s):
    torch._dynamo.reset()
    q, k, v = inputs(torch.float32)
    s = None if s is None else s.detach().float()
    module = layer(value)

    def run(q, k, v):
        return attention_forward(module, q, k, v, None, s_aux=s)[0]

    torch.testing.assert_close(torch.compile(run, backend="eager", fullgraph=True)(q, k, v), run(q, k, v))


# attention_sink with one sink per token


@pytest.mark.parametrize("implementation", ["reference", "triton"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_sinks_by_token_equal_the_same_sinks_by_head(implementation, packed):
    """lse and every gradient, the sinks' summed over the tokens; rows past the last sample see the sink alone."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 12, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    sinks = SPREAD.float().requires_grad_()
    arguments, rows, by_token = {"window_size": (4, 0)}, (q, k, v), sinks[None, :, None].expand(2, 4, 12)
    if packed:
        cu = torch.tensor([0, 5, 5, 20], dtype=torch.int32)
        arguments |= {"cu_seqlens_q": cu, "cu_seqlens_k": cu}
        rows, by_token = tuple(x.flatten(0, 1) for x in rows), sinks[:, None].expand(4, 24)
    arguments |= {"return_lse": True, "implementation": implementation}
    results = [attention_sink(*rows, s, **arguments) for s in (by_token, sinks)]
    grads = []
    for out, lse in results:
        loss = (out * torch.cos(torch.arange(out.numel()).view(out.shape))).sum() + lse.clamp_max(9.0).sum()
        grads.append(torch.autograd.grad(loss, (q, k, v, sinks)))
    for found, expected in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_sinks_by_token_are_exact():
    q, k, v = (torch.randn(2, 5, heads, 4, dtype=torch.float64, requires_grad=True) for heads in (2, 1, 1))
    sinks = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    real = torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    assert torch.autograd.gradcheck(
        lambda *tensors: attention_sink(*tensors, key_padding_mask=real, return_lse=True), (q, k, v, sinks)
    )


def test_a_token_without_a_sink_and_without_a_key():
    q = torch.randn(1, 3, 1, 16, requires_grad=True)
    sinks = torch.tensor([[[float("-inf"), 2.0, float("-inf")]]], requires_grad=True)
    real = torch.tensor([[False, False, True]])
    out, lse = attention_sink(q, q, q, sinks, key_padding_mask=real, return_lse=True)
    assert out[0, :2].abs().max() == 0 and torch.equal(out[0, 2], q[0, 2])
    assert torch.equal(lse[0, 0, :2], sinks[0, 0, :2])
    (out.sum() + lse[..., 1:].sum()).backward()
    assert torch.equal(sinks.grad, torch.tensor([[[0.0, 1.0, 0.0]]])) and q.grad.isfinite().all()


def test_sinks_by_token_are_checked_and_explained():
    q = torch.randn(2, 6, 4, 16)
    for sinks, error, message in (
        (torch.zeros(2, 6, 4), ValueError, r"sinks must be \(Hq,\) = \(4,\) or \(B, Hq, Sq\) = \(2, 4, 6\), got"),
        (torch.zeros(2, 4, 6, dtype=torch.int32), TypeError, "sinks must be a floating dtype, got torch.int32"),
        (torch.zeros(2, 4, 6, device="meta"), ValueError, "sinks must be on q's device cpu, got meta"),
    ):
        for function in (attention_sink, explain):
            with pytest.raises(error, match=message):
                function(q, q, q, sinks)
    cu = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"\(Hq, Tq\) = \(4, 12\), got \(12, 4\)"):
        attention_sink(*[q.flatten(0, 1)] * 3, torch.zeros(12, 4), cu_seqlens_q=cu, cu_seqlens_k=cu)
    assert explain(q, q, q, torch.zeros(2, 4, 6)).implementation == "reference"


# models


def eager_with_a_sink(module, query, key, value, attention_mask, scaling, **kwargs):
    """Eager attention with the constant that the test writes into the config under a name of its own."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ k.transpose(-1, -2) * scaling + attention_mask
    column = scores.new_full((*scores.shape[:3], 1), module.config.tests_sink)
    return (softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v).transpose(1, 2), None


def pair(**settings):
    """A llama with eager_with_a_sink, and ours with the same weights."""
    transformers.AttentionInterface.register("eager_with_a_sink", eager_with_a_sink)
    transformers.AttentionMaskInterface.register("eager_with_a_sink", transformers.masking_utils.eager_mask)
    models = []
    for name in ("eager_with_a_sink", NAME):
        config = transformers.LlamaConfig(**COMMON, **settings)
        config._attn_implementation = name
        torch.manual_seed(0)
        models.append(transformers.LlamaForCausalLM(config).double().eval())
    return models


@pytest.mark.parametrize("key", [0.5, "0.5"])
def test_a_model_with_a_constant_sink_equals_eager(key, tmp_path):
    """As verl sets it; saved in config.json and read from there."""
    eager, ours = pair()
    eager.config.tests_sink = 0.5
    update = pytest.importorskip("verl.utils.model", reason="verl is not installed").update_model_config
    update(ours.config, {"attention_sink": key})
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["attention_sink"] == key
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME, dtype=torch.float64)
    x = torch.arange(26).view(2, 13)
    real = torch.ones(2, 13, dtype=torch.long)
    real[0, :4] = 0
    expected, found = (model(x, attention_mask=real).logits[real.bool()] for model in (eager.eval(), ours.eval()))
    without = pair()[1](x, attention_mask=real).logits[real.bool()]
    assert (without - expected).abs().max() > 1e-3 * expected.abs().max()
    assert_close(found, expected, 1e-6, "logits")  # RMSNorm rounds to fp32 inside
    grads = []
    for model, logits in ((ours, found), (eager, expected)):
        logits.square().sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, grad in grads[1].items():
        assert_close(grads[0][name], grad, 1e-5, name)


def test_a_model_with_learned_sinks_and_a_constant_without_saying_both_is_refused():
    config = transformers.GptOssConfig(**COMMON, **EXPERTS)
    config._attn_implementation, config.attention_sink = NAME, 0.0
    with pytest.raises(ValueError, match=r"must be 'learned' or 'learned\+0.0' for GptOssAttention, which has sinks"):
        transformers.GptOssForCausalLM(config)(torch.arange(5)[None])
