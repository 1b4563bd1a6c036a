"""``make hosts``: other people's trainers, each in an environment of its own, with this attention by one line.

For each host of catalogue.py: two steps of fine-tuning of a tiny random gpt-oss, on padded rows and on a packed row.
The reference is the host itself with eager attention on padded rows, where samples cannot see each other. Prints a
table in Markdown; its numbers are how far the parameter that is furthest off moved otherwise than by eager, relative to
its movement. Exits 1 if a host does otherwise than the catalogue says. The logs stay in --work.
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


def judged(python: Path, host: Host, run: Run, eager: Run) -> tuple[bool, str]:
    """Whether the run did what the catalogue says, and the table's words for what it did."""
    expected = (host.refused or {}).get("packed" if run.packed else "padded")
    status, output, calls = train(python, host, run)
    if expected is not None:
        return status != 0 and expected in output, f"refused: {expected}" if expected in output else "not refused"
    if status:
        return False, f"failed: {output.strip().splitlines()[-1]}"
    compared = subprocess.run(
        [python, HERE / "compare.py", run.model, run.out, eager.out], text=True, capture_output=True
    )
    if compared.returncode:
        return False, compared.stderr.strip().splitlines()[-1]
    found = json.loads(compared.stdout)
    return calls > 0 and found["largest"] <= TOLERANCE, f"{found['largest']:.0e} ({calls} calls)"


def tried(name: str, host: Host, environments: Path, work: Path) -> tuple[bool, str]:
    """Whether the host did what the catalogue says, and its row of the table."""
    slug = name.lower().replace(" ", "-")
    python = python_of(environments / (host.environment or slug), host)
    folder = work / slug
    shutil.rmtree(folder, ignore_errors=True)
    write_data(folder / "data")
    make_model = "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); import tiny_model; "
    make_model += "tiny_model.WRITE[sys.argv[2]](Path(sys.argv[3]))"
    arguments = (ROOT / "examples" / "verl" / "demo", host.model, folder / "model")
    subprocess.run([python, "-c", make_model, *arguments], check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})

    def run(attn: str, packed: bool) -> Run:
        out = f"{'packed' if packed else 'padded'}-{'eager' if attn == 'eager' else 'ours'}"
        return Run(attn, packed, folder / "model", folder / "data", folder / out)

    eager = run("eager", packed=False)
    status, output, calls = train(python, host, eager)
    if status or calls:
        return False, f"| {name} | eager failed: {output.strip().splitlines()[-1]} |"
    results = [judged(python, host, run(host.attn, packed), eager) for packed in (False, True)]
    versions = subprocess.run(
        [
            python,
            "-c",
            "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))",
            *host.packages,
        ],
        check=True,
        text=True,
        capture_output=True,
    ).stdout.split()
    named = ", ".join(f"{package} {version}" for package, version in zip(host.packages, versions, strict=True))
    return all(good for good, _ in results), f"| {name} | {named} | {host.line} | {results[0][1]} | {results[1][1]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hosts", nargs="*", metavar="HOST", help=f"of {', '.join(HOSTS)}; all by default")
    parser.add_argument("--environments", type=Path, default=ROOT / ".venv-hosts", help="default: .venv-hosts")
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "hosts", help="data, models, logs")
    arguments = parser.parse_args()
    unknown = set(arguments.hosts) - set(HOSTS)
    if unknown:
        parser.error(f"HOST must be one of {[*HOSTS]}, got {unknown}")
    rows, good = [], True
    for name in arguments.hosts or HOSTS:
        print(f"{name} ...", flush=True)
        as_said, row = tried(name, HOSTS[name], arguments.environments.absolute(), arguments.work.absolute())
        rows.append(row)
        good &= as_said
        print("  as the catalogue says" if as_said else f"  NOT as the catalogue says: {row}", flush=True)
    print("| host | versions | the line | padded | packed |\n|---|---|---|---|---|", *rows, sep="\n")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
