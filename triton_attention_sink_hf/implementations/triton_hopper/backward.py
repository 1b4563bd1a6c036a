"""Hopper backward in Gluon: one fused kernel of five products for head dimensions up to 128.

Three warpgroups. Two consumers own 64 keys each: transposed scores and dP, dk and dv in registers, P and dS as register
operands; they write dS to a ring of two slots. The third loads q, dout, lse and delta through the copy engine and makes
dq: dS K as an fp32 tile that the copy engine adds to a buffer in memory. So no barrier couples the consumers. A barrier
of a dS slot says two things: dS is there, and both consumers are done with the q and dout of that block.

dk, dv and dsink have a fixed order; dq has none (the order in which tiles arrive), hence no place where determinism is
asked for. Before the kernel ``backward_preprocess.py`` runs (delta, lse in base 2, dsink, zeros for dq), after it
``_finish`` (dq in its own dtype).
"""

import torch
import triton
import triton.language as tl
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
from ..common.problem import Problem, ceil_div, planned, strides
from ..common.reduce import sum_rows
from ..common.relaunch import Launch
from .backward_preprocess import ALIGN, ROWS, new_statistics, prepare_launch, statistics_blocks
from .config import BACKWARD_L2_KEYS, backward_config
from .gluon_compat import async_atomic_add, async_load, thread_barrier
from .launch import call_constants, row_blocks, section_of_heads
from .tile_table import is_surplus, key_tile, table_slots, tile_table
from .vocabulary import hide, seeing_queries, store_rows

BLOCK_M = 64  # queries of a block, and keys of a consumer
KEYS = 128  # keys of a program


@triton.jit
def _finish_kernel(
    buffer_ptr, dq_ptr, softmax_scale, seqlen_q, heads_q, stride_dqb, stride_dqt, stride_dqh, stride_dqd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dq (B, Sq, Hq, D) in its dtype and layout from the fp32 buffer."""
    h = tl.program_id(0)
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK_D)[None, :]
    rows = i.to(tl.int64)[:, None]
    inside = (i < seqlen_q)[:, None] & (d < D)
    dq = tl.load(buffer_ptr + ((b * seqlen_q + rows) * heads_q + h) * D + d, mask=inside) * softmax_scale
    dq_base = dq_ptr + b * stride_dqb + h.to(tl.int64) * stride_dqh
    tl.store(dq_base + rows * stride_dqt + d * stride_dqd, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@gluon.jit
def _slot(c, STAGES: gl.constexpr):
    """Slot of block c in the ring, and the phase of its barrier."""
    return c % STAGES, (c // STAGES) & 1


@gluon.jit
def _load_block(
    q_desc, dout_desc, lse_desc, delta_desc, q_smem, dout_smem, lse_smem, delta_smem, full, slot, b, head, row, m0,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(full.index(slot), q_desc.block_type.nbytes + dout_desc.block_type.nbytes + 8 * BLOCK_M)
    async_load(q_desc, [b, head, m0, 0], full.index(slot), q_smem.index(slot))
    async_load(lse_desc, [row, m0], full.index(slot), lse_smem.index(slot))
    async_load(dout_desc, [b, head, m0, 0], full.index(slot), dout_smem.index(slot))
    async_load(delta_desc, [row, m0], full.index(slot), delta_smem.index(slot))


@gluon.jit
def _dq_part(
    part: gl.constexpr, last: gl.constexpr, o, e, b, head, m0, zero, k_smem, ds_smem, dq_smem, dq_desc, ds_empty,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """64 columns of a dq tile: dS of both consumers times K, added to the buffer."""
    ds0 = ds_smem.index(e * 2).permute((1, 0))
    ds1 = ds_smem.index(e * 2 + 1).permute((1, 0))
    k0 = k_smem.index(0).reshape([64, BLOCK_D]).slice(part * 64, 64, 1)
    k1 = k_smem.index(1).reshape([64, BLOCK_D]).slice(part * 64, 64, 1)
    dq = warpgroup_mma(ds0, k0, zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds1, k1, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    if last:
        mbarrier.arrive(ds_empty.index(e), count=1)
    tma.store_wait(1)
    thread_barrier()
    tile = dq_smem.index(o)
    tile.reshape([64, 64]).store(dq)
    fence_async_shared()
    thread_barrier()
    async_atomic_add(dq_desc, [b, head, m0, part * 64], tile)


@gluon.jit
def _loader_and_dq(
    q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, dq_smem, memory, sizes,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr, KEYS: gl.constexpr, ALIGN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, ds_smem, kv_full, full, ds_full, ds_empty = memory
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    PARTS: gl.constexpr = BLOCK_D // 64
    key, _end, b, head_k, start, blocks, heads_k, group = key_tile(
        sizes, KEYS, BLOCK_M, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED
    )
    mbarrier.expect(kv_full, 2 * k_desc.block_type.nbytes + 2 * v_desc.block_type.nbytes)
    for w in gl.static_range(2):
        async_load(k_desc, [b, head_k, key + w * 64, 0], kv_full, k_smem.index(w))
        async_load(v_desc, [b, head_k, key + w * 64, 0], kv_full, v_smem.index(w))
    n = group * blocks
    head = head_k * group
    row = b * heads_k * group + head
    ahead_head = 0  # the next block to load: head of the group, block
    ahead = 0
    for c in range(0, gl.minimum(STAGES, n)):
        _load_block(
            q_desc, dout_desc, lse_desc, delta_desc, q_smem, dout_smem, lse_smem, delta_smem, full, c,
            b, head + ahead_head, row + ahead_head, start + ahead * BLOCK_M, BLOCK_M,
        )  # fmt: skip
        ahead += 1
        if ahead == blocks:
            ahead = 0
            ahead_head += 1
    zero = gl.zeros([64, 64], gl.float32, layout=layout)
    mbarrier.wait(kv_full, 0)
    i = 0
    for c in range(0, n):
        e = c & 1
        mbarrier.wait(ds_full.index(e), (c >> 1) & 1)
        if c + STAGES < n:  # both consumers are through with this slot
            slot = c % STAGES
            _load_block(
                q_desc, dout_desc, lse_desc, delta_desc, q_smem, dout_smem, lse_smem, delta_smem, full, slot,
                b, head_k * group + ahead_head, row + ahead_head, start + ahead * BLOCK_M, BLOCK_M,
            )  # fmt: skip
            ahead += 1
            if ahead == blocks:
                ahead = 0
                ahead_head += 1
        for part in gl.static_range(PARTS):
            _dq_part(
                part, part == PARTS - 1, (c * PARTS + part) & 1, e, b, head, start + i * BLOCK_M, zero,
                k_smem, ds_smem, dq_smem, dq_desc, ds_empty, BLOCK_D,
            )  # fmt: skip
        i += 1
        if i == blocks:
            i = 0
            head += 1
    tma.store_wait(0)


@gluon.jit
def _consumer(
    w: gl.constexpr, k_ptr, v_ptr, dk_ptr, dv_ptr, memory, sizes, softmax_scale,
    stride_kb, stride_kt: gl.constexpr, stride_kh, stride_vb, stride_vt: gl.constexpr, stride_vh,
    stride_dkb, stride_dkt: gl.constexpr, stride_dkh, stride_dvb, stride_dvt: gl.constexpr, stride_dvh,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, KEYS: gl.constexpr, ALIGN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, ds_smem, kv_full, full, ds_full, ds_empty = memory
    # registers to spare: K and V there, scores one block ahead, P as an operand of dv before P has become dS
    SMALL: gl.constexpr = BLOCK_D <= 64 and BLOCK_DV <= 64
    HAS_LO: gl.constexpr = HAS_RIGHT or PACKED
    HAS_HI: gl.constexpr = HAS_LEFT or PACKED
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dk_operand: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    dv_operand: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    dtype: gl.constexpr = q_smem.dtype
    scale = softmax_scale * LOG2E
    key, end, b, head_k, start, blocks, _heads_k, group = key_tile(
        sizes, KEYS, BLOCK_M, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED
    )
    lo, hi, edge, unmasked = seeing_queries(
        key + w * 64, end, start, blocks, sizes, 64, BLOCK_M, HAS_LEFT, HAS_RIGHT, PACKED, gl.SliceLayout(1, s_layout)
    )
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=s_layout)
    dk = gl.zeros([64, BLOCK_D], gl.float32, layout=dk_layout)
    dv = gl.zeros([64, BLOCK_DV], gl.float32, layout=dv_layout)
    k = k_smem.index(w).reshape([64, BLOCK_D])
    v = v_smem.index(w).reshape([64, BLOCK_DV])
    if SMALL:
        own = key + w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, operand))
        d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, operand))
        k_base = k_ptr + b.to(gl.int64) * stride_kb + head_k.to(gl.int64) * stride_kh
        inside = (own < end)[:, None]
        k = gl.load(
            k_base + own.to(gl.int64)[:, None] * stride_kt + d[None, :], mask=inside & (d < D)[None, :], other=0.0
        )
        v_base = v_ptr + b.to(gl.int64) * stride_vb + head_k.to(gl.int64) * stride_vh
        v = gl.load(
            v_base + own.to(gl.int64)[:, None] * stride_vt + d[None, :], mask=inside & (d < DV)[None, :], other=0.0
        )
    mbarrier.wait(kv_full, 0)
    n = group * blocks
    i = 0
    s = zero
    dp = zero
    if SMALL:
        mbarrier.wait(full.index(0), 0)
        q0 = q_smem.index(0).reshape([BLOCK_M, BLOCK_D])
        s = warpgroup_mma(k, q0.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    for c in tl.range(0, n, disable_licm=True):  # else what does not change takes the registers of what does
        slot, phase = _slot(c, STAGES)
        e = c & 1
        q = q_smem.index(slot).reshape([BLOCK_M, BLOCK_D])
        dout = dout_smem.index(slot).reshape([BLOCK_M, BLOCK_DV])
        if not SMALL:
            mbarrier.wait(full.index(slot), phase)
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
        lse = lse_smem.index(slot).load(s_layout)
        s = hide(s, i, start, lo, hi, edge, unmasked, BLOCK_M, HAS_LO, HAS_HI, gl.SliceLayout(0, s_layout))
        p = gl.exp2(s * scale - lse)
        dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        if SMALL:
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), dv_operand), dout, dv, is_async=True)
        delta = delta_smem.index(slot).load(s_layout)
        dp = warpgroup_mma_wait(1 if SMALL else 0, deps=[dp])
        ds = (p * (dp - delta)).to(dtype)
        if not SMALL:
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), dv_operand), dout, dv, is_async=True)
        if SMALL:  # scores of the next block (of this one again at the very end)
            next_slot, next_phase = _slot(gl.minimum(c + 1, n - 1), STAGES)
            mbarrier.wait(full.index(next_slot), next_phase)
        dk = warpgroup_mma(gl.convert_layout(ds, dk_operand), q, dk, is_async=True)
        if SMALL:
            q_next = q_smem.index(next_slot).reshape([BLOCK_M, BLOCK_D])
            s = warpgroup_mma(k, q_next.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(ds_empty.index(e), ((c >> 1) & 1) ^ 1)
        ds_smem.index(e * 2 + w).store(ds)
        if SMALL:
            s, dv, dk = warpgroup_mma_wait(0, deps=[s, dv, dk])
        else:
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        fence_async_shared()
        mbarrier.arrive(ds_full.index(e), count=1)
        i += 1
        if i == blocks:
            i = 0
    first = key + w * 64
    store_rows(
        dk_ptr, dk * softmax_scale, first, end, b, head_k, stride_dkb, stride_dkt, stride_dkh, D, BLOCK_D, dk_layout
    )
    store_rows(dv_ptr, dv, first, end, b, head_k, stride_dvb, stride_dvt, stride_dvh, DV, BLOCK_DV, dv_layout)


_VARYING = ["seqlen_q", "seqlen_k", "heads_k", "group", "left", "right", "slots", "tiles", "heads", "section"]


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_bwd_kernel(
    q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, k_ptr, v_ptr, dk_ptr, dv_ptr,
    ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_k, group, left, right, slots, tiles, heads, section,
    stride_kb, stride_kt: gl.constexpr, stride_kh, stride_kd: gl.constexpr,
    stride_vb, stride_vt: gl.constexpr, stride_vh, stride_vd: gl.constexpr,
    stride_dkb, stride_dkt: gl.constexpr, stride_dkh, stride_dkd: gl.constexpr,
    stride_dvb, stride_dvt: gl.constexpr, stride_dvh, stride_dvd: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, KEYS: gl.constexpr, ALIGN: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr,
):  # fmt: skip
    if PACKED:  # noqa: SIM102
        if is_surplus(table_ptr, heads):
            return
    dtype: gl.constexpr = q_desc.dtype
    k_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK_D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK_DV], v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_DV], dout_desc.layout)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)
    ds_smem = gl.allocate_shared_memory(dtype, [4, 64, BLOCK_M], ds_layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, 1, 1, 64, 64], dq_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_desc.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], delta_desc.layout)
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(full.index(j), count=1)
    for j in gl.static_range(2):
        mbarrier.init(ds_full.index(j), count=2)
        mbarrier.init(ds_empty.index(j), count=1)
    fence_async_shared()
    memory = (q_smem, dout_smem, k_smem, v_smem, lse_smem, delta_smem, ds_smem, kv_full, full, ds_full, ds_empty)
    sizes = (ranges_ptr, table_ptr, seqlen_q, seqlen_k, heads_k, group, left, right, slots, tiles, heads, section)
    # constexprs survive only in tuples written out here
    gl.warp_specialize(
        [
            (_consumer, (
                0, k_ptr, v_ptr, dk_ptr, dv_ptr, memory, sizes, softmax_scale,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
                D, DV, BLOCK_D, BLOCK_DV, STAGES, BLOCK_M, KEYS, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
            (_consumer, (
                1, k_ptr, v_ptr, dk_ptr, dv_ptr, memory, sizes, softmax_scale,
                stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
                stride_dkb, stride_dkt, stride_dkh, stride_dvb, stride_dvt, stride_dvh,
                D, DV, BLOCK_D, BLOCK_DV, STAGES, BLOCK_M, KEYS, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
            (_loader_and_dq, (
                q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, dq_desc, dq_smem, memory, sizes,
                BLOCK_D, STAGES, BLOCK_M, KEYS, ALIGN, HAS_LEFT, HAS_RIGHT, PACKED,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, DQ_REGISTERS],
    )  # fmt: skip


@planned
def _plan(problem: Problem, out_strides, dout_strides, dlse_strides, dq_strides, dk_strides, dv_strides) -> tuple:
    """The three launches."""
    call, mask, config = problem.call, problem.call.mask, backward_config(problem)
    slots = table_slots(problem.seqlen_k, KEYS)
    tiles = slots if mask.packed else ceil_div(problem.seqlen_k, KEYS)
    d, constants = call.q.shape[-1], call_constants(problem)
    finish = {
        "softmax_scale": call.softmax_scale,
        "seqlen_q": problem.seqlen_q,
        "heads_q": problem.heads_q,
        **strides("dq", dq_strides),
        "D": d,
        "BLOCK_D": constants["BLOCK_D"],
        "ROWS": ROWS,
    }
    main = {
        **constants,
        "D": d,
        "heads_k": problem.heads_k,
        "slots": slots,
        "tiles": tiles,
        "heads": problem.batch * problem.heads_k,
        "section": section_of_heads(problem, problem.heads_k, BACKWARD_L2_KEYS),
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("dk", dk_strides),
        **strides("dv", dv_strides),
        "STAGES": config.stages,
        "BLOCK_M": BLOCK_M,
        "KEYS": KEYS,
        "ALIGN": ALIGN,
        "CONSUMER_REGISTERS": config.registers[0],
        "DQ_REGISTERS": config.registers[1],
    }
    q, k, v = call.q, call.k, call.v
    (_, seqlen, heads, d), out_shape = q.shape, (*q.shape[:3], v.shape[-1])
    buffer_strides = (seqlen * heads * d, heads * d, d, 1)
    statistics = statistics_blocks(problem, BLOCK_M)
    blocks = {
        "q_desc": row_blocks(q.shape, q.stride(), q.dtype, BLOCK_M),
        "dout_desc": row_blocks(out_shape, dout_strides, q.dtype, BLOCK_M),
        "k_desc": row_blocks(k.shape, k.stride(), k.dtype, 64),
        "v_desc": row_blocks(v.shape, v.stride(), v.dtype, 64),
        "lse_desc": statistics,
        "delta_desc": statistics,
        "dq_desc": row_blocks(q.shape, buffer_strides, torch.float32, BLOCK_M, 64),
    }
    rows = (problem.heads_q, ceil_div(problem.seqlen_q, ROWS), problem.batch)
    return (
        prepare_launch(problem, out_strides, dout_strides, dlse_strides, has_buffer=True),
        Launch(_hopper_bwd_kernel, (tiles * problem.batch * problem.heads_k,), blocks, **main),
        Launch(_finish_kernel, rows, **finish),
    )


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq, dk, dv, and dsinks unless None. dlse (B, Hq, Sq) or None. Every element is written."""
    call = problem.call
    prepare, main, finish = _plan(
        problem, *(None if x is None else x.stride() for x in (out, dout, dlse, dq, dk, dv))
    )  # fmt: skip
    buffer = lse.new_empty(call.q.shape)
    statistics, dsink_parts = new_statistics(problem, lse, dsinks is not None)
    prepare(
        out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=dlse, sink_ptr=problem.sinks, buffer_ptr=buffer,
        statistics_ptr=statistics, dsink_ptr=dsink_parts,
    )  # fmt: skip
    ranges = problem.ranges
    unused = lse  # warp_specialize passes no None
    key_ranges = unused if ranges is None else ranges[4 * problem.seqlen_q :]
    main(
        q_desc=call.q,
        dout_desc=dout,
        k_desc=call.k,
        v_desc=call.v,
        lse_desc=statistics[0],
        delta_desc=statistics[1],
        dq_desc=buffer,
        k_ptr=call.k,
        v_ptr=call.v,
        dk_ptr=dk,
        dv_ptr=dv,
        ranges_ptr=key_ranges,
        table_ptr=unused if ranges is None else tile_table(key_ranges, problem.seqlen_k, KEYS),
    )
    finish(buffer_ptr=buffer, dq_ptr=dq)
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
