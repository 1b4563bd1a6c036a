"""Softmax of a block of scores in registers, against exact maxima or guarded.

Guarded: exponentials against the maxima so far. That needs no maximum, no shuffle and no rescaling. P may then exceed
1, which costs no precision, because rounding is relative. Where a thread's sum of a row passes the limit, its warp
takes the maxima again from the scores that it still holds. NaN and inf end up where exact maxima leave them: in the
row's sum.

Gluon has no branch per warp. A predicate declared for the whole kernel carries a warp's vote to a scalar.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _vote_if_above(limit: str) -> gl.constexpr:
    """PTX that sets ``vote`` in all lanes of a warp if one of them has a value above ``limit`` (fp32, in hex)."""
    return gl.constexpr(
        f"{{ .reg .pred p; setp.gt.f32 p, $2, {limit}; setp.gt.or.f32 p, $3, {limit}, p; "
        "vote.sync.any.pred vote, p, 0xffffffff; mov.b32 $0, 0; mov.b32 $1, 0; }"
    )


ABOVE_0 = _vote_if_above("0f00000000")
ABOVE_LIMIT = _vote_if_above("0f47000000")  # 2**15: what P may sum up to in a thread; fp16 ends at 2**16


def _rescale_asm(n: int) -> gl.constexpr:
    """PTX that multiplies a thread's n values of two rows by their rows' factors if the warp's last vote was true."""
    out, x, factor = ([f"${part * n + i}" for i in range(n)] for part in range(3))
    moves = "".join(f"mov.f32 {o}, {i}; " for o, i in zip(out, x, strict=True))
    products = "".join(f"mul.f32 {o}, {o}, {factor[i // 2 % 2 * 2]}; " for i, o in enumerate(out))
    return gl.constexpr(f"{{ {moves} @!vote bra KEEP; {products} KEEP: }}")


def _rescale_operands(n: int) -> gl.constexpr:
    return gl.constexpr(",".join(["=f"] * n + ["f"] * 2 * n))


RESCALE_32, RESCALE_64, RESCALE_128 = (_rescale_asm(n) for n in (32, 64, 128))
OPERANDS_32, OPERANDS_64, OPERANDS_128 = (_rescale_operands(n) for n in (32, 64, 128))


@gluon.jit
def declare_vote():
    gl.inline_asm_elementwise(".reg .pred vote; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _any_lane(x, VOTE: gl.constexpr):
    """Whether a lane of this warp has x above VOTE's limit. NaN is above nothing.

    A scalar that may differ between warps: what it guards must not exchange anything between them.

    Args:
        x: (64, 4), two values a thread.
    """
    gl.inline_asm_elementwise(VOTE, "=r,=r,f,f", [x], gl.int32, False, 2)
    return gl.inline_asm_elementwise("selp.u32 $0, 1, 0, vote;", "=r", [], gl.int32, False, 1) != 0


@gluon.jit
def rescale_if_voted(acc, alpha):
    """acc times its rows' alpha, if the last vote of this warp said so. (A branch of Triton's would copy acc.)"""
    COLUMNS: gl.constexpr = acc.shape[1]
    if COLUMNS == 64:
        return gl.inline_asm_elementwise(RESCALE_32, OPERANDS_32, [acc, alpha[:, None]], gl.float32, False, 32)
    elif COLUMNS == 128:
        return gl.inline_asm_elementwise(RESCALE_64, OPERANDS_64, [acc, alpha[:, None]], gl.float32, False, 64)
    else:
        return gl.inline_asm_elementwise(RESCALE_128, OPERANDS_128, [acc, alpha[:, None]], gl.float32, False, 128)


@gluon.jit
def _partial_max(s):
    """(64, 4): maxima over what a thread holds of a row, as a tree."""
    BLOCK_N: gl.constexpr = s.shape[1]
    return gl.max(gl.max(gl.max(s.reshape([64, 4, BLOCK_N // 32, 4, 2]), axis=4), axis=1), axis=1)


@gluon.jit
def partial_sum(p):
    """(64, 4): sums over what a thread holds of a row, as a tree."""
    BLOCK_N: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.sum(p.reshape([64, 4, BLOCK_N // 32, 4, 2]), axis=4), axis=1), axis=1)


@gluon.jit
def pack(p, DTYPE: gl.constexpr):
    """P as it crosses a loop's edge: an int32 for two values, which LLVM does not take apart."""
    low, high = gl.split(p.reshape([p.shape[0], p.shape[1] // 2, 2]))
    if DTYPE.is_bf16():
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, True, 1)
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], gl.int32, True, 1)


@gluon.jit
def unpack(P, DTYPE: gl.constexpr, layout: gl.constexpr):
    low, high = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [P], (gl.int16, gl.int16), True, 1)
    p = gl.join(low.to(DTYPE, bitcast=True), high.to(DTYPE, bitcast=True)).reshape([P.shape[0], P.shape[1] * 2])
    return gl.convert_layout(p, layout)


@gluon.jit
def _new_maxima(s, m, l, scale):
    """(m, l, alpha): maxima that include s, the sums so far relative to them, and what scales the accumulator so."""
    x = _partial_max(s)
    new = gl.maximum(m, gl.convert_layout(gl.max(x, axis=1), m.type.layout) * scale)
    alpha = gl.exp2(m - new)
    return new, l * gl.convert_layout(alpha, gl.SliceLayout(1, x.type.layout))[:, None], alpha


@gluon.jit
def exact_softmax(s, m, l, scale, DTYPE: gl.constexpr):
    """(P, m, l, alpha) against exact maxima. A vote skips shuffles and rescaling where no maximum of the warp grew.

    l: partial sums (64, 4).
    """
    alpha = m * 0.0 + 1.0
    x = _partial_max(s)
    if _any_lane(x * scale - gl.convert_layout(m, gl.SliceLayout(1, x.type.layout))[:, None], ABOVE_0):
        m, l, alpha = _new_maxima(s, m, l, scale)
    p = gl.exp2(s * scale - m[:, None])
    return pack(p, DTYPE), m, l + partial_sum(p), alpha


@gluon.jit
def guarded_softmax(s, m, l, scale, DTYPE: gl.constexpr):
    """(P, m, l, alpha) against the maxima so far, unless a sum passes the limit."""
    alpha = m * 0.0 + 1.0
    p = gl.exp2(s * scale - m[:, None])
    x = partial_sum(p)
    P = pack(p, DTYPE)
    if _any_lane(x, ABOVE_LIMIT):
        m, l, alpha = _new_maxima(s, m, l, scale)
        p = gl.exp2(s * scale - m[:, None])
        x = partial_sum(p)
        P = pack(p, DTYPE)
    return P, m, l + x, alpha
