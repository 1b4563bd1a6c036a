"""Launching a kernel again without Triton's argument handling, which takes more host time than a short kernel runs.

``kernel[grid](...)`` binds, specialises and hashes some 45 arguments to find the compiled kernel. Here the numbers,
constants and options of a launch are fixed in a ``Launch``, so only its tensors can lead to another compiled kernel:
by their dtype, by whether their address is a multiple of 16, and by being None. The first launch of each kind goes
through Triton; later ones call the compiled kernel that Triton returned, on the device and stream that are current.

That skips Triton's check that the globals which a kernel reads have not changed, and nothing else. Whatever is not
known to be equivalent goes through Triton every time: its interpreter, AMD, other versions, hooks (profilers), debug
and instrumentation modes, a replaced ``JITFunction.run``, subclasses of tensors.
"""

from __future__ import annotations

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

VERSIONS = (3, 6), (3, 9)  # whose JITFunction.run and launchers were read
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_KNOWN_VERSION = VERSIONS[0] <= TRITON <= VERSIONS[1]
_RUN = JITFunction.run


class Launch:
    """``kernel[grid](**tensors, **constants)`` with all but the tensors fixed; call it with the tensors by keyword.

    Args:
        kernel: a function under ``triton.jit`` or ``gluon.jit``. Its tensors (or tensor descriptors, or None) come
            first in its signature.
        grid: one to three ints.
        constants: every other argument of the kernel, and options such as ``num_warps``.
    """

    def __init__(self, kernel, grid: tuple[int, ...], **constants):
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self._grid3 = (*grid, 1, 1)[:3]
        names = getattr(kernel, "arg_names", [])
        self._tensors = [name for name in names if name not in constants]
        self._rest = tuple(constants[name] for name in names if name in constants)
        known = _KNOWN_VERSION and isinstance(kernel, JITFunction) and names[: len(self._tensors)] == self._tensors
        self._compiled: dict | None = {} if known else None

    def __call__(self, **tensors) -> None:
        kernel = self.kernel
        if self._compiled is None or not _unobserved(kernel):
            kernel[self.grid](**tensors, **self.constants)
            return
        active = driver.active
        device = active.get_current_device()
        key, arguments = [device, len(tensors)], []
        for name in self._tensors:
            x = tensors[name]
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                address = x.data_ptr()
                key += x.dtype, address % 16 == 0, x.get_device()
                arguments.append(address)  # from a tensor the launcher would take it again, and ask the driver about it
            else:
                key.append(None if x is None else _descriptor_key(x))
                arguments.append(x)
        key = tuple(key)
        compiled = self._compiled.get(key)
        if compiled is None:
            compiled = kernel[self.grid](**tensors, **self.constants)
            if _relaunchable(compiled) and _UNKNOWN not in key:
                self._compiled[key] = compiled
            return
        stream = active.get_current_stream(device)
        compiled.run(
            *self._grid3, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *self._rest
        )


def unchecked(kind: type, **fields):
    """``kind(**fields)``, a tensor descriptor, without its checks, which take longer than all else about it.

    The caller has made sure that the address and the strides are multiples of 16 bytes and the last stride is 1.
    """
    x = object.__new__(kind)
    x.__dict__ = fields
    return x


def _unobserved(kernel: JITFunction) -> bool:
    """Whether nobody asked Triton to watch or to change launches."""
    runtime = knobs.runtime
    return (
        type(kernel).run is _RUN
        and not kernel.pre_run_hooks
        and not runtime.debug
        and not knobs.compilation.instrumentation_mode
        and not _called(runtime.launch_enter_hook)
        and not _called(runtime.launch_exit_hook)
        and runtime.add_stages_inspection_hook is None
    )


def _called(hook) -> bool:
    """Whether a launch hook, a HookChain as a rule, calls anything."""
    return bool(getattr(hook, "calls", hook is not None))


_UNKNOWN = "unknown"


def _descriptor_key(x) -> tuple | str:
    """What Triton's name for the type of a tensor descriptor is made of; ``layout`` is Gluon's."""
    kind = type(x)
    if kind.__name__ != "TensorDescriptor" or type(x.base) not in (Tensor, Parameter):
        return _UNKNOWN
    return kind, x.base.dtype, x.base.get_device(), tuple(x.block_shape), getattr(x, "layout", None)


def _relaunchable(compiled) -> bool:
    return type(compiled) is CompiledKernel and compiled.metadata.target.backend == "cuda"
