"""MODELS.md from the verdicts of model_support.py."""

from __future__ import annotations

import re

from model_support import FEATURES, ROWS

HEAD = """# Models and features

Which models with sinks, and which of their neighbours, do what under `attn_implementation: triton_attention_sink`.
Every cell is a test: a tiny model of random weights, its logits and the gradient of every parameter against its own
eager attention, to 1e-4 in fp32. `yes` is equal. `no` with a number is refused with that error, never degraded. `-` is
nothing to compare: the model lacks the feature, or the numbered reason. Packed rows are compared with eager on each
sample alone; `generate` in tokens and logits.

Written by `python tests/model_support.py --json benchmarks/results/models.json --page MODELS.md`, for transformers
{version}; `tests/test_model_support.py` holds it to that. Every class of transformers:
[5.10](tests/model_sweep_5.10.md) and [5.24](tests/model_sweep_5.24.md).

"""
TAIL = """
- **learned sinks**: the model's own, or those of `attach_learned_sinks`. **constant sink**: `attention_sink: 0.5` in
  the model's config, `learned+0.5` beside sinks of its own ([the key](API.md#kinds-of-sinks)).
- **images, prefix**: tokens that see each other in both directions inside the causal mask, by `key_ranges`.
- **packed rows** by `position_ids` that restart. Where a model tells them neither to its mask nor to its layers, pass
  `cu_seq_lens_q` and `cu_seq_lens_k`; without them the samples mix, as with eager.
- **DeepSeek-V4**: its compressor tells a dense mask alone which queries see which compressed keys. Models of sliding
  layers alone are served, head dimension 512 included.
- **HY-V4**, DeepSeek-V3.2 and others with an indexer: while a row has at most `config.index_topk` tokens the indexer
  chooses every key, and attention is dense. Longer rows are refused.
- **Inkling-2**: its sinks by token are served; the position bias that depends on the query is not.
- **T5Gemma**: packed rows by `position_ids`; its encoder would take the decoder's `cu_seq_lens` for its own.
"""
LACKS = ("no window", "no blocks of tokens", "does not generate", "no gradient checkpointing")


def page(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """The page for the newest transformers in ``results``: version -> row -> feature -> verdict."""
    version = newest(results)
    table, reasons = results[version], {}
    lines = [f"| model | {' | '.join(FEATURES)} |", f"|{'---|' * (len(FEATURES) + 1)}"]
    for name in (name for name in ROWS if name in table):
        cells = [cell(table[name].get(feature, "n/a"), reasons) for feature in FEATURES]
        what = ROWS[name][2]
        lines.append(f"| {name}{f': {what}' if what else ''} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return HEAD.format(version=version) + "\n".join([*lines, "", *notes]) + "\n" + TAIL


def newest(results: dict) -> str:
    return max(results, key=lambda version: [int(part) for part in re.findall(r"\d+", version)])


def cell(verdict: str, reasons: dict[str, int]) -> str:
    if verdict == "right":
        return "yes"
    kind, _, reason = verdict.partition(": ")
    if not reason or reason in LACKS:
        return "-"
    reason = re.sub(r"\b\d+\b", "N", reason.split(", got")[0].rstrip())
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"{'-' if kind == 'n/a' else 'no' if kind == 'refused' else 'WRONG'} {number}"
