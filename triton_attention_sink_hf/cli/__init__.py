"""The command ``triton-attention-sink``: one file per subcommand, which imports what it needs when it runs."""

from __future__ import annotations

import typer

from . import bench, demo, doctor, export, verify

app = typer.Typer(
    help="Exact attention with learned sinks, switched on by attn_implementation: triton_attention_sink",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (doctor.doctor, verify.verify, bench.bench, demo.demo, export.export):
    app.command()(command)


def main() -> None:
    app()
