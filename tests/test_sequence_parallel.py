"""Ulysses on real ranks equals one process; wrong calls are refused before ranks communicate."""

import gc
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import sequence_parallel_ranks as ranks
import torch
import torch.distributed as dist
from processes import ROOT, free_port, python, run_ranks

from triton_attention_sink_hf import sequence_parallel
from triton_attention_sink_hf.flash_attention_triton_sink import attention_forward, attention_mask
from triton_attention_sink_hf.integrations import sequence_parallel as internals
from triton_attention_sink_hf.integrations.sequence_parallel import active_group

TOLERANCE = 1e-5

pytestmark = pytest.mark.xdist_group("sequence_parallel")  # one worker: the ranks run once


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Case name -> distances from the truth, the largest over four ranks."""
    pytest.importorskip("transformers")
    out = tmp_path_factory.mktemp("ranks") / "distances.json"
    run_ranks(ranks.WORLD, ranks.__file__, out, CUDA_VISIBLE_DEVICES="")
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", ranks.EXACT, ids=lambda case: case.name)
def test_sharded_rows_equal_eager_sample_by_sample(measured, case):
    found = measured[case.name]
    assert found["log_probs"] <= TOLERANCE
    assert max(found["gradients"].values()) <= TOLERANCE, found["gradients"]
    assert sum(name.endswith("sinks") for name in found["gradients"]) == ranks.LAYERS


@pytest.mark.parametrize("case", ranks.EXACT, ids=lambda case: case.name)
def test_a_layer_exchanges_twice_each_way_and_a_forward_gathers_positions_once(measured, case):
    passes = 3 if case.recompute else 2
    expected = {"all_to_all_single": 2 * passes * ranks.LAYERS, "all_gather": 1}
    assert measured[case.name]["calls"] == expected


@pytest.mark.parametrize("case", ranks.ALONE, ids=lambda case: case.name)
def test_the_criterion_sees_a_missing_exchange(measured, case):
    found = measured[case.name]
    assert found["log_probs"] > 1e3 * TOLERANCE
    assert all(found["gradients"][name] > 1e3 * TOLERANCE for name in found["gradients"] if name.endswith("sinks"))


@pytest.mark.parametrize("size", [2, 4])
def test_cu_seq_lens_softcap_and_value_heads_of_another_dimension(measured, size):
    assert max(measured[f"function-sp{size}"].values()) <= 1e-12, measured[f"function-sp{size}"]


def test_sinks_by_token(measured):
    assert max(measured["by-token-sp4"].values()) <= 1e-12, measured["by-token-sp4"]


def test_autocast_unifies_the_dtypes_before_the_exchange(measured):
    assert measured["autocast-sp4"]["out"] <= 1e-2


@pytest.mark.parametrize("group", ["hook", "verl"])
def test_compiled_as_one_graph(measured, group):
    found = dict(measured[f"compiled-{group}"])
    assert found.pop("whole") > 0.1  # the graph compiled outside was not used inside
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.exhaustive
def test_the_benchmark_for_two_gpus_runs_small_on_two_processes(tmp_path):
    pytest.importorskip("transformers")
    out = tmp_path / "two-gpus.json"
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    script = ROOT / "benchmarks" / "two_gpus.py"
    python(*torchrun, script, "--smoke", "--trainer", "fsdp2", "--out", out, CUDA_VISIBLE_DEVICES="")
    found = json.loads(out.read_text())["sp"]
    assert [found[sp]["all_to_alls_per_step"] for sp in ("1", "2")] == [0, 24]  # 2 layers, 2 rows, 3 passes


@pytest.fixture
def group(monkeypatch):
    """Four ranks; a call must raise before it communicates with them."""

    def talk(*_, **__):
        raise AssertionError("a collective was called")

    group = object()
    monkeypatch.setattr(dist, "get_world_size", {group: 4}.get)
    monkeypatch.setattr(dist, "get_rank", {group: 1}.get)
    for name in ("all_to_all_single", "all_gather"):
        monkeypatch.setattr(dist, name, talk)
    monkeypatch.setattr(internals._GROUPS, "stack", [group])
    return group


def call(q_heads=8, kv_heads=2, seqlen=6, seqlen_k=None, dtype=torch.float32, **kwargs):
    q = torch.zeros(1, q_heads, seqlen, 16)
    k = torch.zeros(1, kv_heads, seqlen_k or seqlen, 16)
    options = {"position_ids": torch.arange(seqlen)[None]} | kwargs
    return attention_forward(SimpleNamespace(is_causal=True, training=True), q, k, k.to(dtype), **options)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"q_heads": 6}, ValueError, r"num_attention_heads must be a multiple of .* size 4, got 6"),
        ({"q_heads": 12, "kv_heads": 3}, ValueError, r"num_key_value_heads must be a multiple or a divisor .*, got 3"),
        ({"q_heads": 24, "kv_heads": 6}, ValueError, r"num_key_value_heads must be .* size 4, got 6"),
        ({"attention_mask": torch.ones(1, 6, dtype=torch.long)}, ValueError, "attention_mask must be None under"),
        ({"seqlen_k": 9}, ValueError, "past_key_values must be None under .*, got 9 keys for 6 queries"),
        ({"position_ids": None}, ValueError, "position_ids must be given under sequence parallelism, got None"),
        ({"position_ids": torch.arange(24)[None]}, ValueError, r"position_ids must be .* \(1, 6\), got \(1, 24\)"),
        ({"position_ids": torch.zeros(3, 1, 6)}, ValueError, r"position_ids must be .*, got \(3, 1, 6\)"),
        ({"dtype": torch.bfloat16}, TypeError, "v must have q's dtype"),
        ({"indices": torch.zeros(1, 6, 6, dtype=torch.int32)}, ValueError, "indices must be None under sequence par"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 6]), "cu_seq_lens_k": torch.tensor([0, 6])},
            ValueError,
            "cu_seq_lens_q must end at the 24 rows of all ranks together, got 6",
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 24]), "cu_seq_lens_k": torch.tensor([0, 23])},
            ValueError,
            "cu_seq_lens_k must end at the 24 rows of all ranks together, got 23",
        ),
    ],
)
def test_what_could_not_be_right_is_refused_before_any_exchange(group, arguments, error, message):
    with pytest.raises(error, match=message):
        call(**arguments)


def test_what_only_a_gpu_knows_is_asserted_there(group, monkeypatch):
    cu = torch.tensor([0, 6])
    monkeypatch.setattr(internals, "readable", lambda x: False)
    with pytest.raises(RuntimeError, match="cu_seq_lens_q must end at the 24 rows of all ranks together"):
        call(cu_seq_lens_q=cu, cu_seq_lens_k=cu)


def test_the_same_call_gets_as_far_as_the_exchange(group):
    with pytest.raises(AssertionError, match="a collective was called"):
        call()


def verl(monkeypatch, group):
    fake = SimpleNamespace(get_ulysses_sequence_parallel_group=lambda: group)
    monkeypatch.setitem(sys.modules, "verl.utils.ulysses", fake)


def test_verls_group_is_used_and_a_group_of_one_counts_as_none(monkeypatch):
    pair, one = object(), object()
    monkeypatch.setattr(dist, "get_world_size", {pair: 2, one: 1}.get)
    monkeypatch.delitem(sys.modules, "verl.utils.ulysses", raising=False)
    assert active_group(None) is None
    for found, expected in ((None, None), (one, None), (pair, pair)):
        verl(monkeypatch, found)
        assert active_group(None) is expected


@pytest.fixture
def single_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_torchs_own_ring_attention_is_refused(single_rank):
    experimental = pytest.importorskip("torch.distributed.tensor.experimental")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    row = torch.zeros(1, 4)
    with (
        experimental.context_parallel(mesh, buffers=[row], buffer_seq_dims=[1]),
        pytest.raises(NotImplementedError, match=r"must be Ulysses .*, got torch's context_parallel"),
    ):
        call()
    call()


HOSTS = {  # module -> its state while it cuts rows, while it does not
    "swift.sequence_parallel.sequence_parallel": (
        {"sequence_parallel": SimpleNamespace(world_size=2)},
        [{"sequence_parallel": SimpleNamespace(world_size=size)} for size in (None, 1)],
    ),
    "roll.utils.context_parallel.globals": (
        {"PROCESS_GROUP_MANAGER": SimpleNamespace(ulysses_size=2)},
        [{"PROCESS_GROUP_MANAGER": SimpleNamespace(ulysses_size=size)} for size in (None, 1)],
    ),
    "openrlhf.models.ring_attn_utils": ({"RING_ATTN_GROUP": object()}, [{"RING_ATTN_GROUP": None}]),
    "axolotl.monkeypatch.ring_attn.patch": ({"RING_ATTN_GROUP": object()}, [{"RING_ATTN_GROUP": None}]),
    "deepspeed.runtime.sequence_parallel.parallel_state_sp": (
        {"_SEQUENCE_PARALLEL_GROUP": object()},
        [{"_SEQUENCE_PARALLEL_GROUP": None}],
    ),
}


@pytest.mark.parametrize("module", HOSTS)
def test_rows_that_a_host_has_cut_are_refused(monkeypatch, module):
    cutting, idle = HOSTS[module]
    for state in idle:
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**state))
        call()
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**cutting))
    for made in (call, lambda: attention_mask(1, 6, 6)):
        with pytest.raises(NotImplementedError, match=r"must be triton_attention_sink_hf.sequence_parallel .* to 1"):
            made()


def test_a_group_of_ones_own_goes_before_a_hosts(group, monkeypatch):
    for module, (cutting, _) in HOSTS.items():
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**cutting))
    with pytest.raises(AssertionError, match="a collective was called"):
        call()


def test_the_innermost_group_counts_and_leaves_with_its_block(monkeypatch, single_rank):
    verl(monkeypatch, object())
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    inner = dist.new_group([0])
    with sequence_parallel(single_rank):
        assert active_group(None) is single_rank
        with pytest.raises(KeyError), sequence_parallel(inner):
            assert active_group(None) is inner
            raise KeyError
        assert active_group(None) is single_rank
    assert active_group(None) is sys.modules["verl.utils.ulysses"].get_ulysses_sequence_parallel_group()


def test_a_recomputation_in_backward_belongs_to_its_forwards_group(monkeypatch, single_rank):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    positions, others = torch.arange(3), torch.arange(3)
    with sequence_parallel(single_rank):
        active_group(positions)

    def in_backward(rows):
        seen = []
        x = torch.ones(1, requires_grad=True)
        x.register_hook(lambda gradient: seen.append(active_group(rows)))
        x.sum().backward()
        return seen

    assert in_backward(positions) == [single_rank]
    assert in_backward(others) == [None]
    assert active_group(positions) is None  # a whole row with the same tensor: which one a recomputation belongs to,
    with pytest.raises(RuntimeError, match="must be other tensors in whole and in sharded forwards"):
        in_backward(positions)  # nobody knows
    remembered = len(internals._FORWARD_GROUP)
    del positions
    gc.collect()
    assert len(internals._FORWARD_GROUP) == remembered - 1


def test_a_mask_knows_the_group_of_its_forward(monkeypatch, single_rank):
    """Recomputation gets the mask of its own forward, whatever ran in between."""
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with sequence_parallel(single_rank):
        sharded = attention_mask(1, 6, 6)
    whole = attention_mask(1, 6, 6)
    assert sharded.has_group and sharded.group is single_rank
    assert whole.has_group and whole.group is None


def test_a_group_is_its_threads_own(monkeypatch, single_rank):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    with sequence_parallel(single_rank), ThreadPoolExecutor(1) as elsewhere:
        assert elsewhere.submit(active_group).result() is None
        assert active_group() is single_rank


def test_a_group_of_one_exchanges_nothing(monkeypatch, single_rank):
    monkeypatch.setattr(dist, "all_to_all_single", None)
    with sequence_parallel(single_rank):
        out, _ = call(attention_mask=torch.ones(1, 6, dtype=torch.long), position_ids=None)
    assert out.shape == (1, 6, 8, 16)


@pytest.mark.parametrize("group", [None, 2, "sp", [0, 1]])
def test_only_a_process_group_is_a_group(group):
    with (
        pytest.raises(TypeError, match=r"group must be a torch.distributed.ProcessGroup, got"),
        sequence_parallel(group),
    ):
        pass


def test_a_group_without_this_rank_is_refused(monkeypatch, single_rank):
    monkeypatch.setattr(dist, "get_rank", lambda group=None: 3 if group is None else -1)
    with pytest.raises(ValueError, match="group must contain this rank, got one without rank 3"):
        sequence_parallel(single_rank).__enter__()
