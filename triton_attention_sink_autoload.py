"""What ``import torch`` calls, as an entry point of the group ``torch.backends``: makes our name known to transformers.

It imports triton_attention_sink_hf, which waits for transformers and imports nothing else by itself. This module stands
outside of that package so that the switch is read first.
"""

import os
import warnings

SWITCH = "TRITON_ATTENTION_SINK_AUTOLOAD"


def autoload() -> None:
    """Do it, unless the environment has TRITON_ATTENTION_SINK_AUTOLOAD=0. Never raises: torch would not be imported."""
    if os.environ.get(SWITCH) == "0":
        return
    try:
        import triton_attention_sink_hf  # noqa: F401
    except Exception as error:
        warnings.warn(f"triton_attention_sink_hf cannot be imported: {error} ({SWITCH}=0 turns this off)", stacklevel=2)
