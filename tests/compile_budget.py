"""What a compiled kernel may take of each architecture: shared memory, and registers that are kept in memory."""

from __future__ import annotations

SHARED_MEMORY = {
    "sm80": 166_912,
    "sm86": 101_376,
    "sm89": 101_376,
    "sm90": 232_448,
    "sm100": 232_448,
    "sm120": 101_376,
    "gfx942": 65_536,
    "gfx950": 163_840,
}
# Bytes of stack a thread (AMD: registers) that may spill. A few words outside a loop cost nothing that can be measured;
# fp32 holds its operands in registers, which ptxas does not fit at D of 128 and 256 with any tile that was tried.
# Above 256 its dq holds 512 columns of two tiles in a thread's registers (triton/config.py).
SPILLED, SPILLED_FP32, SPILLED_FP32_HUGE = 32, 288, 2600
# The tiles for Hopper are those that an H100 ran fastest: without spills dk, dv took a quarter longer (LOG.md). With
# triton 3.6 none needs more than 128 bytes.
SPILLED_MEASURED = {"sm90": 256}
# By triton 3.9 alone. Smaller tiles would not spill; whether they are faster, no card of ours can say.
SPILLED_BY_39 = {
    ("sm90", "_attn_bwd_dkv_kernel", "wide 256 padding packed"): 328,
    ("sm80", "_attn_bwd_dkv_kernel", "window D 40/128"): 48,
    ("sm120", "_attn_bwd_dkv_kernel", "window D 40/128"): 144,
}


def spill_budget(target: str, case: str, kernel: str = "") -> int:
    """Of a case of ``compile_target.py``, by its name."""
    if (target, kernel, case) in SPILLED_BY_39:
        return SPILLED_BY_39[target, kernel, case]
    if case.startswith("fp32"):
        return SPILLED_FP32_HUGE if case.startswith("fp32 huge") else SPILLED_FP32
    return SPILLED_MEASURED.get(target, SPILLED)


def exceeds(target: str, row: dict) -> bool:
    """Whether a kernel (a row of ``compile_target.py``) does not fit, spills too much or has wrong descriptors."""
    too_large = row["shared"] > SHARED_MEMORY[target]
    return (
        too_large or row["spilled"] > spill_budget(target, row["case"], row.get("kernel", "")) or bool(row.get("wrong"))
    )
