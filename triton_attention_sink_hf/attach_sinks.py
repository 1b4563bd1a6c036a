"""``attach_learned_sinks``: trainable sinks for a Hugging Face model that has none."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .integrations.sinks import KEY, LEARNED, parse
from .registration import NAME, registered_names

ATTACHED = "_attached_sinks"  # marks a layer whose sinks are no part of its class


def attach_learned_sinks(model: torch.nn.Module, init: float | str | Path | None = None) -> tuple[str, ...]:
    """Give every attention layer of the text model a parameter ``sinks`` (Hq,), trained and saved with the others.

    Its dtype and device are those of the query projection. The model's config gets ``attention_sink: learned``, by
    which the attention function finds the parameter. Call it before the optimizer, FSDP or any other wrapper is made.
    A second call changes nothing.

    Args:
        model: a transformers model with ``attn_implementation="triton_attention_sink"`` and no sinks of its own.
        init: the logits' first value, natural log: 0 is one more key of score 0 and no value, -20 close to none. Or the
            folder of a checkpoint whose sinks to load, which ``from_pretrained`` does not know. None: 0, or if the
            model's config has ``attention_sink: learned`` already, the folder that the model came from.

    Returns:
        The names of the parameters, layer by layer.

    Raises:
        ValueError, TypeError: a model that has sinks, that would ignore them, or whose layers cannot be told.
    """
    if isinstance(init, bool) or not (init is None or isinstance(init, (int, float, str, Path))):
        raise TypeError(f"init must be None, a number or the folder of a checkpoint, got {type(init).__name__}")
    layers = _attention_layers(model)
    names = tuple(f"{name}.sinks" for name in layers)
    if all(getattr(layer, ATTACHED, False) for layer in layers.values()):
        return names
    own = next((name for name, _ in model.named_parameters() if "sink" in name), None)
    if own is not None:
        raise ValueError(f"model must be one without sinks, got {type(model).__name__}, which has {own}")
    configs = _configs(model, layers)
    if init is None:
        init = 0.0 if getattr(configs[0], KEY, None) is None else model.config._name_or_path
    values = _read(Path(init), names) if isinstance(init, (str, Path)) else dict.fromkeys(names, float(init))
    for name, layer in zip(names, layers.values(), strict=True):
        like = _query_weight(layer)
        sinks = torch.empty(_heads(layer), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            sinks.copy_(values[name]) if isinstance(values[name], Tensor) else sinks.fill_(values[name])
        layer.sinks = torch.nn.Parameter(sinks)
        setattr(layer, ATTACHED, True)
    for config in configs:
        if getattr(config, KEY, None) is None:
            setattr(config, KEY, LEARNED)
    return names


def _attention_layers(model) -> dict[str, torch.nn.Module]:
    """The attention layers of the text model, by name: modules that project and call the attention function."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise TypeError(f"model must be a transformers model, got {type(model).__name__}")
    if config.is_encoder_decoder:
        raise ValueError(f"model must be a decoder or an encoder alone, got {type(model).__name__}, which has both")
    kind = type(config.get_text_config())  # composite models copy their text model's config
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(getattr(module, "config", None)) is kind
        and "Attention" in type(module).__name__
        and any(getattr(getattr(child, "weight", None), "ndim", 0) == 2 for child in module.children())
    }
    if not layers:
        raise ValueError(
            f"model must have attention layers that hold its config and projections, got {type(model).__name__}"
        )
    return layers


def _configs(model, layers: dict[str, torch.nn.Module]) -> list:
    """The configs that hold the key: the layers' own, and the one that is saved."""
    configs = [model.config.get_text_config(), *(layer.config for layer in layers.values())]
    for config in configs:
        implementation = config._attn_implementation
        if implementation not in registered_names():
            raise ValueError(
                f"attn_implementation must be {NAME!r} for attached sinks, got {implementation!r}: other attention "
                "would ignore them"
            )
        value = getattr(config, KEY, None)
        if value is not None and not parse(value)[0]:
            raise ValueError(
                f"{KEY} must be None, '{LEARNED}' or '{LEARNED}+{value}' for attached sinks, got {value!r}"
            )
    return configs


def _query_weight(layer) -> Tensor:
    weight = getattr(getattr(layer, "q_proj", None), "weight", None)
    weights = [x for x in (weight, *layer.parameters()) if isinstance(x, Tensor) and x.is_floating_point()]
    if not weights:
        raise ValueError(f"model must have floating weights, got a {type(layer).__name__} without any")
    if hasattr(weights[0], "placements"):
        raise ValueError("model must not be sharded yet, got DTensors: attach the sinks first")
    return weights[0]


def _heads(layer) -> int:
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(getattr(layer, name, None), int):
            return getattr(layer, name)
    return layer.config.num_attention_heads


def _read(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The named tensors of a checkpoint in safetensors."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys() if name in names}  # noqa: SIM118
    missing = [name for name in names if name not in found]
    if missing:
        raise ValueError(
            f"init must be a number or a folder whose *.safetensors hold the sinks, got {str(folder)!r} without "
            f"{missing[0]}"
        )
    return found
