"""Inside verl: its real actor worker gives eager's log-probs and gradients, and its real trainer runs by config alone.

Everything runs in processes of its own, on the CPU platform of examples/verl/demo, and needs verl and this package
installed (``make test`` does that).
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
import torch
import verl_actor
from processes import ROOT, run_ranks

DEMO = ROOT / "examples" / "verl" / "demo"
TOLERANCE = 1e-5

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed (`make test` does it)"),
    pytest.mark.xdist_group("verl"),  # one after the other: each fills the machine
]


@pytest.fixture(scope="module")
def demo():
    """The modules of the demos."""
    sys.path.insert(0, str(DEMO))
    try:
        names = ("demo", "gpu_demo", "main_ppo", "report", "tiny_model", "toy_task", "training")
        yield type("Demo", (), {name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(DEMO))


@pytest.fixture(scope="module")
def models(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    demo.tiny_model.write_gpt_oss(folder / "gpt_oss")
    demo.tiny_model.write_llama(folder / "llama")
    return folder


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
    """What verl_actor.py writes, run on every rank."""
    platform = {
        "VERL_USE_EXTERNAL_MODULES": "verl_cpu_platform",
        "VERL_PLATFORM": "cpu",
        "VERL_ENGINE_DEVICE": "cuda",
    }
    names = [case.name for case in cases]
    run_ranks(world_size, verl_actor.__file__, models, out, *names, path=(DEMO, ROOT), **platform)
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
@pytest.mark.parametrize("by, ranks", [("name", 1), pytest.param("path", 1, marks=pytest.mark.exhaustive), ("name", 2)])
def test_main_ppo_by_one_config_line(demo, tmp_path, by, ranks):
    """The unmodified trainer, in a folder with a space; the package comes in by its entry point."""
    package = Path(importlib.util.find_spec("triton_attention_sink_hf").origin).parent
    attention = {"name": "triton_attention_sink", "path": str(package)}[by]
    run = prepared(demo, demo.main_ppo.Run(attention, steps=1, folder=tmp_path / "a run", ranks=ranks))
    shipped = (DEMO.parent / "my_ppo.yaml").read_text()
    assert by == "path" or f"attn_implementation: {attention}" in shipped
    with demo.main_ppo.started(run) as process:
        returncode = process.wait(timeout=600)
    assert returncode == 0, run.log.read_text()[-5000:]
    report = demo.report.read(run)
    assert demo.demo.failures(report) == []
    function = "triton_attention_sink_hf.flash_attention_triton_sink.attention_forward"
    assert report.attentions == {(attention, function, "cpu")}
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
    assert demo.training.gpus() == torch.cuda.device_count()


@pytest.mark.parametrize("out", ["prompts.parquet", "prompts.parquet/out"])
def test_the_demo_refuses_a_folder_that_is_none(demo, elsewhere, monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", out])
    with pytest.raises(SystemExit, match=f"--out must be a folder that can be written, got {out}: "):
        demo.demo.main()


def prepared(demo, run):
    run.folder.mkdir(exist_ok=True)
    demo.main_ppo.write_inputs(run)
    return run


OURS = {
    "name": "triton_attention_sink",
    "function": "triton_attention_sink_hf.flash_attention_triton_sink.attention_forward",
    "device": "cuda",
    "training": True,
    "samples_in_row": 8,
    "ranks": 1,
    "calls": 4,
}
KERNELS = {"_attn_fwd_kernel": [8, 100.0], "_attn_bwd_dq_kernel": [4, 100.0], "void at::native::add": [9, 10.0]}


def observed(demo, run, change: dict):
    """What a run leaves behind: two steps, in which the sink 2.0 moves by 0.5 each."""
    from safetensors.torch import save_file

    run.model.mkdir(parents=True)
    save_file({"layer.sinks": torch.tensor([1.0, 2.0])}, run.model / "model.safetensors")
    move, sent = change.get("move", 0.5), change.get("rollout", [[9.0, 9.0], [1.0, 2.0], [1.0, 2.5]])
    rows = [{"role": "rollout", "process": 7, "sinks": {"layer.sinks": sinks}} for sinks in sent]
    rows.append({"role": "kernels", "kernels": change.get("kernels", KERNELS)})
    rows += [
        {
            "role": "trainer",
            "step": step,
            "attention": [OURS | change.get("attention", {})],
            "sinks": {"layer.sinks": [1.0, 2.0 + step * move]},
            "sink_gradients": {"layer.sinks": 0.1},
        }
        for step in (1, 2)
    ]
    run.observations.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {"training/rollout_probs_diff_max": change.get("diff", 1e-7)}
    metrics["training/rollout_probs_diff_mean"] = change.get("mean", 2e-3)
    steps = [
        {"step": step, "data": metrics | {"rollout_corr/k3_kl": k3}}
        for step, k3 in enumerate(change.get("k3", [1e-3] * change.get("steps", 2)), 1)
    ]
    run.metrics.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return demo.report.read(run)


FAULTS = [
    ({}, None),
    ({"attention": {"name": "eager", "function": "eager"}}, "attention in the worker must be"),
    ({"attention": {"function": "other.attention_forward"}}, "attention in the worker must be"),
    ({"attention": {"samples_in_row": 1}}, "packed rows must hold several samples"),
    ({"attention": {"training": False}}, "must call attention while training"),
    ({"attention": {"ranks": 2}}, "rows must be shared by 1 ranks, got"),
    ({"move": 0.0, "rollout": [[1.0, 2.0]]}, "must move"),
    ({"steps": 1}, "steps must be 1 to 2"),
    ({"rollout": []}, "the rollout's sinks must be observed, got none"),
    ({"rollout": [[9.0, 9.0], [1.0, 2.0]]}, "must generate step 2 with the trainer's layer.sinks"),
    ({"rollout": [[1.0, 2.5], [1.0, 2.0]]}, "must generate step 2 with the trainer's layer.sinks"),
    ({"rollout": [[9.0, 9.0], [1.0, 2.5]]}, "must generate step 1 with the trainer's layer.sinks"),
]
OF_THE_DEMO = [
    ({"diff": 2e-5}, "probabilities of trainer and rollout must agree"),
    ({"diff": float("nan")}, "probabilities of trainer and rollout must agree"),
]
OF_THE_GPU_DEMO = [
    ({"mean": 2.6e-3}, "step 1: rollout_probs_diff_mean must be at most 1.25 times the padded control's 2.00e-03"),
    ({"k3": [1e-3, 2e-3]}, "step 2: k3_kl must be at most 1.25 times the padded control's 1.50e-03, got 2.00e-03"),
    ({"k3": [1e-3, float("nan")]}, "step 2: verl must report how far"),
    ({"mean": float("nan")}, "step 1: verl must report how far"),
    ({"kernels": {}}, "this package's fwd kernels must run on the GPU"),
    ({"kernels": {"_attn_fwd_kernel": [8, 1.0]}}, "this package's bwd kernels must run on the GPU"),
]


def verdict(found: list[str], sentence: str | None) -> bool:
    return any(sentence in failure for failure in found) if sentence else found == []


@pytest.mark.parametrize("change, sentence", FAULTS + OF_THE_DEMO)
def test_the_demo_fails_for_every_reason_it_promises(demo, tmp_path, change, sentence):
    run = demo.main_ppo.Run("triton_attention_sink", steps=2, folder=tmp_path)
    assert verdict(demo.demo.failures(observed(demo, run, change)), sentence)


@pytest.mark.parametrize("change, sentence", FAULTS + OF_THE_GPU_DEMO)
def test_the_gpu_demo_fails_for_every_reason_it_promises(demo, tmp_path, change, sentence):
    run = demo.main_ppo.Run("triton_attention_sink", steps=2, folder=tmp_path, gpu=True, rollout="vllm")
    found = observed(demo, run, change)
    control = {"steps": [{"probs_diff_mean": 2e-3, "k3_kl": 1.5e-3}, {"probs_diff_mean": 1e-4, "k3_kl": 1e-3}]}
    assert verdict(list(demo.gpu_demo.failures(run, found, control)), sentence)


def test_the_gpu_demo_holds_its_control_to_no_control(demo, tmp_path):
    run = demo.main_ppo.Run("eager", 2, tmp_path, gpu=True, rollout="vllm", packed=False)
    found = observed(demo, run, {"attention": {"name": "eager", "samples_in_row": 1}, "kernels": {}})
    assert list(demo.gpu_demo.failures(run, found, None)) == []


def test_the_sinks_that_vllm_has_are_the_trainers_in_bf16(demo, tmp_path):
    run = demo.main_ppo.Run("triton_attention_sink", steps=2, folder=tmp_path, gpu=True, rollout="vllm")
    rounded = torch.tensor(2.001).bfloat16().item()
    change = {"move": 0.001, "rollout": [[1.0, 2.0]]}  # too small a step for bf16: nothing new to send
    assert rounded == 2.0 and observed(demo, run, change).failures == []


@pytest.mark.parametrize(
    "kind, rollout, ranks",
    [
        ("gpt_oss", "vllm", 2),
        pytest.param("llama", "vllm", 1, marks=pytest.mark.exhaustive),
        pytest.param("gpt_oss", "hf_eager", 1, marks=pytest.mark.exhaustive),
    ],
)
def test_verl_composes_what_the_demos_ask_for(demo, tmp_path, kind, rollout, ranks):
    """By the file that the demo writes: the shipped one with another attention."""
    run = demo.main_ppo.Run("/a folder/sink", 3, tmp_path / "a run", True, ranks, kind, rollout)
    command = prepared(demo, run) and demo.main_ppo.command(run, tmp_path)
    shown = subprocess.run([*command, "--cfg", "job"], capture_output=True, text=True, cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    import yaml

    config = yaml.safe_load(shown.stdout)
    actor = config["actor_rollout_ref"]
    assert actor["model"]["override_config"]["attn_implementation"] == "/a folder/sink"
    assert actor["rollout"]["name"] == rollout and actor["rollout"]["calculate_log_probs"]
    assert actor["model"]["use_remove_padding"] and actor["actor"]["strategy"] == "fsdp2"
    assert actor["actor"]["fsdp_config"]["ulysses_sequence_parallel_size"] == ranks
    length = config["data"]["max_prompt_length"] + config["data"]["max_response_length"]
    assert actor["rollout"]["max_model_len"] == length
    assert rollout == "hf_eager" or actor["actor"]["ppo_max_token_len_per_gpu"] >= 8 * length
