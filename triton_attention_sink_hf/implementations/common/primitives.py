"""Device functions that every kernel shares: tile addresses, dot products, the softcap, the sink."""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)  # of fp32


@triton.jit
def matmul(a, b, acc=None):
    """a @ b accumulated in fp32. fp32 operands are multiplied exactly (no tf32)."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_product(total, rest, a, b, EXACT: tl.constexpr):
    """(total, rest) plus a @ b. EXACT, for fp32 operands, carries each addition's rounding error (Kahan).

    A long loop adds thousands of tiles to one accumulator, and the error would show in fp32 results.
    """
    if EXACT:
        product = matmul(a, b) - rest
        new = total + product
        return new, (new - total) - product
    else:
        return matmul(a, b, total), rest


@triton.jit
def row_offsets(rows, token, stride_token, stride_head, PACK: tl.constexpr):
    """Element offsets of tile rows that are PACK heads of a token, token by token, from ``token`` on."""
    return (token + rows // PACK).to(tl.int64) * stride_token + (rows % PACK).to(tl.int64) * stride_head


@triton.jit
def load_tile(ptr, offsets, valid, stride_d, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """(rows, BLOCK) tile at ``offsets``; columns past SIZE and, with CHECK, rows that are not valid are 0."""
    d = tl.arange(0, BLOCK)
    ptrs = ptr + offsets[:, None] + d[None, :] * stride_d
    if SIZE == BLOCK:
        if CHECK:
            return tl.load(ptrs, mask=valid[:, None], other=0.0)
        return tl.load(ptrs)
    if CHECK:
        return tl.load(ptrs, mask=valid[:, None] & (d < SIZE)[None, :], other=0.0)
    return tl.load(ptrs, mask=(d < SIZE)[None, :], other=0.0)


@triton.jit
def load_block(desc, b, token, head, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """(ROWS, BLOCK) tile from a descriptor of (1, tokens, heads, BLOCK) blocks; 0 outside the tensor."""
    return tl.reshape(desc.load([b, token, head, 0]), [ROWS, BLOCK])


@triton.jit
def store_tile(
    ptr, offsets, valid, stride_d, tile, SIZE: tl.constexpr, BLOCK: tl.constexpr, CHECK: tl.constexpr = True
):  # fmt: skip
    """Store the first SIZE columns of a (rows, BLOCK) tile; with CHECK only of the rows that are valid."""
    d = tl.arange(0, BLOCK)
    ptrs = ptr + offsets[:, None] + d[None, :] * stride_d
    tile = tile.to(ptr.dtype.element_ty)
    if SIZE == BLOCK:
        if CHECK:
            tl.store(ptrs, tile, mask=valid[:, None])
        else:
            tl.store(ptrs, tile)
    else:
        if CHECK:
            tl.store(ptrs, tile, mask=valid[:, None] & (d < SIZE)[None, :])
        else:
            tl.store(ptrs, tile, mask=(d < SIZE)[None, :])


@triton.jit
def exp(x):
    """exp(x) to about an ulp. exp2(log2(e) x) alone has the rounding error of its argument, which grows with abs(x).

    x = n ln 2 + r by Cody and Waite: the first part of ln 2 has so few bits that its products with n are exact, as long
    as n has few too. Where exp(x) is 0 or infinite, any x will do.
    """
    x = tl.clamp(x, -200.0, 200.0, propagate_nan=tl.PropagateNan.ALL)
    n = tl.floor(x * LOG2E + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4
    return tl.exp2(n) * tl.exp2(r * LOG2E)


@triton.jit
def cap(x, softcap):
    """softcap * tanh(x / softcap), tanh as in Cephes' tanhf.

    1 - 2 / (1 + exp(2 y)) alone cancels where y is small, as most scores are.
    """
    y = x / softcap
    z = y * y
    small = -5.70498872745e-3 * z + 2.06390887954e-2
    small = small * z - 5.37397155531e-2
    small = small * z + 1.33314422036e-1
    small = small * z - 3.33332819422e-1
    small = small * z * y + y
    large = 1.0 - 2.0 / (1.0 + tl.exp2(y * (2.0 * LOG2E)))
    return softcap * tl.where(tl.abs(y) < 0.625, small, large)


@triton.jit
def scaled(s, softmax_scale, softcap, PRESCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """(s, scale): s * scale are the scores times log2(e). EXACT, for fp32 operands: softmax_scale * LOG2E has one
    rounding error for all scores, which shows in fp32 results."""
    if PRESCALE or EXACT:
        s = s * softmax_scale
        if HAS_SOFTCAP:
            s = cap(s, softcap)
        s = s * LOG2E
        scale = 1.0
    else:
        scale = softmax_scale * LOG2E
    return s, scale


@triton.jit
def join_sink(m, l, sink, HAS_SINK: tl.constexpr):
    """The sink joins a row's softmax: (top, l, keys).

    m: the row's largest score, times log2(e); any value where the row has seen no key. l: its sum of exp2(score - m),
    0 where it has seen none. Of the result, top + log(l) is lse and keys / l the factor of P V; l is 0 only in a row
    without key and sink. The largest score or the sink is ``top``, in natural units, so that lse = sink exactly where
    the sink dominates; keys also holds what m has lost by the change of units.
    """
    seen = l > 0.0
    top = tl.where(seen, m * LN2, LOWEST)
    if HAS_SINK:
        top = tl.maximum(top, sink)
    keys = tl.where(seen, tl.exp2(m - top * LOG2E), 0.0)
    l = l * keys
    if HAS_SINK:
        l += tl.exp2((sink - top) * LOG2E)
    return top, l, keys


@triton.jit
def factor_and_lse(m, l, sink, HAS_SINK: tl.constexpr):
    """The factor of a row's accumulator, and its lse, both with the sink. m, l, sink: see ``join_sink``."""
    top, l, keys = join_sink(m, l, sink, HAS_SINK)
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    return keys / l, tl.where(empty, float("-inf"), top + tl.log2(l) * LN2)
