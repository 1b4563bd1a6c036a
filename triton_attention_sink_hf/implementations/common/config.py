"""Numbers that every backend uses, each with its reason."""

MAX_PACK = 8  # heads in a tile; more leave too few tokens in a tile for causal edges
TMA_TARGETS = ("sm90", "sm100", "sm103", "sm120")
RANGES_BLOCK = 256  # rows of a program that finds the ranges of packed rows; memory-bound
SUM_COLUMNS, SUM_ROWS = 8, 512  # 8 fp32 are one 32-byte sector; 4 warps hold 32 elements a thread
SCAN_BLOCK = 1024  # queries at a time in the search for those that see a tile of keys
MERGE_ROWS, MERGE_HEADS = 64, 8  # 8 tokens of 8 heads: whole 32-byte sectors of lse
# Columns of a tile. ptxas 12.8 (of Triton 3.6) gives products of 32 columns a wrong descriptor in one of a hundred
# kernels: they read outside shared memory (tests/sass.py). Of 64 columns none was found.
LEAST_COLUMNS = {"sm90": 64}
