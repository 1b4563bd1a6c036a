"""Tests of relaunch.py under a driver that records launches: ``python in_forks.py relaunch_driver TEST...``."""

from __future__ import annotations

import itertools
import os
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
import triton.language as tl
from cases import Case, make_inputs
from launchers import LAUNCHERS
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from triton_attention_sink_hf.call import Call, Memo
from triton_attention_sink_hf.implementations.common import problem as common_problem
from triton_attention_sink_hf.implementations.common import relaunch
from triton_attention_sink_hf.implementations.common.relaunch import Blocks, Launch

BF16, FP32 = torch.bfloat16, torch.float32


class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232_448, "multiprocessor_count": 132, "max_num_regs": 65_536, "warpSize": 32}

    def load_binary(self, name, kernel, shared, device):
        return object(), f"{name} on {device}", 32, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module):
        pass

    def fill_tma_descriptor(self, *arguments):
        return "tensor map", *arguments


class Driver:
    """Names sm90 and records the arguments of each launch in ``launches``."""

    def __init__(self):
        self.utils, self.launches, self.device, self.stream = Utils(), [], 0, 7

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return self.stream

    def get_active_torch_device(self):
        return torch.device("cpu")

    def launcher_cls(self, source, metadata):
        def run(*arguments):
            self.launches.append((metadata.hash, *arguments))

        return run


DRIVER = Driver()
driver.set_active(DRIVER)
common_problem.target_name = lambda device: "sm90"


@triton.jit
def _kernel(a_ptr, b_ptr, c_ptr, n, stride, scale, WIDTH: tl.constexpr):
    offsets = tl.arange(0, WIDTH)
    x = tl.load(a_ptr + offsets * stride, mask=offsets < n, other=0.0).to(tl.float32) * scale
    if c_ptr is not None:
        x += tl.load(c_ptr + offsets)
    tl.store(b_ptr + offsets, x, mask=offsets < n)


@triton.jit
def _descriptor_kernel(a_desc, b_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    x = a_desc.load([0, 0])
    tl.store(b_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], x)


def values(arguments) -> list:
    """Arguments of a launch with tensors as the addresses that a launcher takes from them."""
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]


BOUND: list = []  # the keys that Triton looked compiled kernels up by: one for each launch through it
_compute_cache_key = jit.compute_cache_key


def _count(*arguments):
    BOUND.append(_compute_cache_key(*arguments))
    return BOUND[-1]


jit.compute_cache_key = _count


def triton_key(kernel, tensors: dict, constants: dict) -> tuple:
    """What Triton's own cache of compiled kernels is looked up by."""
    binder = kernel.device_caches[DRIVER.device][-1]
    _, specialization, options = binder(**tensors, **constants)
    return str(specialization), str(options)


def tensor_choices(dtypes) -> list:
    """None, and tensors of each dtype whose address is and is not a multiple of 16."""
    choices: list = [None]
    for dtype in dtypes:
        base = torch.zeros(64, dtype=dtype)
        assert base.data_ptr() % 16 == 0
        choices += [base, base[1:], base[8:]]
    return choices


def same_key_same_kernel():
    """Calls share a remembered launch if Triton would give them the same kernel, and only then."""
    constants = {"n": 16, "stride": 1, "scale": 0.5, "WIDTH": 16}
    again = Launch(_kernel, (1,), **constants)
    kernels: dict = {}
    as_, bs = tensor_choices((BF16, FP32))[1:], tensor_choices((FP32,))[1:]
    cs = tensor_choices((FP32, BF16))
    for _ in range(2):
        for a, b, c in itertools.product(as_, bs, cs):
            tensors = {"a_ptr": a, "b_ptr": b, "c_ptr": c}
            key = triton_key(_kernel, tensors, constants)
            DRIVER.launches.clear()
            again(**tensors)
            ((name, *arguments),) = DRIVER.launches
            assert kernels.setdefault(key, name) == name
            assert values(arguments[9:])[:3] == [0 if x is None else x.data_ptr() for x in (a, b)] + [
                None if c is None else c.data_ptr()
            ]
    assert len(set(kernels.values())) == len(kernels) > 20
    BOUND.clear()
    again(a_ptr=as_[0], b_ptr=bs[0], c_ptr=None)
    assert not BOUND, "a repeated launch goes around Triton"
    for parameter in (torch.nn.Parameter(as_[0]), as_[0].view(64)):
        again(a_ptr=parameter, b_ptr=bs[0], c_ptr=None)
    assert not BOUND
    again(c_ptr=None, b_ptr=bs[0], a_ptr=as_[0])  # by name, whatever the order
    assert not BOUND and values(DRIVER.launches[-1][10:12]) == [as_[0].data_ptr(), bs[0].data_ptr()]


def same_arguments():
    """A launch again passes what Triton's launch passed: grid, stream of the moment, numbers, constants."""
    constants = {"n": 12, "stride": 1, "scale": 0.5, "WIDTH": 16, "num_warps": 2}
    again = Launch(_kernel, (3, 2), **constants)
    a, b = torch.zeros(64), torch.zeros(64)
    DRIVER.launches.clear()
    for stream in (7, 8):
        DRIVER.stream = stream
        for _ in range(2):
            again(a_ptr=a, b_ptr=b, c_ptr=None)
    first, second, third, fourth = DRIVER.launches
    hooks = slice(7, 10)  # launch metadata and hooks: Triton passes empty ones
    for x in (second, third, fourth):
        assert x[1:4] == (3, 2, 1) and values(x[10:]) == values(first[10:])
        assert x[hooks] == (None, None, None) and x[5:7] == first[5:7] and x[0] == first[0]
    assert [x[4] for x in DRIVER.launches] == [7, 7, 8, 8]


def descriptors():
    x, y = torch.zeros(64, 64, dtype=BF16), torch.zeros(64, 64, dtype=BF16)
    b = torch.zeros(64 * 64, dtype=BF16)

    def launch_of(rows, columns):
        fields = {"shape": x.shape, "strides": x.stride(), "block_shape": [rows, columns]}
        blocks = Blocks(TensorDescriptor, fields)
        assert blocks.of(x) == TensorDescriptor(base=x, **fields) and blocks.of(x).padding == "zero"
        return Launch(_descriptor_kernel, (1,), {"a_desc": blocks}, ROWS=rows, COLUMNS=columns)

    again, narrow = launch_of(16, 32), launch_of(16, 16)
    kernels = set()
    for run in (again, narrow):
        names = set()
        for tensor in (x, y, x):
            DRIVER.launches.clear()
            run(a_desc=tensor, b_ptr=b)
            (recorded,) = DRIVER.launches
            names.add(recorded[0])
            assert recorded[10].base is tensor
        assert len(names) == 1
        kernels |= names
    assert len(kernels) == 2
    # another dtype: another key
    assert len(again._again) == 1
    again(a_desc=x.half(), b_ptr=b)
    assert len(again._again) == 2
    made = [again.blocks["a_desc"].of(tensor) for tensor in (x, x.half())]
    constants = {"ROWS": 16, "COLUMNS": 32}
    assert len({triton_key(_descriptor_kernel, {"a_desc": a, "b_ptr": b}, constants) for a in made}) == 2


def observers():
    """Whoever watches or changes launches sees each of them."""
    constants = {"n": 16, "stride": 1, "scale": 0.5, "WIDTH": 16}
    again = Launch(_kernel, (1,), **constants)
    a, b = torch.zeros(64), torch.zeros(64)

    def through_triton() -> bool:
        BOUND.clear()
        again(a_ptr=a, b_ptr=b, c_ptr=None)
        return bool(BOUND)

    assert through_triton() and not through_triton()

    def hook(*args, **kwargs):
        pass

    runtime = knobs.runtime
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        chain.add(hook)
        assert through_triton()
        chain.remove(hook)
        assert not through_triton()
    for owner, name, value in (
        (runtime, "launch_enter_hook", hook),
        (runtime, "launch_exit_hook", hook),
        (runtime, "debug", True),
        (_kernel, "pre_run_hooks", [hook]),
    ):
        usual = getattr(owner, name)
        setattr(owner, name, value)
        assert through_triton(), name
        setattr(owner, name, usual)
        assert not through_triton(), name
    chain, runtime.launch_enter_hook = runtime.launch_enter_hook, None
    assert not through_triton()
    runtime.launch_enter_hook = chain
    run = triton.JITFunction.run
    seen = []
    triton.JITFunction.run = lambda self, *args, **kwargs: seen.append(self) or run(self, *args, **kwargs)
    assert through_triton() and seen == [_kernel]
    triton.JITFunction.run = run
    assert not through_triton()

    class Subclass(torch.Tensor):
        pass

    wrapped = a.as_subclass(Subclass)
    for _ in range(2):
        BOUND.clear()
        again(a_ptr=wrapped, b_ptr=b, c_ptr=None)
        assert BOUND
    assert len(again._again) == 1
    shuffled = Launch(_kernel, (1,), a_ptr=a, n=16, stride=1, scale=0.5, WIDTH=16)
    for _ in range(2):  # a tensor among the constants: not the signature that relaunch.py expects
        BOUND.clear()
        shuffled(b_ptr=b, c_ptr=None)
        assert BOUND


def devices():
    """A compiled kernel is loaded on one device."""
    again = Launch(_kernel, (1,), n=16, stride=1, scale=0.5, WIDTH=16)
    a, b = torch.zeros(64), torch.zeros(64)
    for device in (0, 1, 0, 1):
        DRIVER.device = device
        DRIVER.launches.clear()
        again(a_ptr=a, b_ptr=b, c_ptr=None)
        assert DRIVER.launches[0][5] == f"_kernel on {device}"
    assert len(again._again) == 2


GPT_OSS = Case(1024, heads=(16, 2), head_dim=64, dtype=BF16, window=(127, 0))
EVERY_CASE = (
    GPT_OSS,
    Case(**{**GPT_OSS.__dict__, "lengths_q": (800, 224), "dlse": True}),
    Case(256, heads=(4, 2), head_dim=64, dtype=BF16, padding="left", sinks=None),
)
WIDE = Case(256, heads=(4, 2), head_dim=256, dtype=BF16)


def launches_of(case: Case, launchers):
    """A function that launches each kernel of ``launchers`` that serves ``case``, and returns the launches recorded and
    how many of them went through Triton."""
    launchers = [launcher for launcher in launchers if launcher.serves(case, "sm90")]
    inputs = make_inputs(case)
    call = Call(inputs.q, inputs.k, inputs.v, inputs.sinks, inputs.mask, case.scale, 0.0, True, Memo())
    q, k, v = call.q, call.k, call.v
    out, lse = torch.empty_like(q), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=FP32)
    dlse = lse.clone() if case.dlse else None
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    gradients.append(None if call.sinks is None else torch.empty_like(call.sinks))

    def launches():
        problem = common_problem.Problem(call)
        DRIVER.launches.clear()
        BOUND.clear()
        for launcher in launchers:
            launcher.launch(problem, out, lse, *(() if launcher.is_forward else (out, dlse, *gradients)))
        return list(DRIVER.launches), len(BOUND)

    return launches


def every_kernel():
    """Each kernel of the portable and the window backend is launched again around Triton, with the same arguments."""
    for case in EVERY_CASE:
        launches = launches_of(case, [launcher for launcher in LAUNCHERS if launcher.backend != "triton_hopper"])
        first, bound = launches()
        assert 0 < bound <= len(first)  # some are launched several times
        second, bound = launches()
        assert bound == 0
        for x, y in zip(first, second, strict=True):
            assert x[:7] == y[:7]
            for left, right in zip(x[10:], y[10:], strict=True):
                same(left, right)


def c_launcher():
    """Around Triton's own launcher too, the C function gets what it got through Triton, tensor maps included."""
    if relaunch.TRITON not in relaunch.C_LAUNCHER_VERSIONS:
        return
    from triton.backends.nvidia import driver as nvidia

    class Record:
        def __call__(self, *arguments):
            DRIVER.launches.append(arguments)

    nvidia.library_dirs = lambda: []
    nvidia.compile_module_from_src = lambda **_: SimpleNamespace(launch=Record())
    DRIVER.launcher_cls = nvidia.CudaLauncher
    expanded = []
    expand = nvidia.make_tensordesc_arg
    nvidia.make_tensordesc_arg = lambda *arguments: expanded.append(arguments) or expand(*arguments)
    calls = []
    launcher_call = nvidia.CudaLauncher.__call__
    nvidia.CudaLauncher.__call__ = lambda *arguments: calls.append(arguments) or launcher_call(*arguments)
    hooks = slice(10, 13)  # launch metadata and hooks: Triton passes empty ones
    described = 0
    cases = (*EVERY_CASE, WIDE)
    assert all(any(launcher.serves(case, "sm90") for case in cases) for launcher in LAUNCHERS)
    for case in cases:
        launches = launches_of(case, LAUNCHERS)
        first, bound = launches()
        assert 0 < bound <= len(first)
        described += len(expanded)
        for _ in range(3):
            calls.clear()
            again, bound = launches()
            assert not calls and bound == 0
            for x, y in zip(first, again, strict=True):
                assert x[:10] == y[:10] and y[hooks] == (None, None, None)
                for left, right in zip(x[13:], y[13:], strict=True):
                    same(left, right)
    assert described

    # one tensor map for each address, and no more of them than the bound
    x = torch.zeros(2, 64, 64, dtype=BF16)
    b = torch.zeros(64 * 64, dtype=BF16)
    fields = {"shape": (64, 64), "strides": (64, 1), "block_shape": [16, 32]}
    again = Launch(_descriptor_kernel, (1,), {"a_desc": Blocks(TensorDescriptor, fields)}, ROWS=16, COLUMNS=32)
    again(a_desc=x[0], b_ptr=b)
    relaunch.MAX_ADDRESSES = 1
    for tensor, made in ((x[0], 1), (x[0], 0), (x[1], 1), (x[1], 0), (x[0], 1)):
        expanded.clear()
        DRIVER.launches.clear()
        again(a_desc=tensor, b_ptr=b)
        assert len(expanded) == made and DRIVER.launches[0][13][1] == tensor.data_ptr()

    # anything unknown about the launcher: Triton's own
    for change in ({"global_scratch_size": 8}, {"profile_scratch_size": 8}, {"launch": Record()}):
        again = Launch(_descriptor_kernel, (1,), {"a_desc": Blocks(TensorDescriptor, fields)}, ROWS=16, COLUMNS=32)
        compiled = again._through_triton({"a_desc": x[0], "b_ptr": b})
        usual = dict(vars(compiled.run))
        vars(compiled.run).update(change)
        assert again._c_launch(compiled) is None, change
        vars(compiled.run).update(usual)
        assert again._c_launch(compiled) is not None


def same(left, right) -> None:
    """The same argument; workspaces, which are new at each call, only have the same kind and alignment."""
    if isinstance(left, TensorDescriptor):
        assert left.base.dtype == right.base.dtype
        assert (left.shape, left.strides, left.block_shape) == (right.shape, right.strides, right.block_shape)
        return
    if isinstance(left, tuple):  # a tensor map: name, address, ...
        assert left[2:] == right[2:]
        same(left[1], right[1])
        return
    left, right = values((left, right))
    if isinstance(left, int) and left > 2**32:  # an address
        assert right > 2**32 and (left % 16 == 0) == (right % 16 == 0)
    else:
        assert type(left) is type(right) and left == right
