"""Repeat a launch without Triton's argument handling, which takes more host time than a short kernel runs.

``kernel[grid](...)`` binds, specialises and hashes some 45 arguments to find the compiled kernel. A ``Launch`` fixes
numbers, constants and options. Then only the tensors can select another compiled kernel: by dtype, by whether the
address is a multiple of 16, and by being None. The first launch of each kind goes through Triton. Later ones call the
compiled kernel that Triton returned, on the current device and stream. Where every argument of Triton's launcher is
known, they call the C function inside it, and build each tensor map once per address.

This skips one check of Triton, that the globals a kernel reads have not changed. Whatever is not known to be equivalent
goes through Triton every time: the interpreter, AMD, other versions, hooks (profilers), debug and instrumentation
modes, a replaced ``JITFunction.run``, tensor subclasses.

Private interfaces of Triton used here: ``CompiledKernel.run``, ``function`` and ``packed_metadata``; for triton 3.6
also ``CudaLauncher.launch`` and ``make_tensordesc_arg``. Delete when Triton repeats a launch in a few microseconds.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

import triton
from torch import Tensor
from torch.nn import Parameter
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

VERSIONS = (3, 6), (3, 9)  # whose JITFunction.run and launchers were reviewed
C_LAUNCHER_VERSIONS = ((3, 6),)  # whose launchers loop in Python around a C function with known arguments
MAX_ADDRESSES = 256  # cached per descriptor; a training loop's allocator reuses far fewer
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
_KNOWN_VERSION = VERSIONS[0] <= TRITON <= VERSIONS[1]
_RUN = JITFunction.run


class Blocks(NamedTuple):
    """All of a tensor descriptor except its base tensor.

    Attributes:
        kind: Triton's ``TensorDescriptor`` or Gluon's.
        fields: every argument of it except ``base``.
    """

    kind: type
    fields: dict

    def of(self, x: Tensor):
        """The descriptor of x, without ``kind``'s checks, which would dominate its cost.

        The caller guarantees that the address and the strides are multiples of 16 bytes and the last stride is 1.
        """
        made = object.__new__(self.kind)
        made.__dict__ = {"base": x, **self.fields}
        return made


class Launch:
    """``kernel[grid](**tensors, **constants)`` with all but the tensors fixed; call it with the tensors by keyword.

    Args:
        kernel: a function under ``triton.jit`` or ``gluon.jit``. Its tensors (or None) come first in its signature.
        grid: one to three ints.
        blocks: the tensors that the kernel takes as descriptors, by name.
        constants: every other argument of the kernel, and options such as ``num_warps``.
    """

    def __init__(self, kernel, grid: tuple[int, ...], blocks: dict[str, Blocks] | None = None, **constants):
        self.kernel, self.grid, self.blocks, self.constants = kernel, grid, blocks or {}, constants
        names = getattr(kernel, "arg_names", [])
        self._tensors = [name for name in names if name not in constants]
        known = _KNOWN_VERSION and isinstance(kernel, JITFunction) and names[: len(self._tensors)] == self._tensors
        self._again: dict[tuple, Callable] | None = {} if known else None

    def __call__(self, **tensors) -> None:
        if self._again is None or not _unobserved(self.kernel):
            self._through_triton(tensors)
            return
        active = driver.active
        device = active.get_current_device()
        key, addresses = [device, len(tensors)], []
        for name in self._tensors:
            x = tensors[name]
            if x is None:
                key.append(None)
                addresses.append(None)
                continue
            if type(x) is not Tensor and type(x) is not Parameter:
                self._through_triton(tensors)
                return
            address = x.data_ptr()
            key += x.dtype, address % 16 == 0, x.get_device()
            addresses.append(address)  # given a tensor, the launcher would look it up again and ask the driver
        key = tuple(key)
        again = self._again.get(key)
        if again is None:
            compiled = self._through_triton(tensors)
            if _relaunchable(compiled):
                self._again[key] = self._c_launch(compiled) or self._run(compiled)
            return
        again(active.get_current_stream(device), addresses, tensors)

    def _through_triton(self, tensors: dict):
        described = {name: blocks.of(tensors[name]) for name, blocks in self.blocks.items()}
        return self.kernel[self.grid](**{**tensors, **described}, **self.constants)

    def _fixed(self) -> tuple[tuple, tuple]:
        """The grid, and the arguments after the tensors."""
        rest = self.kernel.arg_names[len(self._tensors) :]
        return (*self.grid, 1, 1)[:3], tuple(self.constants[name] for name in rest)

    def _run(self, compiled: CompiledKernel) -> Callable:
        """Launches ``compiled`` by what Triton launches it by."""
        (grid, rest), run = self._fixed(), compiled.run
        kernel = (compiled.function, compiled.packed_metadata, None, None, None)
        blocks = [(self._tensors.index(name), name, blocks) for name, blocks in self.blocks.items()]

        def again(stream: int, arguments: list, tensors: dict) -> None:
            for index, name, kind in blocks:
                arguments[index] = kind.of(tensors[name])
            run(*grid, stream, *kernel, *arguments, *rest)

        return again

    def _c_launch(self, compiled: CompiledKernel) -> Callable | None:
        """The same by the C function inside, without two loops over all arguments; None if anything is unknown."""
        launcher = compiled.run
        module = sys.modules[type(launcher).__module__]
        if TRITON not in C_LAUNCHER_VERSIONS or module.__name__ != "triton.backends.nvidia.driver":
            return None
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            return None
        launch, blocks = launcher.launch, []
        if self.blocks:
            launch = inspect.getclosurevars(launch).nonlocals.get("launcher") if inspect.isfunction(launch) else None
            names = sorted(self.blocks, key=self._tensors.index)
            metadata = compiled.metadata.tensordesc_meta or ()
            if launch is None or len(metadata) != len(names) or None in metadata:
                return None
            for name, meta in zip(names, metadata, strict=True):
                blocks.append((self._tensors.index(name), name, self.blocks[name], meta, {}))
            blocks.reverse()  # each becomes several arguments, which shifts those after it
        expand = module.make_tensordesc_arg
        grid, rest = self._fixed()
        kernel = (
            compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None,
            compiled.packed_metadata, None, None, None,
        )  # fmt: skip

        def again(stream: int, arguments: list, tensors: dict) -> None:
            for index, name, kind, meta, known in blocks:
                address = arguments[index]
                expanded = known.get(address)
                if expanded is None:
                    if len(known) >= MAX_ADDRESSES:
                        known.clear()
                    expanded = known[address] = expand(kind.of(tensors[name]), meta)
                arguments[index : index + 1] = expanded
            launch(*grid, stream, *kernel, *arguments, *rest)

        return again


def _unobserved(kernel: JITFunction) -> bool:
    """Whether nothing watches or changes Triton's launches."""
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


def _relaunchable(compiled) -> bool:
    return type(compiled) is CompiledKernel and compiled.metadata.target.backend == "cuda"
