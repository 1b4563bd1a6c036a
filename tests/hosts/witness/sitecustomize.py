"""On PYTHONPATH of a host's run: at exit each process writes how often it called this package's attention.

It imports nothing of the package, since that would register the name.
"""

import atexit
import os
import sys
from pathlib import Path


def write() -> None:
    call = sys.modules.get("triton_attention_sink_hf.call")
    counts = call._memo.cache_info() if call is not None else None
    if counts is not None and counts.hits + counts.misses:
        Path(os.environ["WITNESS"], f"{os.getpid()}").write_text(f"{counts.hits + counts.misses}")


atexit.register(write)
