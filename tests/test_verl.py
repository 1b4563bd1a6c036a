"""Inside verl: its real actor worker gives eager's log-probs and gradients, and its real trainer runs by config alone.

Everything runs in processes of its own, on the CPU platform of examples/verl/demo, and needs verl and this package
installed (``make test`` does that).
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
import verl_actor

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "examples" / "verl" / "demo"
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed (`make test` does it)"),
    pytest.mark.xdist_group("verl"),  # one after the other: each fills the machine
]


@pytest.fixture(scope="module")
def demo():
    """The modules of the demo: demo, main_ppo, report, tiny_model, toy_task."""
    sys.path.insert(0, str(DEMO))
    try:
        names = ("demo", "main_ppo", "report", "tiny_model", "toy_task")
        yield type("Demo", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def models(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    demo.tiny_model.write_gpt_oss(folder / "gpt_oss")
    demo.tiny_model.write_llama(folder / "llama")
    return folder


def start_actors(models: Path, out: Path, cases: list, world_size: int = 1) -> list[subprocess.Popen]:
    """verl_actor.py on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(DEMO), str(ROOT)]),
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu_platform",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
        "HF_HUB_OFFLINE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
    }
    command = [sys.executable, verl_actor.__file__, str(models), str(out), *(case.name for case in cases)]
    return [
        subprocess.Popen(
            command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world_size)
    ]


@pytest.fixture(scope="module")
def distances(models, tmp_path_factory):
    """Case name -> distances of verl's actor from eager, one sample at a time."""
    out = tmp_path_factory.mktemp("actor") / "distances.json"
    return measured(models, out, [*verl_actor.EXACT, verl_actor.MIXES_SAMPLES, verl_actor.FREEZES_SINKS])


@pytest.fixture(scope="module")
def sharded_distances(models, tmp_path_factory):
    """The same with Ulysses sequence parallelism over two ranks."""
    out = tmp_path_factory.mktemp("actors") / "distances.json"
    return measured(models, out, [*verl_actor.SHARDED, verl_actor.TAKES_SHARDS_FOR_ROWS], world_size=2)


def measured(models: Path, out: Path, cases: list, world_size: int = 1) -> dict:
    processes = start_actors(models, out, cases, world_size)
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", verl_actor.EXACT, ids=lambda case: case.name)
def test_actor_equals_eager_sample_by_sample(distances, case):
    found = distances[case.name]
    assert found["log_probs"] <= TOLERANCE
    assert max(found["gradients"].values()) <= TOLERANCE, found["gradients"]
    assert any(name.endswith("sinks") for name in found["gradients"]) == (case.model == "gpt_oss")


def test_the_criterion_sees_samples_that_mix(distances):
    found = distances[verl_actor.MIXES_SAMPLES.name]
    assert found["log_probs"] > 1e3 * TOLERANCE
    assert all(found["gradients"][name] > 1e3 * TOLERANCE for name in sinks(found))


def test_the_criterion_sees_a_missing_sink_gradient(distances):
    found = distances[verl_actor.FREEZES_SINKS.name]
    assert found["log_probs"] <= TOLERANCE
    assert [name for name, distance in found["gradients"].items() if distance > TOLERANCE] == sinks(found)


def sinks(found: dict) -> list[str]:
    return [name for name in found["gradients"] if name.endswith("sinks")]


@pytest.mark.parametrize("case", verl_actor.SHARDED, ids=lambda case: case.name)
def test_two_actors_with_ulysses_equal_eager_sample_by_sample(sharded_distances, case):
    found = sharded_distances[case.name]
    assert found["log_probs"] <= TOLERANCE
    assert max(found["gradients"].values()) <= TOLERANCE, found["gradients"]


def test_the_criterion_sees_shards_taken_for_rows(sharded_distances):
    found = sharded_distances[verl_actor.TAKES_SHARDS_FOR_ROWS.name]
    assert found["log_probs"] > 1e3 * TOLERANCE
    assert all(found["gradients"][name] > 1e3 * TOLERANCE for name in sinks(found))


@pytest.mark.slow
@pytest.mark.parametrize("by, ranks", [("name", 1), ("path", 1), ("name", 2)])
def test_main_ppo_by_one_config_line(demo, tmp_path, by, ranks):
    """The unmodified trainer, in a folder with a space; the package comes in by its entry point."""
    package = Path(importlib.util.find_spec("triton_attention_sink_hf").origin).parent
    attention = {"name": "triton_attention_sink", "path": str(package)}[by]
    run = prepared(demo, demo.main_ppo.Run(attention, steps=1, folder=tmp_path / "a run", ranks=ranks))
    with demo.main_ppo.started(run) as process:
        returncode = process.wait(timeout=600)
    assert returncode == 0, run.log.read_text()[-5000:]
    report = demo.report.read(run)
    assert report.failures == []
    function = "triton_attention_sink_hf.flash_attention_triton_sink.attention_forward"
    assert report.attentions == {(attention, function)}
    assert report.ranks == {ranks}
    assert report.samples_in_row == 8 if ranks == 1 else 2 <= report.samples_in_row < 8


def test_no_process_outlives_an_aborted_run(demo, tmp_path):
    import psutil

    run = prepared(demo, demo.main_ppo.Run("triton_attention_sink", steps=1, folder=tmp_path))
    with demo.main_ppo.started(run) as process:
        deadline = time.monotonic() + 120
        while "Started a local Ray instance" not in run.log.read_text() and time.monotonic() < deadline:
            time.sleep(0.2)
        begun = {child: child.name() for child in psutil.Process(process.pid).children(recursive=True)}
    assert "raylet" in begun.values(), run.log.read_text()
    ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    assert [name for child, name in begun.items() if child.is_running() and child.status() not in ended] == []


ELSEWHERE = {
    "numpy.py": "raise SystemExit('numpy of the current folder')",
    "torch.py": "from types import SimpleNamespace\ncuda = SimpleNamespace(device_count=lambda: 7)",
    "triton_attention_sink_hf/__init__.py": "raise SystemExit('package of another checkout')",
    "model/config.json": "mine",
    "prompts.parquet": "mine",
    "main_ppo.log": "mine",
    "metrics.jsonl": "mine",
    "observations.jsonl": "mine",
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The current folder, which holds other modules of names that the demo imports, and files of names it writes."""
    for name, text in ELSEWHERE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("python_path", ["", f"modules{os.pathsep}"])
def test_the_demo_imports_and_overwrites_nothing_of_the_current_folder(demo, elsewhere, monkeypatch, python_path):
    """``python -m`` and ``python -c`` import what lies where they are started. The trainer is one that shows it."""
    monkeypatch.setenv("PYTHONPATH", python_path)
    imports = "import json, numpy, sys, torch, triton_attention_sink_hf as package"
    shown = "print(json.dumps([numpy.__file__, torch.__file__, package.__file__, sys.path]))"
    trainer = [sys.executable, "-m", "timeit", "-n1", "-r1", "-s", f"{imports}; {shown}", "pass"]
    monkeypatch.setattr(demo.main_ppo, "command", lambda run, ray_folder: trainer)
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", "."])
    assert [demo.demo.main(), demo.demo.main()] == [1, 1]  # this trainer trains nothing
    logs = list(elsewhere.glob("*/main_ppo.log"))
    assert len(logs) == 2
    for log in logs:
        *modules, path = json.loads(log.read_text().splitlines()[0])
        assert modules == [numpy.__file__, torch.__file__, str(ROOT / "triton_attention_sink_hf" / "__init__.py")]
        assert (str(elsewhere / "modules") in path) == ("modules" in python_path) and str(elsewhere) not in path
    assert {name: (elsewhere / name).read_text() for name in ELSEWHERE} == ELSEWHERE


def test_the_demo_asks_the_installed_torch_for_gpus(demo, elsewhere):
    assert demo.demo._gpus() == torch.cuda.device_count()


@pytest.mark.parametrize("out", ["prompts.parquet", "prompts.parquet/out"])
def test_the_demo_refuses_a_folder_that_is_none(demo, elsewhere, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", out])
    with pytest.raises(SystemExit, match=f"--out must be a folder that can be written, got {out}: "):
        demo.demo.main()


def prepared(demo, run):
    run.folder.mkdir(exist_ok=True)
    demo.tiny_model.write_gpt_oss(run.model)
    demo.toy_task.write_prompts(run.prompts)
    return run


OURS = {
    "name": "triton_attention_sink",
    "function": "triton_attention_sink_hf.flash_attention_triton_sink.attention_forward",
    "training": True,
    "samples_in_row": 8,
    "ranks": 1,
    "calls": 4,
}


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({}, None),
        ({"attention": {"name": "eager", "function": "eager"}}, "attention in the worker must be"),
        ({"attention": {"function": "other.attention_forward"}}, "attention in the worker must be"),
        ({"attention": {"samples_in_row": 1}}, "packed rows must hold several samples"),
        ({"attention": {"training": False}}, "must call attention while training"),
        ({"attention": {"ranks": 2}}, "rows must be shared by 1 ranks, got"),
        ({"diff": 2e-5}, "probabilities of trainer and rollout must agree"),
        ({"diff": float("nan")}, "probabilities of trainer and rollout must agree"),
        ({"move": 0.0}, "must move"),
        ({"steps": 2}, "steps must be 1 to 2"),
    ],
)
def test_the_demo_fails_for_every_reason_it_promises(demo, tmp_path, change, sentence):
    from safetensors.torch import save_file

    run = demo.main_ppo.Run("triton_attention_sink", steps=1, folder=tmp_path)
    run.model.mkdir()
    save_file({"layer.sinks": torch.tensor([1.0, 2.0])}, run.model / "model.safetensors")
    attention = OURS | change.get("attention", {})
    rows = [
        {"global_step": 0, "attention": [], "sinks": {"layer.sinks": [1.0, 2.0]}},
        {"global_step": 1, "attention": [attention], "sinks": {"layer.sinks": [1.0, 2.0 + change.get("move", 0.5)]}},
    ]
    run.observations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"training/rollout_probs_diff_max": change.get("diff", 1e-7)}
    run.metrics.write_text(json.dumps({"step": 1, "data": metrics}) + "\n")
    failures = demo.report.read(replace(run, steps=change.get("steps", 1))).failures
    assert bool(failures) == bool(sentence)
    assert not sentence or any(sentence in failure for failure in failures)
