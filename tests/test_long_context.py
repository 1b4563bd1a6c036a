"""benchmarks/long_context.py at toy size: it measures what it says, and its peers are what they are named after."""

import json
import sys

import pytest
import torch
from processes import INTERPRETED_AS_HERE, ROOT, python

FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))
import packed_peers  # noqa: E402

pytest.importorskip("transformers")


def test_a_smoke_run_finds_ours_as_exact_as_eager(tmp_path):
    script = FOLDER / "long_context.py"
    python(script, "--smoke", "--worker", "hf", "--output", tmp_path, **INTERPRETED_AS_HERE)
    data = json.loads((tmp_path / "long_context.json").read_text())
    rows = {(row["tokens"], row["implementation"]): row for row in data["rows"]}
    assert rows.keys() >= {(n, name) for n in (192, 320) for name in ("ours", "eager", packed_peers.YARDSTICK)}
    for (tokens, name), row in rows.items():
        yardstick = rows[tokens, packed_peers.YARDSTICK]["errors"]
        for key in ("log_prob_mean", "others"):
            assert row["errors"][key] < 2 * yardstick[key], (tokens, name, key)
        assert 0 < row["errors"]["sinks_worst"] < 0.1
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
    assert data["longest"]["ours"]["fits"] == 256


@pytest.mark.parametrize("window", [None, 8])
def test_the_mask_of_the_peers_cuts_samples_and_windows(window):
    lengths = (5, 20, 1, 9)
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    found = packed_peers.dense_mask(position_ids, window, torch.float32)[0, 0] == 0
    alone = [torch.ones(n, n).tril().triu(1 - (window or n)).bool() for n in lengths]
    assert torch.equal(found, torch.block_diag(*alone).bool())
