"""What the benchmark says of measured rows: ratios to the best peer, floors, the table, an interrupted run, plots."""

import json
from pathlib import Path

import pytest

from triton_attention_sink_hf.bench import measure, report
from triton_attention_sink_hf.bench.cases import CASES, SHORT, UNEVEN, Case
from triton_attention_sink_hf.bench.peers import Runner

CEILINGS = {"copy_tb_s": 3.0, "matmul_tflop_s": 700.0}
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def _row(implementation, direction, ms, case="full-8k"):
    times = {"ms": ms, "ms_p20": ms, "ms_p80": ms, "host_us": 50.0, "extra_bytes": 0}
    return {"case": case, "implementation": implementation, "direction": direction, **times}


def test_visible_scores_and_bytes():
    dense = Case("dense", 2, 4, heads_q=3, heads_k=1, head_dim=8)
    assert dense.visible_scores == 2 * 3 * (1 + 2 + 3 + 4)
    assert Case("window", 1, 5, heads_q=1, heads_k=1, window=2).visible_scores == 1 + 2 + 2 + 2 + 2
    assert Case("packed", 1, 5, heads_q=1, heads_k=1, lengths=(2, 3)).visible_scores == 3 + 6
    assert dense.flops("forward") == 4 * 8 * dense.visible_scores
    assert dense.flops("backward") == 10 * 8 * dense.visible_scores
    assert dense.bytes("forward") == 8 * (2 * 3 * 8 * 2 + 2 * 1 * 8 * 2 + 3 * 4)


def test_cases_are_what_their_names_say():
    assert len({case.name for case in CASES}) == len(CASES)
    assert sum(UNEVEN) == 32768 and min(UNEVEN) == 1 and max(UNEVEN) == 16384
    assert len(SHORT) == 1000
    for case in CASES:
        assert case.lengths is None or (sum(case.lengths) == case.seqlen and case.batch == 1)


def test_the_best_peer_is_the_fastest_that_ran_in_that_direction():
    rows = [
        _row("ours", "forward", 2.0),
        _row("FlashAttention-4", "forward", 3.0),
        _row("cuDNN", "forward", 2.5),
        {"case": "full-8k", "implementation": "fla", "problem": "wrong: relative error"},
        _row("ours", "backward", 4.0),
        _row("FlashAttention-4", "backward", 2.0),
    ]
    forward, backward = report.summarise(rows, CEILINGS)
    assert (forward["best_peer"], forward["speedup"]) == ("cuDNN", pytest.approx(1.25))
    assert (backward["best_peer"], backward["speedup"]) == ("FlashAttention-4", pytest.approx(0.5))
    assert report.problems(rows) == ["full-8k: fla: wrong: relative error"]


def test_implementations_are_timed_in_turns_that_run_back_and_forth(monkeypatch):
    calls = []
    peers = {name: lambda case, tensors, name=name: Runner(lambda: name, None) for name in ("ours", "cuDNN")}
    monkeypatch.setattr(measure, "PEERS", peers)
    monkeypatch.setattr(measure, "make_tensors", lambda case: {})
    monkeypatch.setattr(measure, "oracles", lambda case, tensors: {})
    monkeypatch.setattr(measure, "_check", lambda runner, want: {"out": 0.0})
    monkeypatch.setattr(measure, "device_ms", lambda function: calls.append(function()) or [float(len(calls))])
    monkeypatch.setattr(measure, "host_us", lambda function: 1.0)
    monkeypatch.setattr(measure, "extra_memory", lambda function: 2)
    ours, cudnn = measure.measure(CASES[0], peers, log=lambda line: None)
    assert calls == ["ours", "cuDNN", "cuDNN", "ours", "ours", "cuDNN"]
    assert (ours["implementation"], ours["direction"], ours["ms"]) == ("ours", "forward", 4.0)
    assert (cudnn["implementation"], cudnn["direction"], cudnn["ms"]) == ("cuDNN", "forward", 3.0)


BENCH_RESULTS = {
    path.stem: path for path in sorted(RESULTS.glob("*.json")) if "summary" in json.loads(path.read_text())
}


def test_the_repository_holds_a_run_of_all_cases():
    assert {row["case"] for row in json.loads(BENCH_RESULTS["h100"].read_text())["rows"]} == {
        case.name for case in CASES
    }


@pytest.mark.parametrize("run", BENCH_RESULTS)
def test_results_in_the_repository_say_what_their_rows_say(run):
    result = json.loads(BENCH_RESULTS[run].read_text())
    assert report.summarise(result["rows"], result["ceilings"]) == result["summary"]
    assert report.pair_ms(result["rows"]) == result["gpt_oss_pair_ms"]
    assert all("problem" not in row or row["implementation"] != "ours" for row in result["rows"])


def test_an_interrupted_run_goes_on_only_in_its_own_environment(tmp_path):
    path = tmp_path / "bench.json"
    environment = {"card": "H100", "commit": "abc"}
    assert report.measured_before(path, environment) == []
    rows = [_row("ours", "forward", 2.0)]
    path.write_text(json.dumps({"environment": environment, "rows": rows}))
    assert report.measured_before(path, environment) == rows
    assert report.measured_before(path, {**environment, "card": "H200"}) == []


def test_plots():
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the bench extra")
    result = json.loads(BENCH_RESULTS["h100"].read_text())
    files = report.plot(result["summary"], "a card")
    assert list(files) == ["forward.png", "backward.png"]
    assert all(png.startswith(b"\x89PNG") for png in files.values())
