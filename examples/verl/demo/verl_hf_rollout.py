"""A rollout server for verl without vLLM or SGLang: Hugging Face eager attention, one sample at a time, on the CPU.

verl imports this module by its own hook (``VERL_USE_EXTERNAL_MODULES=verl_hf_rollout``) and finds the server under
``actor_rollout_ref.rollout.name=hf_eager``. Eager attention on a single unpadded sample is the definition of a sink
model's probabilities: what the trainer computes from packed rows must agree with it.

The server writes down the sinks that it is given (``observer.py``).
"""

from __future__ import annotations

import observer
import ray
import torch
from verl.workers.rollout import base as verl_rollout
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "hf_eager"


class HfServer:
    """A Ray actor that generates. The methods without a body are memory management, which a CPU does not need."""

    def __init__(self, path: str):
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
        self.model = model.eval()
        self.global_steps = 0

    def load(self, weights: dict[str, torch.Tensor], global_steps: int | None) -> None:
        self.model.load_state_dict(weights, strict=True)
        observer.write_rollout({name: x.tolist() for name, x in weights.items() if name.endswith("sinks")})
        self.global_steps = global_steps or 0

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], sampling_params: dict, request_id: str, **_) -> TokenOutput:
        ids, log_probs = list(prompt_ids), []
        limit = sampling_params.get("max_tokens") or sampling_params.get("max_new_tokens") or 16
        temperature = float(sampling_params.get("temperature", 1.0))
        while len(log_probs) < limit and not (log_probs and ids[-1] == self.model.config.eos_token_id):
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            scores = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
            token = int(torch.multinomial(scores.exp(), 1)) if temperature else int(scores.argmax())
            ids.append(token)
            log_probs.append(float(scores[token]))
        return TokenOutput(
            token_ids=ids[len(prompt_ids) :],
            log_probs=log_probs,
            stop_reason="completed",
            num_preempted=0,
            extra_fields={"global_steps": self.global_steps},
        )

    def wake_up(self, tags: list[str] | None = None) -> None: ...
    def sleep(self) -> None: ...
    def clear_kv_cache(self) -> None: ...
    def release_kv_cache(self) -> None: ...
    def resume_kv_cache(self) -> None: ...
    def abort_all_requests(self, reject_request: bool = False) -> None: ...
    def resume_generation(self) -> None: ...


def _actor_name(replica_rank: int) -> str:
    return f"{NAME}_{replica_rank}"


class HfReplica(RolloutReplica):
    """Starts one server. ``num_cpus=0`` and no GPU: it shares the machine with the trainer's worker."""

    async def launch_servers(self) -> None:
        server = ray.remote(HfServer).options(name=_actor_name(self.replica_rank), num_cpus=0)
        self._server_handle = server.remote(self.model_config.path)
        self._server_address = _actor_name(self.replica_rank)
        self.servers = [self._server_handle]


class HfServerAdapter(verl_rollout.BaseRollout):
    """The trainer's side of the server: hands over the weights."""

    async def resume(self, tags: list[str]) -> None: ...
    async def release(self) -> None: ...

    async def update_weights(self, weights, global_steps: int | None = None, **_) -> None:
        # every rank takes part in gathering the weights
        state = {name: tensor.detach().to("cpu", torch.float32, copy=True) for name, tensor in weights}
        if torch.distributed.get_rank() != 0:
            return
        await ray.get_actor(_actor_name(0)).load.remote(state, global_steps)
        print(f"[rollout] received {len(state)} tensors, global step {global_steps}", flush=True)


RolloutReplicaRegistry.register(NAME, lambda: HfReplica)
# The adapter's registry has no register function: an entry is a name and where to import the class from.
verl_rollout._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.{HfServerAdapter.__name__}"
