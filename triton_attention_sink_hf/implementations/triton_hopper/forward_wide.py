"""Hopper forward in Gluon for heads above 64: one producer warp, two consumer warpgroups of 64 query rows each.

What limits these heads is the chain of one warpgroup: scores, maximum, exponentials, P. It hides only while it is
shorter than the other warpgroup's products. So:

- A step issues the scores of block c and P V of block c - 1 together. The softmax of block c runs under that P V.
- Unmasked blocks are *guarded* (``guarded_softmax.py``): 340 instructions a block instead of 448 at D 128.
- Tiles of up to EXACT blocks keep exact maxima: the largest P of a row is then 1, without a rounding error, which
  counts in rows of few keys.
- K and V have rings of their own and one barrier together.
- The output leaves by TMA: at D 128 through the tile's own q buffer, of which there are three; else through memory of
  its own, at D 256 in two halves. Stores from registers took 13 % of the kernel at D 256.

Programs are persistent, as in ``forward.py``.

Over 400 lines: producer, consumer and launch are one pipeline, read together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.primitives import LOG2E
from ..common.problem import Problem, planned
from ..common.relaunch import Launch
from .config import wide_forward_config
from .gluon_compat import aggregate, async_load, thread_barrier
from .guarded_softmax import (
    declare_vote,
    exact_softmax,
    guarded_softmax,
    partial_sum,
    rescale_if_voted,
    unpack,
)
from .launch import forward_launch, padded, row_blocks
from .tile_table import packed_tensors
from .vocabulary import (
    Rows,
    Tiles,
    copy_out,
    copy_rows_out,
    factor_and_lse,
    named_barrier,
    new_barriers,
    opaque_zero,
)

TILE = 128  # query rows of a program: 64 for each of two consumers
NOTHING: gl.constexpr = gl.constexpr(-3.0e38)  # maximum of a row that has seen no key
FIRST_BARRIER: gl.constexpr = gl.constexpr(8)  # of the consumers' turns; Triton numbers its own from 0


@aggregate
class _Memory:
    """Shared memory: q of two consumers in Q_BUFFERS buffers; rings of STAGES blocks of BLOCK_N keys and of values;
    barriers. ``full`` of a slot announces K of block c and V of block c - 1. PINGPONG: consumers take turns at the
    tensor cores. THROUGH_Q: the output leaves through the q buffer, else through ``out``, 128 columns at a time."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    BLOCK_N: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_DV: gl.constexpr
    STAGES: gl.constexpr
    Q_BUFFERS: gl.constexpr
    PINGPONG: gl.constexpr
    THROUGH_Q: gl.constexpr

    @gluon.jit
    def queries(self, buffer):
        """q as an operand. Each loop or branch must ask for its own, see ``opaque_zero``."""
        return self.q.index(buffer + opaque_zero()).reshape([64, self.BLOCK_D])

    @gluon.jit
    def keys(self, slot):
        return self.k.index(slot).reshape([self.BLOCK_N, self.BLOCK_D])

    @gluon.jit
    def values(self, slot):
        return self.v.index(slot).reshape([self.BLOCK_N, self.BLOCK_DV])

    @gluon.jit
    def wait_for_turn(self, w: gl.constexpr):
        if self.PINGPONG:
            named_barrier("sync", FIRST_BARRIER + w, 256)

    @gluon.jit
    def pass_turn_to(self, w: gl.constexpr):
        if self.PINGPONG:
            named_barrier("arrive", FIRST_BARRIER + w, 256)


@gluon.jit
def _load_keys(k_desc, memory, c, b, head, n0, more_bytes):
    """K of block c. ``more_bytes``: of what else its barrier announces."""
    s = c % memory.STAGES
    mbarrier.wait(memory.k_empty.index(s), ((c // memory.STAGES) & 1) ^ 1)
    mbarrier.expect(memory.full.index(s), k_desc.block_type.nbytes + more_bytes)
    async_load(k_desc, [b, head, n0, 0], memory.full.index(s), memory.k.index(s))


@gluon.jit
def _load_values(v_desc, memory, c, b, head, n0):
    """V of block c - 1, announced by block c's barrier."""
    s = (c - 1) % memory.STAGES
    mbarrier.wait(memory.v_empty.index(s), (((c - 1) // memory.STAGES) & 1) ^ 1)
    async_load(v_desc, [b, head, n0, 0], memory.full.index(c % memory.STAGES), memory.v.index(s))


@gluon.jit
def _producer(q_desc, k_desc, v_desc, memory, queries):
    BLOCK_N: gl.constexpr = memory.BLOCK_N
    Q_BUFFERS: gl.constexpr = memory.Q_BUFFERS
    v_bytes: gl.constexpr = v_desc.block_type.nbytes
    c = 0
    i = 0
    v_b = 0
    v_head = 0
    v_n0 = 0
    count = queries.count()
    items = count * queries.total
    for _ in range(gl.program_id(0), items, gl.num_programs(0)):
        first, end, bh = queries.item_of_round(i, count)
        b = bh // queries.heads
        head = bh - b * queries.heads
        head_k = head // queries.group
        start, n = queries.block_range(first, end, BLOCK_N, 1)
        n0 = start + (n - 1) * BLOCK_N
        buffer = i % Q_BUFFERS * 2
        for w in gl.static_range(2):
            mbarrier.wait(memory.q_empty.index(buffer + w), (i // Q_BUFFERS & 1) ^ 1)
            mbarrier.expect(memory.q_full.index(buffer + w), q_desc.block_type.nbytes)
            async_load(
                q_desc, [b, head, first + w * 64, 0], memory.q_full.index(buffer + w), memory.q.index(buffer + w)
            )
        if c == 0:
            _load_keys(k_desc, memory, c, b, head_k, n0, 0)
        else:
            _load_keys(k_desc, memory, c, b, head_k, n0, v_bytes)
            _load_values(v_desc, memory, c, v_b, v_head, v_n0)
        c += 1
        for _ in range(1, n):
            n0 -= BLOCK_N
            _load_keys(k_desc, memory, c, b, head_k, n0, v_bytes)
            _load_values(v_desc, memory, c, b, head_k, n0 + BLOCK_N)
            c += 1
        v_b = b
        v_head = head_k
        v_n0 = n0
        i += 1  # noqa: SIM113
    if c > 0:  # the last V
        s = c % memory.STAGES
        mbarrier.wait(memory.k_empty.index(s), ((c // memory.STAGES) & 1) ^ 1)
        mbarrier.expect(memory.full.index(s), v_bytes)
        _load_values(v_desc, memory, c, v_b, v_head, v_n0)


@gluon.jit
def _apply_mask(s, lo, hi, n0, HAS_LO: gl.constexpr):
    j = n0 + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    visible = j[None, :] < hi[:, None]
    if HAS_LO:
        visible = visible & (j[None, :] >= lo[:, None])
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _step(
    P, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w: gl.constexpr,
    MASKED: gl.constexpr, GUARDED: gl.constexpr, FRESH: gl.constexpr, HAS_LO: gl.constexpr,
):  # fmt: skip
    """Scores of block c and P V of block c - 1 together, then the softmax of block c.

    m and l are block c's. FRESH: block c is the first of the next tile; acc stays the old tile's and is not rescaled.
    """
    slot = c % memory.STAGES
    v_slot = (c - 1) % memory.STAGES
    acc_layout: gl.constexpr = acc.type.layout
    mbarrier.wait(memory.full.index(slot), (c // memory.STAGES) & 1)
    memory.wait_for_turn(w)
    s = warpgroup_mma(q, memory.keys(slot).permute((1, 0)), zero, use_acc=False, is_async=True)
    p = unpack(P, memory.v.dtype, gl.DotOperandLayout(0, acc_layout, 2))
    acc = warpgroup_mma(p, memory.values(v_slot), acc, use_acc=True, is_async=True)
    memory.pass_turn_to(1 - w)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(memory.k_empty.index(slot), count=1)
    if MASKED:
        s = _apply_mask(s, lo, hi, n0, HAS_LO)
    if GUARDED:
        P, m, l, alpha = guarded_softmax(s, m, l, scale, memory.v.dtype)
    else:
        P, m, l, alpha = exact_softmax(s, m, l, scale, memory.v.dtype)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(memory.v_empty.index(v_slot), count=1)
    if not FRESH:
        acc = rescale_if_voted(acc, gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout)))
    return P, acc, m, l


@gluon.jit
def _copy_halves_out(out_desc, tile, out, b, head, token):
    """Store 64 rows of 256 columns by TMA, half by half."""
    left, right = gl.split(out.reshape([64, 2, 128]).permute((0, 2, 1)))
    copy_out(out_desc, tile, left, b, head, token, 0)
    tma.store_wait(0)
    thread_barrier()
    copy_out(out_desc, tile, right, b, head, token, 128)


@gluon.jit
def _consumer(
    w: gl.constexpr, out_desc, out_rows, lse_ptr, sink_ptr, memory, queries, softmax_scale,
    EXACT: gl.constexpr, HAS_SINK: gl.constexpr,
):  # fmt: skip
    BLOCK_N: gl.constexpr = memory.BLOCK_N
    BLOCK_DV: gl.constexpr = memory.BLOCK_DV
    Q_BUFFERS: gl.constexpr = memory.Q_BUFFERS
    PACKED: gl.constexpr = queries.PACKED
    HAS_LO: gl.constexpr = queries.HAS_BEFORE or PACKED
    dtype: gl.constexpr = memory.v.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    scale = softmax_scale * LOG2E
    # s, p: [queries, keys]; acc: [queries, columns of V]; m: [queries]; l: [queries, 4], partial sums
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    acc = gl.zeros([64, BLOCK_DV], gl.float32, layout=acc_layout)
    m0 = gl.full([64], NOTHING, gl.float32, layout=row_layout)
    l0 = partial_sum(zero)
    count = queries.count()
    items = count * queries.total
    if w == 1:
        memory.pass_turn_to(0)
    # scores of the first tile's first block; without a tile, of anything
    first, end, bh = queries.item_of_round(0, count)
    start, n = queries.block_range(first, end, BLOCK_N, 1)
    lo, hi = queries.interval(first + w * 64 + gl.arange(0, 64, layout=row_layout), end)
    some = gl.program_id(0) < items
    mbarrier.wait(memory.q_full.index(w), 0, pred=some)
    mbarrier.wait(memory.full.index(0), 0, pred=some)
    memory.wait_for_turn(w)
    s = warpgroup_mma(memory.queries(w), memory.keys(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    memory.pass_turn_to(1 - w)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(memory.k_empty.index(0), count=1)
    s = _apply_mask(s, lo, hi, start + (n - 1) * BLOCK_N, HAS_LO)
    P, m, l, _alpha = exact_softmax(s, m0, l0, scale, dtype)
    c = 1  # blocks whose scores are done
    i = 0  # tiles done
    for t in range(gl.program_id(0), items, gl.num_programs(0)):  # P: of the tile's first block
        next_first, next_end, next_bh = queries.item_of_round(i + 1, count)
        token = first + w * 64
        _stop, edge, unmasked = queries.own_blocks(token, end, start, n, 64, BLOCK_N)
        rows = token + gl.arange(0, 64, layout=row_layout)
        lo, hi = queries.interval(rows, end)
        if PACKED and not queries.HAS_BEFORE:  # short segments share a tile: mask all of its few blocks
            unmasked = gl.where(edge > 0, 0, unmasked)
            edge = 0
        # blocks n - 2 to 0, descending: right edge, unmasked (exact or guarded), left edge
        right_edge = gl.maximum(gl.minimum(n - edge - unmasked, n) - 1, 0)
        middle = gl.maximum(n - edge - 1, right_edge)
        exact = gl.where(n <= EXACT, middle, right_edge)
        n0 = start + (n - 2) * BLOCK_N
        buffer = i % Q_BUFFERS * 2 + w
        q = memory.queries(buffer)
        for _ in range(0, right_edge):
            P, acc, m, l = _step(P, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, True, False, False, HAS_LO)
            c += 1
            n0 -= BLOCK_N
        q = memory.queries(buffer)
        for _ in range(right_edge, exact):
            P, acc, m, l = _step(P, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, False, False, False, HAS_LO)
            c += 1
            n0 -= BLOCK_N
        q = memory.queries(buffer)
        for _ in range(exact, middle):
            P, acc, m, l = _step(P, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, False, True, False, HAS_LO)
            c += 1
            n0 -= BLOCK_N
        if queries.HAS_BEFORE:
            q = memory.queries(buffer)
            for _ in range(middle, n - 1):
                P, acc, m, l = _step(P, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, True, False, False, HAS_LO)
                c += 1
                n0 -= BLOCK_N
        if memory.THROUGH_Q:
            if i > 0:  # the last tile's output has left its q buffer
                tma.store_wait(0)
                mbarrier.arrive(memory.q_empty.index((i - 1) % Q_BUFFERS * 2 + w), count=1)
        else:
            mbarrier.arrive(memory.q_empty.index(buffer), count=1)
        # The last block's P V goes out with the first scores of the next tile. After the last tile those are not used.
        i += 1  # noqa: SIM113
        following = i % Q_BUFFERS * 2 + w
        start, n = queries.block_range(next_first, next_end, BLOCK_N, 1)
        lo, hi = queries.interval(next_first + w * 64 + gl.arange(0, 64, layout=row_layout), next_end)
        mbarrier.wait(memory.q_full.index(following), i // Q_BUFFERS & 1, pred=t + gl.num_programs(0) < items)
        q = memory.queries(following)
        P, acc, next_m, next_l = _step(
            P, acc, m0, l0, c, q, memory, scale, lo, hi, start + (n - 1) * BLOCK_N, zero, w, True, False, True, HAS_LO
        )
        c += 1

        l = gl.convert_layout(gl.sum(l, axis=1), row_layout)
        b = bh // queries.heads
        head = bh - b * queries.heads
        sink = 0.0
        if HAS_SINK:
            sink = gl.load(sink_ptr + head).to(gl.float32)
        factor, lse = factor_and_lse(m, l, sink, HAS_SINK)
        factor = gl.convert_layout(factor, gl.SliceLayout(1, acc_layout))
        gl.store(lse_ptr + bh.to(gl.int64) * queries.rows + rows, lse, mask=rows < end)
        out = (acc * factor[:, None]).to(dtype)
        if memory.THROUGH_Q:
            copy_rows_out(out_desc, out_rows, memory.q.index(buffer), out, b, head, token, end, PACKED)
        else:
            tma.store_wait(0)  # what was stored before has left the memory
            thread_barrier()
            if BLOCK_DV <= 128:
                copy_rows_out(out_desc, out_rows, memory.out.index(w), out, b, head, token, end, PACKED)
            elif not PACKED:  # noqa: SIM114 (known when compiled, the next is not)
                _copy_halves_out(out_desc, memory.out.index(w), out, b, head, token)
            elif token + 64 <= end:
                _copy_halves_out(out_desc, memory.out.index(w), out, b, head, token)
            else:  # rows from ``end`` on are another tile's
                out_rows.store(out, token, end, b, head, acc_layout)
        acc = gl.zeros([64, BLOCK_DV], gl.float32, layout=acc_layout)
        m = next_m
        l = next_l
        first = next_first
        end = next_end
        bh = next_bh
    tma.store_wait(0)
    if w == 0:
        memory.wait_for_turn(0)


_VARYING = ["seqlen_q", "seqlen_k", "heads_q", "group", "left", "right", "slots", "tiles", "heads", "section"]


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_wide_fwd_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, sink_ptr, ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section,
    stride_ob, stride_ot: gl.constexpr, stride_oh, stride_od: gl.constexpr,
    DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, PINGPONG: gl.constexpr, EXACT: gl.constexpr,
    HAS_SINK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    declare_vote()
    queries = Tiles(
        ranges_ptr=ranges_ptr, table_ptr=table_ptr, rows=seqlen_q, others=seqlen_k, heads=heads_q, group=group,
        before=left, after=right, slots=slots, tiles=tiles, total=heads, section=section,
        TILE=128, LAST_FIRST=True, HAS_BEFORE=HAS_LEFT, HAS_AFTER=HAS_RIGHT, PACKED=PACKED,
    )  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q = gl.allocate_shared_memory(dtype, [Q_BUFFERS * 2, 1, 1, 64, BLOCK_D], q_desc.layout)
    THROUGH_Q: gl.constexpr = Q_BUFFERS >= 3 and BLOCK_D == BLOCK_DV
    out = q
    if not THROUGH_Q:
        out = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, min(BLOCK_DV, 128)], out_desc.layout)
    memory = _Memory(
        q=q,
        k=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], v_desc.layout),
        q_full=new_barriers(Q_BUFFERS * 2), q_empty=new_barriers(Q_BUFFERS * 2),
        full=new_barriers(STAGES), k_empty=new_barriers(STAGES), v_empty=new_barriers(STAGES),
        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV, STAGES=STAGES, Q_BUFFERS=Q_BUFFERS,
        out=out, PINGPONG=PINGPONG, THROUGH_Q=THROUGH_Q,
    )  # fmt: skip
    for j in gl.static_range(Q_BUFFERS * 2):
        mbarrier.init(memory.q_full.index(j), count=1)
        mbarrier.init(memory.q_empty.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(memory.full.index(j), count=1)
        mbarrier.init(memory.k_empty.index(j), count=2)
        mbarrier.init(memory.v_empty.index(j), count=2)
    fence_async_shared()
    out_rows = Rows(ptr=out_ptr, stride_b=stride_ob, stride_t=stride_ot, stride_h=stride_oh, COLUMNS=DV, BLOCK=BLOCK_DV)
    # constexprs survive only in tuples written out here
    gl.warp_specialize(
        [
            (_consumer, (0, out_desc, out_rows, lse_ptr, sink_ptr, memory, queries, softmax_scale, EXACT, HAS_SINK)),
            (_consumer, (1, out_desc, out_rows, lse_ptr, sink_ptr, memory, queries, softmax_scale, EXACT, HAS_SINK)),
            (_producer, (q_desc, k_desc, v_desc, memory, queries)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@planned
def _plan(problem: Problem, out_shape, out_strides) -> Launch:
    q, config = problem.call.q, wide_forward_config(problem)
    out_blocks = row_blocks(out_shape, out_strides, q.dtype, 64, min(padded(out_shape[-1]), 128))
    return forward_launch(
        _hopper_wide_fwd_kernel,
        problem,
        config,
        TILE,
        out_strides,
        blocks={"out_desc": out_blocks},
        PINGPONG=config.pingpong,
        EXACT=config.exact_keys // config.block_n,
    )


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call = problem.call
    _plan(problem, out.shape, out.stride())(
        q_desc=call.q,
        k_desc=call.k,
        v_desc=call.v,
        out_desc=out,
        out_ptr=out,
        lse_ptr=lse,
        sink_ptr=lse if problem.sinks is None else problem.sinks,  # warp_specialize passes no None
        **packed_tensors(problem, TILE, unused=lse),
    )
