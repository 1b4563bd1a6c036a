"""Hopper backward in Gluon for head dimensions above 128: a dk, dv kernel and a dq kernel. Deterministic.

dk and dv of 64 keys fill the registers of one warpgroup each. So ``_hopper_dkv_kernel`` has two consumers: one computes
S, P and dv, the other dP, dS and dk. P passes between them through shared memory, in fp32. ``_hopper_dq_kernel`` has
two consumers of 64 queries each.

In both, P and dS are register operands, and the next block's scores are issued with this block's last product. A third
warpgroup loads by TMA. It is the default partition, where a consumer would spill.

Over 400 lines: both kernels share a launch and a structure, and are read together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.primitives import LOG2E
from ..common.problem import Problem, ceil_div, planned, strides
from ..common.reduce import sum_rows
from ..common.relaunch import Launch
from .backward_preprocess import new_statistics, preprocess_launch, statistics_blocks
from .config import STATISTICS_ALIGN, WIDE
from .gluon_compat import aggregate, async_load
from .launch import call_constants, row_blocks, section_of_heads
from .tile_table import packed_tensors, table_slots
from .vocabulary import Rows, Tiles, new_barriers


@aggregate
class _DkvMemory:
    """Shared memory of ``_hopper_dkv_kernel``: k and v of the tile, two slots of the rest; barriers."""

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    p: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    dout_full: gl.shared_memory_descriptor
    dout_empty: gl.shared_memory_descriptor
    p_full: gl.shared_memory_descriptor
    p_empty: gl.shared_memory_descriptor


@gluon.jit
def _dkv_loader(
    q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, memory, keys, BLOCK: gl.constexpr, ALIGN: gl.constexpr
):
    key, _end, b, head_k, start, blocks = keys.own_tile(BLOCK, ALIGN)
    mbarrier.expect(memory.kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    async_load(k_desc, [b, head_k, key, 0], memory.kv_full, memory.k)
    async_load(v_desc, [b, head_k, key, 0], memory.kv_full, memory.v)
    head = head_k * keys.group
    m0 = start
    for c in range(0, keys.group * blocks):
        slot = c & 1
        phase = ((c >> 1) & 1) ^ 1
        row = b * keys.heads * keys.group + head
        mbarrier.wait(memory.q_empty.index(slot), phase)
        mbarrier.expect(memory.q_full.index(slot), q_desc.block_type.nbytes + 4 * BLOCK)
        async_load(lse_desc, [row, m0], memory.q_full.index(slot), memory.lse.index(slot))
        async_load(q_desc, [b, head, m0, 0], memory.q_full.index(slot), memory.q.index(slot))
        mbarrier.wait(memory.dout_empty.index(slot), phase)
        mbarrier.expect(memory.dout_full.index(slot), dout_desc.block_type.nbytes + 4 * BLOCK)
        async_load(delta_desc, [row, m0], memory.dout_full.index(slot), memory.delta.index(slot))
        async_load(dout_desc, [b, head, m0, 0], memory.dout_full.index(slot), memory.dout.index(slot))
        m0 += BLOCK
        if m0 >= start + blocks * BLOCK:
            m0 = start
            head += 1


@gluon.jit
def _dv_consumer(dv_rows, memory, keys, softmax_scale, BLOCK_D: gl.constexpr, BLOCK: gl.constexpr, ALIGN: gl.constexpr):
    BLOCK_DV: gl.constexpr = dv_rows.BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = memory.q.dtype
    scale = softmax_scale * LOG2E
    key, end, b, head_k, start, blocks = keys.own_tile(BLOCK, ALIGN)
    lo, hi, edge, unmasked = keys.seeing(key, end, start, blocks, BLOCK, BLOCK, gl.SliceLayout(1, s_layout))
    # s, p: [keys, queries]; dv: [keys, columns]
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dv = gl.zeros([BLOCK, BLOCK_DV], gl.float32, layout=layout)
    k = memory.k.reshape([BLOCK, BLOCK_D])
    n = keys.group * blocks
    mbarrier.wait(memory.kv_full, 0)
    mbarrier.wait(memory.q_full.index(0), 0)
    q = memory.q.index(0).reshape([BLOCK, BLOCK_D])
    s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    i = 0
    for c in range(0, n):
        slot = c & 1
        phase = (c >> 1) & 1
        lse = memory.lse.index(slot).load(s_layout)
        mbarrier.arrive(memory.q_empty.index(slot), count=1)
        s = keys.apply_mask(s, i, start, lo, hi, edge, unmasked, BLOCK, gl.SliceLayout(0, s_layout))
        i += 1
        if i == blocks:
            i = 0
        p = gl.exp2(s * scale - lse)
        mbarrier.wait(memory.p_empty.index(slot), phase ^ 1)
        memory.p.index(slot).store(p)
        mbarrier.arrive(memory.p_full.index(slot), count=1)
        p = gl.convert_layout(p.to(dtype), operand)
        mbarrier.wait(memory.dout_full.index(slot), phase)
        dv = warpgroup_mma(p, memory.dout.index(slot).reshape([BLOCK, BLOCK_DV]), dv, is_async=True)
        following = gl.minimum(c + 1, n - 1)  # the last block's scores are computed twice and not used
        mbarrier.wait(memory.q_full.index(following & 1), (following >> 1) & 1)
        q = memory.q.index(following & 1).reshape([BLOCK, BLOCK_D])
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dv = warpgroup_mma_wait(0, deps=[s, dv])
        mbarrier.arrive(memory.dout_empty.index(slot), count=1)
    dv_rows.store(dv, key, end, b, head_k, layout)


@gluon.jit
def _dk_consumer(
    dk_rows, memory, keys, softmax_scale, BLOCK_DV: gl.constexpr, BLOCK: gl.constexpr, ALIGN: gl.constexpr
):
    BLOCK_D: gl.constexpr = dk_rows.BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = memory.q.dtype
    key, end, b, head_k, _start, blocks = keys.own_tile(BLOCK, ALIGN)
    # dp, ds: [keys, queries]; dk: [keys, columns]
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dk = gl.zeros([BLOCK, BLOCK_D], gl.float32, layout=layout)
    v = memory.v.reshape([BLOCK, BLOCK_DV])
    n = keys.group * blocks
    mbarrier.wait(memory.kv_full, 0)
    mbarrier.wait(memory.dout_full.index(0), 0)
    dout = memory.dout.index(0).reshape([BLOCK, BLOCK_DV])
    dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
    dp = warpgroup_mma_wait(0, deps=[dp])
    for c in range(0, n):
        slot = c & 1
        phase = (c >> 1) & 1
        dp = dp - memory.delta.index(slot).load(s_layout)
        mbarrier.arrive(memory.dout_empty.index(slot), count=1)
        mbarrier.wait(memory.p_full.index(slot), phase)
        ds = memory.p.index(slot).load(s_layout) * dp
        mbarrier.arrive(memory.p_empty.index(slot), count=1)
        ds = gl.convert_layout(ds.to(dtype), operand)
        mbarrier.wait(memory.q_full.index(slot), phase)
        dk = warpgroup_mma(ds, memory.q.index(slot).reshape([BLOCK, BLOCK_D]), dk, is_async=True)
        following = gl.minimum(c + 1, n - 1)
        mbarrier.wait(memory.dout_full.index(following & 1), (following >> 1) & 1)
        dout = memory.dout.index(following & 1).reshape([BLOCK, BLOCK_DV])
        dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp, dk = warpgroup_mma_wait(0, deps=[dp, dk])
        mbarrier.arrive(memory.q_empty.index(slot), count=1)
    dk_rows.store(dk * softmax_scale, key, end, b, head_k, layout)


_VARYING = [
    "seqlen_q", "seqlen_k", "heads_k", "heads_q", "group", "left", "right", "slots", "tiles", "heads", "section",
]  # fmt: skip


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_dkv_kernel(
    q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, dk_ptr, dv_ptr, ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_k, group, left, right, slots, tiles, heads, section,
    stride_dkb, stride_dkt: gl.constexpr, stride_dkh, stride_dkd: gl.constexpr,
    stride_dvb, stride_dvt: gl.constexpr, stride_dvh, stride_dvd: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK: gl.constexpr, ALIGN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    keys = Tiles(
        ranges_ptr=ranges_ptr, table_ptr=table_ptr, rows=seqlen_k, others=seqlen_q, heads=heads_k, group=group,
        before=right, after=left, slots=slots, tiles=tiles, total=heads, section=section,
        TILE=BLOCK, LAST_FIRST=False, HAS_BEFORE=HAS_RIGHT, HAS_AFTER=HAS_LEFT, PACKED=PACKED,
    )  # fmt: skip
    if PACKED:  # noqa: SIM102
        if keys.is_surplus():
            return
    dtype: gl.constexpr = q_desc.dtype
    # each quarter of a warp's stores touches every bank once
    p_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    memory = _DkvMemory(
        k=gl.allocate_shared_memory(dtype, [1, 1, BLOCK, BLOCK_D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [1, 1, BLOCK, BLOCK_DV], v_desc.layout),
        q=gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_D], q_desc.layout),
        dout=gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_DV], dout_desc.layout),
        lse=gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK], lse_desc.layout),
        delta=gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK], delta_desc.layout),
        p=gl.allocate_shared_memory(gl.float32, [2, BLOCK, BLOCK], p_layout),
        kv_full=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        q_full=new_barriers(2),
        q_empty=new_barriers(2),
        dout_full=new_barriers(2),
        dout_empty=new_barriers(2),
        p_full=new_barriers(2),
        p_empty=new_barriers(2),
    )
    mbarrier.init(memory.kv_full, count=1)
    for j in gl.static_range(2):
        mbarrier.init(memory.q_full.index(j), count=1)
        mbarrier.init(memory.q_empty.index(j), count=2)
        mbarrier.init(memory.dout_full.index(j), count=1)
        mbarrier.init(memory.dout_empty.index(j), count=2)
        mbarrier.init(memory.p_full.index(j), count=1)
        mbarrier.init(memory.p_empty.index(j), count=1)
    fence_async_shared()
    dk = Rows(ptr=dk_ptr, stride_b=stride_dkb, stride_t=stride_dkt, stride_h=stride_dkh, COLUMNS=D, BLOCK=BLOCK_D)
    dv = Rows(ptr=dv_ptr, stride_b=stride_dvb, stride_t=stride_dvt, stride_h=stride_dvh, COLUMNS=DV, BLOCK=BLOCK_DV)
    gl.warp_specialize(
        [
            (_dkv_loader, (q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, memory, keys, BLOCK, ALIGN)),
            (_dv_consumer, (dv, memory, keys, softmax_scale, BLOCK_D, BLOCK, ALIGN)),
            (_dk_consumer, (dk, memory, keys, softmax_scale, BLOCK_DV, BLOCK, ALIGN)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@aggregate
class _DqMemory:
    """Shared memory of ``_hopper_dq_kernel``: q and dout of both warpgroups, two slots of k, one of v; barriers."""

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    rows_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


@gluon.jit
def _dq_loader(q_desc, dout_desc, k_desc, v_desc, memory, queries, BLOCK: gl.constexpr):
    first, end, bh = queries.own_item()
    b = bh // queries.heads
    head = bh - b * queries.heads
    head_k = head // queries.group
    start, n = queries.block_range(first, end, BLOCK, 1)
    for w in gl.static_range(2):
        mbarrier.expect(memory.rows_full.index(w), q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
        async_load(q_desc, [b, head, first + w * BLOCK, 0], memory.rows_full.index(w), memory.q.index(w))
        async_load(dout_desc, [b, head, first + w * BLOCK, 0], memory.rows_full.index(w), memory.dout.index(w))
    for c in range(0, n):
        slot = c & 1
        mbarrier.wait(memory.k_empty.index(slot), ((c >> 1) & 1) ^ 1)
        mbarrier.expect(memory.k_full.index(slot), k_desc.block_type.nbytes)
        async_load(k_desc, [b, head_k, start + c * BLOCK, 0], memory.k_full.index(slot), memory.k.index(slot))
        mbarrier.wait(memory.v_empty, (c & 1) ^ 1)
        mbarrier.expect(memory.v_full, v_desc.block_type.nbytes)
        async_load(v_desc, [b, head_k, start + c * BLOCK, 0], memory.v_full, memory.v)


@gluon.jit
def _dq_consumer(
    w: gl.constexpr, statistics_ptr, dq_rows, memory, queries, softmax_scale, padded_q,
    BLOCK_DV: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    BLOCK_D: gl.constexpr = dq_rows.BLOCK
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = memory.q.dtype
    scale = softmax_scale * LOG2E
    first, end, bh = queries.own_item()
    b = bh // queries.heads
    start, n = queries.block_range(first, end, BLOCK, 1)
    own, edge, unmasked = queries.own_blocks(first + w * BLOCK, end, start, n, BLOCK, BLOCK)
    own = gl.maximum(own, 1)
    rows = first + w * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, s_layout))
    lo, hi = queries.interval(rows, end)
    statistics = statistics_ptr + bh.to(gl.int64) * padded_q + rows
    lse = gl.load(statistics, mask=rows < end, other=float("inf"))
    delta = gl.load(statistics + queries.total.to(gl.int64) * padded_q, mask=rows < end, other=0.0)
    # s, dp: [queries, keys]; dq: [queries, columns]
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dq = gl.zeros([BLOCK, BLOCK_D], gl.float32, layout=layout)
    q = memory.q.index(w).reshape([BLOCK, BLOCK_D])
    dout = memory.dout.index(w).reshape([BLOCK, BLOCK_DV])
    v = memory.v.reshape([BLOCK, BLOCK_DV])
    mbarrier.wait(memory.rows_full.index(w), 0)
    mbarrier.wait(memory.k_full.index(0), 0)
    k = memory.k.index(0).reshape([BLOCK, BLOCK_D])
    s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    for c in range(0, own):
        slot = c & 1
        mbarrier.wait(memory.v_full, slot)
        dp = warpgroup_mma(dout, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        if (c < edge) | (c >= edge + unmasked):
            j = start + c * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
            visible = j[None, :] < hi[:, None]
            if queries.HAS_BEFORE or queries.PACKED:
                visible = visible & (j[None, :] >= lo[:, None])
            s = gl.where(visible, s, float("-inf"))
        p = gl.exp2(s * scale - lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(memory.v_empty, count=1)
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), operand)
        dq = warpgroup_mma(ds, memory.k.index(slot).reshape([BLOCK, BLOCK_D]), dq, is_async=True)
        following = gl.minimum(c + 1, own - 1)  # the last block's scores are computed twice and not used
        mbarrier.wait(memory.k_full.index(following & 1), (following >> 1) & 1)
        k = memory.k.index(following & 1).reshape([BLOCK, BLOCK_D])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dq = warpgroup_mma_wait(0, deps=[s, dq])
        mbarrier.arrive(memory.k_empty.index(slot), count=1)
    for c in range(own, n):  # blocks that only the other consumer's queries see
        slot = c & 1
        mbarrier.wait(memory.v_full, slot)
        mbarrier.arrive(memory.v_empty, count=1)
        mbarrier.wait(memory.k_full.index(slot), (c >> 1) & 1)
        mbarrier.arrive(memory.k_empty.index(slot), count=1)
    head = bh - b * queries.heads
    dq_rows.store(dq * softmax_scale, first + w * BLOCK, end, b, head, layout)


@gluon.jit(do_not_specialize=[*_VARYING, "padded_q"])
def _hopper_dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, statistics_ptr, dq_ptr, ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section, padded_q,
    stride_dqb, stride_dqt: gl.constexpr, stride_dqh, stride_dqd: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK: gl.constexpr, QUERIES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    queries = Tiles(
        ranges_ptr=ranges_ptr, table_ptr=table_ptr, rows=seqlen_q, others=seqlen_k, heads=heads_q, group=group,
        before=left, after=right, slots=slots, tiles=tiles, total=heads, section=section,
        TILE=QUERIES, LAST_FIRST=True, HAS_BEFORE=HAS_LEFT, HAS_AFTER=HAS_RIGHT, PACKED=PACKED,
    )  # fmt: skip
    if PACKED:  # noqa: SIM102
        if queries.is_surplus():
            return
    dtype: gl.constexpr = q_desc.dtype
    memory = _DqMemory(
        q=gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_D], q_desc.layout),
        dout=gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_DV], dout_desc.layout),
        k=gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [1, 1, BLOCK, BLOCK_DV], v_desc.layout),
        rows_full=new_barriers(2),
        k_full=new_barriers(2),
        k_empty=new_barriers(2),
        v_full=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        v_empty=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    for j in gl.static_range(2):
        mbarrier.init(memory.rows_full.index(j), count=1)
        mbarrier.init(memory.k_full.index(j), count=1)
        mbarrier.init(memory.k_empty.index(j), count=2)
    mbarrier.init(memory.v_full, count=1)
    mbarrier.init(memory.v_empty, count=2)
    fence_async_shared()
    dq = Rows(ptr=dq_ptr, stride_b=stride_dqb, stride_t=stride_dqt, stride_h=stride_dqh, COLUMNS=D, BLOCK=BLOCK_D)
    gl.warp_specialize(
        [
            (_dq_loader, (q_desc, dout_desc, k_desc, v_desc, memory, queries, BLOCK)),
            (_dq_consumer, (0, statistics_ptr, dq, memory, queries, softmax_scale, padded_q, BLOCK_DV, BLOCK)),
            (_dq_consumer, (1, statistics_ptr, dq, memory, queries, softmax_scale, padded_q, BLOCK_DV, BLOCK)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@planned
def _plan(problem: Problem, out_strides, dout_strides, dlse_strides, dq_strides, dk_strides, dv_strides) -> tuple:
    """Launches: statistics; dk and dv, or None where they are not asked for; dq."""
    call, packed, constants = problem.call, problem.call.mask.packed, call_constants(problem)
    preprocess = preprocess_launch(problem, out_strides, dout_strides, dlse_strides, has_buffer=False)
    q, k, v = call.q, call.k, call.v
    blocks = {
        "q_desc": row_blocks(q.shape, q.stride(), q.dtype, WIDE.block),
        "dout_desc": row_blocks((*q.shape[:3], v.shape[-1]), dout_strides, q.dtype, WIDE.block),
        "k_desc": row_blocks(k.shape, k.stride(), k.dtype, WIDE.block),
        "v_desc": row_blocks(v.shape, v.stride(), v.dtype, WIDE.block),
    }
    statistics = statistics_blocks(problem, WIDE.block)
    bytes_per_row = (q.shape[-1] + v.shape[-1]) * q.element_size()

    def launch(kernel, blocks: dict, rows: int, tile: int, heads: int, section: int, **rest) -> Launch:
        slots = table_slots(rows, tile)
        tiles = slots if packed else ceil_div(rows, tile)
        total = problem.batch * heads
        grid = (tiles * total,)
        sizes = {"slots": slots, "tiles": tiles, "heads": total, "section": section}
        rest |= {"D": q.shape[-1], "BLOCK": WIDE.block, "REGISTERS": WIDE.registers}
        return Launch(kernel, grid, blocks, **constants, **sizes, **rest)

    dkv = None
    if dk_strides is not None:
        group = problem.heads_q // problem.heads_k
        dkv = launch(
            _hopper_dkv_kernel, {**blocks, "lse_desc": statistics, "delta_desc": statistics},
            problem.seqlen_k, WIDE.block, problem.heads_k,
            section_of_heads(problem, problem.heads_k, WIDE.l2_bytes // (bytes_per_row * group)),
            heads_k=problem.heads_k, **strides("dk", dk_strides), **strides("dv", dv_strides), ALIGN=STATISTICS_ALIGN,
        )  # fmt: skip
    dq = launch(
        _hopper_dq_kernel, blocks, problem.seqlen_q, WIDE.queries, problem.heads_q,
        section_of_heads(problem, problem.heads_q, WIDE.l2_bytes // bytes_per_row),
        heads_q=problem.heads_q, padded_q=preprocess.constants["padded_q"], QUERIES=WIDE.queries,
        **strides("dq", dq_strides),
    )  # fmt: skip
    return preprocess, dkv, dq


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq; dk, dv and dsinks unless None. dlse (B, Hq, Sq) or None. The same bits every time."""
    call = problem.call
    preprocess, dkv_launch, dq_launch = _plan(
        problem, *(None if x is None else x.stride() for x in (out, dout, dlse, dq, dk, dv))
    )  # fmt: skip
    statistics, dsink_parts = new_statistics(problem, lse, dsinks is not None)
    preprocess(
        out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=dlse, sink_ptr=problem.sinks, buffer_ptr=None,
        statistics_ptr=statistics, dsink_ptr=dsink_parts,
    )  # fmt: skip
    tensors = {"q_desc": call.q, "dout_desc": dout, "k_desc": call.k, "v_desc": call.v}
    if dkv_launch is not None:
        dkv_launch(
            **tensors,
            lse_desc=statistics[0],
            delta_desc=statistics[1],
            dk_ptr=dk,
            dv_ptr=dv,
            **packed_tensors(problem, WIDE.block, unused=lse, of_keys=True),
        )
    dq_launch(
        **tensors,
        statistics_ptr=statistics,
        dq_ptr=dq,
        **packed_tensors(problem, WIDE.queries, unused=lse),
    )
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
