"""Does this attention train *your* model as eager does? Compares log-probs and the gradient of every parameter.

A few random samples of uneven lengths go through the model twice: one at a time with eager attention, which is the
definition, and as one packed row with ours (``position_ids`` that restart, no mask), which is what verl and TRL do.
Both runs have the same loss, a weighted sum of log-probs.

Errors are norms relative to eager in fp32. What is allowed (``comparison.py``):

* fp32: ``FP32_TOLERANCE``.
* bf16, fp16: ``FACTOR`` times the error of eager itself in that dtype, plus one rounding. Both errors are one draw
  each. So eager's is that of the parameter or of its namesakes in all layers, whichever is larger, and ours may exceed
  it by ``DEVIATIONS`` standard deviations of a norm of that many elements: the bias of a router has a handful.

In a mixture of experts the router of the fp32 run decides for every run (``routing.py``), because a near tie that falls
the other way changes a gradient more than any attention does.
"""

from .driver import check_attention, verify
from .report import Report, Row

__all__ = ["Report", "Row", "check_attention", "verify"]
