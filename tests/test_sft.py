"""Supervised fine-tuning by TRL, the Hugging Face Trainer and verl: their parameters after two steps are eager's.

Each trainer runs as it is, in a process of its own (sft_runs.py), with this attention by config or one import. Eager
then repeats the steps sample by sample, from the batches that the trainer made.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import sft_runs
import torch
from processes import ROOT, free_port, python
from sft_runs import LEARNING_RATE, LENGTHS, MIXED, OURS, STEPS

pytest.importorskip("transformers")

DEMO = ROOT / "examples" / "verl" / "demo"
# `make test` installs TRL there, apart: verl 0.9.1's actor fails where TRL 1.16 can be imported
TRL_APART = Path(sys.prefix) / "trl"
TOLERANCE = 1e-4
MODES = {
    "trl": ("packing", "padding_free"),
    "hf": ("flattened", "flattened_cu_seqlens", "padded"),
    "verl": ("packed", "padded"),
}
PACKED = {"trl": ("packing", "padding_free"), "hf": ("flattened",), "verl": ("packed",)}
HOSTS = [pytest.param(host, marks=pytest.mark.xdist_group("verl" if host == "verl" else "sft")) for host in MODES]


def missing(host: str) -> str | None:
    if host == "trl" and importlib.util.find_spec("trl") is None and not TRL_APART.is_dir():
        return "TRL is not installed (`make test` does it)"
    if host == "verl" and importlib.util.find_spec("verl") is None:
        return "verl is not installed (`make test` does it)"
    return None


@pytest.fixture(scope="module", params=HOSTS)
def host(request):
    if missing(request.param):
        pytest.skip(missing(request.param))
    return request.param


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sys.path.insert(0, str(DEMO))
    try:
        import tiny_model
    finally:
        sys.path.remove(str(DEMO))
    folder = tmp_path_factory.mktemp("sft") / "gpt_oss"
    tiny_model.write_gpt_oss(folder)
    return folder


@pytest.fixture(scope="module")
def runs(host, model, tmp_path_factory):
    """(mode, attention) -> what sft_runs.py recorded."""
    out = tmp_path_factory.mktemp(host)
    cases = [(mode, OURS) for mode in MODES[host]] + [(mode, MIXED) for mode in PACKED[host]]
    path = {"trl": (ROOT, TRL_APART), "hf": (ROOT,), "verl": (DEMO,)}[host]
    wanted = (f"{mode}/{name}" for mode, name in cases)
    python(sft_runs.__file__, host, model, out, *wanted, path=path, cwd=out, **variables(host))
    return {(mode, name): torch.load(out / f"{mode}-{name}.pt") for mode, name in cases}


def variables(host: str) -> dict[str, str]:
    """What each host's process needs in its environment to train on a CPU."""
    own = {"CUDA_VISIBLE_DEVICES": ""}
    if host == "verl":
        own |= {"VERL_USE_EXTERNAL_MODULES": "verl_cpu_platform", "VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        own |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    return own


def repeated(model: Path, steps: list) -> tuple[dict, dict]:
    """Parameters before and after the steps, by eager attention on one sample at a time."""
    eager = sft_runs.loaded(model, "eager").train()
    before = {name: x.detach().clone() for name, x in eager.named_parameters()}
    for samples in steps:
        counted = sum((labels[1:] != -100).sum() for _, labels in samples)
        eager.zero_grad()
        for ids, labels in samples:
            logits = eager(ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            (loss / counted).backward()
        with torch.no_grad():
            for x in eager.parameters():
                x -= LEARNING_RATE * x.grad
    return before, {name: x.detach() for name, x in eager.named_parameters()}


def distances(model: Path, run: dict) -> dict[str, float]:
    """Of every parameter's movement from eager's, relative to eager's."""
    before, after = repeated(model, run["steps"])
    assert run["parameters"].keys() == after.keys()
    return {
        name: ((run["parameters"][name] - x).norm() / (x - before[name]).norm()).item() for name, x in after.items()
    }


def test_two_steps_move_every_parameter_as_eager_would(host, model, runs):
    for mode in MODES[host]:
        run = runs[mode, OURS]
        assert len(run["steps"]) == STEPS
        assert all(len(samples) > 1 for samples in run["steps"][:1])
        lengths = {len(ids) for samples in run["steps"] for ids, _ in samples}
        assert host == "verl" or lengths <= set(LENGTHS)
        found = distances(model, run)
        print(mode, f"largest distance {max(found.values()):.1e}")
        assert max(found.values()) <= TOLERANCE, (mode, found)
        assert sum(name.endswith("sinks") for name in found) == 2


def test_samples_that_see_each_other_are_noticed(host, model, runs):
    for mode in PACKED[host]:
        found = distances(model, runs[mode, MIXED])
        print(mode, {name: x for name, x in found.items() if name.endswith("sinks")})
        assert all(found[name] > 100 * TOLERANCE for name in found if name.endswith("sinks")), (mode, found)
