"""Launches around Triton's argument handling: the same kernel and the same arguments as through it, or through it.

On a CPU, with Triton's driver replaced by one that records launches; in a process without Triton's interpreter. A
driver that launches nothing cannot tell whether a kernel is right, only whether it would be the same one.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def _run(name: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    done = subprocess.run(
        [sys.executable, TESTS / "relaunch_driver.py", name], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize(
    "name",
    ["same_key_same_kernel", "same_arguments", "descriptors", "observers", "devices", "every_kernel", "c_launcher"],
)
def test_relaunch(name):
    _run(name)


def test_interpreted_kernels_go_through_triton():
    """Every launch of the interpreter is its own, as the suite without a GPU needs."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    from triton_attention_sink_hf.implementations.common.reduce import _launch

    assert _launch(3, 8)._again is None
