"""Five checks of this installation: ``python test_attention_sink/test_basic.py``, from any directory.

Prints PASS or FAIL for each, with what was compared or why it failed, and exits 1 if one failed. Without a GPU the
kernels run in Triton's interpreter.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not


def main() -> int:
    try:
        import torch
    except ImportError as error:
        print(f'FAIL  torch must be installed, 2.8 or newer (pytorch.org, "Get started"): {error}')
        return 1

    if not torch.cuda.is_available():  # before the package, which imports transformers, which imports triton
        os.environ.setdefault("TRITON_INTERPRET", "1")

    from triton_attention_sink_hf.checks import CHECKS, run_checks

    passed = 0
    for result in run_checks():
        passed += result.passed
        print(f"{'PASS' if result.passed else 'FAIL'}  {result.name:<20} {result.detail}", flush=True)
    print(f"{passed} of {len(CHECKS)} checks passed")
    return 0 if passed == len(CHECKS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
