"""Models with sinks and their neighbours, tiny and random, by feature: what MODELS.md says, measured.

    python tests/model_support.py [--only "NAME|..."] [--json FILE] [--page FILE]

Verdicts are those of model_sweep.py, whose cases it runs, beside cases of its own: every kind of sink, and masks of
images and prefixes. ``--json`` adds the installed transformers' verdicts to FILE; ``--page`` writes the page from it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os

import torch
import transformers
from model_sweep import LENGTHS, NotApplicable, Pair, run_in_process, verdict_of
from tiny_models import tiny_of, tokens
from torch.nn.functional import softmax
from transformers import masking_utils

from triton_attention_sink_hf import attach_learned_sinks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RESULTS = os.path.join(ROOT, "benchmarks", "results", "models.json")
PAGE = os.path.join(ROOT, "MODELS.md")
SLIDING = dict(layer_types=["sliding_attention"] * 2, num_hidden_layers=2, head_dim=512)
# row -> (class, settings beside the tiny ones, what it is)
ROWS: dict[str, tuple[str, dict, str]] = {
    "gpt-oss": ("GptOssForCausalLM", {}, "sinks"),
    "MiMo-V2-Flash": ("MiMoV2FlashForCausalLM", {}, "sinks in the sliding layers"),
    "Granite-SWA": ("GraniteSWAForCausalLM", {}, "sinks"),
    "Granite-MoE-SWA": ("GraniteMoeSWAForCausalLM", {}, "sinks"),
    "OpenAI privacy filter": ("OpenAIPrivacyFilterForTokenClassification", {}, "sinks, an encoder"),
    "Flint": ("FlintForCausalLM", {}, "sinks"),
    "HY-V4": ("HYV4ForCausalLM", {}, "sinks, an indexer (rows of at most `index_topk` tokens)"),
    "DeepSeek-V4": ("DeepseekV4ForCausalLM", {}, "sinks, compressed keys"),
    "DeepSeek-V4, sliding layers alone": ("DeepseekV4ForCausalLM", SLIDING, "sinks, head dimension 512"),
    "Inkling-2": ("Inkling2ForCausalLM", {}, "sinks by token, a position bias"),
    "DeepSeek-V3.2": ("DeepseekV32ForCausalLM", {}, "an indexer, as HY-V4"),
    "Llama": ("LlamaForCausalLM", {}, ""),
    "Mistral": ("MistralForCausalLM", {}, ""),
    "Qwen3": ("Qwen3ForCausalLM", {}, ""),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", {}, ""),
    "Gemma 2": ("Gemma2ForCausalLM", {}, "softcap"),
    "Gemma 3, text": ("Gemma3ForCausalLM", {}, ""),
    "Gemma 3, images": ("Gemma3ForConditionalGeneration", {}, "image tokens see each other"),
    "PaliGemma": ("PaliGemmaForConditionalGeneration", {}, "a bidirectional prefix"),
    "T5Gemma": ("T5GemmaForConditionalGeneration", {}, "encoder, decoder, cross-attention"),
}
FEATURES = {
    "forward and gradients": "plain", "window": "window", "packed rows": "packed",
    "packed by cu_seq_lens": "packed_by_lengths", "padding": "left_padded", "packed and padded": "packed_padded",
    "generate": "generate", "static cache": "generate_static", "checkpointing": "checkpointed",
    "learned sinks": "learned", "constant sink": "constant", "images, prefix": "blocks",
}  # fmt: skip
CONSTANT = 0.5
WITH_COLUMNS = "eager_with_columns"


def eager_with_columns(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, sinks=None, position_bias=None,
    **kwargs,
):  # fmt: skip
    """Eager attention with a column for every sink: the model's or the module's own, and the config's ``column``."""
    k, v = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ k.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    for added in (attention_mask, position_bias):
        scores = scores if added is None else scores + added
    s_aux = sinks if s_aux is None else s_aux
    s_aux = getattr(module, "sinks", None) if s_aux is None else s_aux
    if s_aux is not None and s_aux.dim() == 1:
        s_aux = s_aux[None, :, None, None]
    columns = [] if s_aux is None else [s_aux.expand(*scores.shape[:3], 1)]
    if getattr(module.config, "column", None) is not None:
        columns.append(scores.new_full((*scores.shape[:3], 1), module.config.column))
    p = softmax(torch.cat([scores, *columns], -1), -1)[..., : scores.shape[-1]]
    return (p @ v).transpose(1, 2), None


class Row(Pair):
    """The cases of a sweep, and those of this page."""

    def __init__(self, model_class, config, short):
        super().__init__(model_class, config)
        self.classes, self.short = (model_class, short), short
        self.own = any("sink" in name for name, _ in self.eager.named_parameters())
        transformers.AttentionInterface.register(WITH_COLUMNS, eager_with_columns)
        transformers.AttentionMaskInterface.register(WITH_COLUMNS, masking_utils.eager_mask)

    def window(self) -> str:
        if self.short is None:
            raise NotApplicable("no window")
        pair = Pair(*self.classes)
        verdicts = [pair.plain()] + ([pair.packed()] if pair.inputs.positions else [])
        return next((verdict for verdict in verdicts if not verdict.startswith(("right", "n/a"))), verdicts[0])

    def packed_by_lengths(self) -> str:
        """As trainers without padding pass them; eager ignores them."""
        alone, ids, position_ids, kept = self.samples(LENGTHS[:1])
        cu = torch.tensor([0, *itertools.accumulate(LENGTHS[0])], dtype=torch.int32)
        lengths = dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=max(LENGTHS[0]), max_length_k=max(LENGTHS[0]))
        packed = {**self.inputs(ids, None, position_ids), **lengths}
        return self.unless_eager_too(self.compare(alone, [(packed, kept)]), position_ids, packed, kept)

    def with_columns(self, attach: bool, **settings) -> str:
        """Ours with the key set or sinks attached, against eager_with_columns."""
        models = self.eager, self.ours
        try:
            self.ours = copy.deepcopy(self.ours)
            if attach:
                for i, name in enumerate(attach_learned_sinks(self.ours)):
                    p = self.ours.get_parameter(name)
                    p.data = torch.linspace(-3, 4, p.numel()) + i
            self.eager = copy.deepcopy(self.ours)
            self.eager.set_attn_implementation(WITH_COLUMNS)
            for model, key in ((self.ours, "attention_sink"), (self.eager, "column")):
                if key in settings:
                    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
                        setattr(config, key, settings[key])
            verdict = self.packed() if self.inputs.positions else "n/a"
            return self.plain() if verdict.startswith("n/a") else verdict
        finally:
            self.eager, self.ours = models

    def learned(self) -> str:
        return self.plain() if self.own else self.with_columns(attach=True)

    def constant(self) -> str:
        key = f"learned+{CONSTANT}" if self.own else CONSTANT
        return self.with_columns(attach=False, attention_sink=key, column=CONSTANT)

    def blocks(self) -> str:
        if "token_type_ids" not in self.inputs.names:
            raise NotApplicable("no blocks of tokens")
        ids, kinds = tokens(2, 13), torch.zeros(2, 13, dtype=torch.long)
        if "PaliGemma" in type(self.eager).__name__:
            kinds[:, 6:] = 1  # the rest is the prefix
        else:
            kinds[:, 3:7] = 1
        call = [({**self.inputs(ids), "token_type_ids": kinds}, torch.ones_like(ids, dtype=torch.bool))]
        return self.compare(call, call)


def measure(name: str) -> dict[str, str]:
    """Verdict by feature of a row; {} if transformers lacks the class."""
    class_name, settings, _ = ROWS[name]
    model_class = getattr(transformers, class_name)
    config, short = (tiny_of(model_class, short_window=short) for short in (False, True))
    for changed in (config, short):
        for key, value in settings.items():
            setattr(changed, key, value)
    if config.to_dict() == short.to_dict():
        short = None
    rows = []
    built = verdict_of(lambda: rows.append(Row(model_class, config, short)) or "right")
    if built != "right":
        return dict.fromkeys(FEATURES, built)
    return {feature: verdict_of(getattr(rows[0], case)) for feature, case in FEATURES.items()}


def run(names: list[str], timeout: float = 600.0) -> dict[str, dict[str, str]]:
    """Each row in a process of its own."""
    there = [name for name in names if hasattr(transformers, ROWS[name][0])]
    return {name: run_in_process(measure, name, timeout, functools.partial(dict.fromkeys, FEATURES)) for name in there}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names of rows, between bars")
    parser.add_argument("--json", help="file of results to add to")
    parser.add_argument("--page", help="file for the page")
    arguments = parser.parse_args()
    results = run([name for name in ROWS if not arguments.only or name in arguments.only.split("|")])
    for name, row in results.items():
        for feature, verdict in row.items():
            print(f"{name} | {feature}: {verdict}", flush=True)
    if arguments.json:
        known = {}
        if os.path.exists(arguments.json):
            with open(arguments.json) as file:
                known = json.load(file)
        known.setdefault(transformers.__version__, {}).update(results)
        with open(arguments.json, "w") as file:
            json.dump(known, file, indent=1, sort_keys=True)
            file.write("\n")
    if arguments.page:
        from model_support_page import page

        with open(arguments.json or RESULTS) as file, open(arguments.page, "w") as out:
            out.write(page(json.load(file)))


if __name__ == "__main__":
    main()
