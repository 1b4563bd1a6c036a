"""Hopper backward in Gluon for short causal windows: one kernel. Deterministic, reads every input once, no workspace.

A program takes a chunk of tokens of one key head. It walks through the chunk, then through the halo: the tokens after
it, which still see its last keys. A step has ROWS rows: tokens times the heads of the group. It sees three tiles of
TILE keys. Three consumers own the tiles in turn. Each computes transposed scores and dP of its tile, keeps the tile's
dk and dv in registers while rows see it, and leaves dS in shared memory. Every third step a consumer also computes dq
of the step before, from dS of all three. The first warpgroup loads, and computes delta and lse in base 2 of every row.

delta comes from the rounded ``out``, as in every fused backward; dsink from P dP in fp32. Registers are the limit: of a
thread, 64 hold dk and dv, 64 scores and dP. ``opaque`` and ``_own_place`` save some.

Over 400 lines: the walk of the four warpgroups is one pipeline, read together.
"""

import triton.language as tl
from torch import Tensor
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
from ..common.problem import Problem, addressable, ceil_div, multiprocessors, planned, strides
from ..common.reduce import sum_rows
from ..common.relaunch import Launch
from .config import MAX_BATCH, MIN_LEFT, MIN_SEQLEN, MIN_TOKENS, TARGETS, WINDOW
from .gluon_compat import aggregate, async_load, async_store, thread_barrier
from .launch import row_blocks, token_blocks
from .vocabulary import Rows, new_barriers, opaque


@gluon.jit
def _own_place():
    """(key head, number of the chunk, batch row) of this program. Re-read to save registers."""
    return gl.inline_asm_elementwise(
        "mov.u32 $0, %ctaid.x; mov.u32 $1, %ctaid.y; mov.u32 $2, %ctaid.z;", "=r,=r,=r", [],
        (gl.int32, gl.int32, gl.int32), False, 1,
    )  # fmt: skip


@aggregate
class _Memory:
    """Shared memory: STAGES steps of q, dout, out and what a row starts from; SLOTS tiles of k and v; dS of the three
    consumers, twice; dq of each; barriers."""

    q: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    sink: gl.shared_memory_descriptor
    lo: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor
    dq: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    kv_full: gl.shared_memory_descriptor
    ds_full: gl.shared_memory_descriptor
    ds_empty: gl.shared_memory_descriptor
    BLOCK_D: gl.constexpr
    STAGES: gl.constexpr
    SLOTS: gl.constexpr


@aggregate
class _Walk:
    """How a program walks through its chunk.

    Attributes:
        ranges_ptr: ``Problem.ranges``, if PACKED. seqlen: rows. length: tokens of a chunk. left: of the window.
        ROWS: of a step: TOKENS tokens times PACK heads. TILE: keys of a tile. EPOCH: steps between two tiles.
    """

    ranges_ptr: gl.tensor
    seqlen: gl.tensor
    length: gl.tensor
    left: gl.tensor
    ROWS: gl.constexpr
    TOKENS: gl.constexpr
    PACK: gl.constexpr
    TILE: gl.constexpr
    EPOCH: gl.constexpr
    PACKED: gl.constexpr

    @gluon.jit
    def own_chunk(self):
        """(first token, end of the chunk's tokens, steps with its tokens, steps)."""
        _head_k, number, _b = _own_place()
        first = number * self.length
        end = gl.minimum(first + self.length, self.seqlen)
        own = (end - first + self.TOKENS - 1) // self.TOKENS
        steps = (gl.minimum(end + 2 * self.TILE, self.seqlen) - first + self.TOKENS - 1) // self.TOKENS
        return first, end, own, steps


@gluon.jit
def _load_step(q_desc, dout_desc, out_desc, memory, t, b, token, head):
    slot = t % memory.STAGES
    mbarrier.expect(memory.full.index(slot), 3 * q_desc.block_type.nbytes)
    async_load(q_desc, [b, token, head, 0], memory.full.index(slot), memory.q.index(slot))
    async_load(dout_desc, [b, token, head, 0], memory.full.index(slot), memory.dout.index(slot))
    async_load(out_desc, [b, token, head, 0], memory.full.index(slot), memory.out.index(slot))


@gluon.jit
def _load_tile(k_desc, v_desc, memory, index, b, head_k, first, TILE: gl.constexpr):
    """Load tile ``index``. The first two lie before the chunk; keys before the first of the row read as 0."""
    slot = index % memory.SLOTS
    mbarrier.expect(memory.kv_full.index(slot), 2 * k_desc.block_type.nbytes)
    async_load(k_desc, [b, head_k, first + (index - 2) * TILE, 0], memory.kv_full.index(slot), memory.k.index(slot))
    async_load(v_desc, [b, head_k, first + (index - 2) * TILE, 0], memory.kv_full.index(slot), memory.v.index(slot))


@gluon.jit
def _loader(q_desc, dout_desc, out_desc, k_desc, v_desc, lse_ptr, sink_ptr, memory, walk, HAS_SINK: gl.constexpr):
    ROWS: gl.constexpr = walk.ROWS
    TOKENS: gl.constexpr = walk.TOKENS
    PACK: gl.constexpr = walk.PACK
    BLOCK_D: gl.constexpr = memory.BLOCK_D
    STAGES: gl.constexpr = memory.STAGES
    first, end, _own, steps = walk.own_chunk()
    head_k, _number, b = _own_place()
    head = head_k * PACK
    for index in gl.static_range(3):
        _load_tile(k_desc, v_desc, memory, index, b, head_k, first, walk.TILE)
    for t in range(0, gl.minimum(STAGES, steps)):
        _load_step(q_desc, dout_desc, out_desc, memory, t, b, first + t * TOKENS, head)
    layout: gl.constexpr = gl.BlockedLayout([1, 32], [16, 2], [4, 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    lse_base = lse_ptr + ((b * gl.num_programs(0) + head_k) * PACK + rows % PACK).to(gl.int64) * walk.seqlen
    if HAS_SINK:
        sink = gl.load(sink_ptr + head + rows % PACK).to(gl.float32)
    i = first + rows // PACK
    lse_ahead = gl.load(lse_base + i, mask=i < walk.seqlen, other=float("-inf"))
    if walk.PACKED:
        row = gl.minimum(i, walk.seqlen - 1)
        lo_ahead = gl.load(walk.ranges_ptr + row)
        hi_ahead = gl.load(walk.ranges_ptr + walk.seqlen + row)
    for t in range(0, steps):
        slot = opaque(t % STAGES)
        i = first + t * TOKENS + rows // PACK
        lse = lse_ahead
        lse_ahead = gl.load(lse_base + i + TOKENS, mask=i + TOKENS < walk.seqlen, other=float("-inf"))
        unseeing = lse == float("-inf")
        if walk.PACKED:
            lo = lo_ahead
            unseeing = unseeing | (lo >= hi_ahead)
            row = gl.minimum(i + TOKENS, walk.seqlen - 1)
            lo_ahead = gl.load(walk.ranges_ptr + row)
            hi_ahead = gl.load(walk.ranges_ptr + walk.seqlen + row)
        mbarrier.wait(memory.full.index(slot), (t // STAGES) & 1)
        out = memory.out.index(slot).reshape([ROWS, BLOCK_D]).load(layout).to(gl.float32)
        dout = memory.dout.index(slot).reshape([ROWS, BLOCK_D]).load(layout).to(gl.float32)
        memory.delta.index(slot).store(gl.sum(out * dout, 1))
        memory.lse.index(slot).store(gl.where(unseeing, float("inf"), lse * LOG2E))
        if HAS_SINK:
            p_sink = gl.where(unseeing | (i >= end), 0.0, gl.exp2((sink - lse) * LOG2E))
            memory.sink.index(slot).store(p_sink)
        if walk.PACKED:
            memory.lo.index(slot).store(lo)
        thread_barrier()
        mbarrier.arrive(memory.ready.index(slot), count=1)
        done = t - 1
        if (done >= 0) & (done + STAGES < steps):
            mbarrier.wait(memory.empty.index(done % STAGES), (done // STAGES) & 1)
            _load_step(q_desc, dout_desc, out_desc, memory, done + STAGES, b, first + (done + STAGES) * TOKENS, head)
            if done % walk.EPOCH == 0:  # all consumers have left the oldest tile, and its last dq is done
                _load_tile(k_desc, v_desc, memory, done // walk.EPOCH + 3, b, head_k, first, walk.TILE)


@gluon.jit
def _publish(due, t, memory):
    """Signal that this consumer's dS of step t is in shared memory."""
    if due:
        fence_async_shared()
        thread_barrier()
        mbarrier.arrive(memory.ds_full.index(opaque(t & 1)), count=1)


@gluon.jit
def _dq_in_turn(due, w: gl.constexpr, t, first, softmax_scale, memory, walk, dq_desc, layout: gl.constexpr):
    """dq of step t from dS of its three tiles, if it is due and it is consumer w's turn."""
    if due & (t % 3 == w):
        buffer = opaque(t & 1)
        oldest = t // walk.EPOCH
        dq = gl.zeros([walk.ROWS, memory.BLOCK_D], gl.float32, layout=layout)
        mbarrier.wait(memory.ds_full.index(buffer), (t >> 1) & 1)
        for r in gl.static_range(3):
            ds = memory.ds.index(buffer * 3 + (oldest + r) % 3).permute((1, 0))
            k = memory.k.index((oldest + r) % memory.SLOTS).reshape([walk.TILE, memory.BLOCK_D])
            dq = warpgroup_mma(ds, k, dq, use_acc=r > 0, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        mbarrier.arrive(memory.ds_empty.index(buffer), count=1)
        tma.store_wait(0)
        thread_barrier()
        tile = memory.dq.index(opaque(w))  # opaque: the address then shares registers with dS's
        tile.reshape([walk.ROWS, memory.BLOCK_D]).store((dq * softmax_scale).to(tile.dtype))
        fence_async_shared()
        thread_barrier()
        head_k, _number, b = _own_place()
        async_store(dq_desc, [b, first + t * walk.TOKENS, head_k * walk.PACK, 0], tile)


@gluon.jit
def _sum_of_keys(x):
    """(TILE, ROWS) -> (TILE / 16, 8, ROWS): sums of the two keys that one thread holds of a row."""
    return gl.sum(x.reshape([x.shape[0] // 16, 2, 8, x.shape[1]]), 1)


@gluon.jit
def _sum_of_tokens(x, HEADS: gl.constexpr):
    """(..., ..., ROWS) -> (..., ..., HEADS): sums of what one thread holds, for HEADS >= 8."""
    return gl.sum(x.reshape([x.shape[0], x.shape[1], x.shape[2] // HEADS, HEADS]), 2)


@gluon.jit
def _consumer(
    w: gl.constexpr, dq_desc, dk_rows, dv_rows, dsink_ptr, memory, walk, softmax_scale, HAS_SINK: gl.constexpr
):
    ROWS: gl.constexpr = walk.ROWS
    TOKENS: gl.constexpr = walk.TOKENS
    PACK: gl.constexpr = walk.PACK
    TILE: gl.constexpr = walk.TILE
    EPOCH: gl.constexpr = walk.EPOCH
    BLOCK_D: gl.constexpr = memory.BLOCK_D
    STAGES: gl.constexpr = memory.STAGES
    SLOTS: gl.constexpr = memory.SLOTS
    HEADS: gl.constexpr = max(PACK, 8)
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    row: gl.constexpr = gl.SliceLayout(0, s_layout)
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    dtype: gl.constexpr = memory.q.dtype
    scale = softmax_scale * LOG2E
    first, end, own, steps = walk.own_chunk()
    column = gl.arange(0, ROWS, layout=row) // PACK
    # s, dp: [keys, rows]; dk, dv: [keys, columns]
    zero = gl.zeros([TILE, ROWS], gl.float32, layout=s_layout)
    dsink = _sum_of_tokens(_sum_of_keys(zero), HEADS)
    tiles = (steps + EPOCH - 1) // EPOCH + 2
    lo_ahead = 0
    if walk.PACKED:
        lo_ahead = gl.load(walk.ranges_ptr + gl.minimum(first + TOKENS, walk.seqlen) - 1)
    for index in range(w, tiles, 3):
        key = first + (index - 2) * TILE
        mine = (key >= first) & (key < end)
        begin = gl.maximum((index - 2) * EPOCH, 0)
        stop = gl.minimum((index + 1) * EPOCH, steps)
        working = stop
        if not mine:
            working = gl.maximum(gl.minimum(stop, own), begin)
        n = key + gl.arange(0, TILE, layout=gl.SliceLayout(1, s_layout))
        dk = gl.zeros([TILE, BLOCK_D], gl.float32, layout=layout)
        dv = gl.zeros([TILE, BLOCK_D], gl.float32, layout=layout)
        kslot = index % SLOTS
        mbarrier.wait(memory.kv_full.index(kslot), (index // SLOTS) & 1)
        for t in tl.range(begin, working, disable_licm=True):
            slot = opaque(t % STAGES)
            phase = (t // STAGES) & 1
            buffer = opaque(t & 1)
            token = first + t * TOKENS
            k = memory.k.index(kslot).reshape([TILE, BLOCK_D])
            v = memory.v.index(kslot).reshape([TILE, BLOCK_D])
            q = memory.q.index(slot).reshape([ROWS, BLOCK_D])
            dout = memory.dout.index(slot).reshape([ROWS, BLOCK_D])
            mbarrier.wait(memory.full.index(slot), phase)
            s = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False, is_async=True)
            _publish((t > 0) & (t <= own), t - 1, memory)  # dS of the step before, now that it has landed
            lo = gl.maximum(token + (TOKENS - 1) - walk.left, 0)  # of the step's last row: the largest
            if walk.PACKED:
                lo = lo_ahead
                lo_ahead = gl.load(walk.ranges_ptr + gl.minimum(token + 2 * TOKENS, walk.seqlen) - 1)
            mbarrier.wait(memory.ready.index(slot), phase)
            lse = memory.lse.index(slot).load(row)
            s = warpgroup_mma_wait(0, deps=[s])
            p = gl.exp2(s * scale - lse[None, :])
            if t // EPOCH == index - 2:  # the diagonal
                p = gl.where((n - token)[:, None] <= column[None, :], p, 0.0)
            if lo > key:
                if walk.PACKED:
                    p = gl.where(n[:, None] >= memory.lo.index(slot).load(row)[None, :], p, 0.0)
                else:
                    past = gl.where(n >= 0, n + walk.left - token, -1)
                    p = gl.where(past[:, None] >= column[None, :], p, 0.0)
            dp = warpgroup_mma(v, dout.permute((1, 0)), zero, use_acc=False, is_async=True)
            delta = memory.delta.index(slot).load(row)
            dp = warpgroup_mma_wait(0, deps=[dp])
            ds = p * dp
            if HAS_SINK:
                of_keys = _sum_of_keys(ds)
                p_sink = memory.sink.index(slot).load(gl.SliceLayout(0, gl.SliceLayout(1, of_keys.type.layout)))
                dsink += _sum_of_tokens(of_keys * p_sink[None, None, :], HEADS)
            ds = (ds - p * delta[None, :]).to(dtype)
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), operand), dout, dv, is_async=True)
            dk = warpgroup_mma(gl.convert_layout(ds, operand), q, dk, is_async=True)
            if t < own:
                mbarrier.wait(memory.ds_empty.index(buffer), ((t >> 1) & 1) ^ 1)
                memory.ds.index(buffer * 3 + w).store(ds)
            dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
            _dq_in_turn((t > 0) & (t <= own), w, t - 1, first, softmax_scale, memory, walk, dq_desc, layout)
            mbarrier.arrive(memory.empty.index(slot), count=1)
        for t in range(working, stop):  # keys whose gradients belong to the next chunk
            slot = t % STAGES
            mbarrier.wait(memory.full.index(slot), (t // STAGES) & 1)
            _publish(t == own, t - 1, memory)
            _dq_in_turn(t == own, w, t - 1, first, softmax_scale, memory, walk, dq_desc, layout)
            mbarrier.arrive(memory.empty.index(slot), count=1)
        if mine:
            head_k, _number, b = _own_place()
            dk_rows.store(dk * softmax_scale, key, end, b, head_k, layout)
            dv_rows.store(dv, key, end, b, head_k, layout)
    _publish(own == steps, own - 1, memory)
    _dq_in_turn(own == steps, w, own - 1, first, softmax_scale, memory, walk, dq_desc, layout)
    tma.store_wait(0)
    if HAS_SINK:
        part = gl.sum(gl.sum(dsink, 0), 0)
        part = gl.sum(part.reshape([HEADS // PACK, PACK]), 0)
        h = gl.arange(0, PACK, layout=part.type.layout)
        head_k, number, b = _own_place()
        parts = (b * gl.num_programs(1) + number) * 3 + w
        gl.store(dsink_ptr + (parts * gl.num_programs(0) + head_k).to(gl.int64) * PACK + h, -part)


_VARYING = ["seqlen", "length", "left"]


@gluon.jit(do_not_specialize=_VARYING)
def _hopper_window_bwd_kernel(
    q_desc, dout_desc, out_desc, k_desc, v_desc, dq_desc, lse_ptr, sink_ptr, ranges_ptr, dk_ptr, dv_ptr, dsink_ptr,
    softmax_scale, seqlen, length, left,
    stride_dkb, stride_dkt: gl.constexpr, stride_dkh, stride_dkd: gl.constexpr,
    stride_dvb, stride_dvt: gl.constexpr, stride_dvh, stride_dvd: gl.constexpr,
    D: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, TILE: gl.constexpr, BLOCK_D: gl.constexpr,
    PACK: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, HAS_SINK: gl.constexpr, PACKED: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    TOKENS: gl.constexpr = ROWS // PACK
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, ROWS], dtype)
    row_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    memory = _Memory(
        q=gl.allocate_shared_memory(dtype, [STAGES, 1, TOKENS, PACK, BLOCK_D], q_desc.layout),
        dout=gl.allocate_shared_memory(dtype, [STAGES, 1, TOKENS, PACK, BLOCK_D], dout_desc.layout),
        out=gl.allocate_shared_memory(dtype, [STAGES, 1, TOKENS, PACK, BLOCK_D], out_desc.layout),
        dq=gl.allocate_shared_memory(dtype, [3, 1, TOKENS, PACK, BLOCK_D], dq_desc.layout),
        k=gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, TILE, BLOCK_D], k_desc.layout),
        v=gl.allocate_shared_memory(dtype, [SLOTS, 1, 1, TILE, BLOCK_D], v_desc.layout),
        ds=gl.allocate_shared_memory(dtype, [6, TILE, ROWS], ds_layout),
        lse=gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], row_layout),
        delta=gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], row_layout),
        sink=gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], row_layout),
        lo=gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], row_layout),
        full=new_barriers(STAGES), ready=new_barriers(STAGES), empty=new_barriers(STAGES),
        kv_full=new_barriers(SLOTS), ds_full=new_barriers(2), ds_empty=new_barriers(2),
        BLOCK_D=BLOCK_D, STAGES=STAGES, SLOTS=SLOTS,
    )  # fmt: skip
    for j in gl.static_range(STAGES):
        mbarrier.init(memory.full.index(j), count=1)
        mbarrier.init(memory.ready.index(j), count=1)
        mbarrier.init(memory.empty.index(j), count=3)
    for j in gl.static_range(SLOTS):
        mbarrier.init(memory.kv_full.index(j), count=1)
    for j in gl.static_range(2):
        mbarrier.init(memory.ds_full.index(j), count=3)
        mbarrier.init(memory.ds_empty.index(j), count=1)
    fence_async_shared()
    walk = _Walk(
        ranges_ptr=ranges_ptr, seqlen=seqlen, length=length, left=left,
        ROWS=ROWS, TOKENS=TOKENS, PACK=PACK, TILE=TILE, EPOCH=TILE // TOKENS, PACKED=PACKED,
    )  # fmt: skip
    dk = Rows(ptr=dk_ptr, stride_b=stride_dkb, stride_t=stride_dkt, stride_h=stride_dkh, COLUMNS=D, BLOCK=BLOCK_D)
    dv = Rows(ptr=dv_ptr, stride_b=stride_dvb, stride_t=stride_dvt, stride_h=stride_dvh, COLUMNS=DV, BLOCK=BLOCK_D)
    gl.warp_specialize(
        [
            (_loader, (q_desc, dout_desc, out_desc, k_desc, v_desc, lse_ptr, sink_ptr, memory, walk, HAS_SINK)),
            (_consumer, (0, dq_desc, dk, dv, dsink_ptr, memory, walk, softmax_scale, HAS_SINK)),
            (_consumer, (1, dq_desc, dk, dv, dsink_ptr, memory, walk, softmax_scale, HAS_SINK)),
            (_consumer, (2, dq_desc, dk, dv, dsink_ptr, memory, walk, softmax_scale, HAS_SINK)),
        ],
        [4, 4, 4],
        [REGISTERS, REGISTERS, REGISTERS],
    )


def chunk_length(seqlen: int, heads: int, programs: int) -> int:
    """Tokens of a chunk: the multiple of WINDOW.tile that gives the busiest of ``programs`` the least to do."""

    def work(length: int) -> tuple[int, int]:
        rounds = ceil_div(heads * ceil_div(seqlen, length), programs)
        return rounds * (length + WINDOW.halo + WINDOW.tile), -length

    tiles = ceil_div(seqlen, WINDOW.tile)
    return min((ceil_div(tiles, n) * WINDOW.tile for n in range(1, tiles + 1)), key=work)


@planned
def _plan(problem: Problem, out_strides, dout_strides, dq_strides, dk_strides, dv_strides) -> tuple[Launch, int]:
    """The launch, rows of partial sums of dsink."""
    call = problem.call
    q, k, v = call.q, call.k, call.v
    d, dv, group = q.shape[-1], v.shape[-1], problem.heads_q // problem.heads_k
    length = chunk_length(problem.seqlen_q, problem.batch * problem.heads_k, multiprocessors(q.device))
    chunks, out_shape = ceil_div(problem.seqlen_q, length), (*q.shape[:3], dv)
    blocks = {
        "q_desc": token_blocks(q.shape, q.stride(), q.dtype, WINDOW.rows // group, group),
        "dout_desc": token_blocks(out_shape, dout_strides, q.dtype, WINDOW.rows // group, group),
        "out_desc": token_blocks(out_shape, out_strides, q.dtype, WINDOW.rows // group, group),
        "k_desc": row_blocks(k.shape, k.stride(), k.dtype, WINDOW.tile),
        "v_desc": row_blocks(v.shape, v.stride(), v.dtype, WINDOW.tile),
        "dq_desc": token_blocks(q.shape, dq_strides, q.dtype, WINDOW.rows // group, group),
    }
    launch = Launch(
        _hopper_window_bwd_kernel,
        (problem.heads_k, chunks, problem.batch),
        blocks,
        softmax_scale=call.softmax_scale,
        seqlen=problem.seqlen_q,
        length=length,
        left=call.mask.left,
        **strides("dk", dk_strides),
        **strides("dv", dv_strides),
        D=d,
        DV=dv,
        ROWS=WINDOW.rows,
        TILE=WINDOW.tile,
        BLOCK_D=WINDOW.block_d,
        PACK=group,
        STAGES=WINDOW.stages,
        SLOTS=WINDOW.slots,
        HAS_SINK=call.sinks is not None,
        PACKED=call.mask.packed,
        REGISTERS=WINDOW.registers,
        num_warps=4,
    )
    return launch, chunks * problem.batch * 3


def supports(problem: Problem, out: Tensor, dout: Tensor, dlse: Tensor | None, dq: Tensor, dk: Tensor | None) -> bool:
    """Whether this kernel can replace the two backward kernels of ``triton_window``, and is faster."""
    call = problem.call
    q, k, v = call.q, call.k, call.v
    batch, seqlen = q.shape[:2]
    return (
        problem.target in TARGETS
        and dlse is None
        and dk is not None
        and call.mask.left >= MIN_LEFT
        and seqlen == k.shape[1]
        and seqlen >= MIN_SEQLEN
        and batch * seqlen >= MIN_TOKENS
        and batch <= MAX_BATCH
        and q.shape[2] // k.shape[2] in WINDOW.groups
        and 32 < max(q.shape[-1], v.shape[-1]) <= WINDOW.block_d
        and all(map(addressable, (q, k, v, out, dout, dq)))
    )


def launch_backward(problem: Problem, out, lse, dout, dlse, dq, dk, dv, dsinks) -> None:
    """Write dq, dk, dv, and dsinks unless None; dlse is None. Every element is written."""
    call, ranges = problem.call, problem.ranges
    launch, parts = _plan(problem, *(x.stride() for x in (out, dout, dq, dk, dv)))
    dsink_parts = lse.new_empty(parts, problem.heads_q) if call.sinks is not None else None
    unused = lse  # warp_specialize passes no None
    launch(
        q_desc=call.q,
        dout_desc=dout,
        out_desc=out,
        k_desc=call.k,
        v_desc=call.v,
        dq_desc=dq,
        lse_ptr=lse,
        sink_ptr=unused if problem.sinks is None else problem.sinks,
        ranges_ptr=unused if ranges is None else ranges,
        dk_ptr=dk,
        dv_ptr=dv,
        dsink_ptr=unused if dsink_parts is None else dsink_parts,
    )
    if dsinks is not None:
        sum_rows(dsink_parts, dsinks)
