"""How a command says that it cannot do what was asked: one sentence and exit status 2. Status 1 is a failed check."""

from __future__ import annotations

from typing import NoReturn

import typer


def refuse(reason: object) -> NoReturn:
    """Print the first line of ``reason``, a sentence or an exception, and exit with status 2."""
    typer.echo(one_line(reason), err=True)
    raise typer.Exit(2)


def one_line(reason: object) -> str:
    """The first line of a sentence or of an exception's message; the exception's name where it has none."""
    return (f"{reason}".strip().splitlines() or [type(reason).__name__])[0]
