"""``attn_implementation: triton_attention_sink`` for Hugging Face models: the attention function and its mask function.

transformers calls ``attention_mask`` once per forward and kind of layer, and passes the result to ``attention_forward``
of every layer. The two honour what stands here, or refuse it with a sentence that says what to do instead:

==================  ==================================================================================================
sinks               ``s_aux`` or ``sinks``: (Hq,), one logit per head, or (B, Hq, Sq), one per token; and the config's
                    ``attention_sink``: a constant, the module's own, or both (``integrations/sinks.py``)
causality, window   as the mask function was asked, like eager attention; if the model called none, ``is_causal`` (else
                    the module's) and ``sliding_window``; aligned to the end of the cache
blocks              inside a causal mask, of tokens that see each other (images, prefixes); without past keys
packed rows         ``cu_seq_lens_q/k``, else the cuts of the mask function, else ``position_ids`` if Sq == Sk, cut
                    where they do not rise by 1; also with a padding mask
padding             2-D masks, left, right or between; integers above 1 number the samples
caches              dynamic, static and sliding; a static cache's unwritten slots are hidden
softcap, scaling    used
shared prompts      ``shared_prefixes``: a ``SharedPrefixes``; one row, no padding, no cache, no sequence parallelism
continuous batches  of transformers' paged cache: ``cu_seq_lens_q/k``, or ``block_table``, ``k_cache`` and ``v_cache``
sparse layers       ``indices`` (B, Sq, Sk), the keys that an indexer chose, while it chooses all that there are
sequence parallel   Ulysses: verl's group or ``with sequence_parallel(group)``; packed rows, no padding, no cache
refused             dropout, ``head_mask``, ``output_attentions``, dense 4-D masks, mask patterns beyond these,
                    layers with keys that their mask was not made for, ring attention, and any keyword
                    not known to leave the mathematics alone (``IGNORED_KEYWORDS``; add a name to it if yours does)
==================  ==================================================================================================

q, k and v are not copied, except to pack a batch of several rows and to send shards to other ranks. Layers do not wait
for the device, with one exception: given a padding mask for whole sequences, one read per forward finds out whether
there is any padding.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .first_keys import first_keys_attention
from .integrations.continuous_batching import batch_attention, is_continuous_batch
from .integrations.forward_mask import NO_PADDING, ForwardMask
from .integrations.mask_function import attention_mask
from .integrations.sample_tree import tree_attention
from .integrations.sequence_parallel import (
    active_group,
    check_shards,
    gather_positions,
    gather_rows,
    own_sinks,
    scatter_rows,
)
from .integrations.sinks import layer_sinks
from .interface import attention_sink, follow_autocast
from .shared_prefix import SharedPrefixes

__all__ = ["IGNORED_KEYWORDS", "attention_forward", "attention_mask"]

# Keywords that models pass to the attention function and that do not change its result.
IGNORED_KEYWORDS = {
    # of models
    "cache_params", "cache_position", "image_sizes", "input_ids", "inputs_embeds", "is_first_iteration", "layer_idx",
    "logits_to_keep", "mm_token_type_ids", "num_logits_to_keep", "output_hidden_states", "output_router_logits",
    "past_key_value", "past_key_values", "position_embeddings", "return_dict", "seq_idx", "token_type_ids", "use_cache",
    # of losses: transformers', Liger's, TRL's and verl's
    "accum_dtype", "accumulation_steps", "calculate_entropy", "calculate_log_probs", "ce_weight", "chunk_mem_const",
    "final_logit_softcapping", "ignore_index", "label_smoothing", "labels", "loss_reduction", "loss_weights",
    "lse_square_scale", "num_items_in_batch", "reduction", "return_entropy", "return_loss", "return_log_probs",
    "return_predicted_tokens", "return_token_accuracy", "return_z_loss", "shift_labels", "skip_logits", "temperature",
    "token_scaling", "use_token_scaling", "vocab_size",
    # of continuous batching; what changes the result is honoured where it comes with these
    "logits_indices", "logits_processor_args", "read_index", "write_index",
}  # fmt: skip
# Keywords of continuous batching that change the result.
_OF_BATCHES = (
    "cache", "read_index", "write_index", "block_table", "k_cache", "v_cache", "max_seqlen_q", "max_seqlen_k",
)  # fmt: skip


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    deterministic: bool | None = None,
    shared_prefixes: SharedPrefixes | None = None,
    head_mask: Tensor | None = None,
    output_attentions: bool | None = None,
    indices: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Exact attention with sinks for one layer, differentiable in query, key, value and the sinks.

    Args:
        module: the layer; its ``is_causal``, ``training``, ``sinks`` and ``config`` are read.
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D). value: (B, Hkv, Sk, Dv). Any strides.
        attention_mask: what ``attention_mask()`` returned, or a 2-D padding mask (B, Sk), nonzero = real key.
        scaling: factor on the scores, default D ** -0.5. softcap: c > 0 caps them with c * tanh(x / c).
        sliding_window: W: a query sees itself and the W - 1 keys before it.
        s_aux, sinks: (Hq,), (B, Hq, Sq) or (B, Hq, Sq, 1), natural-log sink logits; one of them or neither.
        position_ids: (B, S) or (1, S). cu_seq_lens_q, cu_seq_lens_k: int (N + 1,), packed rows of a batch of one.
            Under sequence parallelism S is the shard's, and cu_seq_lens_* count the rows of all ranks.
        indices: integer (B, Sq, n), the n keys that each query may see, all different: n must be Sk, which is all.
        max_length_q, max_length_k: accepted; nothing needs them.
        shared_prefixes: which segments of the row are prompts of which others; position_ids are those of its
            ``position_ids()``.
        deterministic: True asks for bit-exact gradients; else torch's global setting decides.

    Returns:
        ((B, Sq, Hq, Dv), None).

    Raises:
        ValueError, TypeError, NotImplementedError: what cannot be honoured, named.
    """
    cached = {name: kwargs.pop(name, None) for name in _OF_BATCHES} if is_continuous_batch(kwargs) else None
    _refuse(module, dropout, head_mask, output_attentions, kwargs)
    if indices is not None:
        _refuse_sparse(indices, query.shape[2], key.shape[2])
    sinks, first_keys = layer_sinks(module, query, s_aux, sinks)
    scores = dict(softmax_scale=scaling, softcap=0.0 if softcap is None else softcap)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if isinstance(attention_mask, ForwardMask):
        mask = attention_mask
    else:
        mask = _layers_own_mask(module, q, k, attention_mask, is_causal, sliding_window)
    if first_keys and mask.window[0] >= 0:
        _check_first_keys(mask, q.shape[1], k.shape[1], cached, shared_prefixes)
    else:
        first_keys = 0  # a layer without a window sees them anyway
    if cached is not None:
        if shared_prefixes is not None:
            raise ValueError("shared_prefixes must be None in continuous batching, got a tree")
        return _continuous_batch(
            module, query, key, value, mask, cu_seq_lens_q, cu_seq_lens_k, cached, sinks=sinks, **scores
        ), None  # fmt: skip
    mask.check(q.shape[1], k.shape[1])
    rows = position_ids if cu_seq_lens_q is None else cu_seq_lens_q
    given, position_ids = position_ids, _text_positions(mask, position_ids, q.shape[0], q.shape[1])
    group = mask.group if mask.has_group else active_group(rows)
    if shared_prefixes is not None:
        if group is not None:
            raise ValueError("shared_prefixes must be None under sequence parallelism, got a tree")
        others = dict(
            attention_mask=attention_mask, position_ids=position_ids, cu_seq_lens_q=cu_seq_lens_q,
            cu_seq_lens_k=cu_seq_lens_k,
        )  # fmt: skip
        return tree_attention(
            shared_prefixes, q, k, v, sinks, mask, others, deterministic=deterministic or None, **scores
        ), None  # fmt: skip
    if group is not None:
        if indices is not None:
            raise ValueError("indices must be None under sequence parallelism, got those of this rank's rows alone")
        q, k, v = follow_autocast(q, k, v)
        padded = isinstance(attention_mask, Tensor) or mask.padding() != NO_PADDING
        positions = given if position_ids is None else position_ids
        check_shards(group, q, k, v, padded, positions, cu_seq_lens_q, cu_seq_lens_k)
        q, k, v = gather_rows(group, q, k, v)
        sinks = own_sinks(group, sinks)
        mask = mask.for_gathered_rows(q.shape[1])
        if cu_seq_lens_q is None:
            shard = position_ids
            position_ids = mask.forward.once(
                shard, ("gathered", group, q.device), lambda: gather_positions(group, shard, q.device)
            )
    options = dict(causal=mask.causal, window_size=mask.window, deterministic=deterministic or None, **scores)
    if cu_seq_lens_q is None and cu_seq_lens_k is None:
        cu_q, key_padding_mask, seqused_k = mask.visibility(q, k, position_ids)
        cu_k = cu_q
    else:
        cu_q, cu_k = _given_segments(q, mask, attention_mask, cu_seq_lens_q, cu_seq_lens_k)
        key_padding_mask = seqused_k = None
    options["key_padding_mask"] = key_padding_mask
    key_ranges = mask.key_ranges(cu_q is not None, q.device)
    if key_ranges is not None:  # which hold causality and window
        options |= dict(causal=False, window_size=(-1, -1), key_ranges=key_ranges)
    attend = attention_sink
    if first_keys:
        attend = functools.partial(first_keys_attention, first_keys=first_keys)
        del options["causal"]  # which it is
    if cu_q is None:
        out = attend(q, k, v, sinks, seqused_k=seqused_k, **options)
    elif q.shape[0] == 1 and attend is attention_sink and (sinks is None or sinks.dim() == 1):
        out = attention_sink(q, k, v, sinks, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)  # not a view is needed
    else:
        if sinks is not None and sinks.dim() == 3:
            sinks = sinks.transpose(0, 1).flatten(1)
        rows = (x.flatten(0, 1) for x in (q, k, v))
        out = attend(*rows, sinks, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options).unflatten(0, q.shape[:2])
    return out if group is None else scatter_rows(group, out), None


def _continuous_batch(module, query, key, value, mask: ForwardMask, cu_q, cu_k, cached: dict, **options) -> Tensor:
    """Attention of a row of requests. The mask says which keys beside its own a query sees; cu_seq_lens the rest."""
    mask.check_blocks()
    if not mask.causal or mask.real is not None or mask.blocks is not None:
        raise ValueError("attention_mask must be None in continuous batching, and the layers causal: use generate()")
    mask.forward.used = True
    return batch_attention(module, query, key, value, cu_q, cu_k, cached, window_size=mask.window, **options)


def _refuse(module, dropout, head_mask, output_attentions, kwargs) -> None:
    if dropout and module.training:
        raise ValueError(
            f"dropout must be 0.0 in training, got {dropout}: set attention_dropout=0.0 in the model's config"
        )
    if head_mask is not None:
        raise ValueError("head_mask must be None, got a mask: use attn_implementation='eager' to mask heads")
    if output_attentions:
        raise ValueError(
            "output_attentions must be False, got True: the attention matrix never exists here; use "
            "attn_implementation='eager' to look at it"
        )
    for name, value in kwargs.items():
        if value is not None and value is not False and name not in IGNORED_KEYWORDS:
            why = (
                "it is not known whether it changes the attention. Use attn_implementation='eager', or, if it does "
                f"not, add {name!r} to triton_attention_sink_hf.flash_attention_triton_sink.IGNORED_KEYWORDS"
            )
            if name == "position_bias":
                why = "no kernel adds a bias to the scores. Use attn_implementation='eager'"
            got = type(value).__name__
            raise ValueError(f"{name} must be None for attn_implementation='triton_attention_sink', got {got}: {why}")


def _check_first_keys(mask: ForwardMask, seqlen_q: int, seqlen_k: int, cached, shared_prefixes) -> None:
    what = None
    if not mask.causal or mask.window[1] > 0 or mask.blocks is not None:
        what = "layers that are not causal, and images"
    elif cached is not None or seqlen_q != seqlen_k:
        what = "a cache, whose sliding layers have dropped the first keys: pass use_cache=False"
    elif shared_prefixes is not None:
        what = "shared_prefixes"
    if what is not None:
        raise ValueError(f"attention_sink must be without 'first:N' for {what}, got first keys beside a window")


def _refuse_sparse(indices: Tensor, seqlen_q: int, seqlen_k: int) -> None:
    """Raise unless an indexer's choice hides nothing. Its topk gives different keys, so as many as there are is all."""
    if indices.dim() != 3 or tuple(indices.shape[1:]) != (seqlen_q, seqlen_k) or indices.is_floating_point():
        raise ValueError(
            f"indices must be integers (B, Sq, Sk) = (B, {seqlen_q}, {seqlen_k}), which hide no key, got "
            f"{tuple(indices.shape)} {indices.dtype}: the layer's indexer chooses keys (sparse attention). Use rows of "
            "at most config.index_topk tokens, or attn_implementation='eager'"
        )


def _layers_own_mask(module, q: Tensor, k: Tensor, mask, is_causal, sliding_window) -> ForwardMask:
    """The mask of a layer whose model called no mask function, from the layer's own arguments."""
    real = sample_ids = None
    if mask is not None:
        if not isinstance(mask, Tensor):
            raise TypeError(f"attention_mask must be a 2-D tensor or None, got {type(mask).__name__}")
        if mask.dim() != 2 or mask.is_floating_point():
            raise ValueError(
                f"attention_mask must be a 2-D bool or integer padding mask (B, S), got {tuple(mask.shape)} "
                f"{mask.dtype}: pass position_ids that restart for packed rows, or use attn_implementation='eager' for "
                "a dense mask"
            )
        if tuple(mask.shape) != (k.shape[0], k.shape[1]):
            raise ValueError(f"attention_mask must be (B, Sk) = {tuple(k.shape[:2])}, got {tuple(mask.shape)}")
        mask = mask.to(q.device)
        real, sample_ids = mask != 0, None if mask.dtype == torch.bool else mask
    own = getattr(module, "is_causal", True)
    causal = own if is_causal is None else bool(is_causal)
    window = (-1, -1)
    if sliding_window:
        # A decoder run as an encoder: its eager mask shows W keys on each side. An encoder's W includes the query.
        reach = sliding_window if own and not causal else sliding_window - 1
        window = (reach, 0 if causal else reach)
    else:
        _reject_undeclared_window(module, k.shape[1])
    shape = (q.shape[0], 1, q.shape[1], k.shape[1])
    return ForwardMask(shape, q.device, causal=causal, window=window, real=real, sample_ids=sample_ids)


def _reject_undeclared_window(module, seqlen_k: int) -> None:
    """Raise if the layer has a window that it did not pass. A few models put it into the eager mask alone."""
    config = getattr(module, "config", None)
    kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    if kinds is not None and index is not None and kinds[index] != "sliding_attention":
        return
    window = getattr(module, "sliding_window", None if index is None else getattr(config, "sliding_window", None))
    if window and 0 < window < seqlen_k:
        raise ValueError(
            f"sliding_window must be the {window} that {type(module).__name__} or its config has, got None: the model "
            "does not pass it on, so use attn_implementation='eager' or set config.sliding_window=None"
        )


def _given_segments(q, mask, attention_mask, cu_seq_lens_q, cu_seq_lens_k) -> tuple[Tensor, Tensor]:
    """int32 cu_seqlens of queries and keys, from the model's ``cu_seq_lens_*``."""
    if isinstance(attention_mask, Tensor) or mask.padding() != NO_PADDING:
        raise ValueError("attention_mask must be None where cu_seq_lens_q and cu_seq_lens_k are given, got a mask")
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k must both be given, got one")
    if q.shape[0] != 1:
        raise ValueError(f"the batch must be 1 where cu_seq_lens_q and cu_seq_lens_k are given, got {q.shape[0]}")

    def int32(cu: Tensor) -> Tensor:
        return mask.forward.once(cu, ("int32", q.device), lambda: cu.to(q.device, torch.int32))

    cu_q = int32(cu_seq_lens_q)
    # One object stays one object: some kernels require the same cuts for queries and keys.
    return cu_q, cu_q if cu_seq_lens_k is cu_seq_lens_q else int32(cu_seq_lens_k)


def _text_positions(mask: ForwardMask, position_ids: Tensor | None, batch: int, seqlen: int) -> Tensor | None:
    """The positions (B, S) or (1, S) that restart with each packed sample.

    Multimodal rotary embeddings have (4, B, S): the first row is taken. (3, B, S), time, height and width alone, cannot
    tell packed samples from images, and is refused where it shows that the row is packed.
    """
    if position_ids is None:
        return None
    if position_ids.dim() == 3:
        if position_ids.shape[0] == 4:
            text = mask.forward.once(position_ids, "text", lambda: position_ids[0])
            return _text_positions(mask, text, batch, seqlen)
        if mask.shape[2] == mask.shape[3] == position_ids.shape[-1]:
            mask.refuse_restarts(position_ids[0])
        return None
    if position_ids.shape[-1] != seqlen or (position_ids.dim() == 2 and position_ids.shape[0] not in (1, batch)):
        raise ValueError(
            f"position_ids must be (B, S) = ({batch}, {seqlen}) or (1, {seqlen}), got {tuple(position_ids.shape)}"
        )
    return position_ids
