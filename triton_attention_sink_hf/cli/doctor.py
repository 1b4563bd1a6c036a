"""``triton-attention-sink doctor``: what is installed, what would serve which model and why, and whether it works."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from .refusal import one_line

PACKAGES = (
    "torch", "triton", "transformers", "verl", "vllm", "flash-attn", "flash-attn-4", "trl", "kernels", "accelerate",
    "numpy",
)  # fmt: skip
PACKAGE = Path(__file__).absolute().parent.parent
VLLM = "0.25.1"  # the first that we saw load gpt-oss in bf16


def doctor(
    attn: Annotated[
        str | None, typer.Option(metavar="STRING", help="Only say whether this attn_implementation works, and why.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check this installation: versions, card, implementations, five checks, config lines. Exits 1 on a FAIL."""
    if attn is not None:
        _doctor_of_name(attn, as_json)
    report = collect()
    if as_json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    raise typer.Exit(0 if all(check["passed"] for check in report["checks"]) else 1)


def _doctor_of_name(attn: str, as_json: bool) -> NoReturn:
    from ..naming import judge

    verdict = judge(attn)
    if verdict.ours:
        problem = _tried(attn)
        verdict = verdict if problem is None else replace(verdict, works=False, reason=problem)
    if as_json:
        print(json.dumps({"attn_implementation": attn, **asdict(verdict), "registration": registration()}, indent=2))
    else:
        print(f"attn_implementation: {attn}\n  {'works' if verdict.works else 'does not work'}: {verdict.reason}")
        if verdict.ours:
            print(f"  {registration()}")
        elif "triton_attention_sink'" not in verdict.reason:
            print(f"  this package's: {config_lines()['name']}")
    raise typer.Exit(0 if verdict.works else 1)


def _tried(attn: str) -> str | None:
    """Why a tiny gpt-oss could not be built with it; None if it was, and kept the string."""
    from ..checks import tiny_gpt_oss

    try:
        found = tiny_gpt_oss(attn).config._attn_implementation
    except Exception as error:  # whatever transformers raises
        return one_line(error)
    return None if found == attn else f"transformers replaces it by {found!r}"


def registration() -> str:
    """How a new process comes to know the name."""
    from ..naming import automatic_registration

    reason = automatic_registration()
    if reason is None:
        return "registered by itself: `import torch` makes the name known once transformers is loaded"
    return (
        f"not registered by itself ({reason}): import triton_attention_sink_hf before the model is built, or start the "
        "program with python -m triton_attention_sink_hf"
    )


def collect() -> dict:
    """Everything that ``doctor`` prints, as plain JSON types."""
    found = versions()
    return {
        "versions": found,
        "verl": verl_hints(found),
        "registration": registration(),
        "device": device(),
        "implementations": choices(),
        "checks": checks(),
        "config": config_lines(),
    }


def versions() -> dict[str, str | None]:
    """Name -> installed version, None if it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    from .. import __version__

    found: dict[str, str | None] = {"triton_attention_sink_hf": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def verl_hints(found: dict[str, str | None]) -> list[str]:
    """What stops or slows a run of verl with these versions; nothing without verl."""
    if found["verl"] is None:
        return []
    from packaging.version import Version  # verl brings it

    hints = []
    if found["vllm"] is not None and Version(found["vllm"]) < Version(VLLM):
        hints.append(
            f"vllm must be {VLLM} or newer for gpt-oss in bf16, got {found['vllm']}: "
            f"KeyError 'layers.0.mlp.experts.w2_weight' (pip install vllm=={VLLM})"
        )
    if not _has_cross_entropy():
        hints.append(
            "flash-attn's cross entropy cannot be imported: verl takes log-probs token by token, slowly "
            '("Log-probs token by token" in CLEAN_USAGE_GUIDE.md)'
        )
    return hints


def _has_cross_entropy() -> bool:
    """Whether verl's own import of it succeeds."""
    try:
        import flash_attn.ops.triton.cross_entropy  # noqa: F401
    except ImportError:
        return False
    return True


def device() -> dict:
    """The card that kernels would run on; type "cpu" without one."""
    import torch

    if not torch.cuda.is_available():
        return {"type": "cpu", "name": platform.processor() or platform.machine(), "count": 0}
    properties = torch.cuda.get_device_properties(0)
    architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return {
        "type": "cuda",
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "architecture": architecture or f"sm_{properties.major}{properties.minor}",
        "runtime": f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
    }


def choices() -> list[dict]:
    """Which implementation would serve layers of gpt-oss and Llama in bf16 here, and why not each of the others."""
    import torch

    from .. import explain

    where = "cuda" if torch.cuda.is_available() else "cpu"
    layers = (
        ("gpt-oss, sliding layer", 64, 8, 64, True, (127, 0)),
        ("gpt-oss, full layer", 64, 8, 64, True, (-1, -1)),
        ("Llama", 32, 8, 128, False, (-1, -1)),
    )
    rows = []
    for layer, heads, kv_heads, head_dim, has_sinks, window in layers:
        q = torch.empty(1, 256, heads, head_dim, dtype=torch.bfloat16, device=where)
        k = torch.empty(1, 256, kv_heads, head_dim, dtype=torch.bfloat16, device=where)
        sinks = torch.empty(heads, dtype=torch.bfloat16, device=where) if has_sinks else None
        explanation = explain(q, k, k, sinks, window_size=window)
        shape = f"{heads}/{kv_heads} heads of {head_dim}, {'sinks' if has_sinks else 'no sinks'}"
        shape += f", window {window[0] + 1}" if window[0] >= 0 else ""
        rows.append(
            {
                "layer": f"{layer} ({shape})",
                "implementation": explanation.implementation,
                "reasons": explanation.reasons,
            }
        )
    return rows


def checks() -> list[dict]:
    """The five checks, in their own process: without a GPU they need Triton's interpreter, which this one lacks."""
    from ..checks import interpreter_environment
    from ..processes import module_command

    environment = os.environ | interpreter_environment()
    run = subprocess.run(module_command("checks"), env=environment, capture_output=True, text=True)
    results = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    if run.returncode and all(result["passed"] for result in results):
        last_line = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        results.append({"name": "All checks run", "passed": False, "detail": last_line})
    return results


def config_lines() -> dict:
    """What to paste into a config for this installation; ``path_problem``: why the path cannot be used, or None."""
    from ..registration import NAME, path_problem

    return {
        "name": f"attn_implementation: {NAME}",
        "path": f"attn_implementation: {PACKAGE}",
        "path_problem": path_problem(f"{PACKAGE}"),
        "external_lib": "external_lib: triton_attention_sink_hf",
    }


def _print(report: dict) -> None:
    from rich.console import Console
    from rich.markup import escape

    def show(line: str = "") -> None:
        console.print(line, soft_wrap=True, highlight=False)

    console = Console()
    show("[bold]Versions[/bold]")
    for package, version in report["versions"].items():
        show(f"  {package:<26}{version or '[dim]not installed[/dim]'}")
    for hint in report["verl"]:
        show(f"  [yellow]verl:[/yellow] {escape(hint)}")
    show(f"\n[bold]Registration[/bold]\n  {escape(report['registration'])}")
    card = report["device"]
    show("\n[bold]Device[/bold]")
    if card["type"] == "cpu":
        show(f"  no GPU that torch can use; CPU {card['name']}")
    else:
        show(f"  {card['count']} x {card['name']}, {card['memory_gib']} GiB, {card['architecture']}, {card['runtime']}")
    show("\n[bold]Which implementation serves a call in bf16[/bold]")
    for row in report["implementations"]:
        show(f"  {row['layer']}: [bold]{row['implementation']}[/bold]")
        for name, reason in row["reasons"].items():
            if reason is not None:
                show(f"    not {name}: {escape(reason)}")
    show("\n[bold]Checks[/bold]")
    for check in report["checks"]:
        mark = "[green]PASS[/green]" if check["passed"] else "[red]FAIL[/red]"
        show(f"  {mark}  {check['name']:<20} {escape(check['detail'])}")
    config = report["config"]
    show("\n[bold]Config lines for this installation[/bold]")
    show("  actor_rollout_ref:")
    show("    model:")
    show(f"      {config['external_lib']}   [dim]# optional: a failed import stops the run[/dim]")
    show("      override_config:")
    show(f"        {config['name']}")
    if config["path_problem"] is None:
        show(f"  or by path\n        {escape(config['path'])}")
    else:
        show(f"  not by path: {escape(config['path_problem'])}")
