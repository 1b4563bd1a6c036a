"""``verify``: check what was asked for, load the model, run it with eager and with ours, compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from . import models, passes
from .comparison import compare, errors
from .models import DTYPES
from .report import Report
from .routing import Routing
from .samples import random_samples, sample_lengths


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
        layers: keep only this many, from the first.
        log: called with lines of progress.

    Raises:
        ValueError: there is nothing to compare: no such device or attention, or a model that cannot be loaded, does not
            fit, cannot be run with eager attention or has sinks that eager does not know. Models that bring code of
            their own and weights other than safetensors, which are pickles, are not loaded.
        ImportError: transformers is missing.
    """
    import transformers

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_attention(attention)
    if not Path(model).exists() and (Path(model).is_absolute() or model.startswith(".")):
        raise ValueError(f"model must be a folder or a name on the Hub, got {model!r}: there is no such folder")
    with one_sentence("the model cannot be loaded"):
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
        text = config.get_text_config()
        if layers is not None:
            models.keep_layers(text, layers)
        parameters = models.count_parameters(config)
    models.refuse_sinks_of_the_config(text)
    lengths = sample_lengths(text)
    report = Report(model, attention, device, dtype, parameters, lengths)
    gib = parameters * 8 / 2**30
    log(
        f"{parameters:,} parameters: {gib:.1f} GiB on {device} (weights and gradients in fp32), {gib:.1f} for comparing"
    )
    models.refuse_too_large(gib, device)
    with one_sentence("the model cannot be loaded"):
        loaded = models.load(model, config, DTYPES[dtype], report.notes).to(device).eval()
    report.notes += models.notes_on(text, lengths, loaded, device)
    report.sinks = {
        name: (x.min().item(), x.max().item()) for name, x in loaded.named_parameters() if name.endswith("sinks")
    }

    samples = random_samples(lengths, text.vocab_size, seed)
    routing = Routing(text)
    with passes.exact_fp32():
        with one_sentence("eager attention cannot run the model"):
            log("eager, fp32, sample by sample")
            models.cast(loaded, torch.float32)
            exact = passes.by_sample(loaded, samples, routing)
            eager = None
            if dtype != "fp32":
                log(f"eager, {dtype}, sample by sample")
                models.cast(loaded, DTYPES[dtype])
                found = passes.by_sample(loaded, samples, routing)
                eager = errors(found, exact)
                del found
        log(f"{attention}, {dtype}, packed")
        try:
            models.switch(loaded, attention)
            found = passes.packed(loaded, samples, routing)
        except (ImportError, OSError, torch.OutOfMemoryError) as error:
            raise ValueError(f"{attention} cannot be loaded or does not fit: {_first_line(error)}") from error
        except Exception as error:  # of any type: the attention failed
            report.problem = f"{type(error).__name__}: {error}"
            return report
    report.notes += routing.notes
    difference = (found[0] - exact[0])[torch.cat(samples.weights) != 0].abs()
    report.log_prob_mean, report.log_prob_max = difference.mean().item(), difference.max().item()
    report.rows = compare(errors(found, exact), eager, exact, dtype)
    return report


def check_device(device: str) -> None:
    """ValueError unless torch can compute on ``device`` here."""
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # of many types: no such device, no driver, no such number, "meta"
        raise ValueError(f"device must be one that torch can use here, got {device!r}: {_first_line(error)}") from error


def check_attention(name: str) -> None:
    """ValueError unless ``name`` can stand in ``attn_implementation``; whether a model takes it is another question."""
    import transformers  # noqa: F401  ImportError without it

    from ..naming import judge

    verdict = judge(name)
    if not verdict.works:
        raise ValueError(f"attention must be a name that transformers knows, got {name!r}: {verdict.reason}")


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """Turn any exception into a ValueError of one line: a checkpoint can be broken in more ways than can be listed."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (f"{error}".strip().splitlines() or ["no message"])[0]
