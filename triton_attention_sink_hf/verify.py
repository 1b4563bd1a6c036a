"""Does this attention train *your* model as eager does? Log-probs and the gradient of every parameter, compared.

A few random samples of uneven lengths go through the model twice: one after the other with eager attention, which is
the definition, and as one packed row with ours (``position_ids`` that restart, no mask), which is what verl and TRL do.
Both have the same loss, a weighted sum of log-probs.

Errors are norms relative to eager in fp32. What is allowed:

* fp32: ``FP32_TOLERANCE``.
* bf16, fp16: ``FACTOR`` times the error that eager itself has in that dtype, sample by sample, plus one rounding.
  Either error is one draw, so eager's is that of the parameter or of its namesakes in all layers, whichever is larger,
  and ours may lie ``DEVIATIONS`` standard deviations of a norm of that many elements above it: a router's bias has a
  handful.

In a mixture of experts the router of the fp32 run decides for all runs, since a near tie that falls the other way
changes a gradient by more than any attention does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FP32_TOLERANCE = 1e-4
FACTOR, DEVIATIONS = 2.0, 4.0
LOG_PROBS = "log-probs"
SHORTEST, LONGEST = 192, 1024  # the longest sample lies between, whatever the model's window
SMALL = 1e-2  # a gradient smaller than this times the usual one is measured against that


@dataclass(frozen=True)
class Row:
    """One comparison; errors are relative norms. ``eager_error``: of eager in the same dtype, None in fp32."""

    name: str
    size: float
    error: float
    eager_error: float | None
    allowed: float

    @property
    def passed(self) -> bool:
        return self.error <= self.allowed  # a NaN fails

    @property
    def excess(self) -> float:
        """How much of what is allowed is used; above 1 is a failure."""
        return math.inf if math.isnan(self.error) else self.error / self.allowed


@dataclass
class Report:
    """What ``verify`` found. ``problem``: why ours could not run at all."""

    model: str
    attention: str
    device: str
    dtype: str
    parameters: int
    lengths: list[int]
    notes: list[str] = field(default_factory=list)
    sinks: dict[str, tuple[float, float]] = field(default_factory=dict)  # name -> smallest, largest
    log_prob_mean: float = math.nan  # absolute difference from fp32 eager, in nats
    log_prob_max: float = math.nan
    rows: list[Row] = field(default_factory=list)
    problem: str | None = None

    @property
    def passed(self) -> bool:
        return self.problem is None and bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def log_probs(self) -> Row:
        return self.rows[0]

    def sink_rows(self) -> list[Row]:
        return [row for row in self.rows if row.name in self.sinks]

    def worst(self, n: int) -> list[Row]:
        """The n gradients that come closest to what is allowed, or exceed it most, those of sinks left out."""
        others = [row for row in self.rows[1:] if row.name not in self.sinks]
        return sorted(others, key=lambda row: row.excess, reverse=True)[:n]

    def as_dict(self) -> dict:
        rows = [asdict(row) | {"passed": row.passed} for row in self.rows]
        return asdict(self) | {"rows": rows, "passed": self.passed}


def verify(
    model: str,
    *,
    dtype: str = "fp32",
    device: str | None = None,
    attention: str = "triton_attention_sink",
    layers: int | None = None,
    seed: int = 0,
    log: Callable[[str], None] = lambda line: None,
) -> Report:
    """Compare ``attention`` with eager for one model. The weights are loaded once.

    Args:
        model: what ``AutoModelForCausalLM.from_pretrained`` takes, or a folder that holds no more than a config.json,
            whose weights are then random and whose sinks are spread from -2 to 6.
        dtype: "fp32", "bf16" or "fp16": of the parameters, under autocast, as FSDP2 hands them to the layers.
        device: default: the GPU if there is one.
        layers: keep only the first so many.
        log: gets a line of progress now and then.

    Raises:
        ValueError: there is nothing to compare: no such device or attention, or a model that cannot be loaded, does not
            fit or cannot be run with eager attention.
        ImportError: transformers is missing.
    """
    import transformers

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_attention(attention)
    if not Path(model).exists() and (Path(model).is_absolute() or model.startswith(".")):
        raise ValueError(f"model must be a folder or a name on the Hub, got {model!r}: there is no such folder")
    with _said_as("the model cannot be loaded"):
        config = transformers.AutoConfig.from_pretrained(model)
        text = config.get_text_config()
        if layers is not None:
            _keep_layers(text, layers)
        parameters = _count(config)
    lengths = sample_lengths(text)
    report = Report(model, attention, device, dtype, parameters, lengths)
    gib = parameters * 8 / 2**30
    log(
        f"{parameters:,} parameters: {gib:.1f} GiB on {device} (weights and gradients in fp32), {gib:.1f} for comparing"
    )
    _refuse_too_large(gib, device)
    with _said_as("the model cannot be loaded"):
        loaded = _load(model, config, DTYPES[dtype], report).to(device).eval()
    report.notes += _notes(text, lengths, loaded, device)
    report.sinks = {
        name: (x.min().item(), x.max().item()) for name, x in loaded.named_parameters() if name.endswith("sinks")
    }

    samples = random_samples(lengths, text.vocab_size, seed)
    routing = Routing(text)
    with _exact_fp32():
        with _said_as("eager attention cannot run the model"):
            log("eager, fp32, sample by sample")
            _cast(loaded, torch.float32)
            exact = _by_sample(loaded, samples, routing)
            eager = None
            if dtype != "fp32":
                log(f"eager, {dtype}, sample by sample")
                _cast(loaded, DTYPES[dtype])
                found = _by_sample(loaded, samples, routing)
                eager = errors(found, exact)
                del found
        log(f"{attention}, {dtype}, packed")
        try:
            _switch(loaded, attention)
            found = _packed(loaded, samples, routing)
        except (ImportError, OSError, torch.OutOfMemoryError) as error:
            raise ValueError(f"{attention} cannot be loaded or does not fit: {_first_line(error)}") from error
        except Exception as error:  # whatever it is, the attention did not do its work
            report.problem = f"{type(error).__name__}: {error}"
            return report
    report.notes += routing.notes
    difference = (found[0] - exact[0])[torch.cat(samples.weights) != 0].abs()
    report.log_prob_mean, report.log_prob_max = difference.mean().item(), difference.max().item()
    report.rows = compare(errors(found, exact), eager, exact, dtype)
    return report


# What was asked for


def check_device(device: str) -> None:
    """ValueError unless torch can compute on ``device`` here."""
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # of many types: no such device, no driver, no such number, "meta"
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {_first_line(error)}") from error


def check_attention(name: str) -> None:
    """ValueError unless ``name`` can stand in ``attn_implementation``; whether a model takes it is another question."""
    from transformers import AttentionInterface

    import triton_attention_sink_hf  # noqa: F401  registers the names

    known = {"eager", *AttentionInterface().valid_keys()}
    is_on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w.-]+)?", name) is not None
    if name not in known and not is_on_hub:
        ours = sorted(x for x in known if "attention_sink" in x)
        raise ValueError(f"attention must be a name that transformers knows, such as {ours}, or org/name, got {name!r}")


@contextmanager
def _said_as(what: str) -> Iterator[None]:
    """Any exception as a ValueError of one line: a checkpoint can be broken in more ways than can be listed."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (f"{error}".strip().splitlines() or ["no message"])[0]


# Model


def _keep_layers(config, layers: int) -> None:
    if not 1 <= layers <= config.num_hidden_layers:
        raise ValueError(f"layers must be from 1 to the model's {config.num_hidden_layers}, got {layers}")
    config.num_hidden_layers = layers
    for name in ("layer_types", "mlp_layer_types"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name)[:layers])


def _count(config) -> int:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            x.numel() for x in AutoModelForCausalLM.from_config(config, attn_implementation="eager").parameters()
        )


def _refuse_too_large(gib: float, device: str) -> None:
    """Weights and gradients in fp32 lie on the device, two sets of gradients on the host."""
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


def _load(model: str, config, dtype: torch.dtype, report: Report):
    import transformers

    folder = Path(model)
    options = {"attn_implementation": "eager", "dtype": dtype}
    weights = [file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]
    if folder.is_dir() and not weights:
        report.notes.append("the folder holds no weights: they are random, sinks spread from -2 to 6")
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
    transformers.logging.set_verbosity_error()  # of the layers that were left out
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(model, config=config, **options)
    finally:
        transformers.logging.set_verbosity(verbosity)


def _switch(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    if model.config._attn_implementation != attention:
        raise ValueError(
            f"attn_implementation must be 'eager' for {type(model).__name__}, got {attention!r}: the model does not "
            "call transformers' attention functions"
        )


def _cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies are buffers and stay exact. From the dtype to fp32 and back loses nothing."""
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _notes(config, lengths: list[int], model: torch.nn.Module, device: str) -> list[str]:
    notes = []
    sinks = [x for name, x in model.named_parameters() if name.endswith("sinks")]
    if not sinks:
        notes.append("the model has no sinks")
    elif all(x.count_nonzero() == 0 for x in sinks):
        notes.append("every sink is 0, as in a model whose sinks were never trained: their effect is small")
    window = _window(config)
    if window and window >= max(lengths):
        notes.append(f"the window of {window} is longer than every sample: it is not exercised")
    if getattr(config, "attention_dropout", 0.0):
        notes.append(f"attention_dropout is {config.attention_dropout}: training with it is refused, set it to 0.0")
    if torch.device(device).type == "cpu":
        notes.append("on a CPU the plain-torch reference serves: the kernels are verified on a GPU only")
    return notes


# Samples


def _window(config) -> int | None:
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    used = getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return window if used else None


def sample_lengths(config) -> list[int]:
    """Uneven, the longest half again as long as the window so that it matters, one of a single token."""
    window = _window(config) or 0
    longest = max(SHORTEST, min(window + window // 2 + 5, LONGEST))
    longest = min(longest, getattr(config, "max_position_embeddings", None) or longest)
    return [max(longest // 5, 2), longest, 1, max(longest // 3, 2), 7, max(2 * longest // 3, 2)]


@dataclass(frozen=True)
class Samples:
    """ids, and the weight of each position's log-prob in the loss, per sample (length,); a sample's last counts 0."""

    ids: list[Tensor]
    weights: list[Tensor]


def random_samples(lengths: list[int], vocabulary: int, seed: int) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    weights = [torch.randn(n, generator=generator) / math.sqrt(sum(lengths)) for n in lengths]
    for weight in weights:
        weight[-1] = 0.0
    return Samples(ids, weights)


# Runs: log-probs (T,) of all samples behind each other, and gradients by name, fp32 on the CPU

Outcome = tuple[Tensor, dict[str, Tensor]]


def _by_sample(model, samples: Samples, routing: Routing) -> Outcome:
    log_probs, gradients = [], {}
    for index, (ids, weights) in enumerate(zip(samples.ids, samples.weights, strict=True)):
        with routing.of([index]):
            log_probs.append(_forward_backward(model, ids, weights, torch.arange(len(ids))))
        for name, gradient in _take_gradients(model):
            gradients[name] = gradients[name] + gradient if name in gradients else gradient
    return torch.cat(log_probs), gradients


def _packed(model, samples: Samples, routing: Routing) -> Outcome:
    positions = torch.cat([torch.arange(len(ids)) for ids in samples.ids])
    with routing.of(range(len(samples.ids))):
        log_probs = _forward_backward(model, torch.cat(samples.ids), torch.cat(samples.weights), positions)
    return log_probs, dict(_take_gradients(model))


def _forward_backward(model, ids: Tensor, weights: Tensor, positions: Tensor) -> Tensor:
    """One row of tokens. As verl calls the model, under autocast where the parameters are not fp32."""
    ids, weights, positions = (x.to(model.device) for x in (ids, weights, positions))
    with torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32):
        logits = model(ids[None], attention_mask=None, position_ids=positions[None], use_cache=False).logits[0]
    log_probs = -torch.nn.functional.cross_entropy(logits.float(), ids.roll(-1), reduction="none")
    (log_probs * weights).sum().backward()
    return torch.where(weights == 0, 0.0, log_probs.detach()).cpu()


def _take_gradients(model) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.float().cpu()
            parameter.grad = None


class Routing(TorchFunctionMode):
    """The experts chosen by the first run of each sample are used again by the later ones.

    Routers choose with ``torch.topk`` over the experts; nothing else of that width is touched.
    """

    EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")

    def __init__(self, config):
        super().__init__()
        self.widths = {getattr(config, name, None) for name in self.EXPERTS} - {None, 0, 1}
        self.chosen: dict[int, list[Tensor]] = {}  # sample -> (its tokens, k) for every router in turn
        self.samples: list[int] = []
        self.turn = 0
        self.changed = self.decisions = 0

    @contextmanager
    def of(self, samples):
        """Record the choices for the sample, or use those that are known."""
        self.samples, self.turn = list(samples), 0
        self.recording = self.samples[0] not in self.chosen
        if self.recording:
            self.chosen[self.samples[0]] = []
        self.changed = self.decisions = 0
        with self:
            yield

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function not in (torch.topk, Tensor.topk) or args[0].shape[-1] not in self.widths:
            return result
        if self.recording:
            self.chosen[self.samples[0]].append(result.indices)
            return result
        known = torch.cat([self.chosen[sample][self.turn] for sample in self.samples]).view_as(result.indices)
        self.turn += 1
        self.changed += (known.sort(-1).values != result.indices.sort(-1).values).any(-1).sum().item()
        self.decisions += known[..., 0].numel()
        return torch.return_types.topk((args[0].gather(-1, known), known))

    @property
    def notes(self) -> list[str]:
        """About the last run."""
        if not self.decisions:
            return []
        return [f"routing as in fp32; by itself it would have differed in {self.changed} of {self.decisions} choices"]


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """fp32 products without tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# Comparison


def errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Relative norms of the differences: log-probs, then the gradient of every parameter that has one."""
    (log_probs, gradients), (true_log_probs, true_gradients) = found, exact
    relative = {LOG_PROBS: (_norm(log_probs - true_log_probs) / _norm(true_log_probs))}
    usual = _usual(true_gradients)
    for name, true in true_gradients.items():
        difference = gradients[name] - true if name in gradients else true
        relative[name] = _norm(difference) / max(_norm(true), SMALL * usual * math.sqrt(true.numel()), 1e-30)
    for name in gradients.keys() - true_gradients.keys():
        relative[name] = math.inf if gradients[name].any() else 0.0
    return relative


def compare(found: dict[str, float], eager: dict[str, float] | None, exact: Outcome, dtype: str) -> list[Row]:
    """One row for the log-probs and one for each gradient; eager: the errors of eager in dtype, None in fp32."""
    counted = {LOG_PROBS: exact[0]} | exact[1]
    rounding = torch.finfo(DTYPES[dtype]).eps
    rows = []
    for name, error in found.items():
        true = counted.get(name, torch.zeros(1))
        own, allowed = None, FP32_TOLERANCE
        if eager is not None:
            own = eager.get(name, 0.0)
            namesakes = [x for other, x in eager.items() if _kind(other) == _kind(name)] or [0.0]
            usual = math.sqrt(sum(x * x for x in namesakes) / len(namesakes))
            unlucky = 1.0 + DEVIATIONS / math.sqrt(2 * true.numel())
            allowed = FACTOR * unlucky * max(own, usual) + (FP32_TOLERANCE if name == LOG_PROBS else rounding)
        rows.append(Row(name, _norm(true), error, own, allowed))
    return rows


def _kind(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def _usual(gradients: dict[str, Tensor]) -> float:
    """Root mean square of all elements."""
    squares = sum(_norm(x) ** 2 for x in gradients.values())
    return math.sqrt(squares / max(sum(x.numel() for x in gradients.values()), 1))


def _norm(x: Tensor) -> float:
    return torch.linalg.vector_norm(x.double() if x.numel() < 2**20 else x).item()
