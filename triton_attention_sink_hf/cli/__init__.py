"""The command ``triton-attention-sink``: one file per subcommand, which imports what it needs when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, demo, doctor, export, verify

app = typer.Typer(
    help="Exact attention with learned sinks, switched on by attn_implementation: triton_attention_sink",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (doctor.doctor, verify.verify, bench.bench, demo.demo, export.export):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"triton-attention-sink {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    try:
        app()
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise SystemExit('torch must be installed, 2.8 or newer (pytorch.org, "Get started")') from None
