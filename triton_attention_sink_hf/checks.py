"""The five checks of an installation, shared by ``test_attention_sink/test_basic.py`` and ``doctor``.

Run as a module, each check prints one line of JSON. Without a GPU the kernels need Triton's interpreter: set
TRITON_INTERPRET=1 before anything imports triton (transformers does).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
NAME = "triton_attention_sink"
MINIMUM_TRITON = "3.4"  # what torch 2.8 brings


@dataclass(frozen=True)
class Result:
    """One check. ``detail``: what was compared, or in one line why it failed."""

    name: str
    passed: bool
    detail: str


def run_checks() -> Iterator[Result]:
    """Run the five checks in order. A check that raises has failed; the others still run."""
    for name, check in CHECKS.items():
        try:
            yield Result(name, True, check())
        except Exception as error:
            lines = f"{error}".strip().splitlines() or ["no message"]
            yield Result(name, False, f"{type(error).__name__}: {lines[0]}")


def check_import() -> str:
    """The public names are there, and transformers knows the attention name."""
    import triton_attention_sink_hf as package

    missing = [name for name in package.__all__ if not hasattr(package, name)]
    if missing:
        raise ImportError(f"triton_attention_sink_hf lacks {', '.join(missing)}")
    if Path(package.__file__).parent.resolve() != FOLDER.resolve():
        raise ImportError(f"triton_attention_sink_hf must be imported from {FOLDER}, got {package.__file__}")
    import transformers
    from transformers import AttentionInterface

    if NAME not in AttentionInterface().valid_keys():
        raise ImportError(f"{NAME!r} is not registered with transformers {transformers.__version__}")
    return f"triton_attention_sink_hf {package.__version__}, registered with transformers {transformers.__version__}"


def check_kernels() -> str:
    """The Triton kernels run and give out, lse and the four gradients of fp64 attention, in each dtype."""
    device, how = kernel_device()
    # bf16 is left to the GPU: Triton's interpreter multiplies bf16 wrongly
    dtypes = (torch.float32, torch.float16) + ((torch.bfloat16,) if device == "cuda" else ())
    for dtype in dtypes:
        _compare(device, dtype, "triton", heads=(2, 2), seqlen=33, head_dim=32)
    names = ", ".join(f"{dtype}".removeprefix("torch.") for dtype in dtypes)
    return f"{how}: out, lse and 4 gradients match fp64 in {names}"


def check_forward() -> str:
    """What a gpt-oss layer asks for: full and sliding layers, packed rows, padding; "auto" and the kernels."""
    device, _ = kernel_device()
    padding = torch.ones(2, 40, dtype=torch.bool, device=device)
    padding[0, :7] = False
    padding[1, 31:] = False
    cu_seqlens = torch.tensor([0, 17, 18, 40], dtype=torch.int32, device=device)
    cases = {
        "full": {},
        "window": {"window_size": (7, 0)},
        "packed": {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "window_size": (7, 0)},
        "padded": {"key_padding_mask": padding},
    }
    for options in cases.values():
        for implementation in ("auto", "triton"):
            _compare(device, _usual_dtype(device), implementation, heads=(4, 2), seqlen=40, head_dim=64, **options)
    return f"{', '.join(cases)} layers of gpt-oss match fp64"


def check_gqa() -> str:
    """Every ratio of query heads to key heads, gradients included: heads are shared, not repeated."""
    device, _ = kernel_device()
    ratios = ((4, 4), (4, 1), (7, 1), (16, 2))
    for heads in ratios:
        _compare(device, _usual_dtype(device), "triton", heads=heads, seqlen=19, head_dim=16)
    return f"query/key heads {', '.join(f'{q}/{kv}' for q, kv in ratios)} match fp64"


def check_path() -> str:
    """transformers builds a tiny gpt-oss from this folder's absolute path; it equals eager, gradients included."""
    from .registration import path_problem

    path = f"{FOLDER.absolute()}"
    problem = path_problem(path)
    if problem is not None:
        raise ValueError(problem)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    eager = _logits_and_gradients("eager", device)
    for name in (path, f"{path}/"):
        ours = _logits_and_gradients(name, device)
        for key, expected in eager.items():
            error = _relative(ours[key], expected)
            if not error < 1e-4:
                raise AssertionError(
                    f"{key} with {name} must be eager's within 1e-4, got a relative error of {error:.1e}"
                )
    n_sinks = sum("sinks" in key for key in eager)
    return f"{path} serves a tiny gpt-oss as eager does: logits and {len(eager) - 1} gradients, {n_sinks} of sinks"


CHECKS: dict[str, Callable[[], str]] = {
    "Import Test": check_import,
    "Triton Kernel Check": check_kernels,
    "Basic Forward Pass": check_forward,
    "GQA Support": check_gqa,
    "Path Format": check_path,
}


def kernel_device() -> tuple[str, str]:
    """The device that the kernels can run on here, and how: compiled on a GPU, else interpreted on the CPU.

    Raises:
        ImportError, RuntimeError: neither is possible.
    """
    try:
        import triton
        from triton import knobs
    except ImportError as error:
        raise ImportError(f"triton must be installed, {MINIMUM_TRITON} or newer, got {_triton()}: {error}") from error
    if knobs.runtime.interpret:
        _check_interpreter(triton.__version__)
        return "cpu", f"triton {triton.__version__}, interpreted on the CPU"
    if torch.cuda.is_available():
        return "cuda", f"triton {triton.__version__} on {torch.cuda.get_device_name()}"
    raise RuntimeError("no GPU: TRITON_INTERPRET=1 must be set before triton is imported, to interpret the kernels")


def _triton() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return "none (pip install triton)"


def _check_interpreter(triton_version: str) -> None:
    """RuntimeError where this numpy is too new for this triton's interpreter."""
    import numpy

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in version.split(".")[:2])

    if numbers(triton_version) < (3, 7) and numbers(numpy.__version__) >= (2, 4):
        raise RuntimeError(
            f"numpy must be older than 2.4 for the interpreter of triton {triton_version}, got {numpy.__version__}: "
            "these checks on a CPU need it, nothing else does"
        )


def _usual_dtype(device: str) -> torch.dtype:
    """bf16, as models train; fp32 in the interpreter, which multiplies bf16 wrongly."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def _compare(device, dtype, implementation, *, heads, seqlen, head_dim, **options) -> None:
    """Raise AssertionError unless out, lse and the gradients of q, k, v and sinks are as close to fp64 as eager's.

    The bound, on relative norms: 1.5 times the error of eager attention on the same rounded inputs with fp32
    accumulation, plus one rounding of the tensor's dtype (in fp32 a few: sums of mixed signs, in another order).
    """
    packed = "cu_seqlens_q" in options
    generator = torch.Generator().manual_seed(0)
    lead = (seqlen,) if packed else (2, seqlen)
    shapes = [(*lead, heads[0], head_dim), (*lead, heads[1], head_dim), (*lead, heads[1], head_dim)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    inputs.append(torch.linspace(-4, 8, heads[0], device=device))  # wide apart: a sink of 0 is hard to see
    dout = torch.randn(shapes[0], generator=generator).to(device, dtype)

    got = _outputs_and_gradients(inputs, dout, implementation, options)
    eager = _outputs_and_gradients(inputs, dout, "reference", options)
    exact = _outputs_and_gradients([x.double() for x in inputs], dout.double(), "reference", options)
    for name, expected in exact.items():
        error, allowed = _relative(got[name], expected), 1.5 * _relative(eager[name], expected)
        allowed += max(torch.finfo(got[name].dtype).eps, 2e-6)
        if not error <= allowed:  # a NaN must fail
            raise AssertionError(f"{name} must be fp64's within {allowed:.1e}, got a relative error of {error:.1e}")


def _outputs_and_gradients(inputs, dout, implementation, options) -> dict[str, Tensor]:
    from .interface import attention_sink

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = attention_sink(*leaves, implementation=implementation, return_lse=True, **options)
    gradients = torch.autograd.grad(
        [out, lse], leaves, [dout, torch.cos(torch.arange(lse.numel())).view_as(lse).to(lse)]
    )
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv", "dsinks"), gradients, strict=True))}


def _relative(got: Tensor, expected: Tensor) -> float:
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def tiny_gpt_oss(attn_implementation: str):
    """A gpt-oss of two layers (sliding, full), the same random fp32 weights each time, its sinks wide apart."""
    from transformers import AutoModelForCausalLM, GptOssConfig

    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=8, num_key_value_heads=2,
        head_dim=16, num_local_experts=2, num_experts_per_tok=2, vocab_size=64, sliding_window=8,
        layer_types=["sliding_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 2.0 if "sinks" in name else 0.2
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def _logits_and_gradients(attn_implementation: str, device: str) -> dict[str, Tensor]:
    model = tiny_gpt_oss(attn_implementation).to(device).train()
    tokens = torch.randint(1, 64, (2, 24), generator=torch.Generator().manual_seed(0)).to(device)
    padding = torch.ones_like(tokens)
    padding[0, :5] = 0
    logits = model(tokens, attention_mask=padding).logits[padding.bool()]
    logits.square().mean().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **gradients}


def main() -> int:
    """Print each result as a line of JSON; 1 if a check failed."""
    passed = True
    for result in run_checks():
        print(json.dumps(asdict(result)), flush=True)
        passed &= result.passed
    return 0 if passed else 1


def interpreter_environment() -> dict[str, str]:
    """What a process needs in its environment to run the kernels here: TRITON_INTERPRET=1 if there is no GPU."""
    return {} if torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ else {"TRITON_INTERPRET": "1"}


if __name__ == "__main__":
    raise SystemExit(main())
