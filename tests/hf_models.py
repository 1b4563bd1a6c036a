"""Tiny Hugging Face models in pairs, eager and ours, with the same random weights. Sinks are spread from -10 to 20."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NAME = "triton_attention_sink"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
VOCAB = 97
COMMON = dict(
    num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=None, attention_dropout=0.0,
)  # fmt: skip
ALTERNATING = ["sliding_attention", "full_attention"]
EXPERTS = dict(num_local_experts=3, num_experts_per_tok=2)
NO_DROPOUT = ("attn_pdrop", "embd_pdrop", "resid_pdrop")
# model -> (config class, model class, arguments, relative tolerance in fp64)
MODELS = {
    "gpt_oss": ("GptOssConfig", "GptOssForCausalLM", dict(sliding_window=5, layer_types=ALTERNATING, **EXPERTS), 1e-10),
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}, 1e-6),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(sliding_window=5), 1e-6),
    "gemma2": (
        "Gemma2Config", "Gemma2ForCausalLM",
        dict(sliding_window=5, layer_types=ALTERNATING, attn_logit_softcapping=2.0, query_pre_attn_scalar=16), 1e-6,
    ),
    "granite_swa": ("GraniteSWAConfig", "GraniteSWAForCausalLM", dict(sliding_window=5, layer_types=ALTERNATING), 1e-5),
    "mimo_v2_flash": (
        "MiMoV2FlashConfig", "MiMoV2FlashForCausalLM",
        dict(sliding_window=5, v_head_dim=24, n_routed_experts=3, num_experts_per_tok=2, moe_intermediate_size=32),
        1e-5,
    ),
    "ministral3": ("Ministral3Config", "Ministral3ForCausalLM", dict(sliding_window=None), 1e-6),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", {}, 1e-6),
    "gpt_bigcode": (
        "GPTBigCodeConfig", "GPTBigCodeForCausalLM",
        dict(n_embd=64, n_head=4, n_layer=2, n_inner=32, n_positions=64, **dict.fromkeys(NO_DROPOUT, 0.0)), 1e-6,
    ),
    "privacy_filter": (
        "OpenAIPrivacyFilterConfig", "OpenAIPrivacyFilterForTokenClassification",
        dict(sliding_window=4, num_labels=7, **EXPERTS), 1e-5,
    ),
}  # fmt: skip
LENGTHS = ((5, 9, 3), (1, 14, 2))  # two rows of 17 packed tokens
CAUSAL = [name for name in MODELS if name != "privacy_filter"]


def make_pair(name: str, dtype=torch.float64, **overrides):
    """(eager model, our model, tolerance) with the same random weights; skips what this transformers lacks."""
    config_class, model_class, arguments, tolerance = MODELS[name]
    if not hasattr(transformers, model_class):
        pytest.skip(f"transformers {transformers.__version__} has no {model_class}")
    arguments = {**COMMON, **arguments, **overrides}
    pair = []
    for implementation in ("eager", NAME):
        config = getattr(transformers, config_class)(**copy.deepcopy(arguments))
        config._attn_implementation = implementation
        if dtype == torch.float64:  # which transformers 5's grouped product does not know
            config._experts_implementation = "eager"
        pair.append(getattr(transformers, model_class)(config).to(dtype).eval())
    eager, ours = pair
    generator = torch.Generator().manual_seed(0)
    for parameter_name, parameter in eager.named_parameters():
        if parameter_name.endswith("sinks"):
            parameter.data = torch.linspace(-10, 20, parameter.numel()).to(parameter)
        elif parameter.dim() > 1:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    ours.load_state_dict(eager.state_dict())
    assert ours.config._attn_implementation == NAME
    return eager, ours, tolerance


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(2, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def packed_positions(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def padded(side: str, dtype=torch.long) -> tuple[torch.Tensor, torch.Tensor]:
    x = tokens(3, 13)
    real = torch.ones(3, 13, dtype=dtype)
    for row, n in enumerate((4, 9, 0)):
        where = slice(0, n) if side == "left" else slice(13 - n, 13)
        real[row, where] = 0
        x[row, where] = 0
    return x, real


def weights(logits: torch.Tensor) -> torch.Tensor:
    """A fixed cotangent, the same for the same row of the same shape."""
    return torch.cos(torch.arange(logits.numel(), dtype=logits.dtype)).view(logits.shape)


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> None:
    assert ours.shape == expected.shape, f"{what}: {ours.shape} against {expected.shape}"
    error = (ours - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
    assert error < tolerance, f"{what}: relative error {error:.1e}"


def assert_same_gradients(ours, expected, tolerance: float) -> None:
    assert ours.keys() == expected.keys()
    for name, grad in expected.items():
        if grad.abs().max() > 1e-12:
            assert_close(ours[name], grad, tolerance, f"gradient of {name}")
    sinks = [name for name in expected if name.endswith("sinks")]
    assert all(ours[name].abs().max() > 0 for name in sinks)
