"""Write new keys and values into a cache, in one launch. No attention kernel."""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.problem import next_power_of_2
from ..common.relaunch import Launch


@triton.jit
def _copy_token(
    cache_ptr, new_ptr, row, t, ok, head, stride_ct, stride_ch, stride_cd, stride_nt, stride_nh, stride_nd,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BLOCK_D)
    own = (head < tl.where(ok, HEADS, 0))[:, None] & (d < D)[None, :]
    new = tl.load(new_ptr + t.to(tl.int64) * stride_nt + head[:, None] * stride_nh + d[None, :] * stride_nd, mask=own)
    cell = row.to(tl.int64) * stride_ct + head.to(tl.int64)[:, None] * stride_ch + d[None, :] * stride_cd
    tl.store(cache_ptr + cell, new, mask=own)


@triton.jit(do_not_specialize=["pages", "slots", "seqlen"])
def _append_kernel(
    k_cache_ptr, v_cache_ptr, k_ptr, v_ptr, seqlens_ptr, table_ptr, pages, slots, seqlen, stride_tb,
    stride_kcb, stride_kct, stride_kch, stride_kcd, stride_vcb, stride_vct, stride_vch, stride_vcd,
    stride_kb, stride_kt, stride_kh, stride_kd, stride_vb, stride_vt, stride_vh, stride_vd,
    PAGE: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """One program per new token: all its heads. A key that does not fit fails an assertion, and nothing is written."""
    t = tl.program_id(0) % seqlen
    b = tl.program_id(0) // seqlen
    slot = tl.load(seqlens_ptr + b) + t
    page, row = b, slot
    ok = (slot >= 0) & (slot < slots)
    if PAGE > 0:
        page = tl.load(table_ptr + b.to(tl.int64) * stride_tb + slot // PAGE, mask=ok, other=-1)
        row = slot % PAGE
        ok = ok & (page >= 0) & (page < pages)
    tl.device_assert(ok, "new keys must fit the cache")
    head = tl.arange(0, BLOCK_H)
    _copy_token(
        k_cache_ptr + page.to(tl.int64) * stride_kcb, k_ptr + b.to(tl.int64) * stride_kb, row, t, ok, head,
        stride_kct, stride_kch, stride_kcd, stride_kt, stride_kh, stride_kd, HEADS, D, BLOCK_D,
    )  # fmt: skip
    _copy_token(
        v_cache_ptr + page.to(tl.int64) * stride_vcb, v_ptr + b.to(tl.int64) * stride_vb, row, t, ok, head,
        stride_vct, stride_vch, stride_vcd, stride_vt, stride_vh, stride_vd, HEADS, DV, BLOCK_DV,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _launch(k_cache: tuple, v_cache: tuple, k: tuple, v: tuple, table: tuple | None) -> Launch:
    """Each argument: shape and strides of that tensor."""
    (batch, seqlen, heads, d), dv = k[0], v[0][-1]
    pages, page_size = k_cache[0][:2]
    named = {"kc": k_cache, "vc": v_cache, "k": k, "v": v}
    return Launch(
        _append_kernel,
        (batch * seqlen,),
        pages=pages,
        slots=page_size if table is None else table[0][1] * page_size,
        seqlen=seqlen,
        stride_tb=0 if table is None else table[1][0],
        **{
            f"stride_{name}{axis}": stride
            for name, x in named.items()
            for axis, stride in zip("bthd", x[1], strict=True)
        },
        PAGE=0 if table is None else page_size,
        HEADS=heads,
        BLOCK_H=next_power_of_2(heads),
        D=d,
        DV=dv,
        BLOCK_D=next_power_of_2(d),
        BLOCK_DV=next_power_of_2(dv),
        num_warps=1 if heads * max(d, dv) <= 512 else 4,
        debug=True,  # keeps the assertion
    )


def append_keys(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, cache_seqlens: Tensor, block_table: Tensor | None
) -> None:
    """Write k (B, Snew, Hkv, D) and v behind ``cache_seqlens`` (B,), into rows of the cache or into pages."""
    table = block_table if block_table is None or block_table.stride(1) == 1 else block_table.contiguous()
    if not k.numel():
        return
    tensors = (k_cache, v_cache, k, v, table)
    launch = _launch(*(None if x is None else (tuple(x.shape), x.stride()) for x in tensors))
    with torch.cuda.device_of(k_cache):
        launch(
            k_cache_ptr=k_cache,
            v_cache_ptr=v_cache,
            k_ptr=k,
            v_ptr=v,
            seqlens_ptr=cache_seqlens.contiguous(),
            table_ptr=table,
        )
