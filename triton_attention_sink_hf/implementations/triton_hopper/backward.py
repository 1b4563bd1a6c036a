"""Hopper backward in Gluon for head dimensions up to 128: all five products in one kernel.

Three warpgroups. Two consumers own 64 keys each. They compute transposed scores and dP, keep dk and dv in registers,
take P and dS as register operands, and write dS to a ring of two slots. The third warpgroup loads q, dout, lse and
delta by TMA and computes dq: dS K as an fp32 tile, which it adds to a buffer in memory straight from registers, 16
bytes a thread. So the buffer has the order of registers (``dq_buffer_shape``), and blocks of queries begin at multiples
of BLOCK_M. No barrier couples the consumers. A dS barrier means two things: dS is there, and both consumers are done
with the q and dout of that block.

dk, dv and dsink are deterministic. dq is not, because tiles are added as they arrive; so this kernel is not used when
deterministic gradients are requested. ``backward_preprocess.py`` runs before it (delta, lse in base 2, dsink, zeros for
dq), ``backward_postprocess.py`` after it (dq in its own dtype).
"""

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
from .backward_postprocess import dq_buffer_shape, postprocess_launch
from .backward_preprocess import new_statistics, preprocess_launch, statistics_blocks
from .config import BACKWARD_L2_KEYS, backward_config
from .gluon_compat import aggregate, async_load
from .launch import call_constants, row_blocks, section_of_heads
from .tile_table import packed_tensors, table_slots
from .vocabulary import Rows, Tiles, new_barriers


@aggregate
class _Descs:
    """What the third warpgroup loads."""

    q: tma.tensor_descriptor
    dout: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    lse: tma.tensor_descriptor
    delta: tma.tensor_descriptor


@aggregate
class _Memory:
    """Shared memory: k and v of both consumers; STAGES slots of q, dout, lse, delta; two of both consumers' dS;
    barriers."""

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    ds_full: gl.shared_memory_descriptor
    ds_empty: gl.shared_memory_descriptor


@gluon.jit
def _slot(c, STAGES: gl.constexpr):
    """Slot of block c in the ring, and the phase of its barrier."""
    return c % STAGES, (c // STAGES) & 1


@gluon.jit
def _load_block(descs, memory, slot, b, head, row, m0, BLOCK_M: gl.constexpr):
    full = memory.full.index(slot)
    mbarrier.expect(full, descs.q.block_type.nbytes + descs.dout.block_type.nbytes + 8 * BLOCK_M)
    async_load(descs.q, [b, head, m0, 0], full, memory.q.index(slot))
    async_load(descs.lse, [row, m0], full, memory.lse.index(slot))
    async_load(descs.dout, [b, head, m0, 0], full, memory.dout.index(slot))
    async_load(descs.delta, [row, m0], full, memory.delta.index(slot))


@gluon.jit
def _add_dq_part(part: gl.constexpr, e, dq_ptr, tile, zero, memory, BLOCK_D: gl.constexpr):
    """64 columns of a tile of dq, dS of both consumers times K, added to the buffer."""
    ds0 = memory.ds.index(e * 2).permute((1, 0))
    ds1 = memory.ds.index(e * 2 + 1).permute((1, 0))
    k0 = memory.k.index(0).reshape([64, BLOCK_D]).slice(part * 64, 64, 1)
    k1 = memory.k.index(1).reshape([64, BLOCK_D]).slice(part * 64, 64, 1)
    dq = warpgroup_mma(ds0, k0, zero, use_acc=False, is_async=True)
    dq = warpgroup_mma(ds1, k1, dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=[dq])
    if (part + 1) * 64 == BLOCK_D:
        mbarrier.arrive(memory.ds_empty.index(e), count=1)
    # rows: (warp, half, row); columns: (group, lane, pair). A thread's two pairs of a group become neighbours.
    dq = dq.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([8, 512])
    layout: gl.constexpr = dq.type.layout
    group = gl.arange(0, 8, layout=gl.SliceLayout(1, layout))
    at = group[:, None] * 512 + gl.arange(0, 512, layout=gl.SliceLayout(0, layout))[None, :]
    part_ptr = dq_ptr + (tile.to(gl.int64) * (BLOCK_D // 64) + part) * 4096
    gl.atomic_add(part_ptr + at, dq, sem="relaxed")


@gluon.jit
def _loader_and_dq(
    descs, memory, keys, dq_ptr, dq_tiles,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    key, _end, b, head_k, start, blocks = keys.own_tile(BLOCK_M, BLOCK_M)
    mbarrier.expect(memory.kv_full, 2 * descs.k.block_type.nbytes + 2 * descs.v.block_type.nbytes)
    for w in gl.static_range(2):
        async_load(descs.k, [b, head_k, key + w * 64, 0], memory.kv_full, memory.k.index(w))
        async_load(descs.v, [b, head_k, key + w * 64, 0], memory.kv_full, memory.v.index(w))
    n = keys.group * blocks
    head = head_k * keys.group
    row = b * keys.heads * keys.group + head
    ahead_head = 0  # the next block to load: head of the group, block
    ahead = 0
    for c in range(0, gl.minimum(STAGES, n)):
        _load_block(descs, memory, c, b, head + ahead_head, row + ahead_head, start + ahead * BLOCK_M, BLOCK_M)
        ahead += 1
        if ahead == blocks:
            ahead = 0
            ahead_head += 1
    zero = gl.zeros([64, 64], gl.float32, layout=layout)
    mbarrier.wait(memory.kv_full, 0)
    i = 0
    for c in range(0, n):
        e = c & 1
        mbarrier.wait(memory.ds_full.index(e), (c >> 1) & 1)
        if c + STAGES < n:  # both consumers are done with this slot
            slot = c % STAGES
            next_head = head_k * keys.group + ahead_head
            _load_block(descs, memory, slot, b, next_head, row + ahead_head, start + ahead * BLOCK_M, BLOCK_M)
            ahead += 1
            if ahead == blocks:
                ahead = 0
                ahead_head += 1
        # past the last query all dS are 0, and any tile will do
        tile = (b * keys.heads * keys.group + head) * dq_tiles + gl.minimum(start // BLOCK_M + i, dq_tiles - 1)
        for part in gl.static_range(BLOCK_D // 64):
            _add_dq_part(part, e, dq_ptr, tile, zero, memory, BLOCK_D)
        i += 1
        if i == blocks:
            i = 0
            head += 1


@gluon.jit
def _consumer(
    w: gl.constexpr, k_rows, v_rows, dk_rows, dv_rows, memory, keys, softmax_scale,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    BLOCK_D: gl.constexpr = dk_rows.BLOCK
    BLOCK_DV: gl.constexpr = dv_rows.BLOCK
    # There are registers left for K and V, for scores one block ahead, and for P and dS at the same time.
    SMALL: gl.constexpr = BLOCK_D <= 64 and BLOCK_DV <= 64
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_DV, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
    dk_operand: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    dv_operand: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    dtype: gl.constexpr = memory.q.dtype
    scale = softmax_scale * LOG2E
    key, end, b, head_k, start, blocks = keys.own_tile(BLOCK_M, BLOCK_M)
    first = key + w * 64
    lo, hi, edge, unmasked = keys.seeing(first, end, start, blocks, 64, BLOCK_M, gl.SliceLayout(1, s_layout))
    # s, dp: [keys, queries]; dk, dv: [keys, columns]
    zero = gl.zeros([64, BLOCK_M], gl.float32, layout=s_layout)
    dk = gl.zeros([64, BLOCK_D], gl.float32, layout=dk_layout)
    dv = gl.zeros([64, BLOCK_DV], gl.float32, layout=dv_layout)
    k = memory.k.index(w).reshape([64, BLOCK_D])
    v = memory.v.index(w).reshape([64, BLOCK_DV])
    if SMALL:
        k = k_rows.load(first, end, b, head_k, operand)
        v = v_rows.load(first, end, b, head_k, operand)
    mbarrier.wait(memory.kv_full, 0)
    n = keys.group * blocks
    i = 0
    s = zero
    dp = zero
    if SMALL:
        mbarrier.wait(memory.full.index(0), 0)
        q0 = memory.q.index(0).reshape([BLOCK_M, BLOCK_D])
        s = warpgroup_mma(k, q0.permute((1, 0)), zero, use_acc=False, is_async=True)
        s, dp = warpgroup_mma_wait(0, deps=[s, dp])
    for c in tl.range(0, n, disable_licm=True):  # hoisted values would spill
        slot, phase = _slot(c, STAGES)
        e = c & 1
        q = memory.q.index(slot).reshape([BLOCK_M, BLOCK_D])
        dout = memory.dout.index(slot).reshape([BLOCK_M, BLOCK_DV])
        if not SMALL:
            mbarrier.wait(memory.full.index(slot), phase)
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
        lse = memory.lse.index(slot).load(s_layout)
        s = keys.apply_mask(s, i, start, lo, hi, edge, unmasked, BLOCK_M, gl.SliceLayout(0, s_layout))
        p = gl.exp2(s * scale - lse)
        dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
        if SMALL:
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), dv_operand), dout, dv, is_async=True)
        delta = memory.delta.index(slot).load(s_layout)
        dp = warpgroup_mma_wait(1 if SMALL else 0, deps=[dp])
        ds = (p * (dp - delta)).to(dtype)
        if not SMALL:
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), dv_operand), dout, dv, is_async=True)
        if SMALL:  # scores of the next block (of this one again at the very end)
            next_slot, next_phase = _slot(gl.minimum(c + 1, n - 1), STAGES)
            mbarrier.wait(memory.full.index(next_slot), next_phase)
        dk = warpgroup_mma(gl.convert_layout(ds, dk_operand), q, dk, is_async=True)
        if SMALL:
            q_next = memory.q.index(next_slot).reshape([BLOCK_M, BLOCK_D])
            s = warpgroup_mma(k, q_next.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(memory.ds_empty.index(e), ((c >> 1) & 1) ^ 1)
        memory.ds.index(e * 2 + w).store(ds)
        if SMALL:
            s, dv, dk = warpgroup_mma_wait(0, deps=[s, dv, dk])
        else:
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        fence_async_shared()
        mbarrier.arrive(memory.ds_full.index(e), count=1)
        i += 1
        if i == blocks:
            i = 0
    dk_rows.store(dk * softmax_scale, first, end, b, head_k, dk_layout)
    dv_rows.store(dv, first, end, b, head_k, dv_layout)


_VARYING = [
    "seqlen_q",
    "seqlen_k",
    "heads_k",
    "group",
    "left",
    "right",
    "slots",
    "tiles",
    "heads",
    "section",
    "dq_tiles",
]


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_bwd_kernel(
    q_desc, dout_desc, k_desc, v_desc, lse_desc, delta_desc, dq_ptr, k_ptr, v_ptr, dk_ptr, dv_ptr,
    ranges_ptr, table_ptr,
    softmax_scale, seqlen_q, seqlen_k, heads_k, group, left, right, slots, tiles, heads, section, dq_tiles,
    stride_kb, stride_kt: gl.constexpr, stride_kh, stride_kd: gl.constexpr,
    stride_vb, stride_vt: gl.constexpr, stride_vh, stride_vd: gl.constexpr,
    stride_dkb, stride_dkt: gl.constexpr, stride_dkh, stride_dkd: gl.constexpr,
    stride_dvb, stride_dvt: gl.constexpr, stride_dvh, stride_dvd: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
    STAGES: gl.constexpr, BLOCK_M: gl.constexpr, KEYS: gl.constexpr,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, PACKED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, DQ_REGISTERS: gl.constexpr,
):  # fmt: skip
    keys = Tiles(
        ranges_ptr=ranges_ptr, table_ptr=table_ptr, rows=seqlen_k, others=seqlen_q, heads=heads_k, group=group,
        before=right, after=left, slots=slots, tiles=tiles, total=heads, section=section,
        TILE=KEYS, LAST_FIRST=False, HAS_BEFORE=HAS_RIGHT, HAS_AFTER=HAS_LEFT, PACKED=PACKED,
    )  # fmt: skip
    if PACKED:  # noqa: SIM102
        if keys.is_surplus():
            return
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BLOCK_M], dtype)
    memory = _Memory(
        k=gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK_D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [2, 1, 1, 64, BLOCK_DV], v_desc.layout),
        q=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout),
        dout=gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_DV], dout_desc.layout),
        ds=gl.allocate_shared_memory(dtype, [4, 64, BLOCK_M], ds_layout),
        lse=gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], lse_desc.layout),
        delta=gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK_M], delta_desc.layout),
        kv_full=gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        full=new_barriers(STAGES),
        ds_full=new_barriers(2),
        ds_empty=new_barriers(2),
    )
    mbarrier.init(memory.kv_full, count=1)
    for j in gl.static_range(STAGES):
        mbarrier.init(memory.full.index(j), count=1)
    for j in gl.static_range(2):
        mbarrier.init(memory.ds_full.index(j), count=2)
        mbarrier.init(memory.ds_empty.index(j), count=1)
    fence_async_shared()
    descs = _Descs(q=q_desc, dout=dout_desc, k=k_desc, v=v_desc, lse=lse_desc, delta=delta_desc)
    k = Rows(ptr=k_ptr, stride_b=stride_kb, stride_t=stride_kt, stride_h=stride_kh, COLUMNS=D, BLOCK=BLOCK_D)
    v = Rows(ptr=v_ptr, stride_b=stride_vb, stride_t=stride_vt, stride_h=stride_vh, COLUMNS=DV, BLOCK=BLOCK_DV)
    dk = Rows(ptr=dk_ptr, stride_b=stride_dkb, stride_t=stride_dkt, stride_h=stride_dkh, COLUMNS=D, BLOCK=BLOCK_D)
    dv = Rows(ptr=dv_ptr, stride_b=stride_dvb, stride_t=stride_dvt, stride_h=stride_dvh, COLUMNS=DV, BLOCK=BLOCK_DV)
    gl.warp_specialize(
        [
            (_consumer, (0, k, v, dk, dv, memory, keys, softmax_scale, STAGES, BLOCK_M)),
            (_consumer, (1, k, v, dk, dv, memory, keys, softmax_scale, STAGES, BLOCK_M)),
            (_loader_and_dq, (descs, memory, keys, dq_ptr, dq_tiles, BLOCK_D, STAGES, BLOCK_M)),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, DQ_REGISTERS],
    )


@planned
def _plan(problem: Problem, out_strides, dout_strides, dlse_strides, dq_strides, dk_strides, dv_strides) -> tuple:
    """The three launches."""
    call, mask, config = problem.call, problem.call.mask, backward_config(problem)
    slots = table_slots(problem.seqlen_k, config.keys)
    tiles = slots if mask.packed else ceil_div(problem.seqlen_k, config.keys)
    d, constants = call.q.shape[-1], call_constants(problem)
    main = {
        **constants,
        "D": d,
        "heads_k": problem.heads_k,
        "slots": slots,
        "tiles": tiles,
        "heads": problem.batch * problem.heads_k,
        "section": section_of_heads(problem, problem.heads_k, BACKWARD_L2_KEYS),
        "dq_tiles": dq_buffer_shape(problem)[2],
        **strides("k", call.k.stride()),
        **strides("v", call.v.stride()),
        **strides("dk", dk_strides),
        **strides("dv", dv_strides),
        "STAGES": config.stages,
        "BLOCK_M": config.block_m,
        "KEYS": config.keys,
        "CONSUMER_REGISTERS": config.registers[0],
        "DQ_REGISTERS": config.registers[1],
    }
    q, k, v = call.q, call.k, call.v
    out_shape = (*q.shape[:3], v.shape[-1])
    statistics = statistics_blocks(problem, config.block_m)
    blocks = {
        "q_desc": row_blocks(q.shape, q.stride(), q.dtype, config.block_m),
        "dout_desc": row_blocks(out_shape, dout_strides, q.dtype, config.block_m),
        "k_desc": row_blocks(k.shape, k.stride(), k.dtype, 64),
        "v_desc": row_blocks(v.shape, v.stride(), v.dtype, 64),
        "lse_desc": statistics,
        "delta_desc": statistics,
    }
    return (
        preprocess_launch(problem, out_strides, dout_strides, dlse_strides, has_buffer=True),
        Launch(_hopper_bwd_kernel, (tiles * problem.batch * problem.heads_k,), blocks, **main),
        postprocess_launch(problem, dq_strides),
    )


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq, dk, dv, and dsinks unless None. dlse (B, Hq, Sq) or None. Every element is written."""
    call = problem.call
    preprocess, main, postprocess = _plan(
        problem, *(None if x is None else x.stride() for x in (out, dout, dlse, dq, dk, dv))
    )  # fmt: skip
    buffer = lse.new_empty(dq_buffer_shape(problem))
    statistics, dsink_parts = new_statistics(problem, lse, dsinks is not None)
    preprocess(
        out_ptr=out, dout_ptr=dout, lse_ptr=lse, dlse_ptr=dlse, sink_ptr=problem.sinks, buffer_ptr=buffer,
        statistics_ptr=statistics, dsink_ptr=dsink_parts,
    )  # fmt: skip
    main(
        q_desc=call.q,
        dout_desc=dout,
        k_desc=call.k,
        v_desc=call.v,
        lse_desc=statistics[0],
        delta_desc=statistics[1],
        dq_ptr=buffer,
        k_ptr=call.k,
        v_ptr=call.v,
        dk_ptr=dk,
        dv_ptr=dv,
        **packed_tensors(problem, backward_config(problem).keys, unused=lse, of_keys=True),
    )
    postprocess(buffer_ptr=buffer, dq_ptr=dq)
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
