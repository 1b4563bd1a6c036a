"""``triton-attention-sink demo``: train a tiny gpt-oss with eager attention and with ours, and compare."""

from __future__ import annotations

from typing import Annotated

import typer

from .refusal import one_line, refuse

TOLERANCE = 1e-4


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = 30,
    attention: Annotated[
        str, typer.Option(help="attn_implementation to compare with eager.")
    ] = "triton_attention_sink",
) -> None:
    """Train a tiny random gpt-oss twice on the same data, eager and ours: same losses, and the sinks move.

    Exits 1 if a loss differs by more than 1e-4 or no sink moved, 2 if the attention cannot be used.
    (In a checkout, `make demo` runs verl's trainer.)
    """
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table

    console = Console()
    try:
        from ..verify import check_attention

        check_attention(attention)
        runs = {name: _train(name) for name in ("eager", attention)}
    except (ImportError, ValueError) as error:
        refuse(f"the demo cannot run: {one_line(error)}")
    rows = [
        [next(run) for run in runs.values()]
        for _ in track(range(steps), description="training twice", console=console, transient=True)
    ]
    console.print(f"attn_implementation: {attention}, against eager", soft_wrap=True)
    table = Table("step", "loss, eager", "loss, ours", "difference", "sinks moved, eager", "sinks moved, ours")
    for step, ((eager_loss, eager_moved), (loss, moved)) in enumerate(rows, 1):
        if step in (1, steps) or step % max(steps // 10, 1) == 0:
            numbers = (f"{eager_loss:.6f}", f"{loss:.6f}", f"{abs(loss - eager_loss):.1e}")
            table.add_row(f"{step}", *numbers, f"{eager_moved:.5f}", f"{moved:.5f}")
    console.print(table)
    worst = max(abs(ours[0] - eager[0]) for eager, ours in rows)
    moved = rows[-1][1][1]
    passed = worst <= TOLERANCE and moved > 0.0
    console.print(f"{'PASS' if passed else 'FAIL'}: losses differ by at most {worst:.1e}, a sink moved by {moved:.5f}")
    raise typer.Exit(0 if passed else 1)


def _train(attn_implementation: str):
    """Build a model; return an iterator that trains it on four random rows.

    Each step yields the loss and how far the sink that moved most has moved so far.
    """
    import torch

    from ..checks import tiny_gpt_oss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny_gpt_oss(attn_implementation).to(device).train()
    generator = torch.Generator().manual_seed(1)
    sinks = [parameter for name, parameter in model.named_parameters() if name.endswith("sinks")]
    before = [sink.detach().clone() for sink in sinks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(1, model.config.vocab_size, (4, 32), generator=generator).to(device)

    def steps():
        while True:
            loss = model(tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield loss.item(), max((s - b).abs().max().item() for s, b in zip(sinks, before, strict=True))

    return steps()
