"""``python -m triton_attention_sink_hf.cli``, for a checkout that is not installed."""

from . import main

main()
