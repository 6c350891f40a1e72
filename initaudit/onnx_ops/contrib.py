"""The com.microsoft operators that onnxruntime's optimiser writes, as compositions of the standard's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.conv import Conv, conv_weights
from initaudit.onnx_ops.linear import Gemm, matmul_weights
from initaudit.onnx_ops.normalization import LayerNormalization, rms_normalized
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import normal_axis, together
from initaudit.roles import Role, WeightUse

MICROSOFT = "com.microsoft"

_ACTIVATIONS: Mapping[str, Callable[[Tensor, Sequence[float]], Tensor]] = {
    "": lambda x, _: x,
    "Relu": lambda x, _: torch.relu(x),
    "Sigmoid": lambda x, _: torch.sigmoid(x),
    "Tanh": lambda x, _: torch.tanh(x),
    "LeakyRelu": lambda x, p: F.leaky_relu(x, p[0] if p else 0.01),
    "Clip": lambda x, p: x.clamp(p[0], p[1]),
    "HardSigmoid": lambda x, p: torch.clamp(p[0] * x + p[1], 0, 1),
    "HardSwish": lambda x, _: x * torch.clamp(x / 6 + 0.5, 0, 1),
    "Softplus": lambda x, _: F.softplus(x),
}


def _activated(x: Tensor, name: str, parameters: Sequence[float] | None) -> Tensor:
    if name not in _ACTIVATIONS:
        raise UnsupportedOperator("fused activation", f"{name!r}", "one of " + ", ".join(sorted(_ACTIVATIONS)))
    return _ACTIVATIONS[name](x, parameters or ())


@operator(Role("contraction", "conv", data=("x", "z"), weights=conv_weights), domain=MICROSOFT)
def FusedConv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    z: Tensor | None = None,
    *,
    activation: str = "",
    activation_params: Sequence[float] | None = None,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution, plus z, through an activation function."""
    y = Conv(x, w, b, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return _activated(y if z is None else y + z, activation, activation_params)


def _fused_matmul_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    # Batches that are transposed too put their axis between rows and columns, which no letter of ours can say.
    if call.get("transBatchA") or call.get("transBatchB"):
        return ()
    return matmul_weights(call)


@operator(Role("contraction", "matmul", data=("a", "b"), weights=_fused_matmul_weights), domain=MICROSOFT)
def FusedMatMul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """alpha a b, either operand transposed on demand; a transposed batch brings the first axis next to the last."""
    a, b = together(a, b)
    a = a.movedim(0, -2) if transBatchA else a
    b = b.movedim(0, -2) if transBatchB else b
    a = a.mT if transA and a.ndim > 1 else a
    b = b.mT if transB and b.ndim > 1 else b
    return alpha * (a @ b)


@operator(Role("contraction", "gemm", data=("a", "b", "c"), weights=matmul_weights), domain=MICROSOFT)
def FusedGemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str = "",
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha a b + beta c through an activation function."""
    parameters = [p for p in (activation_alpha, activation_beta) if p is not None]
    return _activated(Gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB), activation, parameters)


@operator(Role("pointwise", "gelu"), domain=MICROSOFT)
def Gelu(x: Tensor) -> Tensor:
    """x Φ(x)."""
    return F.gelu(x)


@operator(Role("pointwise", "gelu"), domain=MICROSOFT)
def BiasGelu(a: Tensor, b: Tensor) -> Tensor:
    """(a + b) Φ(a + b)."""
    a, b = together(a, b)
    return F.gelu(a + b)


@operator(Role("pointwise", "gelu"), domain=MICROSOFT)
def FastGelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Φ(x) by way of the hyperbolic tangent, of x plus a bias."""
    return F.gelu(x if bias is None else x + together(bias, x)[0], approximate="tanh")


@operator(Role("pointwise", "quick_gelu"), domain=MICROSOFT)
def QuickGelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


@operator(Role("normalization", "rms_norm", data=("x",)), domain=MICROSOFT)
@operator(Role("normalization", "rms_norm", data=("x",)))
def SimplifiedLayerNormalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, outputs: int = 1
) -> Tensor | tuple[Tensor, Tensor]:
    """RMS normalisation; the second output is 1/√(mean of x² + epsilon)."""
    normal, inverse = rms_normalized(x, range(normal_axis(axis, x.ndim), x.ndim), epsilon)
    y = normal.to(x.dtype) * together(scale, x)[0]
    return y if outputs == 1 else (y, inverse)


def _skipped(input: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    input, skip = together(input, skip)
    total = input + skip
    return total if bias is None else total + together(bias, total)[0]


@operator(Role("normalization", "layer_norm", data=("input", "skip")), domain=MICROSOFT)
def SkipLayerNormalization(
    input: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The layer normalisation of input + skip + bias; that sum is the fourth output."""
    total = _skipped(input, skip, bias)
    result = LayerNormalization(total, gamma, beta, epsilon=epsilon, outputs=outputs)
    return result if isinstance(result, Tensor) else (*result, total)


@operator(Role("normalization", "rms_norm", data=("input", "skip")), domain=MICROSOFT)
def SkipSimplifiedLayerNormalization(
    input: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The RMS normalisation of input + skip + bias; that sum is the fourth output."""
    total = _skipped(input, skip, bias)
    normal, inverse = rms_normalized(total, [total.ndim - 1], epsilon)
    y = normal.to(total.dtype) * together(gamma, total)[0]
    return y if outputs == 1 else (y, torch.zeros_like(inverse), inverse, total)


def _tables(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    names = ("word_embedding", "position_embedding", "segment_embedding")
    return tuple(
        WeightUse(name, ("v", "d"), "embedding", unit_axis=None)
        for name in names
        if call.get(name) is not None and call[name].constant
    )


@operator(Role("embedding", "embed_layer_norm", data=("word_embedding",), weights=_tables), domain=MICROSOFT)
def EmbedLayerNormalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int = 1,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """The layer normalisation of the sum of word, position and segment embeddings `v d`, for ids `n q`: `n q d`.

    Further outputs: how many positions of each sequence the mask keeps, and the sum.
    """
    ids = input_ids.to(torch.int64)
    places = torch.arange(ids.shape[1]) if position_ids is None else position_ids.to(torch.int64)
    total = F.embedding(ids, word_embedding) + F.embedding(places.to(ids.device), position_embedding)
    if segment_embedding is not None:
        total = total + F.embedding(
            torch.zeros_like(ids) if segment_ids is None else segment_ids.to(torch.int64), segment_embedding
        )
    y = LayerNormalization(total, gamma, beta, epsilon=epsilon)
    if not isinstance(y, Tensor):
        raise TypeError("one output of LayerNormalization is a tensor")
    if outputs == 1:
        return y
    kept = torch.zeros(ids.shape[0], dtype=torch.int32) if mask is None else mask.sum(1).to(torch.int32)
    return y, kept, total
