"""How wrong a kernel may be: at most 1.5 times an fp32-accumulating eager computation, plus one rounding.

``oracle`` computes in fp64, ``eager`` in fp32 from the same rounded inputs, rounding to the input dtype exactly what a
kernel must round to feed its matrix products (P before P v and P^T dout, dS before dS k and dS^T q), computing P anew
for the backward, and taking the delta of dS from the rounded out. ``violations`` compares the errors of both. The
contract's budget holds for the norm of an output over all heads; a second, wider one holds head by head, since sinks
from -10 to 20 make some heads' values so small that no norm over all heads would show them to be wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from cases import Case, Inputs
from torch import Tensor

from triton_attention_sink_hf.reference import reference_attention

FACTOR = 1.5
# Within a head errors are not independent (all rows share the rounding of one sink), so a head may be unlucky.
HEAD_FACTOR = 6.0
HEAD_AXIS = {"out": 2, "lse": 1, "dq": 2, "dk": 2, "dv": 2, "dsink": 0}


@dataclass(frozen=True)
class Row:
    """One output, over all heads or one. Errors are norms of the difference from fp64; ``size`` is fp64's own norm."""

    output: str
    head: int | None
    size: float
    error: float
    eager_error: float
    rounding: float

    @property
    def allowed(self) -> float:
        return (FACTOR if self.head is None else HEAD_FACTOR) * self.eager_error + self.rounding

    @property
    def allowed_at_random(self) -> float:
        """For calls that nobody chose, whose outputs may be few numbers: finds wrong kernels, not inexact ones."""
        return 10 * self.eager_error + self.rounding + 2**-21 * self.size

    def __str__(self) -> str:
        scale = self.size or 1.0
        where = "" if self.head is None else f"[head {self.head}]"
        return (
            f"{self.output}{where}: error {self.error / scale:.3g}, allowed {self.allowed / scale:.3g} from eager's "
            f"{self.eager_error / scale:.3g} and rounding's {self.rounding / scale:.3g} (norm {self.size:.3g})"
        )


def assert_within_budget(
    case: Case, inputs: Inputs, got: dict[str, Tensor], tiny: bool = False, rounded_delta: bool = False
) -> None:
    """Every output keeps its budget.

    ``tiny``: the wider one of random calls. ``rounded_delta``: eager's dsink, too, takes delta from the rounded out,
    as kernels do that never see a whole row of scores again.
    """
    rows = measure(case, inputs, got, rounded_delta)
    bad = [row for row in rows if not row.error <= (row.allowed_at_random if tiny else row.allowed)]
    assert not bad, "\n".join([f"{case}", *map(str, bad)])


def measure(case: Case, inputs: Inputs, got: dict[str, Tensor], rounded_delta: bool = False) -> list[Row]:
    """Errors of ``got`` (outputs by name, as ``cases.run`` returns them) and their budgets, per output and head."""
    want, yardstick = oracle(case, inputs), eager(case, inputs, rounded_delta)
    rows = []
    for name, axis in HEAD_AXIS.items():
        if name not in got or name not in want:
            continue
        exact, result = want[name], got[name].double()
        assert result.shape == exact.shape, f"{name}: {result.shape} instead of {exact.shape}"
        rounding = exact.to(got[name].dtype).double() - exact
        error, eager_error = result - exact, yardstick[name].double() - exact
        if name == "lse":  # rows that see neither key nor sink are -inf, exactly
            nothing = exact == float("-inf")
            assert bool((result[nothing] == float("-inf")).all()), "lse of rows without key and sink must be -inf"
            exact, error, eager_error, rounding = (
                x.masked_fill(nothing, 0.0) for x in (exact, error, eager_error, rounding)
            )
        if name == "dsink":
            # One number per head, the sum of its rows' parts. Its own error is one draw, which may cancel by luck and
            # is no yardstick. From the errors of the parts follows its standard deviation; over some hundred cases
            # eager itself draws three of them. The rounding of one number is half an ulp for the same reason.
            parts = (yardstick["dsink_rows"].double() - want["dsink_rows"]).square().sum((0, 2)).sqrt()
            eager_error = torch.maximum(eager_error.abs(), 3.0 * parts)
            rounding = torch.maximum(rounding.abs(), exact.abs() * torch.finfo(got[name].dtype).eps / 2)
            exponents = want["lse"].masked_fill(want["lse"] == float("-inf"), 0.0).abs()
            exponent = torch.nn.functional.pad(exponents.movedim(1, 0).flatten(1), (0, 1)).amax(1)
        columns = [x.movedim(axis, 0).reshape(x.shape[axis], -1) for x in (exact, error, eager_error, rounding)]
        norms = [torch.linalg.vector_norm(x, dim=1).tolist() for x in columns]
        rows.append(Row(name, None, *(math.hypot(*x) for x in norms)))
        if name == "dsink":
            # exp(sink - lse) of one head: an fp32 rounding of an exponent as large as lse is common to its rows
            norms[3] = (columns[3][:, 0] + exact.abs() * exponent * 2**-24).tolist()
        rows += [Row(name, head, *values) for head, values in enumerate(zip(*norms, strict=True))]
    return rows


def oracle(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64 by autograd through the reference."""
    return _by_group(_oracle, case, inputs)


def eager(case: Case, inputs: Inputs, rounded_delta: bool = False) -> dict[str, Tensor]:
    """Outputs and gradients in fp32, before they are rounded to the dtype of the result."""
    return _by_group(partial(_eager, rounded_delta=rounded_delta), case, inputs)


def _by_group(compute, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """``compute`` for one key head and its query heads at a time, so that memory does not grow with the heads."""
    group = inputs.q.shape[2] // inputs.k.shape[2]
    parts = []
    for g in range(inputs.k.shape[2]):
        heads = slice(g * group, (g + 1) * group)
        parts.append(
            compute(
                case,
                replace(
                    inputs,
                    q=inputs.q[:, :, heads],
                    k=inputs.k[:, :, g : g + 1],
                    v=inputs.v[:, :, g : g + 1],
                    sinks=None if inputs.sinks is None else inputs.sinks[heads],
                    dout=inputs.dout[:, :, heads],
                    dlse=None if inputs.dlse is None else inputs.dlse[:, heads],
                ),
            )
        )
    axes = HEAD_AXIS | {"dsink_rows": 1}
    return {name: torch.cat([part[name] for part in parts], axes[name]) for name in parts[0]}


def _oracle(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    q, k, v = (x.detach().double().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    sinks = None if inputs.sinks is None else inputs.sinks.detach().double().requires_grad_()
    out, lse = reference_attention(q, k, v, sinks, inputs.mask, softmax_scale=case.scale, softcap=case.softcap)
    dout = inputs.dout.double()
    loss = (out * dout).sum()
    if inputs.dlse is not None:
        loss = loss + (lse.masked_fill(lse == float("-inf"), 0.0) * inputs.dlse.double()).sum()
    leaves = [q, k, v] if sinks is None else [q, k, v, sinks]
    results = dict(zip(("dq", "dk", "dv", "dsink"), torch.autograd.grad(loss, leaves), strict=False))
    results |= {"out": out.detach(), "lse": lse.detach()}
    if sinks is not None:
        results["dsink_rows"] = _sink_parts(sinks.detach(), results["lse"], results["out"], dout, inputs.dlse)
    return results


def _sink_parts(sinks, lse, out, dout, dlse) -> Tensor:
    """(B, H, Sq): what each row adds to dsink, -exp(sink - lse) * delta."""
    delta = (dout * out).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse
    # where a row sees neither key nor sink, both are -inf and it adds nothing
    return -torch.exp(sinks[:, None] - lse).masked_fill(lse == float("-inf"), 0.0) * delta


def _eager(case: Case, inputs: Inputs, rounded_delta: bool) -> dict[str, Tensor]:
    dtype = inputs.q.dtype
    q, dout = inputs.q.float(), inputs.dout.float()
    k, v = inputs.k[:, :, 0].float(), inputs.v[:, :, 0].float()

    def rounded(x):
        return x.to(dtype).float()

    visible = inputs.mask.dense(q.shape[1], k.shape[1], q.device)[:, None]

    def scores(q, k):
        x = torch.einsum("bihd,bjd->bhij", q, k) * case.scale
        if case.softcap:
            x = case.softcap * torch.tanh(x / case.softcap)
        return x.masked_fill(~visible, float("-inf"))

    x = scores(q, k)
    logits = x
    if inputs.sinks is not None:
        logits = torch.cat([x, inputs.sinks.float()[None, :, None, None].expand(*x.shape[:3], 1)], -1)
    if logits.shape[-1] == 0:
        logits = logits.new_full((*x.shape[:3], 1), float("-inf"))
    lse = torch.logsumexp(logits, -1)
    p = torch.exp(x - lse[..., None]).masked_fill(~visible, 0.0)
    out = torch.einsum("bhij,bjd->bihd", rounded(p), v)

    # the backward computes P again, from a product that adds up in another order
    x = scores(q.flip(-1), k.flip(-1))
    slope = 1.0 - (x / case.softcap).square().masked_fill(~visible, 0.0) if case.softcap else 1.0
    p = torch.exp(x - lse[..., None]).masked_fill(~visible, 0.0)
    delta = (dout * rounded(out)).sum(-1).transpose(1, 2)
    if inputs.dlse is not None:
        delta = delta - inputs.dlse
    ds = p * (torch.einsum("bihd,bjd->bhij", dout, v) - delta[..., None]) * slope
    results = {
        "out": out,
        "lse": lse,
        "dq": case.scale * torch.einsum("bhij,bjd->bihd", rounded(ds), k),
        "dk": case.scale * torch.einsum("bhij,bihd->bjd", rounded(ds), q)[:, :, None],
        "dv": torch.einsum("bhij,bihd->bjd", rounded(p), dout)[:, :, None],
    }
    if inputs.sinks is not None:
        delta_out = rounded(out) if rounded_delta else torch.einsum("bhij,bjd->bihd", p, v)
        results["dsink_rows"] = _sink_parts(inputs.sinks.float(), lse, delta_out, dout, inputs.dlse)
        results["dsink"] = results["dsink_rows"].sum((0, 2))
    return results
