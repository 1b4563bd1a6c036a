"""What the Hopper backwards compute before their products, interpreted: lse in base 2, delta and dsink."""

import pytest
import torch
from cases import Case, make_inputs

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="this triton has no Gluon for Hopper")

from triton_attention_sink_hf.call import Call
from triton_attention_sink_hf.implementations.common.problem import Problem
from triton_attention_sink_hf.implementations.triton_hopper.backward_preprocess import new_statistics, preprocess_launch


@pytest.mark.parametrize("sink", [-1e9, -1e10, -1e30, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min])
@pytest.mark.usefixtures("poisoned_empty")
def test_a_sink_far_below(sink):
    """It gets nothing of rows that see a key, and what comes back through lse of rows that see none."""
    inputs = make_inputs(Case(150, heads=(2, 1), head_dim=16, dlse=True))
    sinks = torch.tensor([sink, 1.0])
    problem = Problem(Call(inputs.q, inputs.k, inputs.v, sinks, inputs.mask, 0.25, 0.0, False))
    lse = inputs.q.new_full((1, 2, 150), 3.0)
    lse[..., :7] = sinks[:, None]
    out = torch.randn_like(inputs.dout)
    out[:, :7] = 0.0
    statistics, parts = new_statistics(problem, lse, True)
    dlse = inputs.dlse
    preprocess_launch(problem, out.stride(), inputs.dout.stride(), dlse.stride(), has_buffer=False)(
        out_ptr=out, dout_ptr=inputs.dout, lse_ptr=lse, dlse_ptr=dlse, sink_ptr=sinks, buffer_ptr=None,
        statistics_ptr=statistics, dsink_ptr=parts,
    )  # fmt: skip
    base_2, delta = statistics[..., :150]
    hidden_from = torch.where(base_2 == float("inf"), 0.0, torch.exp2(float("-inf") - base_2))
    assert bool((hidden_from == 0.0).all()), "P of a hidden key must be 0"
    torch.testing.assert_close(base_2[:, 7:], torch.full_like(base_2[:, 7:], 3.0 / 0.6931471805599453))
    torch.testing.assert_close(delta, (out * inputs.dout).sum(-1)[0].T - dlse[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.sum(0)[0], dlse[0, 0, :7].sum(), rtol=1e-5, atol=1e-6)
