"""Hopper forward in Gluon: one warp loads, two or three warpgroups of 64 query rows each compute.

The producer warp fills a ring with K and V through the copy engine. A consumer takes the softmax of one block of
scores, then issues this block's P V and the next block's scores together: exponentials of one warpgroup overlap the
products of the others, which (TURNS) have the tensor cores to themselves in turn, by named barriers. P stays in
registers. Programs are persistent, and the next block may be the first of the next tile, so the pipeline never drains;
heavy tiles come first, in sections of heads whose keys fit L2.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.primitives import LN2, LOG2E
from ..common.problem import Problem, ceil_div, multiprocessors, planned, strides
from ..common.relaunch import Launch
from .config import forward_config
from .gluon_compat import async_load
from .launch import call_constants, row_blocks, section_of_heads
from .tile_table import persistent_item, table_slots, tile_count, tile_table, work_item
from .vocabulary import block_range, interval, opaque_zero, own_blocks

NOTHING: gl.constexpr = gl.constexpr(-3.0e38)  # maximum of a row that has seen no key
LOWEST: gl.constexpr = gl.constexpr(-3.4028234663852886e38)  # of fp32


@gluon.jit
def _load_pair(
    k_desc, v_desc, k_smem, v_smem, full, empty, c, b, head, n0, v_b, v_head, v_n0, STAGES: gl.constexpr
):  # fmt: skip
    """Slot c of the ring: K of this block and V of the block before it, since one step uses both."""
    s = c % STAGES
    has_v = c > 0
    mbarrier.wait(empty.index(s), ((c // STAGES) & 1) ^ 1)
    k_bytes: gl.constexpr = k_desc.block_type.nbytes
    v_bytes: gl.constexpr = v_desc.block_type.nbytes
    mbarrier.expect(full.index(s), k_bytes + v_bytes, pred=has_v)
    mbarrier.expect(full.index(s), k_bytes, pred=c == 0)
    async_load(k_desc, [b, head, n0, 0], full.index(s), k_smem.index(s))
    async_load(v_desc, [v_b, v_head, v_n0, 0], full.index(s), v_smem.index(s), pred=has_v)


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, memory, sizes,
    BLOCK_N: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty = memory
    ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section = sizes
    TILE: gl.constexpr = 64 * CONSUMERS
    c = 0
    i = 0
    v_b = 0
    v_head = 0
    v_n0 = 0
    tiles = tile_count(table_ptr, tiles, PACKED)
    for _ in range(gl.program_id(0), tiles * heads, gl.num_programs(0)):
        item = persistent_item(i, tiles * heads)
        first, end, bh = work_item(item, table_ptr, slots, tiles, seqlen_q, section, TILE, True, PACKED)
        b = bh // heads_q
        head = bh - b * heads_q
        head_k = head // group
        start, n = block_range(
            first, end, ranges_ptr, seqlen_q, seqlen_k, left, right, TILE, BLOCK_N, 1, HAS_LEFT, HAS_RIGHT, PACKED
        )
        n0 = start + (n - 1) * BLOCK_N
        _load_pair(k_desc, v_desc, k_smem, v_smem, full, empty, c, b, head_k, n0, v_b, v_head, v_n0, STAGES)
        c += 1
        buffer = i % Q_BUFFERS * CONSUMERS
        for w in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(buffer + w), (i // Q_BUFFERS & 1) ^ 1)
            mbarrier.expect(q_full.index(buffer + w), q_desc.block_type.nbytes)
            async_load(q_desc, [b, head, first + w * 64, 0], q_full.index(buffer + w), q_smem.index(buffer + w))
        for _ in range(1, n):
            n0 -= BLOCK_N
            _load_pair(k_desc, v_desc, k_smem, v_smem, full, empty, c, b, head_k, n0, b, head_k, n0 + BLOCK_N, STAGES)
            c += 1
        v_b = b
        v_head = head_k
        v_n0 = n0
        i += 1  # noqa: SIM113
    if c > 0:  # the last V
        s = c % STAGES
        mbarrier.wait(empty.index(s), ((c // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(s), v_desc.block_type.nbytes)
        async_load(v_desc, [v_b, v_head, v_n0, 0], full.index(s), v_smem.index(s))


@gluon.jit
def _wait_for_turn(w: gl.constexpr):
    if w == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    elif w == 1:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.sync 10, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _pass_turn_to(w: gl.constexpr):
    if w == 0:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    elif w == 1:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)
    else:
        gl.inline_asm_elementwise("bar.arrive 10, 256; mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def _softmax(
    s, m, l, scale, lo, hi, n0, MASKED: gl.constexpr, HAS_LO: gl.constexpr, BLOCK_N: gl.constexpr,
    col_layout: gl.constexpr,
):  # fmt: skip
    if MASKED:
        j = n0 + gl.arange(0, BLOCK_N, layout=col_layout)
        visible = j[None, :] < hi[:, None]
        if HAS_LO:
            visible = visible & (j[None, :] >= lo[:, None])
        s = gl.where(visible, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, axis=1) * scale)
    alpha = gl.exp2(m - m_new)
    p = gl.exp2(s * scale - m_new[:, None])
    l = l * alpha + gl.sum(p, axis=1)
    return p, m_new, l, alpha


@gluon.jit
def _hide_left(s, lo, n0, edge, BLOCK_N: gl.constexpr, col_layout: gl.constexpr):
    """Scores of keys from n0 on, -inf before each row's ``lo``; blocks from ``edge`` on have no such keys."""
    if edge > 0:
        j = n0 + gl.arange(0, BLOCK_N, layout=col_layout)
        s = gl.where(j[None, :] >= lo[:, None], s, float("-inf"))
    return s


@gluon.jit
def _step(
    s, acc, m, l, c, q, k_smem, v_smem, full, empty, scale, lo, hi, n0, zero, w: gl.constexpr,
    MASKED: gl.constexpr, HAS_LO: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
    col_layout: gl.constexpr, acc_row_layout: gl.constexpr, p_layout: gl.constexpr,
):  # fmt: skip
    """Softmax of the scores s, then this block's P V and the next block's scores: slot c holds both operands."""
    slot = c % STAGES
    p, m, l, alpha = _softmax(s, m, l, scale, lo, hi, n0, MASKED, HAS_LO, BLOCK_N, col_layout)
    acc = acc * gl.convert_layout(alpha, acc_row_layout)[:, None]
    p = gl.convert_layout(p.to(q.dtype), p_layout)
    mbarrier.wait(full.index(slot), (c // STAGES) & 1)
    if TURNS:
        _wait_for_turn(w)
    k = k_smem.index(slot).reshape([BLOCK_N, BLOCK_D])
    # P V first: then the rescaling and rounding that it needs cannot end up between the instructions of Q K
    acc = warpgroup_mma(p, v_smem.index(slot).reshape([BLOCK_N, BLOCK_DV]), acc, use_acc=True, is_async=True)
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    if TURNS:  # the next one's products queue up behind this one's last
        s, acc = warpgroup_mma_wait(1, deps=[s, acc])
        _pass_turn_to((w + 1) % CONSUMERS)
    s, acc = warpgroup_mma_wait(0, deps=[s, acc])
    mbarrier.arrive(empty.index(slot), count=1)
    return s, acc, m, l


@gluon.jit
def _queries(buffer, q_smem, BLOCK_D: gl.constexpr):
    """The operand for one loop or branch; each asks for its own (see ``opaque_zero``)."""
    return q_smem.index(buffer + opaque_zero()).reshape([64, BLOCK_D])


@gluon.jit
def _skip(c, full, empty, w: gl.constexpr, CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr):
    """Give slot c back unused, but not before it is filled: until then the others may still hold what was in it."""
    slot = c % STAGES
    mbarrier.wait(full.index(slot), (c // STAGES) & 1)
    if TURNS:
        _wait_for_turn(w)
        _pass_turn_to((w + 1) % CONSUMERS)
    mbarrier.arrive(empty.index(slot), count=1)


@gluon.jit
def _scores(
    c, buffer, q_smem, k_smem, full, empty, zero, w: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Scores of the block whose K slot c holds; its V is of a block that these rows do not see."""
    slot = c % STAGES
    mbarrier.wait(full.index(slot), (c // STAGES) & 1)
    if TURNS:
        _wait_for_turn(w)
    q = _queries(buffer, q_smem, BLOCK_D)
    k = k_smem.index(slot).reshape([BLOCK_N, BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    if TURNS:
        _pass_turn_to((w + 1) % CONSUMERS)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(slot), count=1)
    return s


@gluon.jit
def _consumer(
    w: gl.constexpr, out_ptr, lse_ptr, sink_ptr, memory, sizes, softmax_scale,
    stride_ob, stride_ot: gl.constexpr, stride_oh,
    DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr, TURNS: gl.constexpr,
    HAS_SINK: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_full, q_empty, full, empty = memory
    ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_q, _group, left, right, slots, tiles, heads, section = sizes
    TILE: gl.constexpr = 64 * CONSUMERS
    SKIPS: gl.constexpr = BLOCK_DV <= 128  # beyond, it takes registers that are not there
    SHARED: gl.constexpr = PACKED and not HAS_LEFT  # by short segments, whose rows do not see all from the left on
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    acc_row_layout: gl.constexpr = gl.SliceLayout(1, acc_layout)
    col_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q_smem.dtype
    scale = softmax_scale * LOG2E
    zero = gl.zeros([64, BLOCK_N], gl.float32, layout=s_layout)
    tiles = tile_count(table_ptr, tiles, PACKED)
    items = tiles * heads
    if TURNS and w == CONSUMERS - 1:  # the turn starts with warpgroup 0 and goes round once a block
        _pass_turn_to(0)
    some = gl.program_id(0) < items
    mbarrier.wait(q_full.index(w), 0, pred=some)
    mbarrier.wait(full.index(0), 0, pred=some)
    k = k_smem.index(0).reshape([BLOCK_N, BLOCK_D])
    s = warpgroup_mma(q_smem.index(w).reshape([64, BLOCK_D]), k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    c = 1  # slots of the ring that were used
    i = 0  # tiles done
    next_first = 0
    next_end = 0
    next_bh = 0
    if PACKED:
        coming = gl.minimum(persistent_item(0, items), items - 1)
        next_first, next_end, next_bh = work_item(
            gl.maximum(coming, 0), table_ptr, slots, tiles, seqlen_q, section, TILE, True, PACKED
        )
    for t in range(gl.program_id(0), items, gl.num_programs(0)):
        if not PACKED:
            next_first, next_end, next_bh = work_item(
                persistent_item(i, items), table_ptr, slots, tiles, seqlen_q, section, TILE, True, PACKED
            )
        first = next_first
        end = next_end
        bh = next_bh
        b = bh // heads_q
        head = bh - b * heads_q
        start, n = block_range(
            first, end, ranges_ptr, seqlen_q, seqlen_k, left, right, TILE, BLOCK_N, 1, HAS_LEFT, HAS_RIGHT, PACKED
        )
        if PACKED:  # the table's entry of the next tile: its latency is hidden behind this one
            coming = gl.minimum(persistent_item(i + 1, items), items - 1)
            next_first, next_end, next_bh = work_item(
                gl.maximum(coming, 0), table_ptr, slots, tiles, seqlen_q, section, TILE, True, PACKED
            )
        token = first + w * 64
        own, edge, unmasked = own_blocks(
            token, end, start, n, ranges_ptr, seqlen_q, seqlen_k, left, right, 64, BLOCK_N, HAS_LEFT, HAS_RIGHT, PACKED
        )
        own = gl.maximum(own, 1) if SKIPS else n
        rows = token + gl.arange(0, 64, layout=row_layout)
        lo, hi = interval(rows, end, ranges_ptr, seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT, PACKED)
        m = gl.full([64], NOTHING, gl.float32, layout=row_layout)
        l = gl.zeros([64], gl.float32, layout=row_layout)
        acc = gl.zeros([64, BLOCK_DV], gl.float32, layout=acc_layout)
        n0 = start + (own - 1) * BLOCK_N
        buffer = i % Q_BUFFERS * CONSUMERS + w
        # s holds the scores of block n - 1. Where these rows see nothing of it, nor of those below it, until block own
        if SKIPS and own < n:
            for _ in range(own, n - 1):
                _skip(c, full, empty, w, CONSUMERS, STAGES, TURNS)
                c += 1
            s = _scores(c, buffer, q_smem, k_smem, full, empty, zero, w, BLOCK_N, BLOCK_D, CONSUMERS, STAGES, TURNS)
            c += 1
        # blocks own - 1 to 1, descending; block 0 follows below
        right_edge = gl.maximum(gl.minimum(own - edge - unmasked, own - 1), 0)
        middle = gl.maximum(gl.minimum(own - edge, own - 1), 0)
        if SHARED:  # all of its few blocks are masked
            right_edge = gl.where(edge > 0, own - 1, right_edge)
            middle = gl.where(edge > 0, own - 1, middle)
        q = _queries(buffer, q_smem, BLOCK_D)
        for _ in range(0, right_edge):
            if SHARED:
                s = _hide_left(s, lo, n0, edge, BLOCK_N, col_layout)
            s, acc, m, l = _step(
                s, acc, m, l, c, q, k_smem, v_smem, full, empty, scale, lo, hi, n0, zero, w, True, False,
                BLOCK_N, BLOCK_D, BLOCK_DV, CONSUMERS, STAGES, TURNS, col_layout, acc_row_layout, p_layout,
            )  # fmt: skip
            c += 1
            n0 -= BLOCK_N
        q = _queries(buffer, q_smem, BLOCK_D)
        for _ in range(right_edge, middle):
            s, acc, m, l = _step(
                s, acc, m, l, c, q, k_smem, v_smem, full, empty, scale, lo, hi, n0, zero, w, False, False,
                BLOCK_N, BLOCK_D, BLOCK_DV, CONSUMERS, STAGES, TURNS, col_layout, acc_row_layout, p_layout,
            )  # fmt: skip
            c += 1
            n0 -= BLOCK_N
        if HAS_LEFT:
            q = _queries(buffer, q_smem, BLOCK_D)
            for _ in range(middle, own - 1):
                s, acc, m, l = _step(
                    s, acc, m, l, c, q, k_smem, v_smem, full, empty, scale, lo, hi, n0, zero, w, True, True,
                    BLOCK_N, BLOCK_D, BLOCK_DV, CONSUMERS, STAGES, TURNS, col_layout, acc_row_layout, p_layout,
                )  # fmt: skip
                c += 1
                n0 -= BLOCK_N
        mbarrier.arrive(q_empty.index(buffer), count=1)
        # The last block's P V goes out with the first scores of the next tile; after the last tile these are waste.
        i += 1  # noqa: SIM113
        following = i % Q_BUFFERS * CONSUMERS + w
        mbarrier.wait(q_full.index(following), i // Q_BUFFERS & 1, pred=t + gl.num_programs(0) < items)
        q = _queries(following, q_smem, BLOCK_D)
        if HAS_LEFT or SHARED:
            s = _hide_left(s, lo, n0, edge, BLOCK_N, col_layout)
        s, acc, m, l = _step(
            s, acc, m, l, c, q, k_smem, v_smem, full, empty, scale, lo, hi, n0, zero, w, True, False,
            BLOCK_N, BLOCK_D, BLOCK_DV, CONSUMERS, STAGES, TURNS, col_layout, acc_row_layout, p_layout,
        )  # fmt: skip
        c += 1

        # The sink joins last, in natural units, so that a row that it dominates has lse = sink exactly. So has a row
        # that has seen no key, where it may be below what NOTHING stands for.
        seen = l > 0.0
        top = gl.where(seen, m * LN2, LOWEST)
        if HAS_SINK:
            sink = gl.load(sink_ptr + head).to(gl.float32)
            top = gl.maximum(top, sink)
        keys = gl.where(seen, gl.exp2(m - top * LOG2E), 0.0)
        l = l * keys
        if HAS_SINK:
            l += gl.exp2((sink - top) * LOG2E)
        nothing = l == 0.0
        l = gl.where(nothing, 1.0, l)
        lse = gl.where(nothing, float("-inf"), top + gl.log2(l) * LN2)
        factor = gl.convert_layout(gl.where(nothing, 0.0, keys / l), acc_row_layout)
        gl.store(lse_ptr + bh.to(gl.int64) * seqlen_q + rows, lse, mask=rows < end)
        out = (acc * factor[:, None]).to(dtype)
        if BLOCK_DV <= 64:  # wide stores; larger heads leave no shared memory for the exchange
            store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_DV, BLOCK_DV // 8], [4, 1], [1, 0])
            out = gl.convert_layout(out, store_layout)
        else:
            store_layout: gl.constexpr = acc_layout
        out_rows = token + gl.arange(0, 64, layout=gl.SliceLayout(1, store_layout))
        columns = gl.arange(0, BLOCK_DV, layout=gl.SliceLayout(0, store_layout))
        out_base = out_ptr + b.to(gl.int64) * stride_ob + head.to(gl.int64) * stride_oh
        mask = (out_rows < end)[:, None]
        if DV < BLOCK_DV:
            mask = mask & (columns < DV)[None, :]
        gl.store(out_base + out_rows.to(gl.int64)[:, None] * stride_ot + columns[None, :], out, mask=mask)
    if TURNS and w == 0:
        _wait_for_turn(0)


_VARYING = ["seqlen_q", "seqlen_k", "heads_q", "group", "left", "right", "slots", "tiles", "heads", "section"]


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_fwd_kernel(
    q_desc, k_desc, v_desc, out_ptr, lse_ptr, sink_ptr, ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section,
    stride_ob, stride_ot: gl.constexpr, stride_oh, stride_od: gl.constexpr,
    DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK_N: gl.constexpr,
    CONSUMERS: gl.constexpr, STAGES: gl.constexpr, Q_BUFFERS: gl.constexpr,
    TURNS: gl.constexpr, HAS_SINK: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [Q_BUFFERS * CONSUMERS, 1, 1, 64, BLOCK_D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_DV], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_BUFFERS * CONSUMERS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for j in gl.static_range(Q_BUFFERS * CONSUMERS):
        mbarrier.init(q_full.index(j), count=1)
        mbarrier.init(q_empty.index(j), count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
        mbarrier.init(empty.index(j), count=CONSUMERS)
    fence_async_shared()
    memory = (q_smem, k_smem, v_smem, q_full, q_empty, full, empty)
    sizes = (ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section)
    # constexprs survive only in tuples written out here
    if CONSUMERS == 3:
        gl.warp_specialize(
            [
                (_consumer, (
                    0, out_ptr, lse_ptr, sink_ptr, memory, sizes, softmax_scale, stride_ob, stride_ot, stride_oh,
                    DV, BLOCK_D, BLOCK_DV, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS, TURNS,
                    HAS_SINK, HAS_LEFT, HAS_RIGHT, PACKED,
                )),
                (_consumer, (
                    1, out_ptr, lse_ptr, sink_ptr, memory, sizes, softmax_scale, stride_ob, stride_ot, stride_oh,
                    DV, BLOCK_D, BLOCK_DV, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS, TURNS,
                    HAS_SINK, HAS_LEFT, HAS_RIGHT, PACKED,
                )),
                (_consumer, (
                    2, out_ptr, lse_ptr, sink_ptr, memory, sizes, softmax_scale, stride_ob, stride_ot, stride_oh,
                    DV, BLOCK_D, BLOCK_DV, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS, TURNS,
                    HAS_SINK, HAS_LEFT, HAS_RIGHT, PACKED,
                )),
                (_producer, (
                    q_desc, k_desc, v_desc, memory, sizes, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS,
                    HAS_LEFT, HAS_RIGHT, PACKED,
                )),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (
                    0, out_ptr, lse_ptr, sink_ptr, memory, sizes, softmax_scale, stride_ob, stride_ot, stride_oh,
                    DV, BLOCK_D, BLOCK_DV, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS, TURNS,
                    HAS_SINK, HAS_LEFT, HAS_RIGHT, PACKED,
                )),
                (_consumer, (
                    1, out_ptr, lse_ptr, sink_ptr, memory, sizes, softmax_scale, stride_ob, stride_ot, stride_oh,
                    DV, BLOCK_D, BLOCK_DV, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS, TURNS,
                    HAS_SINK, HAS_LEFT, HAS_RIGHT, PACKED,
                )),
                (_producer, (
                    q_desc, k_desc, v_desc, memory, sizes, BLOCK_N, CONSUMERS, STAGES, Q_BUFFERS,
                    HAS_LEFT, HAS_RIGHT, PACKED,
                )),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )  # fmt: skip


@planned
def _plan(problem: Problem, out_strides) -> tuple:
    """Rows of a tile, launch."""
    call, mask, config = problem.call, problem.call.mask, forward_config(problem)
    tile = 64 * config.consumers
    heads = problem.batch * problem.heads_q
    bytes_per_key = (call.k.shape[-1] + call.v.shape[-1]) * call.k.element_size()
    slots = table_slots(problem.seqlen_q, tile)
    tiles = slots if mask.packed else ceil_div(problem.seqlen_q, tile)
    constants = {
        **call_constants(problem),
        "heads_q": problem.heads_q,
        "slots": slots,
        "tiles": tiles,
        "heads": heads,
        "section": section_of_heads(problem, problem.heads_q, config.l2_bytes // bytes_per_key),
        **strides("o", out_strides),
        "BLOCK_N": config.block_n,
        "CONSUMERS": config.consumers,
        "STAGES": config.stages,
        "Q_BUFFERS": config.q_buffers,
        "TURNS": config.turns,
        "HAS_SINK": call.sinks is not None,
        "CONSUMER_REGISTERS": config.registers[0],
        "PRODUCER_REGISTERS": config.registers[1],
    }
    q, k, v = call.q, call.k, call.v
    blocks = {
        "q_desc": row_blocks(q.shape, q.stride(), q.dtype, 64),
        "k_desc": row_blocks(k.shape, k.stride(), k.dtype, config.block_n),
        "v_desc": row_blocks(v.shape, v.stride(), v.dtype, config.block_n),
    }
    grid = (min(tiles * heads, multiprocessors(q.device)),)
    return tile, Launch(_hopper_fwd_kernel, grid, blocks, **constants)


def launch_forward(problem: Problem, out, lse) -> None:
    """Write out (B, Sq, Hq, Dv) and lse (B, Hq, Sq), natural log with the sink. Every element is written."""
    call = problem.call
    tile, launch = _plan(problem, out.stride())
    ranges = problem.ranges
    unused = lse  # warp_specialize passes no None
    launch(
        q_desc=call.q,
        k_desc=call.k,
        v_desc=call.v,
        out_ptr=out,
        lse_ptr=lse,
        sink_ptr=unused if problem.sinks is None else problem.sinks,
        ranges_ptr=unused if ranges is None else ranges,
        table_ptr=unused if ranges is None else tile_table(ranges, problem.seqlen_q, tile),
    )
