"""Attention and what goes with it.

`n` is the batch, `h` the heads, `q` and `t` the positions of queries and keys, `e` the features of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from initaudit.onnx_ops.activation import softmax
from initaudit.onnx_ops.conv import constant_bias
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import together, torch_type
from initaudit.roles import Role, WeightUse

Modifier = Callable[[Tensor], tuple[Tensor, ...]]


def heads_apart(x: Tensor, heads: int | None) -> Tensor:
    """`n q (h e)` as `n h q e`; what has four axes already stays."""
    if x.ndim == 4:
        return x
    if heads is None:
        raise ValueError("packed heads without their number")
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def heads_together(x: Tensor) -> Tensor:
    """`n h q e` as `n q (h e)`."""
    return x.transpose(1, 2).flatten(2)


def guarded_softmax(scores: Tensor, blocked: Tensor | None) -> Tensor:
    """The softmax over the last axis; rows that are blocked entirely are zero instead of nan."""
    if blocked is None:
        return softmax(scores, -1)
    zero = torch.zeros((), dtype=scores.dtype, device=scores.device)
    return torch.where(blocked, zero, softmax(torch.where(blocked, zero, scores), -1))


def frontier(
    queries: int, keys: int, offset: Tensor | int, causal: bool, left: int, right: int, device: torch.device
) -> Tensor | None:
    """Which keys each query may see, `q t` or (with an offset for each batch entry) `n 1 q t`; None: all of them."""
    if not causal and left < 0 and right < 0:
        return None
    place = torch.arange(queries, device=device).reshape(-1, 1)
    if isinstance(offset, Tensor):
        place = place + offset.to(device, torch.int64).reshape(-1, 1, 1, 1)
    else:
        place = place + offset
    key = torch.arange(keys, device=device)
    seen = torch.ones((), dtype=torch.bool, device=device)
    if causal:
        seen = key <= place
    if left >= 0:
        seen = seen & (key >= place - left)
    return seen & (key <= place + right) if right >= 0 else seen


def _bias(seen: Tensor, kind: torch.dtype) -> Tensor:
    """0 where a key may be seen, -inf elsewhere."""
    zero = torch.zeros((), dtype=kind, device=seen.device)
    return torch.where(seen, zero, torch.full_like(zero, -math.inf))


def _masked(mask: Tensor | None, keys: int, kind: torch.dtype) -> Tensor | None:
    """A mask of booleans or numbers as numbers to add; what it does not reach is blocked."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = _bias(mask, kind)
    missing = keys - mask.shape[-1]
    return torch.nn.functional.pad(mask, (0, missing), value=-math.inf) if missing > 0 else mask


def repeated(x: Tensor, heads: int) -> Tensor:
    """Every key head as often as there are query heads that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


@operator(Role("attention", "attention", data=("q", "k", "v")))
def Attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """softmax(scale q k' + mask) v (Vaswani et al. 2017, eq. 1), heads packed `n q (h e)` or apart `n h q e`.

    Further outputs: all keys, all values, and the scores at a stage of choice.
    """
    q, k, v = together(q, k, v)
    packed = q.ndim == 3
    q, k, v = heads_apart(q, q_num_heads), heads_apart(k, kv_num_heads), heads_apart(v, kv_num_heads)
    if past_key is not None and past_value is not None:
        k, v = torch.cat(together(past_key, k), 2), torch.cat(together(past_value, v), 2)
    keys, kind = k.shape[2], q.dtype
    offset: Tensor | int = 0 if past_key is None else past_key.shape[2]
    parts = [_masked(attn_mask, keys, kind)]
    if nonpad_kv_seqlen is not None:
        lengths = nonpad_kv_seqlen.to(q.device, torch.int64).reshape(-1, 1, 1, 1)
        parts.append(_bias(torch.arange(keys, device=q.device) < lengths, kind))
        offset = offset if past_key is not None else lengths - q.shape[2]
    seen = frontier(q.shape[2], keys, offset, bool(is_causal), left_window_size, right_window_size, q.device)
    parts.append(None if seen is None else _bias(seen, kind))
    added = [together(part, q)[0] for part in parts if part is not None]
    bias = sum(added[1:], added[0]) if added else None
    # The scale is shared between both factors, in their own type, to keep 16-bit products in range.
    root = torch.tensor(math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale), dtype=kind).item()
    scores = (q * root) @ (repeated(k, q.shape[1]) * root).transpose(-1, -2)
    stages = [scores]
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    stages.append(scores)
    if bias is not None:
        scores = scores + bias
    stages.append(scores)
    blocked = None if bias is None else bias.amax(-1, keepdim=True) == -math.inf
    exact = scores if softmax_precision is None else scores.to(torch_type(softmax_precision))
    probabilities = guarded_softmax(exact, blocked).to(kind)
    stages.append(probabilities)
    y = probabilities @ repeated(v, q.shape[1])
    y = heads_together(y) if packed else y
    return y if outputs == 1 else (y, k, v, stages[qk_matmul_output_mode])


@operator(Role("attention", "flex_attention", data=("q", "k", "v")), domain="ai.onnx.preview")
def FlexAttention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prob_mod: Modifier | None = None,
    scale: float | None = None,
    score_mod: Modifier | None = None,
    softmax_precision: int | None = None,
) -> Tensor:
    """Attention of `n h q e` whose scores and probabilities pass through subgraphs."""
    q, k, v = together(q, k, v)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    wide = wide if softmax_precision is None else torch_type(softmax_precision)
    scores = q.to(wide) @ repeated(k, q.shape[1]).to(wide).transpose(-1, -2) * factor
    if score_mod is not None:
        (scores,) = score_mod(scores)
    probabilities = torch.softmax(scores, -1)
    if prob_mod is not None:
        (probabilities,) = prob_mod(probabilities)
    return probabilities.to(q.dtype) @ repeated(v, q.shape[1])


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Pairs of features turned by an angle (Su et al. 2021, eq. 34): halves of the head, or neighbours where interleaved."""
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat([cos * a - sin * b, sin * a + cos * b], -1)


@operator(Role("passthrough", "rotary_embedding", data=("x",)))
def RotaryEmbedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """The first features of every head `n h q e` (or `n q (h e)`) turned by angles that grow with the position."""
    packed = x.ndim == 3
    value = heads_apart(x, num_heads or None)
    value, cos, sin = together(value, cos_cache, sin_cache)
    if position_ids is not None:
        place = position_ids.to(value.device, torch.int64)
        cos, sin = cos[place], sin[place]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    width = rotary_embedding_dim or value.shape[-1]
    turned = rotated(value[..., :width], cos, sin, bool(interleaved))
    value = torch.cat([turned, value[..., width:]], -1) if width < value.shape[-1] else turned
    return heads_together(value) if packed else value


@operator(Role("attention", "linear_attention", data=("query", "key", "value")))
def LinearAttention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    chunk_size: int = 64,
    kv_num_heads: int,
    q_num_heads: int,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """A state `n h e e` updated by every key and value and read by every query (Yang et al. 2024, gated delta rule)."""
    query, key, value = together(query, key, value)
    q, k, v = heads_apart(query, q_num_heads), heads_apart(key, kv_num_heads), heads_apart(value, kv_num_heads)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = scale or 1 / math.sqrt(q.shape[-1])
    k, v = k.to(wide), v.to(wide)
    state = k.new_zeros(k.shape[0], k.shape[1], k.shape[-1], v.shape[-1])
    if past_state is not None:
        state = together(past_state, k)[0].to(wide)
    fade = rate = None
    if "gated" in update_rule and decay is not None:
        fade = torch.exp(heads_apart(together(decay, k)[0].to(wide), kv_num_heads)).unsqueeze(-1)
    if "delta" in update_rule and beta is not None:
        # `n t h` or one rate for all heads, `n t 1`.
        rate = together(beta, k)[0].to(wide).transpose(1, 2).unsqueeze(-1)
    read = []
    for t in range(k.shape[2]):
        state = state if fade is None else fade[:, :, t] * state
        new = v[:, :, t]
        if rate is not None:
            new = rate[:, :, t] * (new - torch.einsum("nhde,nhd->nhe", state, k[:, :, t]))
        state = state + k[:, :, t].unsqueeze(-1) * new.unsqueeze(-2)
        shared = repeated(state, q.shape[1])
        read.append(torch.einsum("nhd,nhde->nhe", q[:, :, t].to(wide), shared) * factor)
    y = heads_together(torch.stack(read, 2)).to(query.dtype)
    return y if outputs == 1 else (y, state.to(query.dtype if past_state is None else past_state.dtype))


def _causal_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    weight = call["weight"]
    if not weight.constant or weight.shape is None:
        return ()
    bias = constant_bias(call, "bias")
    return (WeightUse("weight", ("o", "i", "k"), "conv", bias=bias, groups=weight.shape[0], unit_axis=1),)


@operator(Role("contraction", "causal_conv", data=("input",), weights=_causal_weights))
def CausalConvWithState(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past_state: Tensor | None = None,
    *,
    activation: str = "none",
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """A depthwise convolution of `n c t` that sees only the past; its last `k - 1` inputs are the new state."""
    input, weight = together(input, weight)
    width = weight.shape[-1]
    before = input.new_zeros(*input.shape[:2], width - 1) if past_state is None else together(past_state, input)[0]
    whole = torch.cat([before.to(input.dtype), input], -1)
    y = torch.nn.functional.conv1d(whole, weight, bias, groups=input.shape[1])
    if activation in ("silu", "swish"):
        y = torch.nn.functional.silu(y)
    elif activation != "none":
        raise ValueError(f"the unknown activation {activation!r}")
    return y if outputs == 1 else (y, whole[..., whole.shape[-1] - (width - 1) :])
