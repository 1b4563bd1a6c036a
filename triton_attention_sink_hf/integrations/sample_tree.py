"""``model(..., shared_prefixes=tree)``: the layers of one forward compute a row of samples that share prompts."""

from __future__ import annotations

from torch import Tensor

from ..shared_prefix import SharedPrefixes, shared_prefix_attention
from ..validation import readable
from .forward_mask import NO_PADDING, ForwardMask


def tree_attention(
    tree: SharedPrefixes,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    mask: ForwardMask,
    given: dict,
    **options,
) -> Tensor:
    """out (1, T, Hq, Dv) of a layer's q, k, v (1, T, H, D). Cuts that the mask found in position_ids are the tree's.

    Args:
        given: the layer's other ways to say which keys a query sees, by the names of its arguments, each perhaps None.

    Raises:
        ValueError, TypeError: what a tree cannot be joined with.
    """
    if not isinstance(tree, SharedPrefixes):
        raise TypeError(f"shared_prefixes must be a SharedPrefixes, got {type(tree).__name__}")
    if sinks is not None and sinks.dim() > 1:
        raise ValueError("sinks must be one per head where shared_prefixes is given, got one per token")
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if given[name] is not None:
            raise ValueError(f"{name} must be None where shared_prefixes is given, got a tensor")
    if isinstance(given["attention_mask"], Tensor) or mask.sample_ids is not None or mask.padding() != NO_PADDING:
        raise ValueError("attention_mask must be None or without padding where shared_prefixes is given, got a mask")
    if not mask.causal or mask.window[1] > 0 or mask.blocks is not None:
        raise ValueError("shared_prefixes must be None for layers that are not causal, and beside images, got a tree")
    if q.shape[:2] != (1, tree.total) or k.shape[:2] != (1, tree.total):
        raise ValueError(
            f"shared_prefixes must be of one row of the layer's tokens without a cache, got total {tree.total} for "
            f"(batch, queries, keys) = {(*q.shape[:2], k.shape[1])}"
        )
    positions = given["position_ids"]
    if positions is not None and readable(positions) and not mask.forward.once(
        positions, ("tree", id(tree)), lambda: bool((positions.reshape(1, -1) == tree.position_ids(q.device)).all())
    ):  # fmt: skip
        raise ValueError(
            "position_ids must be those of shared_prefixes.position_ids(), which go on behind the prompt in each branch"
        )
    out = shared_prefix_attention(
        *(x.squeeze(0) for x in (q, k, v)), sinks, tree=tree, window_size=(mask.window[0], 0), **options
    )
    return out.unsqueeze(0)
