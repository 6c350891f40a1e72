"""The fused attention layers of com.microsoft.

`n` is the batch, `h` the heads, `q` and `t` the positions of queries and keys, `e` the features of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.attention import frontier, heads_apart, heads_together, repeated, rotated
from initaudit.onnx_ops.conv import constant_bias
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import ints, together
from initaudit.roles import Role, WeightUse

MICROSOFT = "com.microsoft"


def _attended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None,
    seen: Tensor | None,
    blocked_value: float,
    softcap: float = 0.0,
) -> Tensor:
    """softmax(scale q k' + bias) v of separate heads, `n q (h e)`; what may not be seen has `blocked_value` added or put."""
    k, v = repeated(k, q.shape[1]), repeated(v, q.shape[1])
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores if bias is None else scores + together(bias, scores)[0]
    if seen is not None:
        scores = torch.where(seen, scores, torch.full_like(scores, blocked_value))
    return heads_together(torch.softmax(scores, -1) @ v)


def _visible(mask: Tensor | None, keys: int, device: torch.device) -> Tensor | None:
    """A mask of com.microsoft as booleans that broadcast with `n h q t`.

    `n` counts the keys of each sequence, `n t` and `n q t` are 1 where one may look, as is `n 1 q t`.
    """
    if mask is None:
        return None
    mask = mask.to(device)
    if mask.ndim == 1:
        return (torch.arange(keys, device=device) < mask.reshape(-1, 1)).reshape(-1, 1, 1, keys)
    shape = {2: (mask.shape[0], 1, 1), 3: (mask.shape[0], 1, mask.shape[1]), 4: tuple(mask.shape[:3])}
    return (mask != 0).reshape(*shape[mask.ndim], mask.shape[-1])[..., :keys]


def _blocked_bias(visible: Tensor | None, bias: Tensor | None, value: float, kind: torch.dtype) -> Tensor | None:
    """A padding mask is added to the scores, as onnxruntime does it: a row that may see nothing stays a plain softmax."""
    if visible is None:
        return bias
    added = torch.where(visible, 0.0, value).to(kind)
    return added if bias is None else bias + added


def _packed_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    if not call["weights"].constant:
        return ()
    equal = len(set(call.get("qkv_hidden_sizes") or [0])) == 1
    gates = ("q", "k", "v") if equal else ()
    return (WeightUse("weights", ("i", "o"), "attention", bias=constant_bias(call, "bias"), gates=gates, unit_axis=None),)


@operator(Role("attention", "attention", data=("input",), weights=_packed_weights), domain=MICROSOFT, name="Attention")
def FusedAttention(
    input: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] | None = None,
    rotary_embedding_dim: int = 0,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention with its projection: `n q i` by `i (q k v)`; the second output holds all keys and values, `2 n h t e`."""
    if do_rotary or past_present_share_buffer or (mask_index is not None and mask_index.numel() == 2 * input.shape[0] > 2):
        raise UnsupportedOperator("com.microsoft::Attention", "rotary, a shared buffer, or a mask of starts and ends")
    input, weights = together(input, weights)
    projected = input @ weights
    projected = projected if bias is None else projected + together(bias, projected)[0]
    sizes = list(qkv_hidden_sizes) if qkv_hidden_sizes else [projected.shape[-1] // 3] * 3
    q, k, v = (heads_apart(part, num_heads) for part in torch.split(projected, sizes, -1))
    before = 0
    if past is not None:
        before = past.shape[3]
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    visible = _visible(mask_index, k.shape[2], q.device)
    added = _blocked_bias(visible, attention_bias, mask_filter_value, q.dtype)
    seen = frontier(q.shape[2], k.shape[2], before, bool(unidirectional), -1, -1, q.device)
    y = _attended(q, k, v, scale, added, seen, mask_filter_value if mask_index is not None else -torch.inf)
    return y if outputs == 1 else (y, torch.stack([k, v]))


def _query_key_value(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads apart out of the forms that MultiHeadAttention takes: packed QKV, packed KV, or three tensors."""
    if key is None and query.ndim == 5:
        # `n q h 3 e`
        q, k, v = (part.transpose(1, 2) for part in query.unbind(3))
    elif key is not None and value is None and key.ndim == 5:
        # `n t h 2 e`
        q = heads_apart(query, heads)
        k, v = (part.transpose(1, 2) for part in key.unbind(3))
    elif key is not None and value is not None:
        q, k, v = heads_apart(query, heads), heads_apart(key, heads), heads_apart(value, heads)
    else:
        raise UnsupportedOperator("com.microsoft::MultiHeadAttention", "this form of query, key and value")
    if bias is None:
        return q, k, v
    widths = [heads * part.shape[-1] for part in (q, k, v)]
    shifts = [part.reshape(1, heads, 1, -1) for part in torch.split(together(bias, q)[0], widths)]
    # Keys and values that are already apart come from a cache (cross attention) and have their bias.
    apart = key is not None and key.ndim == 4
    return q + shifts[0], k if apart else k + shifts[1], v if apart else v + shifts[2]


@operator(Role("attention", "attention", data=("query", "key", "value")), domain=MICROSOFT)
def MultiHeadAttention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    mask_filter_value: float = -10000.0,
    num_heads: int,
    scale: float = 0.0,
    unidirectional: int = 0,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Attention of projected queries, keys and values, `n q (h e)`; then all keys and all values, `n h t e`."""
    q, k, v = _query_key_value(query, key, value, bias, num_heads)
    before = 0
    if past_key is not None and past_value is not None:
        before = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    visible = _visible(key_padding_mask, k.shape[2], q.device)
    added = _blocked_bias(visible, attention_bias, mask_filter_value, q.dtype)
    seen = frontier(q.shape[2], k.shape[2], before, bool(unidirectional), -1, -1, q.device)
    y = _attended(q, k, v, scale, added, seen, -torch.inf)
    return y if outputs == 1 else (y, k, v)


@operator(Role("passthrough", "rotary_embedding", data=("input",)), domain=MICROSOFT, name="RotaryEmbedding")
def FusedRotaryEmbedding(
    input: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Heads `n h q e` or `n q (h e)` turned by angles that grow with the position: one start for all, or `n q`."""
    packed = input.ndim == 3
    width = rotary_embedding_dim or 2 * cos_cache.shape[-1]
    heads = num_heads or (input.shape[-1] // width if packed else input.shape[1])
    value = heads_apart(input, heads)
    place = position_ids.to(value.device, torch.int64)
    if place.numel() == 1:
        place = place.reshape(1, 1) + torch.arange(value.shape[2], device=value.device)
    turned = _turned(value, place, cos_cache, sin_cache, width, bool(interleaved))
    return heads_together(turned) if packed else turned


def _turned(x: Tensor, place: Tensor, cos: Tensor, sin: Tensor, width: int, interleaved: bool) -> Tensor:
    cos, sin = together(cos, x)[0][place].unsqueeze(1), together(sin, x)[0][place].unsqueeze(1)
    turned = rotated(x[..., :width], cos, sin, interleaved)
    return torch.cat([turned, x[..., width:]], -1) if width < x.shape[-1] else turned


@operator(Role("attention", "attention", data=("query", "key", "value")), domain=MICROSOFT)
def GroupQueryAttention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    do_rotary: int = 0,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    outputs: int = 3,
) -> Tensor | tuple[Tensor, ...]:
    """Causal attention whose key heads serve several query heads (Ainslie et al. 2023); then all keys and values, `n h t e`.

    The cache must hold just the keys before these queries, the same number in every sequence.
    """
    if smooth_softmax:
        raise UnsupportedOperator("com.microsoft::GroupQueryAttention", "smooth_softmax")
    if key is None or value is None:
        width = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = torch.split(query, [num_heads * width, kv_num_heads * width, kv_num_heads * width], -1)
    q, k, v = heads_apart(query, num_heads), heads_apart(key, kv_num_heads), heads_apart(value, kv_num_heads)
    before = 0 if past_key is None else past_key.shape[2]
    if any(n + 1 != before + k.shape[2] for n in ints(seqlens_k) or []):
        raise UnsupportedOperator(
            "com.microsoft::GroupQueryAttention", "sequences of several lengths, or a cache with room to spare"
        )
    if do_rotary and cos_cache is not None and sin_cache is not None:
        place = before + torch.arange(q.shape[2], device=q.device).reshape(1, -1)
        place = place if position_ids is None else position_ids.to(q.device, torch.int64)
        width = 2 * cos_cache.shape[-1]
        q, k = (_turned(x, place, cos_cache, sin_cache, width, bool(rotary_interleaved)) for x in (q, k))
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    # A window of w keys counts the query's own.
    left = local_window_size - 1 if local_window_size > 0 else -1
    seen = frontier(q.shape[2], k.shape[2], before, True, left, -1, q.device)
    y = _attended(q, k, v, scale, attention_bias, seen, -torch.inf, softcap)
    return y if outputs == 1 else (y, k, v)
