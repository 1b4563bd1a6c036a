"""What the benchmark makes of measured rows: ratios to the best peer, floors, the table, interrupted runs, plots."""

import inspect
import itertools
import json

import pytest
from results import RESULTS
from typer.testing import CliRunner

from triton_attention_sink_hf.bench import measure, peers, plots, report
from triton_attention_sink_hf.bench.cases import CASES, DECODE_CASES, SHORT, UNEVEN, Case
from triton_attention_sink_hf.bench.peers import Runner
from triton_attention_sink_hf.cli import app

CEILINGS = {"copy_tb_s": 3.0, "matmul_tflop_s": 700.0}


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


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("queries", [1, 3])
def test_a_decode_case_is_checked_against_fp64(queries, window):
    case = Case("decode", 2, 20, heads_q=4, heads_k=2, head_dim=16, window=window, queries=queries)
    tensors = measure.make_tensors(case, device="cpu")
    assert tensors["q"].shape == (2, queries, 4, 16) and tensors["k"].shape == (2, 20, 2, 16)
    for name in ("ours", "eager"):
        runner = peers.PEERS[name](case, tensors)
        assert runner.backward is None
        assert measure._check(runner, measure.oracles(case, tensors))["out"] < 0.01
    keys = min(window or 20, 20)
    assert case.visible_scores == queries * keys * 8 - (0 if window else 8 * sum(range(queries)))
    assert case.bytes("forward") < 2 * (2 * queries * 4 * 16 * 2 + 2 * (keys + queries) * 2 * 16 * 2 + queries * 4 * 4)
    row = _row("ours", "forward", 2.0, DECODE_CASES[0].name)
    (line,) = report.summarise([row], CEILINGS)
    assert line["gb_s"] == pytest.approx(DECODE_CASES[0].bytes("forward") / 2.0 / 1e6)
    assert "GB/s" in report.table([line])


def test_cases_are_what_their_names_say():
    assert len({case.name for case in (*CASES, *DECODE_CASES)}) == len(CASES) + len(DECODE_CASES)
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
    two = {name: lambda case, tensors, name=name: Runner(lambda: name, None) for name in ("ours", "cuDNN")}
    monkeypatch.setattr(measure, "PEERS", two)
    monkeypatch.setattr(measure, "make_tensors", lambda case: {})
    monkeypatch.setattr(measure, "oracles", lambda case, tensors: {})
    monkeypatch.setattr(measure, "_check", lambda runner, want: {"out": 0.0})
    monkeypatch.setattr(measure, "device_ms", lambda function: calls.append(function()) or [float(len(calls))])
    monkeypatch.setattr(measure, "host_us", lambda function: 1.0)
    monkeypatch.setattr(measure, "extra_memory", lambda function: 2)
    ours, cudnn = measure.measure(CASES[0], two, log=lambda line: None)
    assert calls == ["ours", "cuDNN", "cuDNN", "ours", "ours", "cuDNN"]
    assert (ours["implementation"], ours["direction"], ours["ms"]) == ("ours", "forward", 4.0)
    assert (cudnn["implementation"], cudnn["direction"], cudnn["ms"]) == ("cuDNN", "forward", 3.0)


BENCH_RESULTS = {
    path.stem: path for path in sorted(RESULTS.glob("*.json")) if "summary" in json.loads(path.read_text())
}


def test_the_repository_holds_runs_of_all_cases():
    runs = plots.read(BENCH_RESULTS["h100"])
    assert {row["case"] for run in runs for row in run["rows"]} == {case.name for case in CASES}


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


# Plots


def test_the_plots_hold_every_case_in_panels_of_one_run():
    runs = plots.read(RESULTS / "h100.json")
    for direction in ("forward", "backward"):
        panels = plots.panels(runs, direction)
        assert [panel.title.split("\n")[0] for panel in panels] == [
            "Dense rows, full causal",
            "Dense rows, sliding window",
            "Packed rows, full causal",
            "Packed rows, sliding window",
        ]
        labels = [group.label for panel in panels for group in panel.groups]
        assert len(set(labels)) == len(labels) == len(CASES)
        assert {"window 128, 8k, D 64", "full causal, 4k, D 256", "window 4096, 16k, D 128"} <= set(labels)
        assert {"packed rows as in RL, 32k tokens, window 128", "packed rows of 1 to 16k tokens, full causal"} <= {
            *labels
        }


def test_the_fastest_peers_ratio_is_the_tables():
    runs = plots.read(RESULTS / "h100.json")
    tables = [{(line["case"], line["direction"]): line["speedup"] for line in run["summary"]} for run in runs]
    for direction in ("forward", "backward"):
        found = [
            min(ratio for name, ratio in group.ratios.items() if name != "ours")
            for panel in plots.panels(runs, direction)
            for group in panel.groups
        ]
        want = [
            table[row["case"], direction]
            for run, table in zip(runs, tables, strict=True)
            for row in run["rows"]
            if (row["implementation"], row.get("direction")) == ("ours", direction)
        ]
        assert sorted(found) == pytest.approx(sorted(want)) and len(want) == len(CASES)


def _run(*rows, commit="abc"):
    card = {"card": "H100", "driver": "5", "torch": "2.11", "triton": "3.6", "date": "2026-01-02", "commit": commit}
    return {"environment": card, "rows": list(rows), "summary": []}


def test_a_missing_bar_has_its_reason():
    cudnn = next(iter(plots.WORDS))
    run = _run(
        _row("ours", "forward", 2.0),
        _row("ours", "backward", 4.0),
        _row("FlashAttention-3", "forward", 1.0),
        {"case": "full-8k", "implementation": "cuDNN", "problem": cudnn},
        {"case": "full-8k", "implementation": "FlexAttention", "problem": "wrong: relative error"},
        *(_row(name, "forward", 3.0, "full-2k") for name in ("ours", "cuDNN", "FlexAttention", "fla")),
    )
    short, long = plots.panels([run], "forward")[0].groups
    assert long.label == "full causal, 8k, D 64" and long.ms == 2.0
    assert long.ratios == {"ours": 1.0, "FlashAttention-3": 0.5}
    assert long.missing == {
        "dense rows only": ["cuDNN"],
        "wrong: relative error": ["FlexAttention"],
        "not in this run": ["fla"],
    }
    assert short.missing == {"not in this run": ["FlashAttention-3"]}
    (backward,) = plots.panels([run], "backward")[0].groups
    assert backward.missing["forward only"] == ["FlashAttention-3"] and backward.ratios == {"ours": 1.0}


def test_the_problems_that_have_words_are_those_of_the_peers():
    assert all(f'Unsupported("{problem}")' in inspect.getsource(peers) for problem in plots.WORDS)


def test_cases_of_another_run_come_from_it_alone(tmp_path):
    first = _run(*(_row("ours", "forward", 2.0, case) for case in ("full-2k", "full-8k")))
    later = _run(*(_row("ours", "forward", 3.0, case) for case in ("full-2k", "full-8k")), commit="def")
    (tmp_path / "later.json").write_text(json.dumps(later))
    (tmp_path / "first.json").write_text(json.dumps({**first, "other_runs": {"later.json": ["full-2k"]}}))
    runs = plots.read(tmp_path / "first.json")
    panels = {
        panel.title: [(group.label, group.ms) for group in panel.groups] for panel in plots.panels(runs, "forward")
    }
    assert panels == {
        "Dense rows, full causal\n(of another run, commit def)": [("full causal, 2k, D 64", 3.0)],
        "Dense rows, full causal": [("full causal, 8k, D 64", 2.0)],
    }
    text = plots.caption(runs)
    assert "\nRun: H100, driver 5, torch 2.11, triton 3.6, 2026-01-02, commit abc" in text
    assert "\nAnother run: H100, driver 5, torch 2.11, triton 3.6, 2026-01-02, commit def" in text
    with pytest.raises(ValueError, match=r"must be a bench\.json"):
        plots.read(RESULTS / "h100-host.json")


@pytest.mark.parametrize("direction", plots.DIRECTIONS)
@pytest.mark.parametrize("run", BENCH_RESULTS)
def test_what_is_drawn(run, direction):
    """Bars as long as their ratios; every text inside its panel and over no other."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the bench extra")
    runs = plots.read(RESULTS / f"{run}.json")
    panels = plots.panels(runs, direction)
    if not panels:  # decoding has no backward
        assert not any(row["direction"] == direction for run in runs for row in run["summary"])
        return
    figure = plots.draw(panels, direction, plots.caption(runs))
    figure.draw_without_rendering()
    boxes = [part.get_window_extent() for part in (*figure.legends, *figure.texts)]
    assert figure.texts[0].get_text() == plots.caption(runs) and len(boxes) == 2
    for panel, axis in zip(panels, figure.axes, strict=False):
        texts = [text.get_text() for text in axis.texts]
        assert axis.get_title() == panel.title
        assert [bar.get_width() for bar in axis.patches] == [x for group in panel.groups for x in group.ratios.values()]
        for group in panel.groups:
            wanted = [group.label, f"{group.ms:.3f} ms"]
            wanted += [f"{ratio:.2f}\u00d7" for name, ratio in group.ratios.items() if name != "ours"]
            wanted += [f"{', '.join(names)}: {reason}" for reason, names in group.missing.items()]
            assert sorted(texts[: len(wanted)]) == sorted(wanted)
            del texts[: len(wanted)]
        assert not texts
        assert all(text.get_window_extent().x1 <= axis.bbox.x1 for text in axis.texts)
        boxes += [axis.title.get_window_extent(), *(text.get_window_extent().padded(-2) for text in axis.texts)]
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_the_repositorys_plots_are_of_its_results():
    for direction in ("forward", "backward"):
        png = (RESULTS / f"{direction}.png").read_bytes()
        for run in plots.read(RESULTS / "h100.json"):
            assert f"commit {run['environment']['commit']}".encode() in png
    decoding = json.loads((RESULTS / "h100-decode.json").read_text())
    assert f"commit {decoding['environment']['commit']}".encode() in (RESULTS / "decode.png").read_bytes()


def test_bench_draws_a_result_again_without_a_gpu(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, of the bench extra")
    arguments = ["bench", "--redraw", str(RESULTS / "h100-packed.json"), "--output", str(tmp_path)]
    for _ in range(2):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    assert {file.name for file in tmp_path.iterdir()} == {"forward.png", "backward.png", "bench-files.json"}
    assert (tmp_path / "forward.png").read_bytes().startswith(b"\x89PNG")
    result = CliRunner().invoke(app, ["bench", "--redraw", str(RESULTS / "h100-host.json"), "--output", str(tmp_path)])
    assert result.exit_code == 2 and "must be a bench.json" in result.stderr
