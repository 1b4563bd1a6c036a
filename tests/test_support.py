"""INSTALLATION_GUIDE.md's tables of cards, kernels and versions say what the code, the results and the pins say."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from processes import ROOT
from results import ENVIRONMENTS, RESULTS

sys.path.insert(0, str(ROOT / "tests" / "hosts"))
from catalogue import HOSTS

GUIDE = (ROOT / "INSTALLATION_GUIDE.md").read_text()
CONSTRAINTS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if re.match(r"[\w-]+==", line)
)
PROJECT = (ROOT / "pyproject.toml").read_text()


def table(heading: str) -> list[list[str]]:
    """The rows below the heading, without the first two lines."""
    section = GUIDE.split(f"# {heading}\n")[1].split("\n#")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def versions(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w.])\d+\.\d+(?:\.\d+)?(?:b\d+)?(?![\w.]\w)", text))


CARDS, SOFTWARE = table("Cards, and which kernel serves"), {row[0].split(",")[0]: row for row in table("Software")}
TARGETS = {target: row for row in CARDS for target in re.findall(r"sm\d+|gfx\d+|CPU", row[0])}
COMPILED = json.loads((RESULTS / "architectures.json").read_text())


def test_the_cards_are_those_that_were_run_and_those_that_were_compiled():
    run = {environment["card"].removeprefix("NVIDIA ").split()[0] for environment in ENVIRONMENTS}
    assert run == set(re.findall(r"[HBA]\d00", TARGETS["sm90"][0]))
    status = {target: row[1] for target, row in TARGETS.items()}
    only_compiled = set.union(*(set(targets) for targets in COMPILED.values())) - {"sm90"}
    assert {target for target, it in status.items() if it == "compiled only"} == only_compiled
    assert {target for target, it in status.items() if it == "run here"} == {"sm90", "CPU"}
    assert f"with triton {' and '.join(COMPILED)}" in GUIDE


@pytest.mark.parametrize("target", TARGETS)
def test_the_kernel_that_serves(target, monkeypatch):
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this triton has no Gluon for Hopper")
    from cases import Case, make_inputs

    from triton_attention_sink_hf.call import Call, Memo
    from triton_attention_sink_hf.implementations import KERNELS, fastest, flash_attention_4, load
    from triton_attention_sink_hf.masks import Mask

    def serves(call: Call) -> str:
        if target == "CPU":
            return fastest(call)
        for name in KERNELS:
            backend = load(name)
            slower = getattr(backend, "slower_reason", lambda call: None)
            if (slower(call) or backend.supports(call)) is None:
                return name
        return "reference"

    for name in ("triton_window", "triton_hopper", "flash_attention_4"):
        monkeypatch.setattr(load(name), "target_name", lambda device: target)
    monkeypatch.setattr(flash_attention_4, "_absent", lambda: None)
    inputs = make_inputs(Case(512, heads=(4, 2), head_dim=64, dtype=torch.bfloat16))
    full = Call(inputs.q, inputs.k, inputs.v, inputs.sinks, Mask(-1, 0), 0.125, 0.0, False, Memo())
    real = torch.ones(1, 512, dtype=torch.bool)
    calls = {
        "decoding": [replace(full, q=full.q[:, :1])],
        "window up to 129": [replace(full, mask=Mask(left, 0)) for left in (127, 128)],
        "full, wider windows": [full, replace(full, mask=Mask(129, 0))],
        "all else": [
            replace(full, mask=Mask(-1, 0, key_padding_mask=real)),
            replace(full, q=full.q.float(), k=full.k.float(), v=full.v.float()),
            replace(full, mask=Mask(-1, 0, key_ranges=torch.zeros(1, 512, 2, dtype=torch.int32))),
        ],
    }
    for kernel, (kind, those) in zip(TARGETS[target][2:], calls.items(), strict=True):
        assert {serves(call) for call in those} == {kernel.split("`")[1]}, kind


def test_the_triton_that_the_hopper_kernels_need():
    text = (ROOT / "triton_attention_sink_hf/implementations/triton_hopper/config.py").read_text()
    low, high = re.search(r"^TRITON_VERSIONS = \(\((\d+, \d+)\), \((\d+, \d+)\)\)", text, re.MULTILINE).groups()
    assert f"`triton_hopper` needs triton {low.replace(', ', '.')} to {high.replace(', ', '.')}" in GUIDE


@pytest.mark.parametrize("package", SOFTWARE)
def test_versions_that_were_run_have_a_source(package):
    """Those of results and pins are there, and all that are there are of one, or in a record of the guide."""
    name, run = package.lower(), SOFTWARE[package][1]
    measured = {environment[name].split("+")[0] for environment in ENVIRONMENTS if name in environment}
    pinned = {CONSTRAINTS[name]} if name in CONSTRAINTS else set()
    if package == "torch":
        pinned = set(re.findall(r"^TORCH \?= torch==(\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if package == "Python":
        measured = {version.rpartition(".")[0] for version in measured}
    if package == "triton":
        pinned = set(COMPILED)
    if package == "transformers":
        pinned |= set(json.loads((RESULTS / "models.json").read_text()))
    if "the versions above" in run:
        return
    assert measured | pinned <= versions(run), "a version that was run is not in the table"
    records = GUIDE.split("## Versions that were run")[1] + GUIDE.split("## 4. Hub folder")[1].split("\n## ")[0]
    assert versions(run) - measured - pinned <= versions(records), "no result, pin or record has this version"


def test_what_is_too_old_is_what_pip_refuses():
    for package in ("torch", "triton", "transformers", "Python"):
        floor = re.search(rf'("{package}|requires-{package.lower()} = ")>=([\d.]+)', PROJECT)[2]
        assert SOFTWARE[package][3].startswith(f"older than {floor}")
    excluded = re.search(r'^hf = \["transformers>=[\d.]+,!=([\d.]+)"', PROJECT, re.MULTILINE)[1]
    assert SOFTWARE["transformers"][3].endswith(f"; {excluded}")


@pytest.mark.parametrize("host", HOSTS)
def test_the_trainers_have_the_versions_that_their_environments_pin(host):
    (row,) = [row for row in table("Other trainers") if row[0].startswith(f"{host} ")]
    pins = dict(pin.split("==") for line in HOSTS[host].install for pin in line if re.fullmatch(r"[\w-]+==[\d.]+", pin))
    shown = {pins[package] for package in HOSTS[host].packages[:2] if package in pins}
    assert shown <= versions(row[0])
