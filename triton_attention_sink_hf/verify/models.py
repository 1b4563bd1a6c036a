"""The model under test: whether it fits, its weights, its dtype, its attention, and what to note about it."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from ..integrations.sinks import KEY, LEARNED
from .samples import window_of

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def keep_layers(config, layers: int) -> None:
    """Cut ``config`` to its first layers. ValueError if it has fewer."""
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers must be from 1 to the model's {config.num_hidden_layers}, got {layers}")
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name)[:layers])


def refuse_sinks_of_the_config(config) -> None:
    """ValueError if ``config`` adds sinks that eager attention does not know."""
    value = getattr(config, KEY, None)
    if value not in (None, LEARNED):
        raise ValueError(
            f"{KEY} must be None or '{LEARNED}' to verify, got {value!r}: eager attention does not read it"
        )


def count_parameters(config) -> int:
    """Number of parameters of the causal language model of ``config``. Allocates nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            x.numel() for x in AutoModelForCausalLM.from_config(config, attn_implementation="eager").parameters()
        )


def refuse_too_large(gib: float, device: str) -> None:
    """ValueError unless weights and gradients in fp32 fit on the device and two sets of gradients on the host.

    ``gib``: size of weights and gradients together; two sets of gradients take as much.
    """
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    on_gpu = torch.device(device).type == "cuda"
    for where, needed, there in (
        ("the GPU", gib if on_gpu else 0.0, torch.cuda.mem_get_info(device)[1] / 2**30 if on_gpu else math.inf),
        ("this machine", gib if on_gpu else 2 * gib, pages),
    ):
        if needed > there:
            raise ValueError(
                f"the model needs {needed:.0f} GiB of memory and {where} has {there:.0f}: pass --layers to verify only "
                "its first layers"
            )


def load(model: str, config, dtype: torch.dtype, notes: list[str]):
    """The model with eager attention. Appends to ``notes`` if weights are random. ValueError if they are pickled."""
    import transformers

    folder = Path(model)
    options = {"attn_implementation": "eager", "dtype": dtype}
    pickled = [file.name for kind in ("*.bin", "*.pt", "*.pth") for file in folder.glob(kind)]
    weights = [*folder.glob("*.safetensors")]
    if folder.is_dir() and pickled and not weights:
        raise ValueError(f"weights must be safetensors, got {pickled[0]}, a pickle, which can run code: convert them")
    if folder.is_dir() and not weights:
        notes.append("the folder holds no weights: they are random, sinks spread from -2 to 6")
        torch.manual_seed(0)
        made = transformers.AutoModelForCausalLM.from_config(config, **options)
        with torch.no_grad():
            for name, x in made.named_parameters():
                if name.endswith("sinks"):
                    x.copy_(torch.linspace(-2.0, 6.0, x.numel())[torch.randperm(x.numel())])
        return made
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if method == "mxfp4":  # gpt-oss as published
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # warnings about the layers that were left out
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            model, config=config, use_safetensors=True, trust_remote_code=False, **options
        )
    finally:
        transformers.logging.set_verbosity(verbosity)


def switch(model, attention: str) -> None:
    """Set the attention. ValueError if the model would not use it."""
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise ValueError(
            f"attn_implementation must be 'eager' for {type(model).__name__}, got {attention!r}: the model does not "
            "call transformers' attention functions"
        )


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters and drop their gradients. Buffers stay exact, rotary frequencies among them."""
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def notes_on(config, lengths: list[int], model: torch.nn.Module, device: str) -> list[str]:
    """What a reader of the report should know about the model and the samples."""
    notes = []
    sinks = [x for name, x in model.named_parameters() if name.endswith("sinks")]
    if not sinks:
        notes.append("the model has no sinks")
    elif all(x.count_nonzero() == 0 for x in sinks):
        notes.append("every sink is 0, as in a model whose sinks were never trained: their effect is small")
    window = window_of(config)
    if window and window >= max(lengths):
        notes.append(f"the window of {window} is longer than every sample: it is not exercised")
    if getattr(config, "attention_dropout", 0.0):
        notes.append(f"attention_dropout is {config.attention_dropout}: training with it is refused, set it to 0.0")
    if torch.device(device).type == "cpu":
        notes.append("on a CPU the plain-torch reference serves: the kernels are verified on a GPU only")
    return notes
