"""Hopper backward in Gluon for head dimensions above 128: two kernels of four and three products, in a fixed order.

dk and dv of 64 keys fill the registers of one warpgroup each. ``_hopper_dkv_kernel`` gives them one each: the first has
S, P and dv, the second dP, dS and dk; P goes from the one to the other through shared memory, in fp32.
``_hopper_dq_kernel`` has two warpgroups of 64 queries. In both the probabilities and their gradients are register
operands, and the next block's scores go out with this block's last product. A third warpgroup loads through the copy
engine; it is the default partition, where a consumer would spill.
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
from .backward_preprocess import ALIGN, new_statistics, prepare_launch, statistics_blocks
from .config import WIDE_L2_BYTES
from .gluon_compat import async_load
from .launch import call_constants, row_blocks, section_of_heads
from .tile_table import is_surplus, key_tile, table_slots, tile_count, tile_table, work_item
from .vocabulary import block_range, hide, interval, own_blocks, seeing_queries, store_rows

BLOCK = 64  # queries of a block of the dk, dv kernel and keys of one of the dq kernel; keys or queries of a warpgroup
QUERIES = 128  # of a program of the dq kernel
REGISTERS = 240  # of a lane of a consumer


@gluon.jit
def _dkv_loader(
    q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, memory, sizes,
    BLOCK: gl.constexpr, ALIGN: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, _p_smem, barriers = memory
    kv_full, q_full, q_empty, dout_full, dout_empty, _p_full, _p_empty = barriers
    key, _end, b, head_k, start, blocks, heads_k, group = key_tile(
        sizes, BLOCK, BLOCK, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED
    )
    mbarrier.expect(kv_full, k_desc.block_type.nbytes + v_desc.block_type.nbytes)
    async_load(k_desc, [b, head_k, key, 0], kv_full, k_smem)
    async_load(v_desc, [b, head_k, key, 0], kv_full, v_smem)
    head = head_k * group
    m0 = start
    for c in range(0, group * blocks):
        slot = c & 1
        phase = ((c >> 1) & 1) ^ 1
        row = b * heads_k * group + head
        mbarrier.wait(q_empty.index(slot), phase)
        mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + 4 * BLOCK)
        async_load(lse_desc, [row, m0], q_full.index(slot), lse_smem.index(slot))
        async_load(q_desc, [b, head, m0, 0], q_full.index(slot), q_smem.index(slot))
        mbarrier.wait(dout_empty.index(slot), phase)
        mbarrier.expect(dout_full.index(slot), dout_desc.block_type.nbytes + 4 * BLOCK)
        async_load(delta_desc, [row, m0], dout_full.index(slot), delta_smem.index(slot))
        async_load(dout_desc, [b, head, m0, 0], dout_full.index(slot), dout_smem.index(slot))
        m0 += BLOCK
        if m0 >= start + blocks * BLOCK:
            m0 = start
            head += 1


@gluon.jit
def _dv_consumer(
    dv_ptr, memory, sizes, softmax_scale, stride_b, stride_t: gl.constexpr, stride_h,
    DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK: gl.constexpr, ALIGN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, _v_smem, lse_smem, _delta_smem, p_smem, barriers = memory
    kv_full, q_full, q_empty, dout_full, dout_empty, p_full, p_empty = barriers
    HAS_LO: gl.constexpr = HAS_RIGHT or PACKED
    HAS_HI: gl.constexpr = HAS_LEFT or PACKED
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = q_smem.dtype
    scale = softmax_scale * LOG2E
    key, end, b, head_k, start, blocks, _heads_k, group = key_tile(
        sizes, BLOCK, BLOCK, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED
    )
    lo, hi, edge, unmasked = seeing_queries(
        key, end, start, blocks, sizes, BLOCK, BLOCK, HAS_LEFT, HAS_RIGHT, PACKED, gl.SliceLayout(1, s_layout)
    )
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dv = gl.zeros([BLOCK, BLOCK_DV], gl.float32, layout=layout)
    k = k_smem.reshape([BLOCK, BLOCK_D])
    n = group * blocks
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    s = warpgroup_mma(k, q_smem.index(0).reshape([BLOCK, BLOCK_D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    i = 0
    for c in range(0, n):
        slot = c & 1
        phase = (c >> 1) & 1
        lse = lse_smem.index(slot).load(s_layout)
        mbarrier.arrive(q_empty.index(slot), count=1)
        s = hide(s, i, start, lo, hi, edge, unmasked, BLOCK, HAS_LO, HAS_HI, gl.SliceLayout(0, s_layout))
        i += 1
        if i == blocks:
            i = 0
        p = gl.exp2(s * scale - lse)
        mbarrier.wait(p_empty.index(slot), phase ^ 1)
        p_smem.index(slot).store(p)
        mbarrier.arrive(p_full.index(slot), count=1)
        p = gl.convert_layout(p.to(dtype), operand)
        mbarrier.wait(dout_full.index(slot), phase)
        dv = warpgroup_mma(p, dout_smem.index(slot).reshape([BLOCK, BLOCK_DV]), dv, is_async=True)
        following = gl.minimum(c + 1, n - 1)  # the last block's scores are computed twice
        mbarrier.wait(q_full.index(following & 1), (following >> 1) & 1)
        q = q_smem.index(following & 1).reshape([BLOCK, BLOCK_D])
        s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dv = warpgroup_mma_wait(0, deps=[s, dv])
        mbarrier.arrive(dout_empty.index(slot), count=1)
    store_rows(dv_ptr, dv, key, end, b, head_k, stride_b, stride_t, stride_h, DV, BLOCK_DV, layout)


@gluon.jit
def _dk_consumer(
    dk_ptr, memory, sizes, softmax_scale, stride_b, stride_t: gl.constexpr, stride_h,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK: gl.constexpr, ALIGN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, _k_smem, v_smem, _lse_smem, delta_smem, p_smem, barriers = memory
    kv_full, q_full, q_empty, dout_full, dout_empty, p_full, p_empty = barriers
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = q_smem.dtype
    key, end, b, head_k, _start, blocks, _heads_k, group = key_tile(
        sizes, BLOCK, BLOCK, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED
    )
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dk = gl.zeros([BLOCK, BLOCK_D], gl.float32, layout=layout)
    v = v_smem.reshape([BLOCK, BLOCK_DV])
    n = group * blocks
    mbarrier.wait(kv_full, 0)
    mbarrier.wait(dout_full.index(0), 0)
    dp = warpgroup_mma(
        v, dout_smem.index(0).reshape([BLOCK, BLOCK_DV]).permute((1, 0)), zero, use_acc=False, is_async=True
    )
    dp = warpgroup_mma_wait(0, deps=[dp])
    for c in range(0, n):
        slot = c & 1
        phase = (c >> 1) & 1
        dp = dp - delta_smem.index(slot).load(s_layout)
        mbarrier.arrive(dout_empty.index(slot), count=1)
        mbarrier.wait(p_full.index(slot), phase)
        ds = p_smem.index(slot).load(s_layout) * dp
        mbarrier.arrive(p_empty.index(slot), count=1)
        ds = gl.convert_layout(ds.to(dtype), operand)
        mbarrier.wait(q_full.index(slot), phase)
        dk = warpgroup_mma(ds, q_smem.index(slot).reshape([BLOCK, BLOCK_D]), dk, is_async=True)
        following = gl.minimum(c + 1, n - 1)
        mbarrier.wait(dout_full.index(following & 1), (following >> 1) & 1)
        dout = dout_smem.index(following & 1).reshape([BLOCK, BLOCK_DV])
        dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        dp, dk = warpgroup_mma_wait(0, deps=[dp, dk])
        mbarrier.arrive(q_empty.index(slot), count=1)
    store_rows(dk_ptr, dk * softmax_scale, key, end, b, head_k, stride_b, stride_t, stride_h, D, BLOCK_D, layout)


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
    if PACKED:  # noqa: SIM102
        if is_surplus(table_ptr, heads):
            return
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK, BLOCK_DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_D], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_DV], dout_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [2, 1, BLOCK], delta_desc.layout)
    # a quarter of a warp's stores meet all banks once
    p_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0])
    p_smem = gl.allocate_shared_memory(gl.float32, [2, BLOCK, BLOCK], p_layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dout_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    dout_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    p_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for j in gl.static_range(2):
        mbarrier.init(q_full.index(j), count=1)
        mbarrier.init(q_empty.index(j), count=2)
        mbarrier.init(dout_full.index(j), count=1)
        mbarrier.init(dout_empty.index(j), count=2)
        mbarrier.init(p_full.index(j), count=1)
        mbarrier.init(p_empty.index(j), count=1)
    fence_async_shared()
    barriers = (kv_full, q_full, q_empty, dout_full, dout_empty, p_full, p_empty)
    memory = (q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, p_smem, barriers)
    sizes = (ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_k, group, left, right, slots, tiles, heads, section)
    # constexprs survive only in tuples written out here
    gl.warp_specialize(
        [
            (_dkv_loader, (
                q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, memory, sizes,
                BLOCK, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
            (_dv_consumer, (
                dv_ptr, memory, sizes, softmax_scale, stride_dvb, stride_dvt, stride_dvh,
                DV, BLOCK_D, BLOCK_DV, BLOCK, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
            (_dk_consumer, (
                dk_ptr, memory, sizes, softmax_scale, stride_dkb, stride_dkt, stride_dkh,
                D, BLOCK_D, BLOCK_DV, BLOCK, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@gluon.jit
def _dq_loader(
    q_desc, dout_desc, k_desc, v_desc, memory, sizes,
    BLOCK: gl.constexpr, QUERIES: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, v_smem, rows_full, k_full, k_empty, v_full, v_empty = memory
    ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, _heads, section = sizes
    tiles = tile_count(table_ptr, tiles, PACKED)
    first, end, bh = work_item(gl.program_id(0), table_ptr, slots, tiles, seqlen_q, section, QUERIES, True, PACKED)
    b = bh // heads_q
    head = bh - b * heads_q
    head_k = head // group
    start, n = block_range(
        first, end, ranges_ptr, seqlen_q, seqlen_k, left, right, QUERIES, BLOCK, 1, HAS_LEFT, HAS_RIGHT, PACKED
    )
    for w in gl.static_range(2):
        mbarrier.expect(rows_full.index(w), q_desc.block_type.nbytes + dout_desc.block_type.nbytes)
        async_load(q_desc, [b, head, first + w * BLOCK, 0], rows_full.index(w), q_smem.index(w))
        async_load(dout_desc, [b, head, first + w * BLOCK, 0], rows_full.index(w), dout_smem.index(w))
    for c in range(0, n):
        slot = c & 1
        mbarrier.wait(k_empty.index(slot), ((c >> 1) & 1) ^ 1)
        mbarrier.expect(k_full.index(slot), k_desc.block_type.nbytes)
        async_load(k_desc, [b, head_k, start + c * BLOCK, 0], k_full.index(slot), k_smem.index(slot))
        mbarrier.wait(v_empty, (c & 1) ^ 1)
        mbarrier.expect(v_full, v_desc.block_type.nbytes)
        async_load(v_desc, [b, head_k, start + c * BLOCK, 0], v_full, v_smem)


@gluon.jit
def _dq_consumer(
    w: gl.constexpr, statistics_ptr, dq_ptr, memory, sizes, softmax_scale, padded_q,
    stride_b, stride_t: gl.constexpr, stride_h,
    D: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, BLOCK: gl.constexpr, QUERIES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, v_smem, rows_full, k_full, k_empty, v_full, v_empty = memory
    ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_q, _group, left, right, slots, tiles, heads, section = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = q_smem.dtype
    scale = softmax_scale * LOG2E
    tiles = tile_count(table_ptr, tiles, PACKED)
    first, end, bh = work_item(gl.program_id(0), table_ptr, slots, tiles, seqlen_q, section, QUERIES, True, PACKED)
    b = bh // heads_q
    start, n = block_range(
        first, end, ranges_ptr, seqlen_q, seqlen_k, left, right, QUERIES, BLOCK, 1, HAS_LEFT, HAS_RIGHT, PACKED
    )
    own, edge, unmasked = own_blocks(
        first + w * BLOCK, end, start, n, ranges_ptr, seqlen_q, seqlen_k, left, right, BLOCK, BLOCK,
        HAS_LEFT, HAS_RIGHT, PACKED,
    )  # fmt: skip
    own = gl.maximum(own, 1)
    rows = first + w * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, s_layout))
    lo, hi = interval(rows, end, ranges_ptr, seqlen_q, seqlen_k, left, right, HAS_LEFT, HAS_RIGHT, PACKED)
    statistics = statistics_ptr + bh.to(gl.int64) * padded_q + rows
    lse = gl.load(statistics, mask=rows < end, other=float("inf"))
    delta = gl.load(statistics + heads.to(gl.int64) * padded_q, mask=rows < end, other=0.0)
    zero = gl.zeros([BLOCK, BLOCK], gl.float32, layout=s_layout)
    dq = gl.zeros([BLOCK, BLOCK_D], gl.float32, layout=layout)
    q = q_smem.index(w).reshape([BLOCK, BLOCK_D])
    dout = dout_smem.index(w).reshape([BLOCK, BLOCK_DV])
    v = v_smem.reshape([BLOCK, BLOCK_DV])
    mbarrier.wait(rows_full.index(w), 0)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, k_smem.index(0).reshape([BLOCK, BLOCK_D]).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    for c in range(0, own):
        slot = c & 1
        mbarrier.wait(v_full, slot)
        dp = warpgroup_mma(dout, v.permute((1, 0)), zero, use_acc=False, is_async=True)
        if (c < edge) | (c >= edge + unmasked):
            j = start + c * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, s_layout))
            visible = j[None, :] < hi[:, None]
            if HAS_LEFT or PACKED:
                visible = visible & (j[None, :] >= lo[:, None])
            s = gl.where(visible, s, float("-inf"))
        p = gl.exp2(s * scale - lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(v_empty, count=1)
        ds = gl.convert_layout((p * (dp - delta[:, None])).to(dtype), operand)
        dq = warpgroup_mma(ds, k_smem.index(slot).reshape([BLOCK, BLOCK_D]), dq, is_async=True)
        following = gl.minimum(c + 1, own - 1)  # the last block's scores are computed twice
        mbarrier.wait(k_full.index(following & 1), (following >> 1) & 1)
        k = k_smem.index(following & 1).reshape([BLOCK, BLOCK_D])
        s = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dq = warpgroup_mma_wait(0, deps=[s, dq])
        mbarrier.arrive(k_empty.index(slot), count=1)
    for c in range(own, n):  # blocks that the other warpgroup's queries alone see
        slot = c & 1
        mbarrier.wait(v_full, slot)
        mbarrier.arrive(v_empty, count=1)
        mbarrier.wait(k_full.index(slot), (c >> 1) & 1)
        mbarrier.arrive(k_empty.index(slot), count=1)
    head = bh - b * heads_q
    token = first + w * BLOCK
    store_rows(dq_ptr, dq * softmax_scale, token, end, b, head, stride_b, stride_t, stride_h, D, BLOCK_D, layout)


@gluon.jit(do_not_specialize=[*_VARYING, "padded_q"])
def _hopper_dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, statistics_ptr, dq_ptr, ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section, padded_q,
    stride_dqb, stride_dqt: gl.constexpr, stride_dqh, stride_dqd: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    BLOCK: gl.constexpr, QUERIES: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    if PACKED:  # noqa: SIM102
        if is_surplus(table_ptr, heads):
            return
    dtype: gl.constexpr = q_desc.dtype
    q_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_D], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_DV], dout_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [1, 1, BLOCK, BLOCK_DV], v_desc.layout)
    rows_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for j in gl.static_range(2):
        mbarrier.init(rows_full.index(j), count=1)
        mbarrier.init(k_full.index(j), count=1)
        mbarrier.init(k_empty.index(j), count=2)
    mbarrier.init(v_full, count=1)
    mbarrier.init(v_empty, count=2)
    fence_async_shared()
    memory = (q_smem, dout_smem, k_smem, v_smem, rows_full, k_full, k_empty, v_full, v_empty)
    sizes = (ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_q, group, left, right, slots, tiles, heads, section)
    gl.warp_specialize(
        [
            (_dq_loader, (
                q_desc, dout_desc, k_desc, v_desc, memory, sizes, BLOCK, QUERIES, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
            (_dq_consumer, (
                0, statistics_ptr, dq_ptr, memory, sizes, softmax_scale, padded_q, stride_dqb, stride_dqt, stride_dqh,
                D, BLOCK_D, BLOCK_DV, BLOCK, QUERIES, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
            (_dq_consumer, (
                1, statistics_ptr, dq_ptr, memory, sizes, softmax_scale, padded_q, stride_dqb, stride_dqt, stride_dqh,
                D, BLOCK_D, BLOCK_DV, BLOCK, QUERIES, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )  # fmt: skip


@planned
def _plan(problem: Problem, out_strides, dout_strides, dlse_strides, dq_strides, dk_strides, dv_strides) -> tuple:
    """Launches: statistics; dk and dv, or None where they are not asked for; dq."""
    call, packed, constants = problem.call, problem.call.mask.packed, call_constants(problem)
    prepare = prepare_launch(problem, out_strides, dout_strides, dlse_strides, has_buffer=False)
    q, k, v = call.q, call.k, call.v
    blocks = {
        "q_desc": row_blocks(q.shape, q.stride(), q.dtype, BLOCK),
        "dout_desc": row_blocks((*q.shape[:3], v.shape[-1]), dout_strides, q.dtype, BLOCK),
        "k_desc": row_blocks(k.shape, k.stride(), k.dtype, BLOCK),
        "v_desc": row_blocks(v.shape, v.stride(), v.dtype, BLOCK),
    }
    statistics = statistics_blocks(problem, BLOCK)
    bytes_per_row = (q.shape[-1] + v.shape[-1]) * q.element_size()

    def launch(kernel, blocks: dict, rows: int, tile: int, heads: int, section: int, **rest) -> Launch:
        slots = table_slots(rows, tile)
        tiles = slots if packed else ceil_div(rows, tile)
        total = problem.batch * heads
        grid = (tiles * total,)
        sizes = {"slots": slots, "tiles": tiles, "heads": total, "section": section}
        rest |= {"D": q.shape[-1], "BLOCK": BLOCK, "REGISTERS": REGISTERS}
        return Launch(kernel, grid, blocks, **constants, **sizes, **rest)

    dkv = None
    if dk_strides is not None:
        group = problem.heads_q // problem.heads_k
        dkv = launch(
            _hopper_dkv_kernel, {**blocks, "lse_desc": statistics, "delta_desc": statistics},
            problem.seqlen_k, BLOCK, problem.heads_k,
            section_of_heads(problem, problem.heads_k, WIDE_L2_BYTES // (bytes_per_row * group)),
            heads_k=problem.heads_k, **strides("dk", dk_strides), **strides("dv", dv_strides), ALIGN=ALIGN,
        )  # fmt: skip
    dq = launch(
        _hopper_dq_kernel, blocks, problem.seqlen_q, QUERIES, problem.heads_q,
        section_of_heads(problem, problem.heads_q, WIDE_L2_BYTES // bytes_per_row),
        heads_q=problem.heads_q, padded_q=prepare.constants["padded_q"], **strides("dq", dq_strides), QUERIES=QUERIES,
    )  # fmt: skip
    return prepare, dkv, dq


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq; dk, dv and dsinks unless None. dlse (B, Hq, Sq) or None. The same bits every time."""
    call, ranges = problem.call, problem.ranges
    prepare, dkv_launch, dq_launch = _plan(
        problem, *(None if x is None else x.stride() for x in (out, dout, dlse, dq, dk, dv))
    )  # fmt: skip
    statistics, dsink_parts = new_statistics(problem, lse, dsinks is not None)
    prepare(
        out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=dlse, sink_ptr=problem.sinks, buffer_ptr=None,
        statistics_ptr=statistics, dsink_ptr=dsink_parts,
    )  # fmt: skip
    unused = lse  # warp_specialize passes no None
    key_ranges = None if ranges is None else ranges[4 * problem.seqlen_q :]
    tensors = {"q_desc": call.q, "dout_desc": dout, "k_desc": call.k, "v_desc": call.v}
    if dkv_launch is not None:
        dkv_launch(
            **tensors,
            lse_desc=statistics[0],
            delta_desc=statistics[1],
            dk_ptr=dk,
            dv_ptr=dv,
            ranges_ptr=unused if ranges is None else key_ranges,
            table_ptr=unused if ranges is None else tile_table(key_ranges, problem.seqlen_k, BLOCK),
        )
    dq_launch(
        **tensors,
        statistics_ptr=statistics,
        dq_ptr=dq,
        ranges_ptr=unused if ranges is None else ranges,
        table_ptr=unused if ranges is None else tile_table(ranges, problem.seqlen_q, QUERIES),
    )
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
