"""Fresh Python processes, for tests of what an import does and for code that must not share this process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Kernels run in Triton's interpreter if they do here (conftest.py).
INTERPRETED_AS_HERE = {"TRITON_INTERPRET": os.environ.get("TRITON_INTERPRET", "0")}


def environment(*path: Path | str, **variables: str) -> dict[str, str]:
    """This process's environment without Triton's interpreter, Hub and autoload; one thread, PYTHONPATH = ``path``."""
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    # AUTOLOAD: else torch imports the package first, if it is installed
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRITON_ATTENTION_SINK_AUTOLOAD": "0"}
    if path:
        own["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return kept | own | variables


def python(
    *arguments: Path | str,
    path: tuple[Path | str, ...] = (ROOT,),
    cwd: Path | str = "/",
    timeout: float | None = 600,
    **variables: str,
) -> subprocess.CompletedProcess:
    """Run ``python *arguments`` to its end. Fails the test, with what was printed, unless it exits with 0.

    Args:
        path: what is on PYTHONPATH; () = nothing. variables: of the environment.
    """
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment(*path, **variables), cwd=cwd, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done


def run_ranks(n: int, *arguments: Path | str, path: tuple[Path | str, ...] = (ROOT,), **variables: str) -> None:
    """``python *arguments`` on n ranks of torch.distributed. Fails the test unless all exit with 0."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    env = environment(*path, **group, **variables)
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)], env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(n)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * n, "\n".join(outputs)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
