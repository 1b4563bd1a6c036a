"""How wrong a kernel may be: at most 1.5 times an fp32-accumulating eager computation, plus one rounding.

``oracle`` computes in fp64. ``eager`` computes in fp32 from the same rounded inputs. It rounds to the input dtype what
a kernel must round to feed its matrix products: P before P v and P^T dout, dS before dS k and dS^T q. Like a kernel, it
recomputes P in the backward and takes the delta of dS from the rounded out. ``measure`` compares the errors of both.
The contract's budget holds for the norm of an output over all heads. A second, wider budget holds head by head: with
sinks from -10 to 20 some heads' values are so small that a norm over all heads would not show an error in them.

One eager computation is one draw. Its error may be small by luck if an output is a handful of numbers (the dsink of two
heads, one row's lse), or if a few rows make up most of the error; the summation order of a CPU's BLAS decides. So
``eager`` computes the same in ``DRAWS`` ways: features and keys in another order, exponents in another base (kernels
use 2), rounded values scaled by another factor. Its error is the root mean square over the draws. The kernel is one
draw too: it may lie ``DEVIATIONS`` standard deviations of the draws above that. With a hundred independent numbers or
more these are small, and the factor of 1.5 decides. A dsink is one number, a sum of which much may cancel: its error is
at least the norm of its terms' errors, which is what independent ones add up to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from cases import Case, Inputs
from torch import Tensor

from triton_attention_sink_hf.reference import reference_attention

FACTOR = 1.5
# Within a head errors are not independent (all rows share the rounding of one sink), so a head may be unlucky.
HEAD_FACTOR = 6.0
# Sixteen draws give only a rough standard deviation. The error of a correct kernel exceeds ten of them once in 100,000
# times if it is a single normal number, and once in 1,000,000 if it is the norm of two or more (six of them: once in
# 2,000 and in 7,000). A run of the suite makes 5,000 comparisons, few of them over so few numbers.
DRAWS, DEVIATIONS = 16, 10.0
HEAD_AXIS = {"out": 2, "lse": 1, "dq": 2, "dk": 2, "dv": 2, "dsink": 0, "dsink terms": 1}


@dataclass(frozen=True)
class Row:
    """One output, over all heads or one. Errors are norms of the difference from fp64; ``size`` is fp64's own norm.

    ``eager_error``: root mean square of eager's draws. ``deviation``: their standard deviation. ``rounding``: the
    largest that one rounding of the output can be, by the same draws.
    """

    output: str
    head: int | None
    size: float
    error: float
    eager_error: float
    deviation: float
    rounding: float

    @property
    def allowed(self) -> float:
        factor = FACTOR if self.head is None else HEAD_FACTOR
        unlucky = self.eager_error + DEVIATIONS * self.deviation
        return max(factor * self.eager_error, unlucky) + self.rounding

    @property
    def allowed_at_random(self) -> float:
        """For random calls, whose outputs may be few numbers: finds wrong kernels, not inexact ones."""
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


def measure(
    case: Case, inputs: Inputs, got: dict[str, Tensor], rounded_delta: bool = False, draws: int = DRAWS
) -> list[Row]:
    """Errors of ``got`` (outputs by name, as ``cases.run`` returns them) and their budgets, per output and head."""
    want = oracle(case, inputs)
    yardsticks = [eager(case, inputs, rounded_delta, draw) for draw in range(draws)]
    rows = []
    for name, axis in HEAD_AXIS.items():
        if name not in got or name not in want:
            continue
        exact, result = want[name], got[name].double()
        assert result.shape == exact.shape, f"{name}: {result.shape} instead of {exact.shape}"
        nothing = None
        if name == "lse":  # rows that see neither key nor sink are -inf, exactly
            nothing = exact == float("-inf")
            assert bool((result[nothing] == float("-inf")).all()), "lse of rows without key and sink must be -inf"

        def norms(x: Tensor, axis: int = axis, nothing: Tensor | None = nothing) -> Tensor:
            """(heads,)"""
            x = x if nothing is None else x.masked_fill(nothing, 0.0)
            return torch.linalg.vector_norm(x.movedim(axis, 0).reshape(x.shape[axis], -1), dim=1)

        dtype = got[name].dtype
        errors = torch.stack([norms(yardstick[name].double() - exact) for yardstick in yardsticks])
        roundings = torch.stack([norms(_round(exact, dtype, _base(draw)) - exact) for draw in range(draws)])
        least = torch.zeros_like(errors)
        if name == "dsink":
            # exp(sink - lse): a rounding of an exponent of that size in fp32, common to a head's rows, in any base
            seen = want["lse"].masked_fill(want["lse"] == float("-inf"), 0.0).abs().movedim(1, 0).flatten(1)
            exponent = torch.maximum(torch.nn.functional.pad(seen, (0, 1)).amax(1), inputs.sinks.double().abs())
            roundings = roundings + exact.abs() * exponent.clamp(max=1000.0) * 2**-24  # beyond, exp is 0 or 1 exactly
            terms = [yardstick["dsink terms"].double() - want["dsink terms"] for yardstick in yardsticks]
            least = torch.stack([norms(difference, 1) for difference in terms])
        columns = [norms(exact)[None], norms(result - exact)[None], errors, roundings, least]
        rows.append(_row(name, None, *(torch.linalg.vector_norm(x, dim=1) for x in columns)))
        rows += [_row(name, head, *(x[:, head] for x in columns)) for head in range(errors.shape[1])]
    return rows


def _row(
    name: str, head: int | None, size: Tensor, error: Tensor, draws: Tensor, roundings: Tensor, least: Tensor
) -> Row:
    eager_error = torch.maximum(draws.square().mean(), least.square().mean()).sqrt()
    deviation = draws.std(correction=1)
    return Row(name, head, size.item(), error.item(), eager_error.item(), deviation.item(), roundings.amax().item())


def _base(draw: int) -> float:
    """Scale of a draw's exponents and of what it rounds: 1, then any between 1/2 and 1, so that nothing overflows."""
    return 2.0 ** -(draw * 0.6180339887 % 1.0)


def _round(x: Tensor, dtype: torch.dtype, factor: float) -> Tensor:
    """x rounded to dtype as a multiple of ``1 / factor``."""
    return (x * factor).to(dtype).to(x.dtype) / factor


def oracle(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients in fp64 by autograd through the reference."""
    return _by_group(_oracle, case, inputs)


def eager(case: Case, inputs: Inputs, rounded_delta: bool = False, draw: int = 0) -> dict[str, Tensor]:
    """The yardstick, in one of ``DRAWS`` ways that differ in rounding alone."""
    return _by_group(partial(_eager, rounded_delta=rounded_delta, draw=draw), case, inputs)


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
    return {name: torch.cat([part[name] for part in parts], HEAD_AXIS[name]) for name in parts[0]}


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
        delta = (results["out"] * dout).sum(-1).transpose(1, 2)
        results["dsink terms"] = _dsink_terms(sinks.detach(), results["lse"], delta, inputs.dlse)
    return results


def _dsink_terms(sinks: Tensor, lse: Tensor, delta: Tensor, dlse: Tensor | None, base: float = 1.0) -> Tensor:
    """What each row adds to dsink, (B, H, Sq). 0 where a row sees neither key nor sink: both are -inf."""
    p_sink = torch.exp((sinks[:, None] - lse) / base).masked_fill(lse == float("-inf"), 0.0)
    return -p_sink * (delta if dlse is None else delta - dlse)


def _eager(case: Case, inputs: Inputs, rounded_delta: bool, draw: int) -> dict[str, Tensor]:
    dtype, base = inputs.q.dtype, _base(draw)
    features, values, keys = (_order(x, n, draw) for x, n in ((inputs.q, -1), (inputs.v, -1), (inputs.k, 1)))
    q, dout = inputs.q.float()[..., features], inputs.dout.float()[..., values]
    k, v = inputs.k[:, keys, 0].float()[..., features], inputs.v[:, keys, 0].float()[..., values]
    cap, scale = case.softcap * base, case.scale * base  # on the scores, or in every other draw on q

    def rounded(x):
        return x if dtype == torch.float32 else _round(x, dtype, base)

    visible = inputs.mask.dense(q.shape[1], k.shape[1], q.device)[:, None, :, keys]

    def scores(q, k):
        x = _rows_by_rows(q * scale, k, draw) if draw % 2 else _rows_by_rows(q, k, draw) * scale
        if cap:
            x = cap * torch.tanh(x / cap)
        return x.masked_fill(~visible, float("-inf"))

    x = scores(q, k)
    logits = x
    if inputs.sinks is not None:
        sink = inputs.sinks.float() * base
        logits = torch.cat([x, sink[None, :, None, None].expand(*x.shape[:3], 1)], -1)
    if logits.shape[-1] == 0:
        logits = logits.new_full((*x.shape[:3], 1), float("-inf"))
    m = logits.amax(-1)
    m = m.masked_fill(m == float("-inf"), 0.0)
    total = (torch.exp((logits - m[..., None]) / base) * base).sum(-1) / base
    lse = m + base * torch.log(total)  # in units of the base, like x
    p = torch.exp((x - lse[..., None]) / base).masked_fill(~visible, 0.0)
    out = torch.einsum("bhij,bjd->bihd", rounded(p), v)

    # the backward computes P again, from a product that adds up in another order
    x = scores(q.flip(-1), k.flip(-1))
    slope = 1.0 - (x / cap).square().masked_fill(~visible, 0.0) if cap else 1.0
    p = torch.exp((x - lse[..., None]) / base).masked_fill(~visible, 0.0)
    delta = (dout * rounded(out)).sum(-1).transpose(1, 2)
    if inputs.dlse is not None:
        delta = delta - inputs.dlse
    ds = p * (_rows_by_rows(dout, v, draw) - delta[..., None]) * slope
    results = {
        "out": out[..., values.argsort()],
        "lse": lse.double() / base,  # not rounded again: on fp32's own grid most draws would have one error
        "dq": (case.scale * torch.einsum("bhij,bjd->bihd", rounded(ds), k))[..., features.argsort()],
        "dk": (case.scale * torch.einsum("bhij,bihd->bjd", rounded(ds), q))[:, keys.argsort(), None],
        "dv": torch.einsum("bhij,bihd->bjd", rounded(p), dout)[:, keys.argsort(), None],
    }
    results["dk"], results["dv"] = results["dk"][..., features.argsort()], results["dv"][..., values.argsort()]
    if inputs.sinks is not None:
        if not rounded_delta:
            delta = (dout * torch.einsum("bhij,bjd->bihd", p, v)).sum(-1).transpose(1, 2)
            delta = delta if inputs.dlse is None else delta - inputs.dlse
        results["dsink terms"] = _dsink_terms(sink, lse, delta, None, base)
        results["dsink"] = (results["dsink terms"] * base).sum((0, 2)) / base
    return results


def _rows_by_rows(x: Tensor, y: Tensor, draw: int) -> Tensor:
    """(B, H, Sq, Sk) products of x (B, Sq, H, D) and y (B, Sk, D).

    Every other draw adds one feature after the other, where the result is small enough for luck to matter: a BLAS that
    adds in many lanes has fewer roundings than one that does not, and a kernel may be either.
    """
    if draw % 2 == 0 or x.shape[0] * x.shape[1] * x.shape[2] * y.shape[1] > 2**20:
        return torch.einsum("bihd,bjd->bhij", x, y)
    total = x.new_zeros(x.shape[0], x.shape[2], x.shape[1], y.shape[1])
    for a, b in zip(x.unbind(-1), y.unbind(-1), strict=True):
        total = total + a.transpose(1, 2)[..., None] * b[:, None, None, :]
    return total


def _order(x: Tensor, axis: int, draw: int) -> Tensor:
    """Indices along ``axis``, in another order for every draw but the first."""
    n = x.shape[axis]
    order = torch.arange(n) if draw == 0 else torch.randperm(n, generator=torch.Generator().manual_seed(draw))
    return order.to(x.device)
