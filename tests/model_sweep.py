"""Every text model class of the installed transformers, tiny and random, against its own eager attention.

    python tests/model_sweep.py [--only NAME] [--out FILE] [--timeout SECONDS] [--workers N]

Prints a line a class and case that is not right; ``--out`` writes the table. A verdict is one of

right          logits, gradients and generated tokens are eager's, to 1e-4 in fp32
refused: ...   this package raised ValueError, TypeError or NotImplementedError
n/a: ...       nothing to compare: the class cannot be built tiny, eager fails, the forward takes no positions, ...
WRONG: ...     anything else

The truth for packed rows is eager on each sample alone. Each class runs in a process of its own.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import math
import multiprocessing
import os
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers import masking_utils
from transformers.models.auto import modeling_auto

import triton_attention_sink_hf
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward, attention_mask

NAME = "triton_attention_sink"
TOLERANCE = 1e-4
VOCAB, WINDOW, LONG = 97, 5, 64
MAPPINGS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "TOKEN_CLASSIFICATION",
)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Tiny configs
WIDTH = 64
TINY = {
    **dict.fromkeys((
        "hidden_size", "d_model", "n_embd", "embed_dim", "embedding_size", "dim", "emb_dim", "word_embed_proj_dim",
        "out_hidden_size", "projection_dim", "cross_attention_hidden_size", "vision_output_dim", "encoder_hidden_size",
        "lru_width", "out_dim", "output_dim", "text_hidden_size", "decoder_hidden_size", "encoder_width",
        "projection_hidden_size", "hidden_dim", "qformer_hidden_size", "backbone_hidden_size",
    ), WIDTH),
    **dict.fromkeys((
        "intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "d_ff", "n_inner", "ffn_hidden_size",
        "moe_intermediate_size", "shared_expert_intermediate_size", "dim_ff", "dff", "intermediate_size_mlp",
        "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "speech_encoder_intermediate_size",
        "prefix_dense_intermediate_size", "shared_intermediate_size", "mlp_dim", "dense_intermediate_size",
    ), 32),
    **dict.fromkeys((
        "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads", "decoder_attention_heads",
        "attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads", "conf_num_attention_heads",
        "speech_encoder_attention_heads", "encoder_num_attention_heads", "decoder_num_attention_heads",
        "cross_num_attention_heads",
    ), 4),
    **dict.fromkeys((
        "num_key_value_heads", "num_kv_heads", "encoder_num_key_value_heads", "decoder_num_key_value_heads",
        "cross_num_key_value_heads", "num_global_key_value_heads",
    ), 2),
    **dict.fromkeys((
        "head_dim", "d_kv", "kv_channels", "attention_head_size", "global_head_dim", "cross_head_dim",
        "query_pre_attn_scalar", "v_head_dim", "swa_head_dim",
    ), 16),
    **dict.fromkeys((
        "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
    ), 4),
    **dict.fromkeys((
        "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth",
        "num_decoder_layers", "num_encoder_layers", "speech_encoder_layers", "conf_num_hidden_layers",
        "encoder_num_hidden_layers", "decoder_num_hidden_layers", "layers", "attn_layers_count",
        "num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts",
    ), 2),
    **dict.fromkeys((
        "vocab_size", "src_vocab_size", "tgt_vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input",
        "additional_vocab_size", "entity_vocab_size", "tgt_vocab", "audio_vocab_size",
    ), VOCAB),
    **dict.fromkeys(("n_group", "topk_group", "pretraining_tp", "first_k_dense_replace"), 1),
    "n_shared_experts": 1, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "qk_head_dim": 24, "q_lora_rank": 32,
    "kv_lora_rank": 32, "rotary_dim": 8, "hidden_size_per_layer_input": 16, "entity_emb_size": 16,
    "use_sliding_window": True, "max_window_layers": 0, "emb_pdrop": 0.0, "use_mamba_kernels": False,
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "mamba_n_groups": 1, "n_groups": 1, "mamba_ngroups": 1, "mamba_chunk_size": 8, "chunk_size": 8, "mamba_d_ssm": 128,
    "attn_layer_period": 2, "attn_layer_offset": 1, "laurel_rank": 8, "index_topk": 64, "num_nextn_predict_layers": 0, "num_labels": 7,
    "scale_embedding": False, "output_router_logits": False, "attn_logit_softcapping": 2.0,
}  # fmt: skip
# Attributes that say how far a layer looks. A class that has one runs a second time with a short window.
WINDOWS = {
    "sliding_window": WINDOW, "local_attention": 2 * (WINDOW - 1), "attention_chunk_size": WINDOW,
    "sliding_window_size": WINDOW, "attention_window_size": WINDOW, "local_window": WINDOW,
}  # fmt: skip
# What the rules above do not get right, by config class.
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
MROPE_HALF = {**MROPE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4}  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # fmt: skip
BERT_DECODER = {**BERT, "is_decoder": True, "add_cross_attention": True}
ENCODER_DECODER = {"decoder": BERT_DECODER, "decoder_start_token_id": 2, "pad_token_id": 0}
OVERRIDES: dict[str, dict] = {
    "BambaConfig": {"attn_layer_indices": [1]},
    "BltConfig": {"encoder_hash_byte_group_vocab": VOCAB},
    "BltLocalDecoderConfig": {"hidden_size_global": 64},
    "BltLocalEncoderConfig": {"hidden_size_global": 64},
    "DbrxConfig": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4}, "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32}},
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [32, 32], "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
    },
    "EvollaConfig": {"num_key_value_heads": 4},
    "FastVlmConfig": {"vision_config": CLIP},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [32] * 4,
    },
    "Granite4VisionConfig": {"text_config": {
        "model_type": "granite4_vision_text", "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
    }, "spatial_target_layers": [0, 0, 1, 1], "deepstack_layer_map": []},
    "HrmTextConfig": {"H_cycles": 1, "L_cycles": 1},
    "LongcatFlashConfig": {"head_dim": 8, "num_hidden_layers": 4},
    "MoonshineConfig": {"encoder_num_key_value_heads": 4, "decoder_num_key_value_heads": 4},
    "MoonshineStreamingConfig": {"num_key_value_heads": 4},
    "NllbMoeConfig": {"encoder_sparse_step": 1, "decoder_sparse_step": 1},
    "SwitchTransformersConfig": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "ZambaConfig": {
        "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32,
    },
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"]},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16},
    "XmodConfig": {"default_language": "en_XX"},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 85}},
    "Emu3Config": {"vocabulary_map": {"<image>": 85}},
    "ReformerConfig": {"axial_pos_embds": False},
    "Qwen2VLTextConfig": {"rope_parameters": MROPE},
    "Qwen3VLTextConfig": {"rope_parameters": MROPE},
    "Qwen3VLMoeTextConfig": {"rope_parameters": MROPE},
    "Qwen3OmniMoeTextConfig": {"rope_parameters": MROPE},
    "Qwen2_5_VLTextConfig": {"rope_parameters": MROPE},
    "Qwen2_5OmniTextConfig": {"rope_parameters": MROPE},
    "PaddleOCRTextConfig": {"rope_parameters": MROPE},
    "Glm4vTextConfig": {"rope_parameters": MROPE},
    "GlmOcrTextConfig": {"rope_parameters": MROPE},
    "Glm4vMoeTextConfig": {"rope_parameters": MROPE_HALF},
}  # fmt: skip
# Configs of several models, which have no default.
COMPOSITE = {
    "EncoderDecoderConfig": {"encoder": BERT, **ENCODER_DECODER},
    "VisionEncoderDecoderConfig": {"encoder": {**CLIP, "model_type": "vit", "image_size": 8, "patch_size": 4},
                                   **ENCODER_DECODER},
    "SpeechEncoderDecoderConfig": {"encoder": {**BERT, "model_type": "wav2vec2"}, **ENCODER_DECODER},
}  # fmt: skip


def tiny_of(model_class, short_window: bool):
    config = tiny(model_class.config_class, short_window)
    causal_lms = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    if model_class.__name__ in causal_lms and getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    return config


def tiny(config_class, short_window: bool):
    """The config of a tiny model of this class: its own defaults, shrunk by the names of their attributes."""
    if config_class.__name__ in COMPOSITE:
        return config_class(**copy.deepcopy(COMPOSITE[config_class.__name__]))
    default = config_class()
    settings = {}
    layers = _representative_layers(default)
    latent = getattr(default, "kv_lora_rank", None) is not None
    for name, value in vars(default).items():
        if isinstance(value, transformers.PretrainedConfig):
            settings[name] = tiny(type(value), short_window).to_dict()
        elif name in layers:
            settings[name] = layers[name]
        elif isinstance(value, (list, tuple)) or (latent and name in ("head_dim", "qk_head_dim")):
            continue
        elif name in WINDOWS:
            settings[name] = WINDOWS[name] if short_window else LONG
        elif name in TINY and (value is not False or name == "use_sliding_window"):
            settings[name] = TINY[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCAB:
            settings[name] = 80 + sum(map(ord, name)) % 17
        elif name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            settings[name] = {**value, "mrope_section": [2, 3, 3]}
    specials = dict(pad_token_id=0, bos_token_id=1, eos_token_id=None)
    settings |= {name: value for name, value in specials.items() if hasattr(default, name)}
    if latent:
        settings["num_key_value_heads"] = 4
    if "use_sliding_window" in settings:
        settings["max_window_layers"] = 1
        settings.pop("layer_types", None)
    if getattr(default, "decoder_start_token_id", None) is not None or default.is_encoder_decoder:
        settings["decoder_start_token_id"] = 2
    for forced in ("forced_eos_token_id", "forced_bos_token_id"):
        if hasattr(default, forced):
            settings[forced] = None
    settings |= copy.deepcopy(OVERRIDES.get(config_class.__name__, {}))
    return config_class(**settings)


def _representative_layers(config) -> dict[str, list | int]:
    """The lists with an entry for each layer, cut to one layer of each kind, and the number of layers left."""
    count_names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
    count_name = next((name for name in count_names if isinstance(vars(config).get(name), int)), None)
    if count_name is None:
        return {}
    count = vars(config)[count_name]
    lists = {k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count > 3}
    lists = {k: v for k, v in lists.items() if isinstance(v[0], (str, int))}
    if not lists:
        return {}
    kinds = dict.fromkeys(zip(*lists.values(), strict=True))
    kept = (list(kinds) * 2)[: max(2, min(len(kinds), 5))]
    return {count_name: len(kept), **{k: list(v) for k, v in zip(lists, zip(*kept, strict=True), strict=True)}}


# ---------------------------------------------------------------------------------------------------------------------
# Models and their inputs
class Seen:
    """What reached this package since the last reset."""

    calls, cuts = 0, False

    @classmethod
    def reset(cls) -> None:
        cls.calls, cls.cuts = 0, False


def watched_attention(*args, **kwargs):
    Seen.calls += 1
    Seen.cuts |= kwargs.get("position_ids") is not None
    return attention_forward(*args, **kwargs)


def watched_mask(*args, mask_function=None, **kwargs):
    Seen.cuts |= _mentions(mask_function, "packed_sequence_mask_function")
    return attention_mask(*args, mask_function=mask_function, **kwargs)


def _mentions(function, name: str) -> bool:
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [x for cell in cells for x in (cell if isinstance(cell, tuple) else (cell,)) if callable(x)]
    return getattr(function, "__qualname__", "").startswith(name) or any(_mentions(x, name) for x in parts)


def build(model_class, config, attention: str):
    """A model of random weights, the same each time."""
    torch.manual_seed(0)
    model = model_class._from_config(copy.deepcopy(config), attn_implementation=attention).float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "sink" in name:
                p.copy_(torch.linspace(-3, 4, p.numel()).view(p.shape))
            elif p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0
    return model


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 79, shape, generator=torch.Generator().manual_seed(seed))


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


# What the encoders of speech and vision classes take in place of tokens: (batch, config) -> keyword arguments
def _pixels(batch: int, config, size: int | None = None) -> dict:
    return {"pixel_values": torch.randn(1, 3, size, size).expand(batch, -1, -1, -1)}


def _speech(name: str, *shape: int):
    def make(batch: int, config) -> dict:
        torch.manual_seed(0)
        return {name: torch.randn(1, *shape).expand(batch, *shape)}

    return make


ENCODER_INPUTS: dict[str, object] = {
    "WhisperForConditionalGeneration": _speech("input_features", 80, 3000),
    "Speech2TextForConditionalGeneration": _speech("input_features", 40, 80),
    "SpeechT5ForSpeechToText": _speech("input_values", 1600),
    "MoonshineForConditionalGeneration": _speech("input_values", 1600),
    "MoonshineStreamingForConditionalGeneration": _speech("input_values", 1600),
    "SeamlessM4TForSpeechToText": _speech("input_features", 40, 160),
    "SeamlessM4Tv2ForSpeechToText": _speech("input_features", 40, 160),
    "SpeechEncoderDecoderModel": _speech("input_values", 1600),
    "CohereAsrForConditionalGeneration": _speech("input_features", 40, 80),
    "VisionEncoderDecoderModel": _speech("pixel_values", 3, 8, 8),
    "PPFormulaNetForConditionalGeneration": _speech("pixel_values", 3, 32, 32),
    "Pix2StructForConditionalGeneration": _speech("flattened_patches", 6, 770),
}


# What decoders need beside tokens: input_ids -> keyword arguments
EXTRA_INPUTS: dict[str, object] = {
    "BlipForConditionalGeneration": lambda ids: {"pixel_values": torch.zeros(ids.shape[0], 3, 384, 384)},
    "IdeficsForVisionText2Text": lambda ids: {
        "pixel_values": torch.zeros(ids.shape[0], 1, 3, 224, 224), "image_attention_mask": torch.ones(*ids.shape, 1),
    },
}  # fmt: skip
CODEBOOKS = {"MusicgenForCausalLM": 4, "MusicgenMelodyForCausalLM": 4}  # rows of tokens for each row of the batch


class Inputs:
    """The keyword arguments of one class's forward."""

    def __init__(self, model):
        self.model = model
        self.names = inspect.signature(model.forward).parameters
        self.two_sided = "decoder_input_ids" in self.names and model.config.is_encoder_decoder
        self.positions = next((n for n in ("decoder_position_ids", "position_ids") if n in self.names), None)
        self.mask = "decoder_attention_mask" if self.two_sided else "attention_mask"
        if self.two_sided and self.positions == "position_ids":
            self.positions = None  # the encoder's

    def __call__(self, ids, mask=None, position_ids=None):
        batch = ids.shape[0]
        ids = ids.repeat_interleave(CODEBOOKS.get(type(self.model).__name__, 1), 0)
        kwargs = {"use_cache": False} if "use_cache" in self.names else {}
        if "return_dict" in self.names:
            kwargs["return_dict"] = True
        if self.two_sided:
            kwargs |= self.encoder(batch, mask if position_ids is None else None)
            kwargs["decoder_input_ids"] = ids
        else:
            kwargs |= EXTRA_INPUTS.get(type(self.model).__name__, lambda ids: {})(ids)
            kwargs["input_ids"] = ids
        if mask is not None and self.mask in self.names:
            kwargs[self.mask] = mask
        if position_ids is not None:
            kwargs[self.positions] = position_ids
        return kwargs

    def encoder(self, batch: int, mask=None) -> dict:
        special = ENCODER_INPUTS.get(type(self.model).__name__)
        if special is not None:
            return special(batch, self.model.config)
        ids = tokens(1, 11, seed=7).expand(batch, -1)
        kwargs = {"input_ids": ids}
        if mask is not None:  # padded on the side on which the decoder is
            real = torch.ones_like(ids)
            real[0, 8:] = 0
            kwargs["attention_mask"] = real.flip(1) if mask[0, 0] == 0 else real
        return kwargs


def logits_of(output) -> torch.Tensor:
    found = getattr(output, "logits", None)
    if found is None:
        found = next(x for x in output.to_tuple() if isinstance(x, torch.Tensor) and x.is_floating_point())
    return found


def kept_of(logits, keep) -> torch.Tensor:
    return logits[keep.repeat_interleave(logits.shape[0] // keep.shape[0], 0)]


def evaluate(model, calls, gradients: bool = True):
    """(logits of the kept tokens, gradients by name) over calls of (keyword arguments, bool (B, S) of kept tokens)."""
    model.zero_grad()
    flat = torch.cat([kept_of(logits_of(model(**kwargs)), keep) for kwargs, keep in calls])
    grads = {}
    if gradients:
        (flat * torch.cos(torch.arange(flat.numel(), dtype=flat.dtype)).view(flat.shape)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return flat.detach(), grads


def difference(found, expected) -> float:
    """The larger relative error of logits and of any parameter's gradient that is not negligible beside the others."""
    errors = [relative(found[0], expected[0], 0.0)]
    scale = max([g.norm().item() for g in expected[1].values()], default=0.0)
    for name, grad in expected[1].items():
        if name in found[1]:
            errors.append(relative(found[1][name], grad, 1e-2 * scale))
        elif grad.norm() > 1e-6 * scale:
            return math.inf
    return max(errors)


def relative(found, expected, floor: float) -> float:
    error = ((found - expected).norm() / expected.norm().clamp_min(max(floor, 1e-30))).item()
    return math.inf if math.isnan(error) else error


# ---------------------------------------------------------------------------------------------------------------------
# Cases: each returns a verdict
class NotApplicable(Exception):
    pass


def of_eager(run):
    """What eager gives; its failures are no fault of ours."""
    try:
        found = run()
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable(f"eager fails: {type(error).__name__}: {first_line(error)}") from error
    values = found[0] if isinstance(found, tuple) else found
    if not torch.isfinite(values.float()).all():
        raise NotApplicable("eager is not finite")
    return found


def first_line(error) -> str:
    return (str(error).strip().splitlines() or [""])[0][:110]


def judge(error: float) -> str:
    return "right" if error < TOLERANCE else f"WRONG: {error:.1e}"


LENGTHS = ((5, 9, 3), (1, 14, 2))


class Pair:
    """A class's eager model and ours, and the cases that both are put through."""

    def __init__(self, model_class, config):
        self.eager = of_eager(lambda: (torch.zeros(1), build(model_class, config, "eager")))[1]
        try:
            self.ours = build(model_class, config, NAME)
        except KeyError as error:  # a class dict of transformers' own, where the name is not known
            if "text_config" not in getattr(config, "sub_configs", {}):
                raise NotApplicable("transformers knows only its own names") from error
            self.ours = build(model_class, config, {"text_config": NAME})
        self.inputs = Inputs(self.eager)

    def compare(self, expected_calls, calls, **kwargs) -> str:
        def error() -> float:
            expected = of_eager(lambda: evaluate(self.eager, expected_calls, **kwargs))
            return difference(evaluate(self.ours, calls, **kwargs), expected)

        found = error()
        if TOLERANCE <= found < 1e-2:  # a few deep models round by more than that in fp32
            self.eager.double(), self.ours.double()
            try:
                found = error()
            finally:
                self.eager.float(), self.ours.float()
        return judge(found)

    def plain(self) -> str:
        ids = tokens(2, 13)
        call = [(self.inputs(ids), torch.ones_like(ids, dtype=torch.bool))]
        return self.compare(call, call)

    def padded(self, left: bool) -> str:
        ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
        mask[0, 9:] = 0
        mask = mask.flip(1) if left else mask
        call = [(self.inputs(ids, mask), mask.bool())]
        return self.compare(call, call)

    def right_padded(self) -> str:
        return self.padded(left=False)

    def left_padded(self) -> str:
        return self.padded(left=True)

    def samples(self, rows, dropped: int = 0):
        """(calls of each sample alone, ids, position_ids, kept): the last `dropped` samples of each row are padding."""
        if self.inputs.positions is None:
            raise NotApplicable("forward takes no position_ids")
        ids = tokens(len(rows), sum(rows[0]))
        alone, kept = [], torch.ones_like(ids, dtype=torch.bool)
        for i, lengths in enumerate(rows):
            start = 0
            for j, n in enumerate(lengths):
                if j < len(lengths) - dropped:
                    sample = ids[i : i + 1, start : start + n]
                    call = self.inputs(sample, None, positions(n))
                    alone.append((call, torch.ones_like(sample, dtype=torch.bool)))
                else:
                    kept[i, start : start + n] = False
                start += n
        return alone, ids, torch.cat([positions(*lengths) for lengths in rows]), kept

    def pack(self, rows, dropped: int = 0, axes: int = 0, cache: bool = False) -> str:
        alone, ids, position_ids, kept = self.samples(rows, dropped)
        packed = self.inputs(ids, kept.long() if dropped else None, position_ids)
        if cache:
            packed.pop("use_cache", None)
            of_eager(lambda: evaluate(self.eager, [(packed, kept)], gradients=False))
        if axes:
            packed[self.inputs.positions] = position_ids.expand(axes, -1, -1)
        verdict = self.compare(alone, [(packed, kept)])
        return self.unless_eager_too(verdict, position_ids, packed, kept)

    def packed(self) -> str:
        return self.pack(LENGTHS[:1])

    def packed_rows(self) -> str:
        return self.pack(LENGTHS)

    def packed_cache(self) -> str:
        return self.pack(LENGTHS[:1], cache=True)

    def packed_padded(self) -> str:
        return self.pack(LENGTHS, dropped=1)

    def packed_mrope(self, axes: int = 4) -> str:
        text = self.eager.config.get_text_config()
        if "mrope_section" not in (getattr(text, "rope_parameters", None) or {}):
            raise NotApplicable("no multimodal rotary embedding")
        return self.pack(LENGTHS[:1], axes=axes)

    def packed_mrope3(self) -> str:
        return self.packed_mrope(3)

    def unless_eager_too(self, verdict: str, position_ids, packed, kept) -> str:
        """The verdict, unless what mixes the samples is not attention, or attention could not know better."""
        if not verdict.startswith("WRONG"):
            return verdict
        kwargs = dict(packed)
        Seen.reset()
        found = evaluate(self.ours, [(kwargs, kept)], gradients=False)
        if difference(found, evaluate(self.eager, [(kwargs, kept)], gradients=False)) < TOLERANCE and not Seen.cuts:
            return "n/a: own attention" if not Seen.calls else "n/a: neither the mask nor attention is told of the cuts"
        segments = (position_ids == 0).cumsum(-1)
        other = segments[:, None, :, None] != segments[:, None, None, :]

        def cut(**options):
            dense = masking_utils.eager_mask(**{**options, "allow_is_bidirectional_skip": False})
            if dense.shape[-2:] != other.shape[-2:]:  # cross-attention
                return dense
            return dense.masked_fill(other, torch.finfo(dense.dtype).min)

        transformers.AttentionMaskInterface.register("eager", cut)
        try:
            dense = evaluate(self.eager, [(kwargs, kept)], gradients=False)
        finally:
            transformers.AttentionMaskInterface.register("eager", masking_utils.eager_mask)
        mixed = difference(found, dense) < TOLERANCE
        return "n/a: layers that are not attention mix samples" if mixed else verdict

    def generate(self, **kwargs) -> str:
        if not self.eager.can_generate():
            raise NotApplicable("does not generate")
        ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
        mask[0, :3] = 0
        settings = dict(max_new_tokens=8, do_sample=False, num_beams=1, disable_compile=True, **kwargs)
        settings |= dict(return_dict_in_generate=True, output_logits=True)

        def run(model):
            given = self.inputs.encoder(2) if self.inputs.two_sided else {"input_ids": ids}
            if "input_ids" in given:
                given["attention_mask"] = torch.ones_like(given["input_ids"]) if self.inputs.two_sided else mask
            with torch.no_grad():
                out = model.generate(**given, **settings)
            return torch.stack(out.logits), out.sequences

        expected = of_eager(lambda: run(self.eager))
        found = run(self.ours)
        if not torch.equal(found[1], expected[1]):
            return "WRONG: other tokens"
        return judge(relative(found[0], expected[0], 0.0))

    def generate_static(self) -> str:
        return self.generate(cache_implementation="static")

    def checkpointed(self) -> str:
        if not self.eager.supports_gradient_checkpointing:
            raise NotApplicable("no gradient checkpointing")
        for model in (self.eager, self.ours):
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
            model.train()
        try:
            return self.packed() if self.inputs.positions else self.plain()
        finally:
            for model in (self.eager, self.ours):
                model.gradient_checkpointing_disable()
                model.eval()


CASES = (
    "plain", "packed", "packed_rows", "packed_cache", "packed_mrope", "packed_mrope3", "right_padded",
    "left_padded", "packed_padded", "generate", "generate_static", "checkpointed",
)  # fmt: skip


def verdict_of(run) -> str:
    try:
        return run()
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = os.path.dirname(triton_attention_sink_hf.__file__)
        own = os.path.abspath(frames[-1].filename).startswith(inside)
        if own and isinstance(error, (ValueError, TypeError, NotImplementedError)):
            return f"refused: {first_line(error)}"
        where = next((f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames) if "torch/" not in f.filename), "")
        return f"WRONG: {type(error).__name__}: {first_line(error)} ({where})"


def sweep_class(name: str) -> dict[str, dict[str, str]]:
    """Verdicts by variant ("", and "window" where the class has one) and case."""
    model_class = getattr(transformers, name)
    found = {}
    for variant in ("", "window"):
        Seen.reset()
        try:
            config = tiny_of(model_class, short_window=bool(variant))
            long = tiny_of(model_class, short_window=False)
        except Exception as error:
            return {"": {"plain": f"n/a: config: {type(error).__name__}: {first_line(error)}"}}
        if variant and config.to_dict() == long.to_dict():
            break
        pair = []
        built = verdict_of(lambda: pair.append(Pair(model_class, config)) or "right")  # noqa: B023
        if built != "right":
            found[variant] = {"plain": built}
            continue
        verdicts = {"plain": verdict_of(pair[0].plain)}
        own = verdicts["plain"] == "right" and not Seen.calls
        verdicts |= {case: verdict_of(getattr(pair[0], case)) for case in CASES[1:]}
        if own:
            verdicts = {c: "n/a: own attention" if v == "right" else v for c, v in verdicts.items()}
        found[variant] = verdicts
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The whole sweep
def classes() -> list[str]:
    names = {}
    for mapping in MAPPINGS:
        for entry in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in (entry,) if isinstance(entry, str) else entry:
                if hasattr(transformers, name) and not (
                    mapping == "TOKEN_CLASSIFICATION" and "PrivacyFilter" not in name
                ):
                    names[name] = None
    return list(names)


def _child(name: str, pipe) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    transformers.AttentionInterface.register(NAME, watched_attention)
    transformers.AttentionMaskInterface.register(NAME, watched_mask)
    try:
        pipe.send(sweep_class(name))
    except BaseException as error:
        pipe.send({"": {"plain": f"n/a: harness: {type(error).__name__}: {first_line(error)}"}})


def run_class(name: str, timeout: float) -> dict[str, dict[str, str]]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, sender))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return {"": {"plain": f"n/a: takes longer than {timeout:.0f} s"}}
        return receiver.recv()
    except EOFError:
        return {"": {"plain": "n/a: the process died"}}
    finally:
        process.kill()
        process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of the names of the classes to run, by commas")
    parser.add_argument("--out", help="file for the table")
    parser.add_argument("--json", help="file for all verdicts")
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = [name for name in classes() if any(part in name for part in arguments.only.split(","))]
    with ThreadPoolExecutor(arguments.workers) as pool:
        results = {}
        runs = {name: pool.submit(run_class, name, arguments.timeout) for name in names}
        for name, run in runs.items():
            results[name] = run.result()
            for variant, verdicts in results[name].items():
                for case, verdict in verdicts.items():
                    print(f"{name} {variant} {case}: {verdict}", flush=True)
    if arguments.json:
        import json

        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
