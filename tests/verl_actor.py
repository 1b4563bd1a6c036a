"""verl's real actor worker on a CPU, against plain Hugging Face eager on one sample at a time.

Run by test_verl.py in processes of their own, which own the process group: ``python verl_actor.py MODELS OUT CASE...``
with the folder that holds the tiny models. It builds the worker that main_ppo builds (``TrainingWorker`` with FSDP2,
fp32, gloo), and writes for every case the distance of its log-probs and of every parameter's gradient from the truth.
With more than one rank (``WORLD_SIZE``), verl's Ulysses sequence parallelism spans them all, and rank 0 writes.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from verl_worker import VerlWorker

LENGTHS = (13, 1, 29, 2, 17, 40, 8, 9)  # around the window of 8; a sample of one token sees only itself and the sink


@dataclass(frozen=True)
class Case:
    """Attributes:
    model: folder name. attention: attn_implementation. packed: verl's use_remove_padding.
    tail: tokens that verl's pad_to_length appends to the packed row.
    """

    model: str
    attention: str
    packed: bool
    tail: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}-{self.attention}-{'packed' if self.packed else 'padded'}{'-tail' if self.tail else ''}"


OURS = "triton_attention_sink"
NO_SINK_GRADIENT = "sinks_without_gradient"
NO_EXCHANGE = "rows_taken_for_whole"
EXACT = [
    Case("gpt_oss", OURS, packed=False),
    Case("gpt_oss", OURS, packed=True),
    Case("gpt_oss", OURS, packed=True, tail=True),
    Case("llama", OURS, packed=False),
    Case("llama", OURS, packed=True),
    Case("gpt_oss", "eager", packed=False),
]
# Hugging Face's eager gpt-oss attends across packed samples
MIXES_SAMPLES = Case("gpt_oss", "eager", packed=True)
# the right probabilities, which is all that verl's own metrics see
FREEZES_SINKS = Case("gpt_oss", NO_SINK_GRADIENT, packed=True)
# on two ranks
SHARDED = [case for case in EXACT if case.packed]
# what a registered attention computes that knows nothing of Ulysses
TAKES_SHARDS_FOR_ROWS = Case("gpt_oss", NO_EXCHANGE, packed=True)
CASES = {case.name: case for case in (*EXACT, MIXES_SAMPLES, FREEZES_SINKS, TAKES_SHARDS_FOR_ROWS)}


def samples() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Token ids, and the weight of each position's log-prob in the loss (the last predicts nothing: 0)."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(4, 128, (length,), generator=generator) for length in LENGTHS]
    weights = [torch.randn(length, generator=generator) for length in LENGTHS]
    for weight in weights:
        weight[-1] = 0.0
    return ids, weights


def truth(folder: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Log-probs of every sample's next tokens, and the gradients of their weighted sum, sample by sample in eager."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    log_probs = []
    for ids, weight in zip(*samples(), strict=True):
        scores = model(ids[None]).logits[0].log_softmax(-1)
        own = torch.gather(scores, 1, ids.roll(-1)[:, None])[:, 0]
        (own * weight).sum().backward()
        log_probs.append(own.detach())
    return log_probs, {name: parameter.grad for name, parameter in model.named_parameters()}


def actor(case: Case, folder: Path) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The same from verl's actor worker, in two micro-batches."""
    worker = VerlWorker(
        folder, case.attention, torch.float32, ranks=int(os.environ["WORLD_SIZE"]), packed=case.packed, tail=case.tail
    )
    worker.zero()
    return worker.step(*samples(), micro_batch=4), worker.gradients()


def distances(got, want) -> dict:
    """Largest distances, relative to the largest element: of the log-probs and of each parameter's gradient. A sample's
    last log-prob, which predicts nothing, does not count."""
    (log_probs, gradients), (true_log_probs, true_gradients) = got, want
    assert gradients.keys() == true_gradients.keys()
    return {
        "log_probs": _distance(_without_last(log_probs), _without_last(true_log_probs)),
        "gradients": {name: _distance(gradients[name], true) for name, true in true_gradients.items()},
    }


def _without_last(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([row[:-1] for row in rows])


def _distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def _register_without_sink_gradient() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    ours, mask = AttentionInterface()[OURS], AttentionMaskInterface()[OURS]

    def forward(*args, s_aux=None, **kwargs):
        return ours(*args, s_aux=None if s_aux is None else s_aux.detach() + 0 * s_aux, **kwargs)

    AttentionInterface.register(NO_SINK_GRADIENT, forward)
    AttentionMaskInterface.register(NO_SINK_GRADIENT, mask)


def _register_without_exchange() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from verl.utils import ulysses

    def without_group(function):
        def call(*args, **kwargs):
            group = ulysses.get_ulysses_sequence_parallel_group()
            ulysses.set_ulysses_sequence_parallel_group(None)
            try:
                return function(*args, **kwargs)
            finally:
                ulysses.set_ulysses_sequence_parallel_group(group)

        return call

    AttentionInterface.register(NO_EXCHANGE, without_group(AttentionInterface()[OURS]))
    AttentionMaskInterface.register(NO_EXCHANGE, without_group(AttentionMaskInterface()[OURS]))


def main(models: Path, out: Path, names: list[str]) -> None:
    import verl  # noqa: F401  loads its plug-ins: the platform, and this package by its entry point

    torch.set_num_threads(1)
    _register_without_sink_gradient()
    _register_without_exchange()
    cases = [CASES[name] for name in names]
    truths = {model: truth(models / model) for model in {case.model for case in cases}}
    results = {case.name: distances(actor(case, models / case.model), truths[case.model]) for case in cases}
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
