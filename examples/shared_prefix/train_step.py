"""One policy-gradient step of a tiny gpt-oss on groups of answers to the same prompts, in two ways that agree.

Packed: every answer behind a copy of its prompt, as trainers do today. Tree: every prompt once, its answers behind it,
``shared_prefixes`` with the forward. Prints the tokens, the loss and the largest difference of a gradient.
Run ``python train_step.py``; no GPU needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM

from triton_attention_sink_hf import SharedPrefixes

VOCAB = 97


def make_model(seed: int = 0) -> GptOssForCausalLM:
    """Two layers, one with a window of 8, and sinks that matter."""
    torch.manual_seed(seed)
    config = GptOssConfig(
        num_hidden_layers=2, hidden_size=64, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, sliding_window=8, layer_types=["sliding_attention", "full_attention"],
        num_local_experts=4, num_experts_per_tok=2, attn_implementation="triton_attention_sink",
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.sinks.data.uniform_(-2.0, 3.0)
    return model


def make_groups(seed: int = 0) -> list[tuple[Tensor, list[Tensor], list[float]]]:
    """Prompts with four answers each, and the answers' advantages."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> Tensor:
        return torch.randint(2, VOCAB, (length,), generator=generator)

    return [(text(n), [text(m) for m in (5, 9, 3, 7)], [1.0, -0.5, 0.5, -1.0]) for n in (30, 6)]


def packed_loss(model, groups) -> tuple[Tensor, int]:
    """The loss, and the tokens that the model computed."""
    samples = [(torch.cat([prompt, a]), len(prompt)) for prompt, answers, _ in groups for a in answers]
    row = torch.cat([sample for sample, _ in samples])[None]
    positions = torch.cat([torch.arange(len(sample)) for sample, _ in samples])[None]
    logp = model(row, position_ids=positions, use_cache=False).logits[0].log_softmax(-1)
    loss, start = 0.0, 0
    for (sample, prompt), advantage in zip(samples, [x for *_, advantages in groups for x in advantages], strict=True):
        rows = torch.arange(start + prompt - 1, start + len(sample) - 1)  # whose logits predict the answer
        loss = loss - advantage * logp[rows, sample[prompt:]].mean()
        start += len(sample)
    return loss, row.numel()


def tree_loss(model, groups) -> tuple[Tensor, int]:
    """The same."""
    segments, prefix_of = [], []
    for prompt, answers, _ in groups:
        prefix_of += [-1] + [len(segments)] * len(answers)
        segments += [prompt, *answers]
    tree = SharedPrefixes([len(x) for x in segments], prefix_of)
    row = torch.cat(segments)[None]
    logits = model(row, position_ids=tree.position_ids(), use_cache=False, shared_prefixes=tree).logits[0]
    # The last row of a prompt predicts the first token of each answer.
    logp = logits.log_softmax(-1)[tree.previous_rows(), row[0]]
    loss, advantages = 0.0, iter([x for *_, advantages in groups for x in advantages])
    for part, prefix in zip(logp.split(tree.lengths), tree.prefix_of, strict=True):
        if prefix >= 0:
            loss = loss - next(advantages) * part.mean()
    return loss, row.numel()


def main() -> float:
    """The largest difference of a gradient, relative to the largest entry of that parameter's."""
    model, groups, found = make_model(), make_groups(), []
    for name, function in (("packed", packed_loss), ("tree", tree_loss)):
        model.zero_grad()
        loss, tokens = function(model, groups)
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        print(f"{name:6}: {tokens} tokens, loss {loss.item():.6f}")
    worst = max(
        ((found[0][name] - found[1][name]).abs().max() / found[0][name].abs().max()).item() for name in found[0]
    )
    sinks = max((found[0][n] - found[1][n]).abs().max().item() for n in found[0] if n.endswith("sinks"))
    print(f"largest difference of a gradient: {worst:.1e} of the parameter's largest; of a sink: {sinks:.1e}")
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    return worst


if __name__ == "__main__":
    main()
