"""Hopper forward in Gluon for heads up to 64: one producer warp, three consumer warpgroups of 64 query rows each.

The producer fills a ring with K and V by TMA. A consumer computes the softmax of one block of scores, then issues this
block's P V and the next block's scores together. So its exponentials overlap the products of the other consumers, which
take turns at the tensor cores (ping-pong, by named barriers). P stays in registers.

Programs are persistent. The next block may be the first of the next tile, so the pipeline never drains. Heavy tiles
come first, in sections of heads whose keys fit L2. The producer finds each tile and tells the consumers what they need
of it (a record in shared memory): a division takes a consumer 200 cycles, a load of the table 600. The output leaves by
TMA, through the tile's own q buffer.

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
from .config import FORWARD
from .gluon_compat import aggregate, async_load
from .launch import forward_launch, row_blocks
from .tile_table import packed_tensors
from .vocabulary import (
    Rows,
    Tiles,
    copy_rows_out,
    factor_and_lse,
    get,
    named_barrier,
    new_barriers,
    new_numbers,
    opaque_zero,
    put,
)

NOTHING: gl.constexpr = gl.constexpr(-3.0e38)  # maximum of a row that has seen no key
CONSUMERS: gl.constexpr = gl.constexpr(3)
TILE = 64 * 3  # query rows of a program
# A record: what a consumer is told of its rows of a tile. RIGHT_EDGE, MIDDLE, OTHERS: where its loops over blocks end.
FIELDS: gl.constexpr = gl.constexpr(11)
TOKEN, END, BATCH, HEAD = (gl.constexpr(k) for k in range(4))
LAST_KEY, SKIPPED, RIGHT_EDGE, MIDDLE, OTHERS, LEFT_EDGE, UNMASKED = (gl.constexpr(k) for k in range(4, 11))
FIRST_BARRIER: gl.constexpr = gl.constexpr(8)  # of the consumers' turns; Triton numbers its own from 0


@aggregate
class _Memory:
    """Shared memory: 64 rows of q for each of CONSUMERS in Q_BUFFERS buffers; a ring of STAGES slots, each with a block
    of BLOCK_N keys and the values of the block before; barriers."""

    q: gl.shared_memory_descriptor
    records: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    BLOCK_N: gl.constexpr
    BLOCK_D: gl.constexpr
    BLOCK_DV: gl.constexpr
    STAGES: gl.constexpr
    Q_BUFFERS: gl.constexpr
    ALONE: gl.constexpr

    @gluon.jit
    def queries(self, buffer):
        """q as an operand. Each loop or branch must ask for its own, see ``opaque_zero``."""
        return self.q.index(buffer + opaque_zero()).reshape([64, self.BLOCK_D])

    @gluon.jit
    def record(self, i, w: gl.constexpr):
        """Where consumer w finds its record of tile i. The q buffer of tile i - 1 is free: tile i - 1 - Q_BUFFERS is
        done, whose record this replaces."""
        return (i % (self.Q_BUFFERS + 1) * CONSUMERS + w) * FIELDS

    @gluon.jit
    def keys(self, slot):
        return self.k.index(slot).reshape([self.BLOCK_N, self.BLOCK_D])

    @gluon.jit
    def values(self, slot):
        return self.v.index(slot).reshape([self.BLOCK_N, self.BLOCK_DV])


@gluon.jit
def _load_pair(k_desc, v_desc, memory, c, b, head, n0, v_b, v_head, v_n0):
    """Fill slot c of the ring: K of this block and V of the block before, because one step uses both."""
    s = c % memory.STAGES
    has_v = c > 0
    mbarrier.wait(memory.empty.index(s), ((c // memory.STAGES) & 1) ^ 1)
    k_bytes: gl.constexpr = k_desc.block_type.nbytes
    v_bytes: gl.constexpr = v_desc.block_type.nbytes
    mbarrier.expect(memory.full.index(s), k_bytes + v_bytes, pred=has_v)
    mbarrier.expect(memory.full.index(s), k_bytes, pred=c == 0)
    async_load(k_desc, [b, head, n0, 0], memory.full.index(s), memory.k.index(s))
    async_load(v_desc, [v_b, v_head, v_n0, 0], memory.full.index(s), memory.v.index(s), pred=has_v)


@gluon.jit
def _describe_rows(memory, queries, i, first, end, b, head, start, n):
    """Write the consumers' records of tile i."""
    BLOCK_N: gl.constexpr = memory.BLOCK_N
    for w in gl.static_range(CONSUMERS):
        token = first + w * 64
        own, edge, unmasked = queries.own_blocks(token, end, start, n, 64, BLOCK_N)
        own = gl.maximum(own, 1)
        # blocks own - 1 to 1, descending: right edge, unmasked, left edge
        right_edge = gl.maximum(gl.minimum(own - edge - unmasked, own - 1), 0)
        middle = gl.maximum(gl.minimum(own - edge, own - 1), 0)
        if queries.PACKED and not queries.HAS_BEFORE:  # short segments share a tile: mask all of its few blocks
            right_edge = gl.where(edge > 0, own - 1, right_edge)
            middle = gl.where(edge > 0, own - 1, middle)
        record = memory.record(i, w)
        put(memory.records, record + TOKEN, token)
        put(memory.records, record + END, end)
        put(memory.records, record + BATCH, b)
        put(memory.records, record + HEAD, head)
        put(memory.records, record + LAST_KEY, start + (own - 1) * BLOCK_N)
        put(memory.records, record + SKIPPED, n - own)
        put(memory.records, record + RIGHT_EDGE, right_edge)
        put(memory.records, record + MIDDLE, middle)
        put(memory.records, record + OTHERS, own - 1)
        put(memory.records, record + LEFT_EDGE, edge)
        put(memory.records, record + UNMASKED, unmasked)


@gluon.jit
def _producer(q_desc, k_desc, v_desc, memory, queries):
    BLOCK_N: gl.constexpr = memory.BLOCK_N
    STAGES: gl.constexpr = memory.STAGES
    Q_BUFFERS: gl.constexpr = memory.Q_BUFFERS
    c = 0
    i = 0
    v_b = 0
    v_head = 0
    v_n0 = 0
    count = queries.count()
    section = 0
    before = 0
    for _ in range(gl.program_id(0), count * queries.total, gl.num_programs(0)):
        first, end, bh, section, before = queries.balanced_item(i, section, before, count)
        b = bh // queries.heads
        head = bh - b * queries.heads
        head_k = head // queries.group
        start, n = queries.block_range(first, end, BLOCK_N, 1)
        n0 = start + (n - 1) * BLOCK_N
        _load_pair(k_desc, v_desc, memory, c, b, head_k, n0, v_b, v_head, v_n0)
        c += 1
        _describe_rows(memory, queries, i, first, end, b, head, start, n)
        buffer = i % Q_BUFFERS * CONSUMERS
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(memory.q_empty.index(buffer + w), (i // Q_BUFFERS & 1) ^ 1)
            q_full = memory.q_full.index(buffer + w)
            mbarrier.expect(q_full, q_desc.block_type.nbytes)
            async_load(q_desc, [b, head, first + w * 64, 0], q_full, memory.q.index(buffer + w))
        for _ in range(1, n):
            n0 -= BLOCK_N
            _load_pair(k_desc, v_desc, memory, c, b, head_k, n0, b, head_k, n0 + BLOCK_N)
            c += 1
        v_b = b
        v_head = head_k
        v_n0 = n0
        i += 1  # noqa: SIM113
    if c > 0:  # the last V
        s = c % STAGES
        mbarrier.wait(memory.empty.index(s), ((c // STAGES) & 1) ^ 1)
        mbarrier.expect(memory.full.index(s), v_desc.block_type.nbytes)
        async_load(v_desc, [v_b, v_head, v_n0, 0], memory.full.index(s), memory.v.index(s))


@gluon.jit
def _wait_for_turn(w: gl.constexpr):
    named_barrier("sync", FIRST_BARRIER + w, 256)


@gluon.jit
def _pass_turn_to(w: gl.constexpr):
    named_barrier("arrive", FIRST_BARRIER + w, 256)


@gluon.jit
def _mask_right(s, hi, n0, ALONE: gl.constexpr):
    """Scores of keys from n0 on, -inf from each row's ``hi`` on. ALONE: no step of this kernel masks on the left.

    Two forms of one comparison. Where the other one stands, triton 3.6 spills, or packs 64 predicates into integers.
    """
    j = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    if ALONE:
        return gl.where(j[None, :] < (hi - n0)[:, None], s, float("-inf"))
    return gl.where((n0 + j)[None, :] < hi[:, None], s, float("-inf"))


@gluon.jit
def _mask_left(s, lo, n0, edge):
    """Scores of keys from n0 on, -inf before each row's ``lo``. Blocks from ``edge`` on need no such mask."""
    if edge > 0:
        j = n0 + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where(j[None, :] >= lo[:, None], s, float("-inf"))
    return s


@gluon.jit
def _softmax(s, m, l, scale, lo, hi, n0, RIGHT: gl.constexpr, LEFT: gl.constexpr, ALONE: gl.constexpr):
    """RIGHT, LEFT: which sides of the block are masked."""
    if LEFT:
        j = n0 + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
        s = gl.where((j[None, :] < hi[:, None]) & (j[None, :] >= lo[:, None]), s, float("-inf"))
    elif RIGHT:
        s = _mask_right(s, hi, n0, ALONE)
    m_new = gl.maximum(m, gl.max(s, axis=1) * scale)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * scale - m_new[:, None])
    l = l * alpha + gl.sum(p, axis=1)
    return p, m_new, l, alpha


@gluon.jit
def _step(
    s, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w: gl.constexpr, RIGHT: gl.constexpr, LEFT: gl.constexpr
):
    """Softmax of the scores s, then this block's P V and the next block's scores: slot c holds both operands."""
    slot = c % memory.STAGES
    acc_layout: gl.constexpr = acc.type.layout
    p, m, l, alpha = _softmax(s, m, l, scale, lo, hi, n0, RIGHT, LEFT, memory.ALONE)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, acc_layout))[:, None]
    p = gl.convert_layout(p.to(q.dtype), gl.DotOperandLayout(0, acc_layout, 2))
    mbarrier.wait(memory.full.index(slot), (c // memory.STAGES) & 1)
    _wait_for_turn(w)
    k = memory.keys(slot)
    # P V first: else its rescaling and rounding can be scheduled between the instructions of Q K
    acc = warpgroup_mma(p, memory.values(slot), acc, use_acc=True, is_async=True)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    # the next consumer's products queue behind this one's last
    s, acc = warpgroup_mma_wait(1, deps=[s, acc])
    _pass_turn_to((w + 1) % CONSUMERS)
    s, acc = warpgroup_mma_wait(0, deps=[s, acc])
    mbarrier.arrive(memory.empty.index(slot), count=1)
    return s, acc, m, l


@gluon.jit
def _skip(c, memory, w: gl.constexpr):
    """Release slot c unused, once it is filled: until then the other consumers may still read its old content."""
    slot = c % memory.STAGES
    mbarrier.wait(memory.full.index(slot), (c // memory.STAGES) & 1)
    _wait_for_turn(w)
    _pass_turn_to((w + 1) % CONSUMERS)
    mbarrier.arrive(memory.empty.index(slot), count=1)


@gluon.jit
def _scores(c, buffer, memory, zero, w: gl.constexpr):
    """Scores of the block whose K is in slot c. The V there is of a block that these rows do not see."""
    slot = c % memory.STAGES
    mbarrier.wait(memory.full.index(slot), (c // memory.STAGES) & 1)
    _wait_for_turn(w)
    q = memory.queries(buffer)
    k = memory.keys(slot)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    _pass_turn_to((w + 1) % CONSUMERS)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(memory.empty.index(slot), count=1)
    return s


@gluon.jit
def _consumer(
    w: gl.constexpr, out_desc, out_rows, lse_ptr, sink_ptr, memory, queries, softmax_scale, HAS_SINK: gl.constexpr
):
    BLOCK_N: gl.constexpr = memory.BLOCK_N
    BLOCK_DV: gl.constexpr = memory.BLOCK_DV
    Q_BUFFERS: gl.constexpr = memory.Q_BUFFERS
    HAS_LEFT: gl.constexpr = queries.HAS_BEFORE
    PACKED: gl.constexpr = queries.PACKED
    SHARED: gl.constexpr = PACKED and not HAS_LEFT  # short segments share a tile: rows may not see its first keys
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    dtype: gl.constexpr = memory.q.dtype
    scale = softmax_scale * LOG2E
    # s: [queries, keys]; acc: [queries, columns of V]; m, l: [queries]
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    count = queries.count()
    items = count * queries.total
    if w == CONSUMERS - 1:  # consumer 0 starts; each block takes one round of turns
        _pass_turn_to(0)
    some = gl.program_id(0) < items
    mbarrier.wait(memory.q_full.index(w), 0, pred=some)
    mbarrier.wait(memory.full.index(0), 0, pred=some)
    k = memory.keys(0)
    q = memory.q.index(w).reshape([64, memory.BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(memory.empty.index(0), count=1)
    c = 1  # slots of the ring used so far
    i = 0  # tiles done
    for t in range(gl.program_id(0), items, gl.num_programs(0)):
        buffer = i % Q_BUFFERS * CONSUMERS + w
        record = memory.record(i, w)
        token = get(memory.records, record + TOKEN)
        end = get(memory.records, record + END)
        rows = token + gl.arange(0, 64, layout=row_layout)
        lo, hi = queries.interval(rows, end)
        m = gl.full([64], NOTHING, gl.float32, layout=row_layout)
        l = gl.zeros([64], gl.float32, layout=row_layout)
        acc = gl.zeros([64, BLOCK_DV], gl.float32, layout=acc_layout)
        n0 = get(memory.records, record + LAST_KEY)
        skipped = get(memory.records, record + SKIPPED)
        right_edge = get(memory.records, record + RIGHT_EDGE)
        middle = get(memory.records, record + MIDDLE)
        edge = get(memory.records, record + LEFT_EDGE)
        # s holds the scores of the tile's last block. If these rows do not see it, skip to their own last block.
        if skipped > 0:
            for _ in range(1, skipped):
                _skip(c, memory, w)
                c += 1
            s = _scores(c, buffer, memory, zero, w)
            c += 1
        q = memory.queries(buffer)
        for _ in range(0, right_edge):
            if SHARED:
                s = _mask_left(s, lo, n0, edge)
            s, acc, m, l = _step(s, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, True, False)
            c += 1
            n0 -= BLOCK_N
        q = memory.queries(buffer)
        for _ in range(right_edge, middle):
            s, acc, m, l = _step(s, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, False, False)
            c += 1
            n0 -= BLOCK_N
        if HAS_LEFT:
            q = memory.queries(buffer)
            for _ in range(middle, get(memory.records, record + OTHERS)):
                s, acc, m, l = _step(s, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, True, True)
                c += 1
                n0 -= BLOCK_N
        if i > 0:  # the last tile's output has left its q buffer
            tma.store_wait(0)
            mbarrier.arrive(memory.q_empty.index((i - 1) % Q_BUFFERS * CONSUMERS + w), count=1)
        # The last block's P V is issued with the next tile's first scores. After the last tile those are not used.
        i += 1  # noqa: SIM113
        following = i % Q_BUFFERS * CONSUMERS + w
        mbarrier.wait(memory.q_full.index(following), i // Q_BUFFERS & 1, pred=t + gl.num_programs(0) < items)
        q = memory.queries(following)
        if HAS_LEFT or SHARED:
            s = _mask_left(s, lo, n0, edge)
        if HAS_LEFT or PACKED:  # noqa: SIM114 (known when compiled; a branch would cost registers in the loops)
            s = _mask_right(s, hi, n0, memory.ALONE)
        elif get(memory.records, record + UNMASKED) == 0:
            s = _mask_right(s, hi, n0, memory.ALONE)
        b = get(memory.records, record + BATCH)
        head = get(memory.records, record + HEAD)
        sink = 0.0
        if HAS_SINK:
            sink = gl.load(sink_ptr + head).to(gl.float32)
        s, acc, m, l = _step(s, acc, m, l, c, q, memory, scale, lo, hi, n0, zero, w, False, False)
        c += 1

        factor, lse = factor_and_lse(m, l, sink, HAS_SINK)
        factor = gl.convert_layout(factor, acc_row_layout)
        gl.store(lse_ptr + (b * queries.heads + head).to(gl.int64) * queries.rows + rows, lse, mask=rows < end)
        out = (acc * factor[:, None]).to(dtype)
        copy_rows_out(out_desc, out_rows, memory.q.index(buffer), out, b, head, token, end, PACKED)
    tma.store_wait(0)
    if w == 0:
        _wait_for_turn(0)


_VARYING = ["seqlen_q", "seqlen_k", "heads_q", "group", "left", "right", "slots", "tiles", "heads", "section"]


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_fwd_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, sink_ptr, ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section,
    stride_ob, stride_ot: gl.constexpr, stride_oh, stride_od: gl.constexpr,
    DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, HAS_SINK: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    queries = Tiles(
        ranges_ptr=ranges_ptr, table_ptr=table_ptr, rows=seqlen_q, others=seqlen_k, heads=heads_q, group=group,
        before=left, after=right, slots=slots, tiles=tiles, total=heads, section=section,
        TILE=64 * CONSUMERS, LAST_FIRST=True, HAS_BEFORE=HAS_LEFT, HAS_AFTER=HAS_RIGHT, PACKED=PACKED,
    )  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    memory = _Memory(
        q=gl.allocate_shared_memory(dtype, [Q_BUFFERS * CONSUMERS, 1, 1, 64, BLOCK_D], q_desc.layout),
        records=new_numbers((Q_BUFFERS + 1) * CONSUMERS * FIELDS),
        k=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], v_desc.layout),
        q_full=new_barriers(Q_BUFFERS * CONSUMERS), q_empty=new_barriers(Q_BUFFERS * CONSUMERS),
        full=new_barriers(STAGES), empty=new_barriers(STAGES),
        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, BLOCK_DV=BLOCK_DV,
        STAGES=STAGES, Q_BUFFERS=Q_BUFFERS, ALONE=not (HAS_LEFT or PACKED),
    )  # fmt: skip
    for j in gl.static_range(Q_BUFFERS * CONSUMERS):
        mbarrier.init(memory.q_full.index(j), count=1)
        mbarrier.init(memory.q_empty.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(memory.full.index(j), count=1)
        mbarrier.init(memory.empty.index(j), count=CONSUMERS)
    fence_async_shared()
    out = Rows(ptr=out_ptr, stride_b=stride_ob, stride_t=stride_ot, stride_h=stride_oh, COLUMNS=DV, BLOCK=BLOCK_DV)
    # constexprs survive only in tuples written out here
    gl.warp_specialize(
        [
            (_consumer, (0, out_desc, out, lse_ptr, sink_ptr, memory, queries, softmax_scale, HAS_SINK)),
            (_consumer, (1, out_desc, out, lse_ptr, sink_ptr, memory, queries, softmax_scale, HAS_SINK)),
            (_consumer, (2, out_desc, out, lse_ptr, sink_ptr, memory, queries, softmax_scale, HAS_SINK)),
            (_producer, (q_desc, k_desc, v_desc, memory, queries)),
        ],
        [4, 4, 1],
        [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


@planned
def _plan(problem: Problem, out_shape, out_strides) -> Launch:
    blocks = {"out_desc": row_blocks(out_shape, out_strides, problem.call.q.dtype, 64)}
    return forward_launch(_hopper_fwd_kernel, problem, FORWARD, TILE, out_strides, blocks)


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call = problem.call
    launch = _plan(problem, out.shape, out.stride())
    launch(
        q_desc=call.q,
        k_desc=call.k,
        v_desc=call.v,
        out_desc=out,
        out_ptr=out,
        lse_ptr=lse,
        sink_ptr=lse if problem.sinks is None else problem.sinks,  # warp_specialize passes no None
        **packed_tensors(problem, TILE, unused=lse),
    )
