"""The command line as tests call it."""

from pathlib import Path

from typer.testing import CliRunner

from triton_attention_sink_hf.cli import app

NAMES = ["Import Test", "Triton Kernel Check", "Basic Forward Pass", "GQA Support", "Path Format"]
RESULTS = [{"name": name, "passed": True, "detail": "fine"} for name in NAMES]


def invoke(*arguments: str):
    return CliRunner().invoke(app, arguments, catch_exceptions=False)


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below a folder with its bytes, every link with its target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = str(path.readlink())
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found
