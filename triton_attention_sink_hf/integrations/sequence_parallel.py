"""Ulysses sequence parallelism: ranks share the rows of a batch, and in attention they share its heads instead.

Each of n ranks holds (B, S / n, H, D). An all-to-all gives it all rows of H / n heads, attention runs as on one rank,
and a second all-to-all returns its rows. Each is its own transpose, so the backward does the same. A rank uses its own
slice of the sinks and gives a gradient to that slice alone. Summed over the ranks, as for every parameter, it is
complete.

The group is the innermost ``sequence_parallel(group)``, else verl's, else none, and nothing is exchanged. Shards have
equal lengths, in the order of the ranks. position_ids are those of the whole row, cut the same way.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..tracing import constant_result
from ..validation import check_qkv, readable


class _Groups(threading.local):
    """The groups of this thread's ``with sequence_parallel``, innermost last."""

    def __init__(self):
        self.stack: list[dist.ProcessGroup] = []


_GROUPS = _Groups()
_FORWARD_GROUP = WeakTensorKeyDictionary()  # what cut the rows of a forward -> its group, or _SEVERAL
_SEVERAL = object()  # forwards over different groups got the same tensor
_TORCH_CONTEXT_PARALLEL = (
    "torch.distributed.tensor.experimental._context_parallel._attention",
    "torch.distributed.tensor.experimental._attention",  # before torch 2.10
)
# Hosts that cut the rows and hook their exchange into other attentions than this one: the module that knows, and
# whether it does so now.
_CUT_BY_HOSTS = {
    "ms-swift's sequence parallelism": (
        "swift.sequence_parallel.sequence_parallel",
        lambda module: (module.sequence_parallel.world_size or 1) > 1,
    ),
    "ROLL's Ulysses": (
        "roll.utils.context_parallel.globals",
        lambda module: (module.PROCESS_GROUP_MANAGER.ulysses_size or 1) > 1,
    ),
    "Axolotl's ring attention": (
        "axolotl.monkeypatch.ring_attn.patch",
        lambda module: module.RING_ATTN_GROUP is not None,
    ),
    "OpenRLHF's ring attention": (
        "openrlhf.models.ring_attn_utils",
        lambda module: module.RING_ATTN_GROUP is not None,
    ),
    "DeepSpeed's Ulysses (ALST)": (
        "deepspeed.runtime.sequence_parallel.parallel_state_sp",
        lambda module: module._SEQUENCE_PARALLEL_GROUP is not None,
    ),
}


@contextmanager
def sequence_parallel(group: dist.ProcessGroup) -> Iterator[None]:
    """Inside, attention treats its rows as shards over ``group`` and exchanges them (Ulysses).

    ``with sequence_parallel(group): model(input_ids=shard, position_ids=shard_of_positions)`` on every rank of the
    group, where ``input_ids`` and ``position_ids`` are (B, S / n) each: rank i holds rows i * S / n and on. Positions
    restart at 0 for each packed sample, samples may straddle the cuts, and what fills up the last shard is one more
    sample. position_ids must be passed: those that a model makes up count from 0 on every rank. Rows need no mask.

    The backward may run outside, also with activation checkpointing. It must run on every rank. verl needs none of
    this: set ``ulysses_sequence_parallel_size``.

    Args:
        group: the ranks that share rows; a group of one exchanges nothing.

    Raises:
        TypeError: not a process group. ValueError: one that this rank does not belong to.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    if dist.get_rank(group) < 0:
        raise ValueError(f"group must contain this rank, got one without rank {dist.get_rank()}")
    _GROUPS.stack.append(group)
    try:
        yield
    finally:
        _GROUPS.stack.pop()


def active_group(rows: Tensor | None = None) -> dist.ProcessGroup | None:
    """The group over which rows are sharded now, None if they are whole.

    Args:
        rows: the tensor that says how the rows of this forward are cut (position_ids or cu_seq_lens_q). A layer that
            runs within backward and was given no mask by the mask function, which would know its group, recomputes an
            earlier forward with the same tensor, and belongs to that one's group.

    Raises:
        NotImplementedError: torch's ring attention (``context_parallel``) or a host's own sequence parallelism shards
            them, which nothing here undoes.
        RuntimeError: a recomputed layer whose forward cannot be told from another one over other ranks.
    """
    _refuse_ring_attention()
    if not _GROUPS.stack:
        _refuse_cuts_by_hosts()
    group = _GROUPS.stack[-1] if _GROUPS.stack else _verl_group()
    if not torch.compiler.is_compiling() and rows is not None and (group is not None or _FORWARD_GROUP):
        known = _FORWARD_GROUP.get(rows)
        if group is None and in_backward():
            if known is _SEVERAL:
                raise RuntimeError(
                    "position_ids (or cu_seq_lens_q) must be other tensors in whole and in sharded forwards that are "
                    "recomputed in backward, got the same: run backward within sequence_parallel(group), or clone them"
                )
            group = known
        elif known is None and group is not None:
            _FORWARD_GROUP[rows] = group
        elif known is not group:
            _FORWARD_GROUP[rows] = _SEVERAL
    return group if group is not None and dist.get_world_size(group) > 1 else None


def in_backward() -> bool:
    """Whether a backward pass is running, so that layers are being recomputed."""
    return torch._C._current_graph_task_id() != -1


def _verl_group() -> dist.ProcessGroup | None:
    """verl's Ulysses group, None if the process has not loaded verl. torch.compile traces this, and guards on both."""
    ulysses = sys.modules.get("verl.utils.ulysses")
    return ulysses.get_ulysses_sequence_parallel_group() if ulysses is not None else None


@constant_result
def _refuse_ring_attention() -> None:
    replaced = [getattr(sys.modules.get(name), "_replaced_functions", {}) for name in _TORCH_CONTEXT_PARALLEL]
    if any(torch.nn.functional.scaled_dot_product_attention in functions for functions in replaced):
        raise NotImplementedError(
            "sequence parallelism must be Ulysses (triton_attention_sink_hf.sequence_parallel), got torch's "
            "context_parallel: it shards rows and replaces scaled_dot_product_attention, which is not called here"
        )


@constant_result
def _refuse_cuts_by_hosts() -> None:
    for name, (module, cuts_rows) in _CUT_BY_HOSTS.items():
        if module in sys.modules and cuts_rows(sys.modules[module]):
            raise NotImplementedError(
                f"sequence parallelism must be triton_attention_sink_hf.sequence_parallel or verl's, got {name}: it "
                "cuts the rows and does not exchange them for this attention. Set its size to 1"
            )


def check_shards(
    group: dist.ProcessGroup,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padded: bool,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
) -> None:
    """Raise, before anything is exchanged, for a sharded call that could not be right.

    Args:
        q, k, v: this rank's rows, (B, S, H, D). padded: a mask hides some. The others: as ``attention_forward`` got
            them.

    Raises:
        ValueError, TypeError: the argument, named. The last entry of cu_seq_lens_* on a GPU is asserted there, without
        waiting for it (TRITON_ATTENTION_SINK_CHECK=1 reads it instead).
    """
    check_qkv(q, k, v, packed=False)
    n, seqlen = dist.get_world_size(group), q.shape[1]
    if q.shape[2] % n:
        raise ValueError(f"num_attention_heads must be a multiple of the sequence-parallel size {n}, got {q.shape[2]}")
    if k.shape[2] % n and n % k.shape[2]:
        raise ValueError(
            f"num_key_value_heads must be a multiple or a divisor of the sequence-parallel size {n}, got {k.shape[2]}"
        )
    if padded:
        raise ValueError(
            "attention_mask must be None under sequence parallelism, got a mask: pack the samples into rows whose "
            "position_ids restart (verl: use_remove_padding=True)"
        )
    if k.shape[1] != seqlen:
        raise ValueError(
            f"past_key_values must be None under sequence parallelism, got {k.shape[1]} keys for {seqlen} queries"
        )
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        for name, cu in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
            if cu is not None:
                _check_span(name, cu, n * seqlen)
    elif position_ids is None:
        raise ValueError(
            "position_ids must be given under sequence parallelism, got None: without them shards and the whole rows "
            "of a vision tower look the same"
        )
    elif position_ids.shape not in ((seqlen,), (1, seqlen), (q.shape[0], seqlen)):
        raise ValueError(
            f"position_ids must be those of this rank's shard, (B, S) = {tuple(q.shape[:2])} or (1, {seqlen}), got "
            f"{tuple(position_ids.shape)}"
        )


def _check_span(name: str, cu: Tensor, total: int) -> None:
    message = f"{name} must end at the {total} rows of all ranks together"
    if not readable(cu):
        torch._assert_async(cu[-1] == total, message)
    elif int(cu[-1]) != total:
        raise ValueError(f"{message}, got {int(cu[-1])}")


def gather_positions(group: dist.ProcessGroup, position_ids: Tensor, device: torch.device) -> Tensor:
    """position_ids of all ranks' rows, (..., n * S) from this rank's (..., S), on ``device``; one exchange."""
    own = position_ids.to(device).contiguous()
    shards = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(shards, own, group=group)
    return torch.cat(shards, dim=-1)


def gather_rows(group: dist.ProcessGroup, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All rows of this rank's heads, (B, n * S, H / n, D), from this rank's rows of all heads, (B, S, H, D).

    With fewer key heads than ranks each rank gets the one that its query heads use. Differentiable; one exchange if
    the head dimensions are equal, else two.
    """
    n = dist.get_world_size(group)
    if k.shape[2] < n:
        k, v = (x.repeat_interleave(n // x.shape[2], dim=2) for x in (k, v))
    if q.shape[-1] == v.shape[-1]:
        return _gather_rows(group, (q, k, v))
    return *_gather_rows(group, (q, k)), *_gather_rows(group, (v,))


def _gather_rows(group: dist.ProcessGroup, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    n = dist.get_world_size(group)
    shares = [x.unflatten(2, (n, x.shape[2] // n)).movedim(2, 0) for x in tensors]  # (ranks of heads, B, S, h, D)
    rows = _AllToAll.apply(torch.cat(shares, dim=3), group)  # (ranks of rows, B, S, h of all, D)
    return rows.movedim(0, 1).flatten(1, 2).split([x.shape[3] for x in shares], dim=2)


def scatter_rows(group: dist.ProcessGroup, out: Tensor) -> Tensor:
    """This rank's rows of all heads, (B, S, H, D), from all rows of its heads, (B, n * S, H / n, D). Differentiable."""
    n = dist.get_world_size(group)
    shares = out.unflatten(1, (n, out.shape[1] // n)).movedim(1, 0)  # (ranks of rows, B, S, h, D)
    heads = _AllToAll.apply(shares, group)  # (ranks of heads, B, S, h, D)
    return heads.movedim(0, 2).flatten(2, 3)


def own_sinks(group: dist.ProcessGroup, sinks: Tensor | None) -> Tensor | None:
    """(H / n,), the sinks of this rank's heads, from all (H,). Differentiable: the others' gradient is 0 here.

    Sinks by token, (B, H, S) of this rank's rows, are exchanged: (B, H / n, n * S).
    """
    if sinks is None:
        return None
    if sinks.dim() == 3:
        (rows,) = _gather_rows(group, (sinks.transpose(1, 2).unsqueeze(-1),))
        return rows.squeeze(-1).transpose(1, 2)
    return sinks.unflatten(0, (dist.get_world_size(group), -1))[dist.get_rank(group)]


class _AllToAll(torch.autograd.Function):
    """Slice i of the first dimension goes to rank i, and slice i of the result comes from rank i."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        received = torch.empty_like(x)
        dist.all_to_all_single(received, x, group=group)
        return received

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(gradient, ctx.group), None
