"""A CPU as one of verl's platforms, so that its unmodified trainer runs without a GPU.

verl imports this module by its own hook, and picks the platform by name:
``VERL_USE_EXTERNAL_MODULES=verl_cpu_platform VERL_PLATFORM=cpu VERL_ENGINE_DEVICE=cuda``. The last variable tells
verl's engine registry which engine class to take: the one that it registers for GPUs, the same as in a real run.
Not needed, and not loaded, on a machine with a GPU.
"""

from __future__ import annotations

import contextlib
import os
import types

import torch
import torch.distributed as dist
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

DEVICES = 1


def _nothing(*args, **kwargs) -> None:
    pass


def _zero(*args, **kwargs) -> int:
    return 0


def _device_module() -> types.ModuleType:
    """What verl asks of ``torch.cuda``, answered for a CPU: one device, no memory pool of its own."""
    module = types.ModuleType("torch_cpu_as_verl_device")
    module.__dict__.update({name: getattr(torch.cpu, name) for name in torch.cpu.__all__})
    for name in ("empty_cache", "ipc_collect", "reset_peak_memory_stats", "set_device", "synchronize"):
        setattr(module, name, _nothing)
    for name in ("current_device", "max_memory_allocated", "max_memory_reserved", "memory_allocated"):
        setattr(module, name, _zero)
    module.memory_reserved = _zero
    module.mem_get_info = lambda *args: (0, 0)
    module.is_available = lambda: True
    module.device_count = lambda: DEVICES
    module.get_device_name = lambda *args: "cpu"
    module.get_rng_state = lambda *args: torch.get_rng_state()
    module.set_rng_state = lambda state, *args: torch.set_rng_state(state)
    return module


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """One CPU "device" per process; Ray's logical resource stays ``GPU`` so that verl's scheduling is untouched."""

    device_name = "cpu"
    vendor_name = "generic"
    device_module = _device_module()

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:
        # verl passes this to Tensor.to, which takes a bare 0 for the first GPU
        return torch.device("cpu")

    def device_count(self) -> int:
        return DEVICES

    def set_device(self, device_index: int) -> None:
        pass

    def synchronize(self, device_index: int | None = None) -> None:
        pass

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str):
        yield

    def profiler_start(self) -> None:
        pass

    def profiler_stop(self) -> None:
        pass

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    def cudart(self) -> None:
        return None


def _start_gloo() -> None:
    """Start gloo in a trainer worker before verl does, which would ask for ``cpu:gloo,cpu:gloo`` and be refused.

    A trainer worker is a process whose launcher (verl's Ray worker group, or torchrun) set the rendezvous variables.
    """
    rendezvous = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if all(name in os.environ for name in rendezvous) and not dist.is_initialized():
        torch.set_num_threads(1)
        dist.init_process_group("gloo")


_start_gloo()
