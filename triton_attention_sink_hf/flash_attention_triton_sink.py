"""``attn_implementation: triton_attention_sink`` for Hugging Face models: the attention function and its mask function.

transformers calls ``attention_mask`` once per forward and kind of layer, and hands its answer to every layer's
``attention_forward``. Between them they honour, or refuse with a sentence that says what to do instead:

==================  ==================================================================================================
sinks               ``s_aux`` or ``sinks`` (Hq,), one logit per head; per-token sinks are refused
causality, window   ``is_causal`` (else the module's), ``sliding_window``, bottom-right aligned to the cache
packed rows         ``cu_seq_lens_q/k``, else ``position_ids`` cut where they do not rise by 1, if Sq == Sk and no mask
padding             2-D masks, left or right; an all-ones mask counts as none
caches              dynamic, static and sliding; a static cache's unwritten slots are hidden
softcap, scaling    used
refused             dropout, ``head_mask``, ``output_attentions``, dense 4-D masks, mask patterns beyond causal and
                    sliding window, sequence parallelism, and any keyword not known to leave the mathematics alone
                    (``IGNORED_KEYWORDS``; add a name to it if yours does)
==================  ==================================================================================================

What passes from one to the other as the model's attention mask has four dimensions, (B, 1, 1, Sk), because models and
``generate`` hand a 4-D mask on untouched but reinterpret a 2-D one, and a dtype that no model's own mask has:

* None: nothing to hide but the future.
* uint8: 1 = real key, 0 = padding.
* int32, for a cache longer than its contents: the number of keys in use in each visible slot, 0 in a hidden one. The
  number is a value, not a shape, so that a compiled decode step serves every length.

Nothing here copies q, k or v (a packed batch of several rows excepted, where the layout demands it), and no layer
waits for the device. The mask function does once where a padding mask comes with a whole sequence, to drop an all-ones
mask as transformers' own flash-attention mask does, which lets packed rows with such a mask be cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .integrations.segments import cu_seqlens_from_position_ids, is_capturing, once
from .integrations.sequence_parallel import refuse_sequence_parallel
from .interface import attention_sink

# Keywords that models pass on to the attention function and that do not change what it computes.
IGNORED_KEYWORDS = {
    "cache_params", "cache_position", "input_ids", "inputs_embeds", "is_first_iteration", "labels", "layer_idx",
    "logits_to_keep", "mm_token_type_ids", "num_items_in_batch", "num_logits_to_keep", "output_hidden_states",
    "output_router_logits", "past_key_value", "past_key_values", "position_embeddings", "return_dict", "seq_idx",
    "token_type_ids", "use_cache",
}  # fmt: skip

# Parts of transformers' mask patterns that the arguments of attention_forward already say.
_KNOWN_PATTERNS = {
    "and_masks", "causal_mask_function", "sliding_window_overlay", "bidirectional_mask_function",
    "sliding_window_bidirectional_overlay", "packed_sequence_mask_function", "remap_positions_for_packed_sequence",
}  # fmt: skip


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
    head_mask: Tensor | None = None,
    output_attentions: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Exact attention with sinks for one layer, differentiable in query, key, value and the sinks.

    Args:
        module: the layer; its ``is_causal``, ``training``, ``sinks`` and ``config`` are read.
        query: (B, Hq, Sq, D). key: (B, Hkv, Sk, D). value: (B, Hkv, Sk, Dv). Any strides.
        attention_mask: what ``attention_mask()`` returned, or a 2-D padding mask (B, Sk), nonzero = real key.
        scaling: factor on the scores, default D ** -0.5. softcap: c > 0 caps them with c * tanh(x / c).
        sliding_window: W: a query sees itself and the W - 1 keys before it.
        s_aux, sinks: (Hq,), natural-log sink logits; one of them or neither.
        position_ids: (B, S) or (1, S). cu_seq_lens_q, cu_seq_lens_k: int (N + 1,), packed rows of a batch of one.
        max_length_q, max_length_k: accepted; nothing needs them.
        deterministic: True asks for bit-exact gradients; else torch's global setting decides.

    Returns:
        ((B, Sq, Hq, Dv), None).

    Raises:
        ValueError, TypeError, NotImplementedError: what cannot be honoured, named.
    """
    _refuse(module, dropout, head_mask, output_attentions, kwargs)
    refuse_sequence_parallel()
    sinks = _one_sink_per_head(module, query.shape[1], s_aux, sinks)
    causal, window_size = _causality(module, key.shape[2], is_causal, sliding_window)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    options = dict(
        causal=causal,
        window_size=window_size,
        softmax_scale=scaling,
        softcap=0.0 if softcap is None else softcap,
        deterministic=deterministic or None,
    )
    cu_q, cu_k = _segments(q, k, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k)
    if cu_q is not None:
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out = attention_sink(*packed, sinks, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
        return out.unflatten(0, q.shape[:2]), None
    key_padding_mask, seqused_k = _hidden_keys(attention_mask, q)
    out = attention_sink(q, k, v, sinks, key_padding_mask=key_padding_mask, seqused_k=seqused_k, **options)
    return out, None


def attention_mask(
    batch_size: int,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function=None,
    attention_mask: Tensor | None = None,
    cache_position: Tensor | None = None,
    device: torch.device | str | None = None,
    **kwargs,
) -> Tensor | None:
    """The keys hidden from every query, in the encoding of this file's docstring; transformers' mask interface.

    Args:
        q_length: queries, at positions ``q_offset`` and on (a tensor for static caches).
        kv_length: key slots, at positions ``kv_offset`` and on.
        cache_position: (q_length,), in place of q_length and q_offset in transformers 4.57.
        mask_function: transformers' description of the pattern; all but causal, bidirectional, sliding and packed
            are refused.
        attention_mask: 2-D padding mask over all positions so far, nonzero = real.

    Raises:
        ValueError: a pattern that the attention function could not honour.
    """
    _refuse_pattern(mask_function, kwargs)
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
        device = cache_position.device
    elif device is None and attention_mask is not None:
        device = attention_mask.device
    # Keys in use, where they can be fewer than the slots; a bidirectional pattern counts on the padding mask alone.
    used = None
    if kv_length != q_length and "allow_is_bidirectional_skip" not in kwargs:
        used = q_offset + q_length - kv_offset
        if not isinstance(used, Tensor) and used == kv_length:
            used = None
    real = None
    if attention_mask is not None:
        real = attention_mask[:, kv_offset : kv_offset + kv_length] != 0
        real = torch.nn.functional.pad(real, (0, kv_length - real.shape[1]))
        if used is None and kv_length == q_length and _all_real(real):
            real = None
    if used is None:
        return None if real is None else real.to(torch.uint8)[:, None, None, :]
    visible = (torch.arange(kv_length, device=device) < used).expand(batch_size, kv_length)
    if real is not None:
        visible = visible & real
    return (visible * used).to(torch.int32)[:, None, None, :]


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
            raise ValueError(
                f"{name} must be None for attn_implementation='triton_attention_sink', got {type(value).__name__}: it "
                "is not known whether it changes the attention. Use attn_implementation='eager', or, if it does not, "
                f"add {name!r} to triton_attention_sink_hf.flash_attention_triton_sink.IGNORED_KEYWORDS"
            )


def _one_sink_per_head(module, heads: int, s_aux: Tensor | None, sinks: Tensor | None) -> Tensor | None:
    if s_aux is not None and sinks is not None:
        raise ValueError("sinks must be None where s_aux is given, got both")
    name, value = ("s_aux", s_aux) if sinks is None else ("sinks", sinks)
    if value is None and isinstance(getattr(module, "sinks", None), Tensor):
        raise ValueError(f"s_aux must be the sinks that {type(module).__name__} owns, got None: they would be ignored")
    if value is not None and tuple(value.shape) != (heads,):
        raise ValueError(
            f"{name} must be (Hq,) = ({heads},), one sink per head, got {tuple(value.shape)}: use "
            "attn_implementation='eager' for sinks that differ by token"
        )
    return value


def _causality(module, seqlen_k: int, is_causal, sliding_window) -> tuple[bool, tuple[int, int]]:
    own = getattr(module, "is_causal", True)
    causal = own if is_causal is None else bool(is_causal)
    if not sliding_window:
        _refuse_unsaid_window(module, seqlen_k)
        return causal, (-1, -1)
    # A decoder run as an encoder: its eager mask then shows W keys on each side; an encoder's own W counts the query.
    reach = sliding_window if own and not causal else sliding_window - 1
    return causal, (reach, 0 if causal else reach)


def _refuse_unsaid_window(module, seqlen_k: int) -> None:
    """A few models put their window into the eager mask only: here it would be lost."""
    config = getattr(module, "config", None)
    if hasattr(module, "sliding_window"):
        window = module.sliding_window
    else:
        window = getattr(config, "sliding_window", None)
        kinds, index = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
        if index is None or (kinds is not None and kinds[index] != "sliding_attention"):
            return
    if window and 0 < window < seqlen_k:
        raise ValueError(
            f"sliding_window must be the {window} that {type(module).__name__} or its config has, got None: the model "
            "does not pass it on, so use attn_implementation='eager' or set config.sliding_window=None"
        )


def _segments(q, k, attention_mask, position_ids, cu_seq_lens_q, cu_seq_lens_k) -> tuple[Tensor, Tensor] | tuple:
    """int32 cu_seqlens of the flattened rows of q and k, or (None, None)."""
    if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
        if attention_mask is not None:
            raise ValueError("attention_mask must be None where cu_seq_lens_q and cu_seq_lens_k are given, got a mask")
        if cu_seq_lens_q is None or cu_seq_lens_k is None:
            raise ValueError("cu_seq_lens_q and cu_seq_lens_k must both be given, got one")
        if q.shape[0] != 1:
            raise ValueError(f"the batch must be 1 where cu_seq_lens_q and cu_seq_lens_k are given, got {q.shape[0]}")
        return _int32(cu_seq_lens_q, q.device), _int32(cu_seq_lens_k, q.device)
    if attention_mask is not None or q.shape[1] != k.shape[1]:
        return None, None
    cu = cu_seqlens_from_position_ids(position_ids, q.shape[0], q.shape[1], q.device)
    return cu, cu


def _int32(cu: Tensor, device: torch.device) -> Tensor:
    if cu.dtype == torch.int32 and cu.device == device:
        return cu
    return once(cu, ("int32", device), lambda: cu.to(device, torch.int32))


def _hidden_keys(mask: Tensor | None, q: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """key_padding_mask (B, Sk) and seqused_k (B,) from what the model hands on as its attention mask."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask must be a 2-D tensor or None, got {type(mask).__name__}")
    if mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1 and mask.dtype in (torch.uint8, torch.int32):
        return once(mask, ("hidden keys", q.device), lambda: _decode(mask[:, 0, 0].to(q.device)))
    if mask.dim() == 2 and not mask.is_floating_point():
        if mask.dtype == torch.bool and mask.device == q.device:
            return mask, None
        return once(mask, ("real keys", q.device), lambda: (mask.to(q.device) != 0, None))
    raise ValueError(
        f"attention_mask must be a 2-D bool or integer padding mask (B, S), got {tuple(mask.shape)} {mask.dtype}: pass "
        "position_ids that restart for packed rows, or use attn_implementation='eager' for a dense mask"
    )


def _decode(slots: Tensor) -> tuple[Tensor, Tensor | None]:
    return slots != 0, slots.amax(-1) if slots.dtype == torch.int32 else None


def _all_real(real: Tensor) -> bool:
    return not (torch.compiler.is_compiling() or is_capturing(real)) and bool(real.all())


def _refuse_pattern(mask_function, kwargs) -> None:
    """Raise for transformers' mask patterns that would be lost: chunks, blocks of images, user-supplied functions."""
    config, local_size = kwargs.get("config"), kwargs.get("local_size")
    chunk_size = getattr(config, "attention_chunk_size", None)
    unknown = None
    if kwargs.get("use_vmap"):
        unknown = "a custom mask function"
    elif local_size is not None and local_size == chunk_size and local_size != getattr(config, "sliding_window", None):
        unknown = "chunked attention"
    elif not torch.compiler.is_compiling():  # which cannot look into a closure
        unknown = next((name for name in _pattern_names(mask_function) if name not in _KNOWN_PATTERNS), None)
    if unknown is not None:
        raise ValueError(
            f"the model's mask must be causal, bidirectional, sliding or padded, got {unknown}: use "
            "attn_implementation='eager' (or 'sdpa' where the model has no sinks)"
        )


def _pattern_names(mask_function) -> list[str]:
    """Names of the functions of transformers.masking_utils that a pattern is composed of."""
    names, todo = [], [mask_function] if mask_function is not None else []
    while todo:
        function = todo.pop()
        names.append(getattr(function, "__qualname__", repr(function)).split(".")[0])
        for cell in getattr(function, "__closure__", None) or ():
            content = cell.cell_contents
            todo += [x for x in (content if isinstance(content, tuple) else (content,)) if callable(x)]
    return names
