"""Launches around Triton's argument handling get the same kernel and arguments as through it; others go through it.

On a CPU, in a process without Triton's interpreter. A stand-in for Triton's driver records launches and runs none, so
it shows that a kernel is the same one, not that it is right.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMES = (
    "same_key_same_kernel", "same_arguments", "descriptors", "observers", "devices", "every_kernel", "c_launcher",
)  # fmt: skip


@pytest.fixture(scope="module")
def found() -> dict[str, str | None]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join((str(TESTS.parent), str(TESTS)))
    command = [sys.executable, TESTS / "in_forks.py", "relaunch_driver", *NAMES]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.xdist_group("relaunch")  # one worker: the process runs once
@pytest.mark.parametrize("name", NAMES)
def test_relaunch(name, found):
    assert found[name] is None, found[name]


def test_interpreted_kernels_go_through_triton():
    """Every launch of the interpreter is its own, as the suite without a GPU needs."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1")
    from triton_attention_sink_hf.implementations.common.reduce import _launch

    assert _launch(3, 8)._again is None
