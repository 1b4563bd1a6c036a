"""Every text model class of the installed transformers, tiny and random, against its own eager attention.

    python tests/model_sweep.py [--only NAME] [--out FILE] [--timeout SECONDS] [--workers N]

Prints a line a class and case that is not right; ``--out`` writes the table. A verdict is one of

right          logits, gradients and generated tokens are eager's, to 1e-4 in fp32
refused: ...   this package raised ValueError, TypeError or NotImplementedError
n/a: ...       nothing to compare: the class cannot be built tiny, eager fails, the forward takes no positions, ...
WRONG: ...     anything else

The truth for packed rows is eager on each sample alone. Each class runs in a process of its own.

Over 400 lines: half of it are the cases, one function each.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from model_sweep_table import write_table
from tiny_models import Inputs, build, positions, tiny_of, tokens
from transformers import masking_utils
from transformers.models.auto import modeling_auto

import triton_attention_sink_hf
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward, attention_mask

NAME = "triton_attention_sink"
TOLERANCE = 1e-4
MAPPINGS = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "MASKED_LM",
    "TOKEN_CLASSIFICATION",
)  # fmt: skip


class Seen:
    """What reached this package since the last reset."""

    calls, cuts = 0, False

    @classmethod
    def reset(cls) -> None:
        cls.calls, cls.cuts = 0, False


def watched_attention(*args, **kwargs):
    Seen.calls += 1
    Seen.cuts |= kwargs.get("position_ids") is not None
    return attention_forward(*args, **kwargs)


def watched_mask(*args, mask_function=None, **kwargs):
    Seen.cuts |= _mentions(mask_function, "packed_sequence_mask_function")
    return attention_mask(*args, mask_function=mask_function, **kwargs)


def _mentions(function, name: str) -> bool:
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    parts = [x for cell in cells for x in (cell if isinstance(cell, tuple) else (cell,)) if callable(x)]
    return getattr(function, "__qualname__", "").startswith(name) or any(_mentions(x, name) for x in parts)


def logits_of(output) -> torch.Tensor:
    found = getattr(output, "logits", None)
    if found is None:
        found = next(x for x in output.to_tuple() if isinstance(x, torch.Tensor) and x.is_floating_point())
    return found


def kept_of(logits, keep) -> torch.Tensor:
    return logits[keep.repeat_interleave(logits.shape[0] // keep.shape[0], 0)]


def of_dtype(calls, dtype):
    def cast(x):
        return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    return [({name: cast(value) for name, value in kwargs.items()}, keep) for kwargs, keep in calls]


def evaluate(model, calls, gradients: bool = True):
    """(logits of the kept tokens, gradients by name) over calls of (keyword arguments, bool (B, S) of kept tokens)."""
    model.zero_grad()
    flat = torch.cat([kept_of(logits_of(model(**kwargs)), keep) for kwargs, keep in calls])
    grads = {}
    if gradients:
        (flat * torch.cos(torch.arange(flat.numel(), dtype=flat.dtype)).view(flat.shape)).sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return flat.detach(), grads


def difference(found, expected) -> float:
    """The larger relative error of logits and of any parameter's gradient that is not negligible beside the others."""
    errors = [relative(found[0], expected[0], 0.0)]
    scale = max([g.norm().item() for g in expected[1].values()], default=0.0)
    for name, grad in expected[1].items():
        if name in found[1]:
            errors.append(relative(found[1][name], grad, 1e-2 * scale))
        elif grad.norm() > 1e-6 * scale:
            return math.inf
    return max(errors)


def relative(found, expected, floor: float) -> float:
    error = ((found - expected).norm() / expected.norm().clamp_min(max(floor, 1e-30))).item()
    return math.inf if math.isnan(error) else error


class NotApplicable(Exception):
    pass


def of_eager(run):
    """What eager gives; its failures are no fault of ours."""
    try:
        found = run()
    except NotApplicable:
        raise
    except Exception as error:
        raise NotApplicable(f"eager fails: {type(error).__name__}: {first_line(error)}") from error
    values = found[0] if isinstance(found, tuple) else found
    if not torch.isfinite(values.float()).all():
        raise NotApplicable("eager is not finite")
    return found


def first_line(error) -> str:
    return (str(error).strip().splitlines() or [""])[0][:110]


def judge(error: float) -> str:
    return "right" if error < TOLERANCE else f"WRONG: {error:.1e}"


LENGTHS = ((5, 9, 3), (1, 14, 2))


class Pair:
    """A class's eager model and ours, and the cases that both are put through."""

    def __init__(self, model_class, config):
        self.eager = of_eager(lambda: (torch.zeros(1), build(model_class, config, "eager")))[1]
        try:
            self.ours = build(model_class, config, NAME)
        except KeyError as error:  # a class dict of transformers' own, where the name is not known
            if "text_config" not in getattr(config, "sub_configs", {}):
                raise NotApplicable("transformers knows only its own names") from error
            self.ours = build(model_class, config, {"text_config": NAME})
        self.inputs = Inputs(self.eager)

    def compare(self, expected_calls, calls, **kwargs) -> str:
        def error(dtype) -> float:
            self.eager.to(dtype), self.ours.to(dtype)
            expected = of_eager(lambda: evaluate(self.eager, of_dtype(expected_calls, dtype), **kwargs))
            return difference(evaluate(self.ours, of_dtype(calls, dtype), **kwargs), expected)

        found = error(torch.float32)
        if TOLERANCE <= found < 1e-2:  # a few deep models round by more than that in fp32
            try:
                found = error(torch.float64)
            finally:
                self.eager.float(), self.ours.float()
        return judge(found)

    def plain(self) -> str:
        ids = tokens(2, 13)
        call = [(self.inputs(ids), torch.ones_like(ids, dtype=torch.bool))]
        return self.compare(call, call)

    def padded(self, left: bool) -> str:
        ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
        mask[0, 9:] = 0
        mask = mask.flip(1) if left else mask
        call = [(self.inputs(ids, mask), mask.bool())]
        return self.compare(call, call)

    def right_padded(self) -> str:
        return self.padded(left=False)

    def left_padded(self) -> str:
        return self.padded(left=True)

    def samples(self, rows, dropped: int = 0):
        """(calls of each sample alone, ids, position_ids, kept): the last `dropped` samples of each row are padding."""
        if self.inputs.positions is None:
            raise NotApplicable("forward takes no position_ids")
        ids = tokens(len(rows), sum(rows[0]))
        alone, kept = [], torch.ones_like(ids, dtype=torch.bool)
        for i, lengths in enumerate(rows):
            start = 0
            for j, n in enumerate(lengths):
                if j < len(lengths) - dropped:
                    sample = ids[i : i + 1, start : start + n]
                    call = self.inputs(sample, None, positions(n))
                    alone.append((call, torch.ones_like(sample, dtype=torch.bool)))
                else:
                    kept[i, start : start + n] = False
                start += n
        return alone, ids, torch.cat([positions(*lengths) for lengths in rows]), kept

    def pack(self, rows, dropped: int = 0, axes: int = 0, cache: bool = False) -> str:
        alone, ids, position_ids, kept = self.samples(rows, dropped)
        packed = self.inputs(ids, kept.long() if dropped else None, position_ids)
        if cache:
            packed.pop("use_cache", None)
            of_eager(lambda: evaluate(self.eager, [(packed, kept)], gradients=False))
        if axes:
            packed[self.inputs.positions] = position_ids.expand(axes, -1, -1)
        verdict = self.compare(alone, [(packed, kept)])
        return self.unless_eager_too(verdict, position_ids, packed, kept)

    def packed(self) -> str:
        return self.pack(LENGTHS[:1])

    def packed_rows(self) -> str:
        return self.pack(LENGTHS)

    def packed_cache(self) -> str:
        return self.pack(LENGTHS[:1], cache=True)

    def packed_padded(self) -> str:
        return self.pack(LENGTHS, dropped=1)

    def packed_mrope(self, axes: int = 4) -> str:
        text = self.eager.config.get_text_config()
        if "mrope_section" not in (getattr(text, "rope_parameters", None) or {}):
            raise NotApplicable("no multimodal rotary embedding")
        return self.pack(LENGTHS[:1], axes=axes)

    def packed_mrope3(self) -> str:
        return self.packed_mrope(3)

    def unless_eager_too(self, verdict: str, position_ids, packed, kept) -> str:
        """The verdict, unless what mixes the samples is not attention, or attention could not know better."""
        if not verdict.startswith("WRONG"):
            return verdict
        kwargs = dict(packed)
        Seen.reset()
        found = evaluate(self.ours, [(kwargs, kept)], gradients=False)
        if difference(found, evaluate(self.eager, [(kwargs, kept)], gradients=False)) < TOLERANCE and not Seen.cuts:
            return "n/a: own attention" if not Seen.calls else "n/a: neither the mask nor attention is told of the cuts"
        segments = (position_ids == 0).cumsum(-1)
        other = segments[:, None, :, None] != segments[:, None, None, :]

        def cut(**options):
            dense = masking_utils.eager_mask(**{**options, "allow_is_bidirectional_skip": False})
            if dense.shape[-2:] != other.shape[-2:]:  # cross-attention
                return dense
            return dense.masked_fill(other, torch.finfo(dense.dtype).min)

        transformers.AttentionMaskInterface.register("eager", cut)
        try:
            dense = evaluate(self.eager, [(kwargs, kept)], gradients=False)
        finally:
            transformers.AttentionMaskInterface.register("eager", masking_utils.eager_mask)
        mixed = difference(found, dense) < TOLERANCE
        return "n/a: layers that are not attention mix samples" if mixed else verdict

    def generate(self, **kwargs) -> str:
        if not self.eager.can_generate():
            raise NotApplicable("does not generate")
        ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
        mask[0, :3] = 0
        settings = dict(max_new_tokens=8, do_sample=False, num_beams=1, disable_compile=True, **kwargs)
        settings |= dict(return_dict_in_generate=True, output_logits=True)

        def run(model):
            given = self.inputs.encoder(2) if self.inputs.two_sided else {"input_ids": ids}
            if "input_ids" in given:
                given["attention_mask"] = torch.ones_like(given["input_ids"]) if self.inputs.two_sided else mask
            with torch.no_grad():
                out = model.generate(**given, **settings)
            return torch.stack(out.logits), out.sequences

        expected = of_eager(lambda: run(self.eager))
        found = run(self.ours)
        if not torch.equal(found[1], expected[1]):
            return "WRONG: other tokens"
        return judge(relative(found[0], expected[0], 0.0))

    def generate_static(self) -> str:
        return self.generate(cache_implementation="static")

    def checkpointed(self) -> str:
        if not self.eager.supports_gradient_checkpointing:
            raise NotApplicable("no gradient checkpointing")
        for model in (self.eager, self.ours):
            model.gradient_checkpointing_enable(dict(use_reentrant=False))
            model.train()
        try:
            ids = tokens(2, 13)
            call = [(self.inputs(ids), torch.ones_like(ids, dtype=torch.bool))]
            runs = [of_eager(lambda: evaluate(self.eager, call)) for _ in range(3)]
            if any(difference(run, runs[0]) > TOLERANCE for run in runs[1:]):
                raise NotApplicable("eager is random in training")
            return self.packed() if self.inputs.positions else self.plain()
        finally:
            for model in (self.eager, self.ours):
                model.gradient_checkpointing_disable()
                model.eval()


CASES = (
    "plain", "packed", "packed_rows", "packed_cache", "packed_mrope", "packed_mrope3", "right_padded",
    "left_padded", "packed_padded", "generate", "generate_static", "checkpointed",
)  # fmt: skip


def verdict_of(run) -> str:
    try:
        return run()
    except NotApplicable as reason:
        return f"n/a: {reason}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        inside = os.path.dirname(triton_attention_sink_hf.__file__)
        own = os.path.abspath(frames[-1].filename).startswith(inside)
        said = (frames[-1].line or "").startswith("raise ")  # and not stumbled upon
        if own and said and isinstance(error, (ValueError, TypeError, NotImplementedError)):
            return f"refused: {first_line(error)}"
        where = next(
            (f"{os.path.basename(f.filename)}:{f.lineno}" for f in reversed(frames) if "torch/" not in f.filename), ""
        )
        return f"WRONG: {type(error).__name__}: {first_line(error)} ({where})"


def sweep_class(name: str) -> dict[str, dict[str, str]]:
    """Verdicts by variant ("", and "window" where the class has one) and case."""
    model_class = getattr(transformers, name)
    found = {}
    for variant in ("", "window"):
        Seen.reset()
        try:
            config = tiny_of(model_class, short_window=bool(variant))
            long = tiny_of(model_class, short_window=False)
        except Exception as error:
            return {"": {"plain": f"n/a: config: {type(error).__name__}: {first_line(error)}"}}
        if variant and config.to_dict() == long.to_dict():
            break
        pair = []
        built = verdict_of(lambda: pair.append(Pair(model_class, config)) or "right")  # noqa: B023
        if built != "right":
            found[variant] = {"plain": built}
            continue
        verdicts = {"plain": verdict_of(pair[0].plain)}
        own = verdicts["plain"] == "right" and not Seen.calls
        verdicts |= {case: verdict_of(getattr(pair[0], case)) for case in CASES[1:]}
        if own:
            verdicts = {c: "n/a: own attention" if v == "right" else v for c, v in verdicts.items()}
        found[variant] = verdicts
    return found


# The table


def classes() -> list[str]:
    names = {}
    for mapping in MAPPINGS:
        for entry in getattr(modeling_auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").values():
            for name in (entry,) if isinstance(entry, str) else entry:
                if hasattr(transformers, name) and not (
                    mapping == "TOKEN_CLASSIFICATION" and "PrivacyFilter" not in name
                ):
                    names[name] = None
    return list(names)


def _child(measure, name: str, pipe, failed) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity(50)
    transformers.AttentionInterface.register(NAME, watched_attention)
    transformers.AttentionMaskInterface.register(NAME, watched_mask)
    try:
        pipe.send(measure(name))
    except BaseException as error:
        pipe.send(failed(f"n/a: harness: {type(error).__name__}: {first_line(error)}"))


def run_in_process(measure, name: str, timeout: float, failed):
    """``measure(name)`` in a process of its own, or ``failed(verdict)``."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(measure, name, sender, failed))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return failed(f"n/a: takes longer than {timeout:.0f} s")
        return receiver.recv()
    except EOFError:
        return failed("n/a: the process died")
    finally:
        process.kill()
        process.join()


def run_class(name: str, timeout: float) -> dict[str, dict[str, str]]:
    return run_in_process(sweep_class, name, timeout, lambda verdict: {"": {"plain": verdict}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="parts of the names of the classes to run, by commas")
    parser.add_argument("--out", help="file for the table")
    parser.add_argument("--json", help="file for all verdicts")
    parser.add_argument("--timeout", type=float, default=240)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    names = [name for name in classes() if any(part in name for part in arguments.only.split(","))]
    with ThreadPoolExecutor(arguments.workers) as pool:
        results = {}
        runs = {name: pool.submit(run_class, name, arguments.timeout) for name in names}
        for name, run in runs.items():
            results[name] = run.result()
            for variant, verdicts in results[name].items():
                for case, verdict in verdicts.items():
                    print(f"{name} {variant} {case}: {verdict}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    if arguments.out:
        write_table(results, CASES, arguments.out)


if __name__ == "__main__":
    main()
