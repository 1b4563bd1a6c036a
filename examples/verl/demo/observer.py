"""Watches verl's processes from inside and changes nothing.

verl imports this module in each of them by its own hook (``VERL_USE_EXTERNAL_MODULES=observer``). It works through
torch's global hooks and appends JSON lines to the file that ``$VERL_OBSERVATIONS`` names:

    {"role": "trainer", "step": n, "attention": [...], "sinks": {name: values}, "sink_gradients": {name: norm}}
    {"role": "rollout", "process": pid, "sinks": {name: values}}
    {"role": "kernels", "kernels": {name: [launches, microseconds]}}

* trainer (rank 0): after optimizer step n, what the attention layers called since the step before, the sinks, and the
  norms of their gradients as the optimizer saw them.
* rollout: the sinks of a process that generates, each time that they have changed. vLLM's layers are seen as they run,
  which needs ``enforce_eager``; a server of one's own calls ``write_rollout``.
* kernels: the GPU kernels of the first micro-batches of training, forward, recomputation and backward.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

OBSERVATIONS = "VERL_OBSERVATIONS"
MICRO_BATCHES = 2  # that are profiled
CALL = ("name", "function", "device", "training", "samples_in_row", "ranks")


def write(row: dict) -> None:
    """Append a line, if anybody asked for observations."""
    if file := os.environ.get(OBSERVATIONS):
        with open(file, "a") as lines:
            lines.write(json.dumps(row) + "\n")


def write_rollout(sinks: dict[str, list[float]]) -> None:
    """The sinks that this process generates with from now on."""
    write({"role": "rollout", "process": os.getpid(), "sinks": sinks})


class Trainer:
    """Counts the calls of every Hugging Face attention layer by what the call used.

    Per call: the name in the layer's config (after any rewriting by transformers), the function that transformers has
    registered under it, the device, whether the model was training, how many samples began in the row (position_ids
    that restart at 0; rows of a batch, if there are several), and over how many ranks verl had sharded it.
    """

    def __init__(self):
        self.calls: Counter[tuple] = Counter()
        self.layers: dict[str, torch.nn.Module] = {}
        self.gradients: dict[str, float] = {}
        self.steps = 0
        self.kernels = Kernels()
        register_optimizer_step_pre_hook(self.before_step)
        register_optimizer_step_post_hook(self.after_step)

    def after_forward(self, module: torch.nn.Module, kwargs: dict, output: object) -> None:
        from verl.utils.ulysses import get_ulysses_sequence_parallel_world_size

        name = module.config._attn_implementation
        self.layers[f"model.layers.{module.layer_idx}.self_attn.sinks"] = module
        positions, rows, device = kwargs.get("position_ids"), output[0].shape[0], output[0].device.type
        samples = int((positions[0] == 0).sum()) if positions is not None and rows == 1 else rows
        ranks = get_ulysses_sequence_parallel_world_size()
        self.calls[name, registered_function(name), device, module.training, samples, ranks] += 1
        if module.training and device == "cuda":
            self.kernels.after_layer(len(self.layers))

    def before_step(self, *_) -> None:
        self.gradients = {name: whole(x.grad).norm().item() for name, x in self.sinks() if x.grad is not None}

    def after_step(self, *_) -> None:
        self.steps += 1
        sinks = {name: whole(x).tolist() for name, x in self.sinks()}  # every rank takes part in gathering them
        attention = [dict(zip(CALL, key, strict=True), calls=calls) for key, calls in self.calls.items()]
        self.calls.clear()
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
            row = {"role": "trainer", "step": self.steps, "attention": attention, "sinks": sinks}
            write(row | {"sink_gradients": self.gradients})

    def sinks(self) -> list[tuple[str, torch.Tensor]]:
        """Of the layers that were called, by the name that the checkpoint gives them."""
        found = ((name, getattr(layer, "sinks", None)) for name, layer in sorted(self.layers.items()))
        return [(name, x) for name, x in found if isinstance(x, torch.Tensor)]


class Kernels:
    """Profiles the GPU (CUPTI) from the first layer that trains until ``MICRO_BATCHES`` have been through the model."""

    def __init__(self):
        self.profile, self.thread, self.calls, self.done = None, None, 0, False

    def after_layer(self, layers: int) -> None:
        if self.done or torch.distributed.get_rank() != 0:
            return
        if self.profile is None:
            self.thread = threading.get_ident()  # the backward's thread, which recomputes layers, must not end it
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profile.start()
        if threading.get_ident() != self.thread:
            return
        self.calls += 1
        if self.calls > MICRO_BATCHES * layers and layers > 1:
            self.finish()

    def finish(self) -> None:
        torch.cuda.synchronize()
        self.profile.stop()
        launches, time = Counter(), Counter()
        for event in self.profile.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                launches[event.name] += 1
                time[event.name] += event.time_range.elapsed_us()
        write({"role": "kernels", "kernels": {x: [n, round(time[x], 1)] for x, n in launches.most_common()}})
        self.profile, self.done = None, True


class Rollout:
    """The sinks that vLLM's layers hold when they run, each time that a layer's have changed."""

    def __init__(self):
        self.seen: dict[str, list[float]] = {}

    def after_forward(self, module: torch.nn.Module) -> None:
        name, values = f"model.layers.{module.layer_idx}.self_attn.sinks", module.sinks.float().tolist()
        if self.seen.get(name) != values:
            self.seen[name] = values
            write_rollout({name: values})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).float()


def registered_function(name: str) -> str:
    from transformers import AttentionInterface

    if name == "eager":
        return "the model's own eager attention"
    function = AttentionInterface().get(name)
    return f"{function.__module__}.{function.__qualname__}" if function else "not registered"


def observe() -> None:
    trainer, rollout = Trainer(), Rollout()

    def after_forward(module, args, kwargs, output) -> None:
        if not type(module).__name__.endswith("Attention") or getattr(module, "layer_idx", None) is None:
            return
        if getattr(getattr(module, "config", None), "_attn_implementation", None):
            trainer.after_forward(module, kwargs, output)
        elif type(module).__module__.startswith("vllm.") and isinstance(getattr(module, "sinks", None), torch.Tensor):
            rollout.after_forward(module)

    torch.nn.modules.module.register_module_forward_hook(after_forward, with_kwargs=True)


if os.environ.get(OBSERVATIONS):
    observe()
