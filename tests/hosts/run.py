"""``make hosts``: other people's trainers, each in an environment of its own, with this attention by one line.

For each host of catalogue.py: two steps of fine-tuning of a tiny random gpt-oss, on padded rows and on a packed row.
The reference is the host itself with eager attention on padded rows, where samples cannot see each other. Prints a
table in Markdown; its numbers are how far the parameter that is furthest off moved otherwise than by eager, relative to
its movement. The last column is eager attention on the packed row: what samples that see each other come to. Exits 1 if
a host does otherwise than the catalogue says. The logs stay in --work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from catalogue import HERE, HOSTS, Host, Run, write_data

ROOT = HERE.parent.parent
TOLERANCE = 1e-4
TORCH = "torch==2.13.0"
TIMEOUT = 900
MAKE_MODEL = """
import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1])
import tiny_model; tiny_model.WRITE[sys.argv[2]](Path(sys.argv[3]))
"""
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"


def python_of(environment: Path, host: Host) -> Path:
    """The host's Python, in an environment that is made if its list of packages is not the one that it was made for."""
    python, made_for = environment / "bin" / "python", environment / "made_for.json"
    wanted = json.dumps([TORCH, host.install])
    if not made_for.exists() or made_for.read_text() != wanted:
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        for line in (("--upgrade", "pip"), (TORCH,), *host.install):  # old pips take minutes to resolve some hosts
            subprocess.run([python, "-m", "pip", "install", "--quiet", *line], check=True)
        made_for.write_text(wanted)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", ROOT], check=True)
    return python


def train(python: Path, host: Host, run: Run) -> tuple[int, str, int]:
    """Exit status, output and number of calls of this package's attention."""
    witness = run.out.with_suffix(".calls")
    witness.mkdir()
    stand_ins = run.out.parent / "stand_ins"
    stand_ins.mkdir(exist_ok=True)
    for module in host.stand_ins:
        (stand_ins / f"{module}.py").touch()
    variables = {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}", "WITNESS": f"{witness}",
        "PYTHONPATH": f"{HERE / 'witness'}{os.pathsep}{stand_ins}", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2",
        "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "WANDB_MODE": "disabled", "DO_NOT_TRACK": "1",
    }  # fmt: skip
    program, *arguments = host.command(run)
    done = subprocess.run(
        [python.parent / program, *arguments], env=os.environ | variables, cwd=run.out.parent, text=True,
        timeout=TIMEOUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    run.out.with_suffix(".log").write_text(done.stdout)
    return done.returncode, done.stdout, sum(int(file.read_text()) for file in witness.iterdir())


class Failed(Exception):
    """A run that ended otherwise than it had to; the message says how."""


def measured(python: Path, host: Host, run: Run, eager: Run) -> tuple[float, int]:
    """How far the run is from ``eager``, and the calls of this package's attention."""
    status, output, calls = train(python, host, run)
    if status:
        raise Failed(last_line(output))
    command = [python, HERE / "compare.py", run.model, run.out, eager.out]
    compared = subprocess.run(command, text=True, capture_output=True)
    if compared.returncode:
        raise Failed(last_line(compared.stderr))
    return float(compared.stdout), calls


def judged(python: Path, host: Host, run: Run, eager: Run) -> str:
    """What the run did, in the table's words, if that is what the catalogue says."""
    refusal = (host.refused or {}).get("packed" if run.packed else "padded")
    if refusal is not None:
        status, output, _ = train(python, host, run)
        if not status or refusal not in output:
            raise Failed(f"not refused with {refusal!r}: {last_line(output)}")
        return f"refused: {refusal}"
    distance, calls = measured(python, host, run, eager)
    if not calls:
        raise Failed("this package's attention was not called")
    if not distance <= TOLERANCE:
        raise Failed(f"{distance:.0e} of a parameter's movement from eager's")
    return f"{distance:.0e} ({calls} calls)"


def control(python: Path, host: Host, run: Run, eager: Run) -> str:
    """Eager attention on the packed row: what becomes of samples that see each other, if the host lets them."""
    try:
        return f"{measured(python, host, run, eager)[0]:.1e}"
    except Failed as reason:
        return f"refused: {reason}"


def last_line(output: str) -> str:
    return (output.strip().splitlines() or [""])[-1]


def tried(name: str, host: Host, environments: Path, work: Path) -> str:
    """The host's row of the table."""
    python = python_of(environments / (host.environment or name.lower()), host)
    folder = work / name.lower()
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "data")
    called(python, MAKE_MODEL, ROOT / "examples" / "verl" / "demo", host.model, folder / "model")

    def run(attn: str, packed: bool) -> Run:
        out = f"{'packed' if packed else 'padded'}-{'eager' if attn == 'eager' else 'ours'}"
        return Run(attn, packed, folder / "model", folder / "data", folder / out)

    eager = run("eager", packed=False)
    status, output, calls = train(python, host, eager)
    if status or calls:
        raise Failed(f"eager: {last_line(output)}")
    padded, packed = (judged(python, host, run(host.attn, packed), eager) for packed in (False, True))
    beside = "" if packed.startswith("refused") else control(python, host, run("eager", packed=True), eager)
    versions = zip(host.packages, called(python, VERSIONS, *host.packages).split(), strict=True)
    named = ", ".join(map(" ".join, versions))
    return f"| {name} | {named} | {host.line} | {padded} | {packed} | {beside} |"


def called(python: Path, code: str, *arguments: str | Path) -> str:
    """What a program of one line prints."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [python, "-c", code, *arguments]
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environment).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="*", metavar="HOST", help=f"of {', '.join(HOSTS)}; all by default")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-hosts", help="default: .venv-hosts")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "hosts", help="data, models, logs")
    arguments = parser.parse_args()
    unknown = set(arguments.hosts) - set(HOSTS)
    if unknown:
        parser.error(f"HOST must be one of {[*HOSTS]}, got {unknown}")
    rows, failed = [], False
    for name in arguments.hosts or HOSTS:
        print(f"{name} ...", flush=True)
        try:
            rows.append(tried(name, HOSTS[name], arguments.environments.absolute(), arguments.work.absolute()))
        except (Failed, subprocess.SubprocessError) as reason:
            rows.append(f"| {name} | FAILED: {reason} | | | | |")
            failed = True
    print(
        "| trainer | versions | the line | padded | packed | packed, eager |\n|---|---|---|---|---|---|",
        *rows,
        sep="\n",
    )
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
