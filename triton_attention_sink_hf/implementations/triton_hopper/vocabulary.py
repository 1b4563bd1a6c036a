"""What the Gluon kernels share: tiles and what their rows see, loads and stores, barriers, opaque values."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..common.primitives import LN2, LOG2E, LOWEST
from .gluon_compat import aggregate, async_store, thread_barrier


@aggregate
class Tiles:
    """Tiles of TILE rows of one side, queries or keys. Each row sees one interval of the other side's rows.

    Attributes:
        ranges_ptr: ``Problem.ranges`` of this side, if PACKED. table_ptr: ``tile_table`` of this side, if PACKED.
        rows, others: rows of this side and of the other.
        heads: of this side's tensors. group: query heads of a key head.
        before, after: how far a row sees to the left and to the right, where HAS_BEFORE and HAS_AFTER.
        slots: tiles that the table has room for. tiles: tiles of a head; if PACKED, an upper bound.
        total: heads of the whole batch. section: heads worked on side by side.
    """

    ranges_ptr: gl.tensor
    table_ptr: gl.tensor
    rows: gl.tensor
    others: gl.tensor
    heads: gl.tensor
    group: gl.tensor
    before: gl.tensor
    after: gl.tensor
    slots: gl.tensor
    tiles: gl.tensor
    total: gl.tensor
    section: gl.tensor
    TILE: gl.constexpr
    LAST_FIRST: gl.constexpr
    HAS_BEFORE: gl.constexpr
    HAS_AFTER: gl.constexpr
    PACKED: gl.constexpr

    @gluon.jit
    def count(self):
        """Tiles of a head: of packed rows only the device knows how many."""
        if self.PACKED:
            return gl.load(self.table_ptr)
        return self.tiles

    @gluon.jit
    def is_surplus(self):
        """Whether this program, one for each tile that packed rows could have, has none."""
        return gl.program_id(0) >= gl.load(self.table_ptr) * self.total

    @gluon.jit
    def item(self, t, count):
        """(first row, end of rows, head of the batch) of item t. Rows of a tile end there, or after TILE of them.

        Heavy tiles come first in a section of heads, whose keys fit L2.
        """
        s = t // (count * self.section)
        return self._tile_of_section(s, t - s * count * self.section, count)

    @gluon.jit
    def _tile_of_section(self, s, r, count):
        j = r // self.section
        head = s * self.section + r - j * self.section
        if self.PACKED:
            real = j < count  # always true; the select avoids spills in the fused backward at D 128 (triton 3.6)
            first = gl.where(real, gl.load(self.table_ptr + 1 + j), self.rows)
            end = gl.where(real, gl.load(self.table_ptr + 1 + self.slots + j), self.rows)
        else:
            if self.LAST_FIRST:
                j = count - 1 - j
            first = j * self.TILE
            end = self.rows
        return first, end, head

    @gluon.jit
    def item_of_round(self, r, count):
        """``item`` of this program in round r of persistent programs; past the last round, any item.

        Every other round runs backwards: the program with the heavier item of one has the lighter one of the next.
        """
        programs = gl.num_programs(0)
        items = count * self.total
        before = r * programs
        t = before + _turn(r, gl.program_id(0), gl.minimum(programs, items - before))
        return self.item(gl.maximum(gl.minimum(t, items - 1), 0), count)

    @gluon.jit
    def balanced_item(self, r, section, before, count):
        """The same, with sections that take whole rounds: ``before`` items of this section have been taken.

        What fills no round, the lightest items of every section, comes last, those of all sections together, as if in
        one more section. Returns ``item`` and the next round's ``section`` and ``before``, which are 0 in the first.
        """
        programs = gl.num_programs(0)
        per_section = count * self.section
        sections = self.total // self.section
        whole = per_section // programs * programs
        if (section < sections) & (before == whole):
            section += gl.where(whole > 0, 1, sections)
            before = 0
        if section < sections:
            p = before + _turn(r, gl.program_id(0), programs)
            first, end, bh = self._tile_of_section(section, p, count)
        else:
            left = sections * (per_section - whole) - before
            p = before + _turn(r, gl.program_id(0), gl.minimum(programs, left))
            row = p // sections
            first, end, bh = self._tile_of_section(p - row * sections, whole + row, count)
        return first, end, bh, section, before + programs

    @gluon.jit
    def interval(self, i, end):
        """[lo, hi) of the other side's rows for rows ``i``; rows from ``end`` on are as the last one before."""
        i = gl.minimum(i, end - 1)
        if self.PACKED:
            return gl.load(self.ranges_ptr + i), gl.load(self.ranges_ptr + self.rows + i)
        lo = i * 0
        hi = i * 0 + self.others
        if self.HAS_BEFORE:
            lo = gl.minimum(gl.maximum(i + (self.others - self.rows - self.before), 0), self.others)
        if self.HAS_AFTER:
            hi = gl.maximum(gl.minimum(i + (self.others - self.rows + self.after + 1), self.others), 0)
        return lo, hi

    @gluon.jit
    def block_range(self, first, end, STEP: gl.constexpr, ALIGN: gl.constexpr):
        """(start, n): n blocks of STEP rows from ``start`` on cover the intervals of rows [first, first + TILE).

        At least one block, so that every tile runs the same pipeline. ``start`` is a multiple of ALIGN.
        """
        lo, _ = self.interval(first, end)
        _, hi = self.interval(first + self.TILE - 1, end)
        start = lo // ALIGN * ALIGN
        return start, gl.maximum((hi - start + STEP - 1) // STEP, 1)

    @gluon.jit
    def own_blocks(self, first, end, start, n, ROWS: gl.constexpr, STEP: gl.constexpr):
        """What ROWS of a tile's rows need of its n blocks: (stop, edge, full).

        Blocks from ``stop`` on lie outside the intervals of all these rows; blocks edge to edge + full lie in the
        intervals of all of them and need no mask. Without rows before ``end``, stop = 0.
        """
        _, hi_first = self.interval(first, end)
        lo_last, hi_last = self.interval(first + ROWS - 1, end)
        stop = gl.minimum((hi_last - start + STEP - 1) // STEP, n)
        edge = gl.minimum((lo_last - start + STEP - 1) // STEP, n)
        full = gl.maximum(gl.minimum((hi_first - start) // STEP, n) - edge, 0)
        return gl.where(first < end, stop, 0), edge, full

    @gluon.jit
    def own_item(self):
        """``item`` of this program."""
        return self.item(gl.program_id(0), self.count())

    @gluon.jit
    def own_tile(self, STEP: gl.constexpr, ALIGN: gl.constexpr):
        """The tile of this program: (first row, end of rows, batch row, head, and ``block_range``)."""
        first, end, bh = self.own_item()
        b = bh // self.heads
        start, n = self.block_range(first, end, STEP, ALIGN)
        return first, end, b, bh - b * self.heads, start, n

    @gluon.jit
    def seeing(self, first, end, start, n, ROWS: gl.constexpr, STEP: gl.constexpr, layout: gl.constexpr):
        """Of ROWS keys from ``first`` on: the interval of queries that see each, and ``own_blocks``' edge and full."""
        _stop, edge, full = self.own_blocks(first, end, start, n, ROWS, STEP)
        keys = first + gl.arange(0, ROWS, layout=layout)
        lo, hi = self.interval(keys, end)
        if self.PACKED:  # keys of the next segment lie in the tile: no query sees them, in any block
            hi = gl.where(keys < end, hi, 0)
            if first + ROWS > end:
                full = 0
        return lo, hi, edge, full

    @gluon.jit
    def apply_mask(self, s, i, start, lo, hi, edge, full, STEP: gl.constexpr, layout: gl.constexpr):
        """Transposed scores (keys, STEP) of block i of queries, -inf where the key is not seen."""
        if (i < edge) | (i >= edge + full):
            m = start + i * STEP + gl.arange(0, STEP, layout=layout)
            if self.HAS_BEFORE or self.PACKED:
                s = gl.where(lo[:, None] <= m[None, :], s, float("-inf"))
            if self.HAS_AFTER or self.PACKED:
                s = gl.where(m[None, :] < hi[:, None], s, float("-inf"))
        return s


@gluon.jit
def _turn(r, p, width):
    """Place of program p in round r, which has ``width`` items."""
    return gl.where(r % 2 == 0, p, width - 1 - p)


@gluon.constexpr_function
def _barrier(operation, number, threads):
    return f"bar.{operation} {number}, {threads}; mov.u32 $0, 0;"


@gluon.jit
def named_barrier(OPERATION: gl.constexpr, NUMBER: gl.constexpr, THREADS: gl.constexpr):
    """PTX's bar.sync or bar.arrive (OPERATION) on barrier NUMBER, for THREADS threads in all."""
    gl.inline_asm_elementwise(_barrier(OPERATION, NUMBER, THREADS), "=r", [], gl.int32, False, 1)


@gluon.jit
def new_barriers(N: gl.constexpr):
    """N barriers in shared memory, not initialised; they are taken by ``index``."""
    return gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())


@gluon.jit
def new_numbers(N: gl.constexpr):
    """N int32 in shared memory, for ``put`` and ``get``."""
    return gl.allocate_shared_memory(gl.int32, [N, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


@gluon.jit
def put(numbers, i, value):
    """Write number i, from a single warp. A barrier announces it: its arrival comes after the write."""
    numbers.index(i).store(gl.full([1], value, gl.int32, layout=gl.BlockedLayout([1], [32], [1], [0])))


@gluon.jit
def get(numbers, i):
    """Read number i, by the four warps of a consumer."""
    return gl.max(numbers.index(i).load(gl.BlockedLayout([1], [32], [4], [0])), axis=0)


@aggregate
class Rows:
    """A BSHD tensor with a last stride of 1, read or written by tiles of 64 rows. BLOCK: columns of a tile."""

    ptr: gl.tensor
    stride_b: gl.tensor | gl.constexpr
    stride_t: gl.constexpr
    stride_h: gl.tensor | gl.constexpr
    COLUMNS: gl.constexpr
    BLOCK: gl.constexpr

    @gluon.jit
    def load(self, first, end, b, head, layout: gl.constexpr):
        """64 rows from ``first`` on of one head; those from ``end`` on and columns past COLUMNS are 0."""
        rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        d = gl.arange(0, self.BLOCK, layout=gl.SliceLayout(0, layout))
        base = self.ptr + b.to(gl.int64) * self.stride_b + head.to(gl.int64) * self.stride_h
        inside = (rows < end)[:, None]
        pointers = base + rows.to(gl.int64)[:, None] * self.stride_t + d[None, :]
        return gl.load(pointers, mask=inside & (d < self.COLUMNS)[None, :], other=0.0)

    @gluon.jit
    def store(self, x, first, end, b, head, layout: gl.constexpr):
        """64 rows from ``first`` on of one head; those from ``end`` on and columns past COLUMNS are not written."""
        rows = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        d = gl.arange(0, self.BLOCK, layout=gl.SliceLayout(0, layout))
        base = self.ptr + b.to(gl.int64) * self.stride_b + head.to(gl.int64) * self.stride_h
        inside = (rows < end)[:, None] & (d < self.COLUMNS)[None, :]
        pointers = base + rows.to(gl.int64)[:, None] * self.stride_t + d[None, :]
        gl.store(pointers, x.to(self.ptr.dtype.element_ty), mask=inside)


@gluon.jit
def copy_out(out_desc, tile, out, b, head, token, column: gl.constexpr):
    """Store 64 rows of up to 128 columns by TMA, through the shared memory of ``tile``."""
    tile.reshape([out.shape[0], out.shape[1]]).store(out)
    fence_async_shared()
    thread_barrier()
    async_store(out_desc, [b, head, token, column], tile)


@gluon.jit
def copy_rows_out(out_desc, out_rows, tile, out, b, head, token, end, PACKED: gl.constexpr):
    """Store 64 rows of up to 128 columns through ``tile``, by TMA; those from ``end`` on, another tile's, are left."""
    if not PACKED:  # noqa: SIM114 (known when compiled, the next is not)
        copy_out(out_desc, tile, out, b, head, token, 0)
    elif token + 64 <= end:
        copy_out(out_desc, tile, out, b, head, token, 0)
    else:
        COLUMNS: gl.constexpr = out.shape[1]
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])
        tile.reshape([64, COLUMNS]).store(out)
        thread_barrier()
        out_rows.store(tile.reshape([64, COLUMNS]).load(layout), token, end, b, head, layout)


@gluon.jit
def opaque(x):
    """x, hidden from the compilers. Else they compute a dozen addresses from it ahead and keep them in registers."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], gl.int32, False, 1)


@gluon.jit
def opaque_zero():
    """An opaque 0. Adding it to an operand's index forces a fresh wgmma descriptor in each loop or branch.

    Triton 3.6's ptxas otherwise reuses a descriptor from a loop that may have been skipped. ``tests/sass.py`` finds
    such kernels.
    """
    return gl.inline_asm_elementwise("mov.u32 $0, 0;", "=r", [], gl.int32, False, 1)


@gluon.jit
def factor_and_lse(m, l, sink, HAS_SINK: gl.constexpr):
    """The sink joins a row's softmax, as ``common.primitives`` says: the factor of its accumulator, and its lse."""
    seen = l > 0.0
    top = gl.where(seen, m * LN2, LOWEST)
    if HAS_SINK:
        top = gl.maximum(top, sink)
    keys = gl.where(seen, gl.exp2(m - top * LOG2E), 0.0)
    l = l * keys
    if HAS_SINK:
        l += gl.exp2((sink - top) * LOG2E)
    nothing = l == 0.0
    l = gl.where(nothing, 1.0, l)
    lse = gl.where(nothing, float("-inf"), top + gl.log2(l) * LN2)
    return gl.where(nothing, 0.0, keys / l), lse
