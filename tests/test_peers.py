"""`make peer-tests` on a made-up checkout of flash-attn: what it counts, what it takes for a failure."""

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT, environment, python

PEERS = ROOT / "tests" / "peers"
PEER_TEST = """
import torch
from flash_attn.cute.interface import flash_attn_func


def heads(n, seed=0):
    return torch.randn(1, 5, n, 16, generator=torch.Generator().manual_seed(seed))


def test_sinks():
    q, k, v, sinks = heads(2), heads(1, 1), heads(1, 2), torch.tensor([0.0, 3.0], requires_grad=True)
    out, lse = flash_attn_func(q, k, v, causal=True, learnable_sink=sinks)
    scores = torch.einsum("bqhd,bkd->bhqk", q, k[:, :, 0]) / 4
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    both = torch.cat([scores, sinks.view(1, 2, 1, 1).expand(1, 2, 5, 1)], -1)
    want = torch.einsum("bhqk,bkd->bqhd", both.softmax(-1)[..., :-1], v[:, :, 0])
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(*(torch.autograd.grad(x.square().sum(), sinks)[0] for x in (out, want)))


def test_other_arguments():
    flash_attn_func(heads(2), heads(1), heads(1), score_mod=abs)
"""
NO_CALL = "def test_nothing():\n    import flash_attn\n"
UNEXPECTED = """
import torch
from flash_attn import flash_attn_func


def test_sinks():
    flash_attn_func(*[torch.ones(1, 2, 1, 16)] * 3)


def test_refused():
    flash_attn_func(*[torch.ones(1, 2, 1, 16)] * 3, softcap=-1.0)
"""


@pytest.fixture
def peers_run(tmp_path):
    """Of a test file of a peer and further arguments: exit status, and the summary of run.py."""

    def run(text: str, *arguments: str) -> tuple[int, dict]:
        (tmp_path / "tests").mkdir()
        (tmp_path / "tests" / "test_peer.py").write_text(text)
        command = [sys.executable, PEERS / "run.py", "--flash-attention", tmp_path, "--tests", "tests/test_peer.py",
                   "--output", tmp_path / "summary.json", *arguments]  # fmt: skip
        hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": "", "PATH": os.environ["PATH"]}
        done = subprocess.run(command, env=environment(**hidden), cwd=tmp_path, capture_output=True, text=True)
        assert (tmp_path / "summary.json").exists(), done.stdout + done.stderr
        return done.returncode, json.loads((tmp_path / "summary.json").read_text())["flash-attention"]

    return run


def test_calls_and_expected_refusals_are_counted(peers_run):
    status, found = peers_run(PEER_TEST)
    assert status == 0 and found["failed"] == {}
    assert (found["passed"], found["served"], found["calls"]) == (1, 1, 1)
    assert found["refused"] == {"FlashAttention-4's other features": 1}


@pytest.mark.parametrize("fault", ["no-sink", "dsinks", "future"])
def test_a_planted_fault_fails(peers_run, fault):
    status, found = peers_run(PEER_TEST, "--fault", fault)
    assert status == 1 and list(found["failed"]) == ["tests/test_peer.py::test_sinks"]


def test_a_run_without_a_call_fails(peers_run):
    status, found = peers_run(NO_CALL)
    assert status == 1 and found["passed"] == 1
    assert found["failed"] == {"flash-attention": "no call reached this package"}


def test_an_unexpected_refusal_fails(peers_run):
    status, found = peers_run(UNEXPECTED)
    assert status == 1 and found["passed"] == 1
    assert "softcap must be" in found["failed"]["tests/test_peer.py::test_refused"]


def test_faults_and_suites_are_those_that_there_are():
    code = """
import plugin, run, served
assert run.FAULTS == (*served.FAULTS,) and run.SUITES.keys() == plugin.STAND_INS.keys()
"""
    python("-c", code, path=(ROOT, PEERS))
