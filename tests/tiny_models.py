"""Tiny models of random weights for any class of transformers, and what their forwards take."""

from __future__ import annotations

import copy
import inspect

import torch
import transformers
from transformers.models.auto import modeling_auto

VOCAB, WINDOW, LONG = 97, 5, 64

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
        "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts",
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
    "attn_layer_period": 2, "attn_layer_offset": 1, "laurel_rank": 8, "index_topk": 64, "num_labels": 7,
    "num_nextn_predict_layers": 0, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0,
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
    "DbrxConfig": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64},
    },
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [32, 32], "rope_parameters": {**MROPE, "mrope_section": [3, 3, 2]},
    },
    "EvollaConfig": {"num_key_value_heads": 4},
    "FastVlmConfig": {"vision_config": CLIP},
    "Gemma3nTextConfig": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [32] * 4,
    },
    "Gemma4TextConfig": {"global_head_dim": 16},
    "Gemma4UnifiedTextConfig": {"global_head_dim": 16},
    "ApertusWavTokenizerConfig": {"codebook_dim": 64},
    "EsmcConfig": {"num_key_value_heads": 4},
    "FunAsrNanoAdaptorConfig": {"intermediate_size": 16},
    "ZayaConfig": {"num_experts_per_tok": 1},
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
    "VibeVoiceAcousticTokenizerEncoderConfig": {"num_filters": 2, "depths": [1] * 7},
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
    latent = vars(default).get("kv_lora_rank") is not None
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
    if "None" not in str(getattr(config_class, "__annotations__", {}).get("eos_token_id", None)):
        settings["eos_token_id"] = VOCAB - 1
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
