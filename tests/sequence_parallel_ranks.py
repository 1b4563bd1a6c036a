"""Sequence parallelism on four processes over gloo, against Hugging Face eager on one sample at a time in one process.

Run by test_sequence_parallel.py on every rank: ``python sequence_parallel_ranks.py OUT``, with torch's rendezvous
variables set. Rank 0 writes, for every case, the largest distance over all ranks of the log-probs and of each
parameter's gradient from the truth, and how often a rank called which collective in one forward and backward.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

VERL = ModuleType("verl.utils.ulysses")  # a stand-in
VERL.get_ulysses_sequence_parallel_group = lambda: VERL.group

WORLD = 4
ROW = 48  # cut at 24, or at 12, 24 and 36
LAYERS = 2

BESIDE = (13, 10, 12, 2, 11)  # every boundary one row beside a cut
FAR = (6, 24, 18)  # in the middle of the shards, with a sample that is longer than two of them
ON = (12, 12, 24)
WHOLE = (48,)
SHORT = (13, 10, 12, 2, 8)  # three rows of padding


@dataclass(frozen=True)
class Case:
    """Attributes:
    size: ranks that share a row; the four ranks are 4 / size replicas with samples of their own.
    kv_heads: of 8 query heads. rows: lengths of the packed samples, per row of the batch.
    tail: position_ids of the padding: "restart" from 0 as verl's, "two" such runs, or "zeros".
    recompute: activation checkpointing: None, "reentrant" or "saved_tensors". fsdp: FSDP2 over all four ranks.
    outside: backward runs after the ``with``. between: and after a forward of whole rows with the same position_ids.
    exchange: False: as if the attention knew nothing of it.
    """

    size: int
    kv_heads: int = 2
    rows: tuple[tuple[int, ...], ...] = (BESIDE,)
    tail: str = "restart"
    recompute: str | None = None
    fsdp: bool = False
    outside: bool = False
    between: bool = False
    exchange: bool = True

    @property
    def name(self) -> str:
        parts = [f"sp{self.size}", f"kv{self.kv_heads}", *("_".join(map(str, row)) for row in self.rows)]
        parts += [self.tail, self.recompute]
        parts += [word for word in ("fsdp", "outside", "between") if getattr(self, word)]
        return "-".join([part for part in parts if part] + ([] if self.exchange else ["alone"]))


EXACT = [
    *(Case(size, kv_heads) for size in (2, 4) for kv_heads in (1, 2, 8)),
    *(Case(4, rows=(lengths,)) for lengths in (FAR, ON, WHOLE)),
    *(Case(4, rows=(SHORT,), tail=tail) for tail in ("restart", "two", "zeros")),
    Case(2, rows=(BESIDE, FAR)),
    *(Case(4, recompute=how, outside=outside) for how in ("reentrant", "saved_tensors") for outside in (False, True)),
    *(Case(2, recompute=how, outside=True, between=True) for how in ("reentrant", "saved_tensors")),
    *(Case(size, fsdp=True, recompute="saved_tensors") for size in (2, 4)),
]
ALONE = [Case(size, rows=(lengths,), exchange=False) for size in (2, 4) for lengths in (BESIDE, FAR)]


def tiny_model(kv_heads: int, attention: str) -> torch.nn.Module:
    """A gpt-oss with 8 query heads, one layer with a window of 4 and one without; the same weights every time."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        num_hidden_layers=LAYERS,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=16,
        hidden_size=32,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=64,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-2.0, 4.0, 8))
            elif "norm" not in name:
                parameter.normal_(0.0, 0.15)
    return model.train()


def samples(lengths: tuple[int, ...], seed: int) -> list[tuple[Tensor, Tensor]]:
    """Token ids, and the weight of each position's log-prob in the loss (the last predicts nothing: 0)."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(64, (length,), generator=generator)
        weight = torch.randn(length, generator=generator)
        weight[-1] = 0.0
        found.append((ids, weight))
    return found


def own_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


@cache
def truth(kv_heads: int, lengths: tuple[int, ...], seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-probs (T,) of the samples of one row, and the gradients of their weighted sum: eager, sample by sample."""
    model = tiny_model(kv_heads, "eager")
    log_probs = []
    for ids, weight in samples(lengths, seed):
        own = own_log_probs(model(ids[None]).logits[0], ids.roll(-1))
        (own * weight).sum().backward()
        log_probs.append(own.detach())
    return torch.cat(log_probs), {name: parameter.grad for name, parameter in model.named_parameters()}


def packed(lengths: tuple[int, ...], seed: int, tail: str) -> dict[str, Tensor]:
    """One whole row (ROW,): ids, position_ids, labels and weights, padded at the end."""
    pairs = samples(lengths, seed)
    missing = ROW - sum(lengths)
    runs = {"restart": [missing], "two": [missing - 1, 1], "zeros": [1] * missing}[tail]
    row = {
        "ids": torch.cat([ids for ids, _ in pairs]),
        "labels": torch.cat([ids.roll(-1) for ids, _ in pairs]),
        "weights": torch.cat([weight for _, weight in pairs]),
    }
    positions = torch.cat([torch.arange(length) for length in (*lengths, *(runs if missing else []))])
    return {name: pad(x, (0, missing)) for name, x in row.items()} | {"positions": positions}


def measure(case: Case, groups: dict[int, dist.ProcessGroup]) -> dict:
    from triton_attention_sink_hf import sequence_parallel

    group, replica = groups[case.size], dist.get_rank() // case.size
    rank, shard = dist.get_rank(group), ROW // case.size
    own = slice(rank * shard, (rank + 1) * shard)
    seeds = [10 * replica + i for i in range(len(case.rows))]
    rows = [packed(lengths, seed, case.tail) for lengths, seed in zip(case.rows, seeds, strict=True)]
    batch = {name: torch.stack([row[name] for row in rows])[:, own] for name in rows[0]}

    model = tiny_model(case.kv_heads, "triton_attention_sink")
    if case.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": case.recompute == "reentrant"})
        model.enable_input_require_grads()
    if case.fsdp:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    with counted() as calls:
        with sequence_parallel(group) if case.exchange else nullcontext():
            logits = model(batch["ids"], position_ids=batch["positions"], use_cache=False).logits
            log_probs = own_log_probs(logits, batch["labels"])
            loss = (log_probs * batch["weights"]).sum()
            if not case.outside:
                loss.backward()
        if case.between:
            with torch.no_grad():
                model(batch["ids"], position_ids=batch["positions"], use_cache=False)
        if case.outside:
            loss.backward()

    gradients = {}
    for name, parameter in model.named_parameters():
        if case.fsdp:  # which has averaged over all ranks
            gradients[name] = parameter.grad.full_tensor() * WORLD
        else:
            gradients[name] = parameter.grad.clone()
            dist.all_reduce(gradients[name], group=group)
    true = []  # of the rows of every replica that the gradients sum over, this one's last
    for index in (*(i for i in range(WORLD // case.size) if case.fsdp and i != replica), replica):
        true += [truth(case.kv_heads, lengths, 10 * index + i) for i, lengths in enumerate(case.rows)]
    true_log_probs = torch.stack([pad(row, (0, ROW - len(row))) for row, _ in true[-len(rows) :]])[:, own]
    predicts = batch["weights"] != 0
    return {
        "log_probs": distance(log_probs.detach()[predicts], true_log_probs[predicts]),
        "gradients": {name: distance(found, sum(part[name] for _, part in true)) for name, found in gradients.items()},
        "calls": calls,
    }


def measure_function(size: int, groups: dict[int, dist.ProcessGroup], *, by_token: bool = False) -> dict:
    """attention_forward itself, fp64: value heads of another dimension, cu_seq_lens_*, softcap, sinks ``by_token``."""
    from triton_attention_sink_hf import attention_sink, sequence_parallel
    from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

    group = groups[size]
    own = slice(dist.get_rank(group) * ROW // size, (dist.get_rank(group) + 1) * ROW // size)
    generator = torch.Generator().manual_seed(5)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    q, k, v = random(1, 8, ROW, 16), random(1, 2, ROW, 16), random(1, 2, ROW, 24)
    sinks = random(1, 8, ROW) if by_token else random(8)
    weights = random(1, ROW, 8, 24).detach()
    cu = torch.tensor([0, 13, 23, 35, 37, ROW], dtype=torch.int32)
    leaves = (q, k, v, sinks)
    packed_rows = (x.transpose(1, 2)[0] for x in (q, k, v))
    packed_sinks = sinks[0] if by_token else sinks
    out = attention_sink(*packed_rows, packed_sinks, cu_seqlens_q=cu, cu_seqlens_k=cu, window_size=(4, 0), softcap=2.0)
    true = (out.detach()[own], *torch.autograd.grad((out * weights[0]).sum(), leaves))

    with sequence_parallel(group):
        shards = (x[:, :, own] for x in (q, k, v))
        module = SimpleNamespace(is_causal=True, training=True)
        own_sinks = sinks[:, :, own] if by_token else sinks
        options = dict(sliding_window=5, softcap=2.0, s_aux=own_sinks, cu_seq_lens_q=cu, cu_seq_lens_k=cu)
        out, _ = attention_forward(module, *shards, **options)
        gradients = torch.autograd.grad((out * weights[:, own]).sum(), leaves)
    for gradient in gradients:
        dist.all_reduce(gradient, group=group)
    names = ("out", "dq", "dk", "dv", "dsinks")
    return dict(zip(names, map(distance, (out.detach()[0], *gradients), true), strict=True))


def measure_autocast(size: int, groups: dict[int, dist.ProcessGroup]) -> dict:
    """attention_forward under autocast, whose rotary embedding leaves q and k in fp32 and v in bf16."""
    from triton_attention_sink_hf import attention_sink, sequence_parallel
    from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

    group = groups[size]
    own = slice(dist.get_rank(group) * ROW // size, (dist.get_rank(group) + 1) * ROW // size)
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, ROW, heads, 16, generator=generator) for heads in (8, 2, 2))
    v = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16), sequence_parallel(group):
        whole = attention_sink(q, k, v)
        shards = (x[:, own].transpose(1, 2) for x in (q, k, v))
        module = SimpleNamespace(is_causal=True, training=False)
        out, _ = attention_forward(module, *shards, position_ids=torch.arange(ROW)[None, own])
    assert out.dtype == whole.dtype == torch.bfloat16
    return {"out": distance(out, whole[:, own])}


@contextmanager
def as_verl(group: dist.ProcessGroup | None):
    """verl.utils.ulysses as far as attention looks at it, with this group inside the block."""
    sys.modules[VERL.__name__] = VERL
    VERL.group = group
    try:
        yield
    finally:
        VERL.group = None


def measure_compiled(how, groups: dict[int, dist.ProcessGroup]) -> dict:
    """attention_forward as one graph, which has run without sequence parallelism first. how: sets the group."""
    from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward

    generator = torch.Generator().manual_seed(7 + dist.get_rank())
    q, k, v = (torch.randn(1, heads, 12, 16, generator=generator, requires_grad=True) for heads in (8, 2, 2))
    sinks = torch.randn(8, generator=generator, requires_grad=True)
    positions = torch.arange(12)[None] + 12 * dist.get_rank(groups[2])
    module = SimpleNamespace(is_causal=True, training=True)

    def run(forward):
        out, _ = forward(module, q, k, v, s_aux=sinks, sliding_window=5, position_ids=positions)
        return out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v, sinks))

    compiled = torch.compile(attention_forward, backend="eager", fullgraph=True)
    with how(None) if how is as_verl else nullcontext():
        whole = run(compiled)
    with how(groups[2]):
        want, got = run(attention_forward), run(compiled)
    distances = dict(zip(("out", "dq", "dk", "dv", "dsinks"), map(distance, got, want), strict=True))
    return distances | {"whole": distance(whole[0], want[0])}


def distance(got: Tensor, want: Tensor) -> float:
    """Largest distance, relative to the largest element; 0 if this rank has nothing to compare."""
    return ((got - want).abs().max() / want.abs().max()).item() if want.numel() else 0.0


class counted:
    """Counts this rank's exchanges; FSDP gathers by other functions."""

    names = ("all_to_all_single", "all_gather")

    def __enter__(self) -> Counter:
        self.originals = {name: getattr(dist, name) for name in self.names}
        calls = Counter()

        def counting(name):
            def call(output, *args, **kwargs):
                calls[name] += 1
                return self.originals[name](output, *args, **kwargs)

            return call

        for name in self.names:
            setattr(dist, name, counting(name))
        return calls

    def __exit__(self, *_) -> None:
        for name, original in self.originals.items():
            setattr(dist, name, original)


def worst(found: list[dict]) -> dict:
    """One result from all ranks' results, of the same keys: the largest of each number."""
    return {
        key: worst([each[key] for each in found]) if isinstance(value, dict) else max(each[key] for each in found)
        for key, value in found[0].items()
    }


def main(out: Path) -> None:
    import triton_attention_sink_hf

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = {WORLD: dist.group.WORLD}
    pairs = [dist.new_group(pair) for pair in ([0, 1], [2, 3])]
    groups[2] = pairs[dist.get_rank() // 2]
    results = {}
    runs = [(case.name, measure, case) for case in (*EXACT, *ALONE)]
    runs += [(f"function-sp{size}", measure_function, size) for size in (2, 4)]
    runs += [("by-token-sp4", partial(measure_function, by_token=True), 4)]
    runs += [("autocast-sp4", measure_autocast, 4)]
    hooks = {"hook": triton_attention_sink_hf.sequence_parallel, "verl": as_verl}
    runs += [(f"compiled-{name}", measure_compiled, how) for name, how in hooks.items()]
    for name, run, argument in runs:
        found = [None] * WORLD
        dist.all_gather_object(found, run(argument, groups))
        results[name] = worst(found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
