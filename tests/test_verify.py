"""``triton-attention-sink verify`` passes if all is right, and fails for each of three planted faults."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import triton_attention_sink_hf  # noqa: E402, F401  registers the name
from triton_attention_sink_hf.cli import app  # noqa: E402
from triton_attention_sink_hf.verify import models as loading  # noqa: E402
from triton_attention_sink_hf.verify import passes, verify  # noqa: E402
from triton_attention_sink_hf.verify.routing import Routing  # noqa: E402

OURS = "triton_attention_sink"
DEMO = Path(__file__).resolve().parent.parent / "examples" / "verl" / "demo"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders gpt_oss and llama, and config: a gpt-oss without weights."""
    sys.path.insert(0, str(DEMO))
    try:
        import tiny_model
    finally:
        sys.path.remove(str(DEMO))
    folder = tmp_path_factory.mktemp("models")
    tiny_model.write_gpt_oss(folder / "gpt_oss")
    tiny_model.write_llama(folder / "llama")
    transformers.AutoConfig.from_pretrained(folder / "gpt_oss").save_pretrained(folder / "config")
    return folder


def planted(name: str, change) -> str:
    """Register our attention with its keywords changed; the name to call it by."""
    ours = AttentionInterface()[OURS]
    AttentionInterface.register(name, lambda *args, **kwargs: ours(*args, **change(kwargs)))
    AttentionMaskInterface.register(name, AttentionMaskInterface()[OURS])
    return name


FAULTS = {
    "sinks_ignored": lambda kwargs: kwargs | {"s_aux": kwargs["s_aux"] * 0 - 100},
    "sinks_detached": lambda kwargs: kwargs | {"s_aux": kwargs["s_aux"].detach()},
    "segments_ignored": lambda kwargs: kwargs | {"position_ids": None},
}


def command(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "120"})
    return result.exit_code, result.stdout


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("model", ["gpt_oss", "llama"])
def test_ours_passes(models, model, dtype):
    report = verify(str(models / model), dtype=dtype)
    assert report.passed, max(report.rows, key=lambda row: row.excess)
    assert len(report.sink_rows()) == (2 if model == "gpt_oss" else 0)
    assert ("the model has no sinks" in report.notes) == (model == "llama")
    assert max(report.lengths) > 8 and len(set(report.lengths)) == len(report.lengths)
    assert 0 < report.log_prob_mean <= report.log_prob_max < (1e-5 if dtype == "fp32" else 0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_by_a_wide_margin(models, fault, dtype):
    attention = planted(fault, FAULTS[fault])
    code, printed = command("--model", models / "gpt_oss", "--dtype", dtype, "--attention", attention, "--json")
    assert code == 1
    rows = {row["name"]: row for row in json.loads(printed)["rows"]}
    failed = {name for name, row in rows.items() if not row["passed"]}
    sinks = {name for name in rows if name.endswith("sinks")}
    if fault == "sinks_detached":
        assert failed == sinks  # the log-probs and all else are right: nothing but this gradient shows it
    else:
        assert failed > sinks | {"log-probs"}
    telling = sinks if fault.startswith("sinks") else {"log-probs"}
    assert all(rows[name]["error"] > 3 * rows[name]["allowed"] for name in telling)


def test_the_command_prints_a_verdict(models):
    code, printed = command("--model", models / "gpt_oss")
    assert code == 0
    assert "PASS: log-probs and 37 gradients are eager's" in printed
    assert "sinks of 2 layers, from -2.00 to 4.00" in printed
    for layer in range(2):
        assert f"layers.{layer}.sinks" in printed
    code, printed = command("--model", models / "gpt_oss", "--attention", planted("detached", FAULTS["sinks_detached"]))
    assert code == 1
    assert "FAIL: 2 of 38 comparisons exceed what is allowed" in printed


UNUSABLE = {
    "no CUDA": (["--device", "cuda:99"], "device must be one that torch can use here, got 'cuda:99'"),
    "no device": (["--device", "nonsense"], "device must be one that torch can use here, got 'nonsense'"),
    "no numbers": (["--device", "meta"], "device must be one that torch can use here, got 'meta'"),
    "unknown attention": (["--attention", "nothing"], "attention must be a name that transformers knows"),
    "no such path": (["--attention", "/nowhere/triton_attention_sink_hf"], "attention must be a name"),
    "not installed": (["--attention", "nobody-at-all/no-kernel"], "cannot be loaded"),
    "too many layers": (["--layers", 3], "layers must be from 1 to the model's 2, got 3"),
    "no folder": (["--model", "/nowhere/model"], "model must be a folder or a name on the Hub"),
    "no folder here": (["--model", "./nowhere"], "there is no such folder"),
    "not on the Hub": (["--model", "nobody at all/no model"], "the model cannot be loaded"),
    "empty": (["--model", "EMPTY"], "the model cannot be loaded"),
    "broken config": (["--model", "CONFIG"], "the model cannot be loaded"),
    "broken weights": (["--model", "WEIGHTS"], "the model cannot be loaded"),
    "no language model": (["--model", "VIT"], "the model cannot be loaded"),
    "a constant sink": (["--model", "SINK"], "attention_sink must be None or 'learned' to verify, got 0.0"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_compared_is_one_sentence_and_status_2(models, tmp_path, name, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, reason = UNUSABLE[name]
    for folder in ("EMPTY", "CONFIG", "VIT", "SINK"):
        (tmp_path / folder).mkdir()
    config = json.loads((models / "gpt_oss" / "config.json").read_text())
    (tmp_path / "SINK" / "config.json").write_text(json.dumps(config | {"attention_sink": 0.0}))
    (tmp_path / "CONFIG" / "config.json").write_text("[1]")
    (tmp_path / "VIT" / "config.json").write_text('{"model_type": "vit"}')
    shutil.copytree(models / "gpt_oss", tmp_path / "WEIGHTS")
    for file in (tmp_path / "WEIGHTS").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    arguments = [str(tmp_path / x) if x in ("EMPTY", "CONFIG", "WEIGHTS", "VIT", "SINK") else x for x in arguments]
    model = [] if "--model" in arguments else ["--model", models / "gpt_oss"]
    result = CliRunner().invoke(app, ["verify", *map(str, [*model, *arguments])], catch_exceptions=False)
    assert result.exit_code == 2
    *_, sentence = result.stderr.strip().splitlines()  # after the lines of progress
    assert "cannot be verified" in sentence and reason in sentence
    assert "Traceback" not in result.stderr


def test_out_of_memory_is_no_verdict(models, monkeypatch):
    def too_large(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(passes, "packed", too_large)
    result = CliRunner().invoke(app, ["verify", "--model", str(models / "gpt_oss")], catch_exceptions=False)
    assert result.exit_code == 2 and "does not fit: CUDA out of memory" in result.stderr


@pytest.mark.parametrize("error", [RuntimeError("the kernel\nbroke"), KeyError("x"), AssertionError()])
def test_an_attention_that_crashes_fails(models, monkeypatch, error):
    def crash(*arguments):
        raise error

    monkeypatch.setattr(passes, "packed", crash)
    code, printed = command("--model", models / "gpt_oss")
    assert code == 1 and f"FAIL: {type(error).__name__}" in printed


def test_a_model_that_ours_refuses_fails_with_the_reason(tmp_path):
    config = transformers.BloomConfig(n_layer=1, n_head=2, hidden_size=32, vocab_size=64)
    config.save_pretrained(tmp_path)
    code, printed = command("--model", tmp_path)
    assert code == 1
    assert "FAIL: ValueError: attn_implementation must be 'eager' for BloomForCausalLM" in printed


def test_what_does_not_fit_is_refused_before_loading(models, monkeypatch):
    monkeypatch.setattr(loading, "count_parameters", lambda config: 10**15)
    with pytest.raises(ValueError, match="pass --layers"):
        verify(str(models / "gpt_oss"))


def test_a_config_alone_gets_random_weights_and_sinks_that_matter(models):
    report = verify(str(models / "config"), layers=1)
    assert report.passed and "random" in report.notes[0]
    assert list(report.sinks.values()) == [(-2.0, 6.0)]


def test_sinks_of_zero_are_pointed_out(models, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "gpt_oss")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.zero_()
    model.save_pretrained(tmp_path)
    report = verify(str(tmp_path))
    assert report.passed and any(note.startswith("every sink is 0") for note in report.notes)


def test_a_window_longer_than_the_samples_is_pointed_out(models, tmp_path):
    config = transformers.AutoConfig.from_pretrained(models / "gpt_oss")
    config.sliding_window = 4096
    config.save_pretrained(tmp_path)
    assert "the window of 4096 is longer than every sample: it is not exercised" in verify(str(tmp_path)).notes


def test_routing_repeats_the_first_choice():
    routing = Routing(transformers.GptOssConfig(num_local_experts=4))
    first, second = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[1.0, 9.0, 8.0, 2.0]])
    for sample, logits in enumerate((first, second)):
        with routing.of([sample]):
            torch.topk(logits, 2, dim=-1)
            assert torch.equal(torch.topk(torch.arange(5.0), 1).indices, torch.tensor([4]))  # not over the experts
    with routing.of([0, 1]):
        values, indices = torch.topk(torch.cat([second, first]), 2, dim=-1)
    assert indices.tolist() == [[0, 1], [1, 2]]
    assert values.tolist() == [[1.0, 9.0], [3.0, 2.0]]
    assert "differed in 2 of 2 choices" in routing.notes[0]
