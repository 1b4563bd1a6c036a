"""Arguments that are tensor subclasses of torch.distributed: attention waits for them, or names them in an error."""

import pytest
import torch
import torch.distributed as dist

from triton_attention_sink_hf import attention_sink

IMPLEMENTATIONS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _arguments() -> dict:
    q, k, v = (torch.randn(1, 8, heads, 16) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v, "sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0])}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_what_is_still_being_gathered_is_waited_for(name, implementation):
    from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_gather_tensor_autograd

    arguments = _arguments()
    leaf = arguments[name].requires_grad_()
    want = attention_sink(**arguments, implementation=implementation)
    arguments[name] = all_gather_tensor_autograd(leaf, 0, dist.group.WORLD)
    assert isinstance(arguments[name], AsyncCollectiveTensor)
    got = attention_sink(**arguments, implementation=implementation)
    assert torch.equal(got, want)
    assert torch.equal(*(torch.autograd.grad(x.square().sum(), leaf)[0] for x in (got, want)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
@pytest.mark.parametrize("placement", ["Replicate", "Shard"])
def test_dtensors_are_named(placement, name, implementation):
    """Attention cannot know which gradient a rank owes the others."""
    from torch.distributed import tensor
    from torch.distributed.device_mesh import init_device_mesh

    placements = [tensor.Replicate() if placement == "Replicate" else tensor.Shard(0)]
    arguments = _arguments()
    mesh = init_device_mesh("cpu", (1,))
    arguments[name] = torch.nn.Parameter(tensor.distribute_tensor(arguments[name], mesh, placements))
    with pytest.raises(TypeError, match=rf"{name} must be a plain tensor, got a DTensor with placements \({placement}"):
        attention_sink(**arguments, implementation=implementation)
