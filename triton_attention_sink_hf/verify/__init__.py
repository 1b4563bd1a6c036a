"""Does this attention train *your* model as eager does? Compares log-probs and the gradient of every parameter.

A few random samples of uneven lengths go through the model twice. Eager attention runs them one at a time: that is the
truth. Ours runs them as one packed row (``position_ids`` that restart, no mask), as verl and TRL do. Both runs have the
same loss, a weighted sum of log-probs.

Errors are norms relative to eager in fp32. What is allowed (``comparison.py``):

* fp32: ``FP32_TOLERANCE``.
* bf16, fp16: ``FACTOR`` times eager's own error in that dtype, plus one rounding. Each error is one random draw, which
  matters where a parameter has few elements, as a router's bias has. So eager's error is the larger of the parameter's
  own and the root mean square over the same parameter in all layers. And ours may be larger by ``DEVIATIONS`` standard
  deviations of a norm of that many elements.

In a mixture of experts every run uses the routing of the fp32 run (``routing.py``): a near tie that falls the other way
changes a gradient more than any attention does.
"""

from .driver import check_attention, verify
from .report import Report, Row

__all__ = ["Report", "Row", "check_attention", "verify"]
