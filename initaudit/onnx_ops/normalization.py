"""Normalisation layers. `n` is the batch, `c` the channels, `s…` space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import accumulator, normal_axis, together
from initaudit.roles import Role


def _role(name: str, data: str = "x") -> Role:
    return Role("normalization", name, data=(data,))


def _per_channel(value: Tensor, like: Tensor) -> Tensor:
    return together(value, like)[0].reshape(-1, *(1,) * (like.ndim - 2))


@operator(_role("batch_norm"))
def BatchNormalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor,
    input_mean: Tensor,
    input_var: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
    spatial: int = 1,
    is_test: int | None = None,
    opset: int = 28,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """scale (x - mean) / √(variance + epsilon) + b for every channel (Ioffe and Szegedy 2015), with the running statistics.

    In training mode (before opset 14: where more than one output is used) with those of the batch; then the new
    running mean and (biased) variance are outputs too.
    """
    x, scale, b, input_mean, input_var = together(x, scale, b, input_mean, input_var)
    training = bool(training_mode) if opset >= 14 else outputs > 1 and not is_test
    wide = accumulator(x.dtype)
    value = x.to(wide)
    mean, variance = input_mean.to(wide), input_var.to(wide)
    if training:
        over = [axis for axis in range(x.ndim) if axis != 1]
        mean, variance = value.mean(over), value.var(over, correction=0)
    if not spatial:
        # Before opset 9 every place could have statistics of its own, `c s…`.
        y = (value - mean) / torch.sqrt(variance + epsilon) * scale.to(wide) + b.to(wide)
    else:
        factor = scale.to(wide) / torch.sqrt(variance + epsilon)
        y = (value - _per_channel(mean, x)) * _per_channel(factor, x) + _per_channel(b.to(wide), x)
    y = y.to(x.dtype)
    if outputs == 1:
        return y
    running_mean = input_mean * momentum + mean.to(input_mean.dtype) * (1 - momentum)
    running_var = input_var * momentum + variance.to(input_var.dtype) * (1 - momentum)
    return y, running_mean, running_var, mean.to(input_mean.dtype), variance.to(input_var.dtype)


@operator(_role("instance_norm", "input"))
def InstanceNormalization(input: Tensor, scale: Tensor, b: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """scale (x - mean) / √(variance + epsilon) + b, statistics over the space of one channel of one example."""
    over = list(range(2, input.ndim))
    value = input.to(accumulator(input.dtype))
    variance, mean = torch.var_mean(value, over, correction=0, keepdim=True)
    normal = ((value - mean) / torch.sqrt(variance + epsilon)).to(input.dtype)
    return normal * _per_channel(scale, input) + _per_channel(b, input)


@operator(_role("layer_norm"))
def LayerNormalization(
    x: Tensor,
    scale: Tensor,
    b: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: int = 1,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """scale (x - mean) / √(variance + epsilon) + b, statistics over all axes from `axis` on (Ba et al. 2016).

    Further outputs: the mean and 1/√(variance + epsilon). 16-bit types are computed in float32.
    """
    over = list(range(normal_axis(axis, x.ndim), x.ndim))
    value = x.to(accumulator(x.dtype)) if stash_type == 1 else x
    variance, mean = torch.var_mean(value, over, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    y = ((value - mean) * inverse).to(x.dtype) * together(scale, x)[0]
    y = y if b is None else y + together(b, x)[0]
    return y if outputs == 1 else (y, mean, inverse)


def rms_normalized(x: Tensor, over: Sequence[int], epsilon: float) -> tuple[Tensor, Tensor]:
    """x / √(mean of x² + epsilon) (Zhang and Sennrich 2019) in at least float32, and the inverse root."""
    value = x.to(accumulator(x.dtype))
    inverse = torch.rsqrt((value * value).mean(list(over), keepdim=True) + epsilon)
    return value * inverse, inverse


@operator(_role("rms_norm"))
def RMSNormalization(x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """scale x / √(mean of x² + epsilon), the mean over all axes from `axis` on."""
    normal, _ = rms_normalized(x, range(normal_axis(axis, x.ndim), x.ndim), epsilon)
    return normal.to(x.dtype) * together(scale, x)[0]


@operator(_role("group_norm"))
def GroupNormalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1, opset: int = 28
) -> Tensor:
    """scale (x - mean) / √(variance + epsilon) + bias, statistics over a group of channels (Wu and He 2018).

    Scale and bias are per channel; before opset 21 they are per group.
    """
    value = x.to(accumulator(x.dtype)).reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(value, -1, correction=0, keepdim=True)
    normal = ((value - mean) * torch.rsqrt(variance + epsilon)).reshape(x.shape).to(x.dtype)
    if opset < 21:
        scale, bias = (v.repeat_interleave(x.shape[1] // num_groups) for v in (scale, bias))
    return normal * _per_channel(scale, x) + _per_channel(bias, x)


@operator(_role("local_response_norm"))
def LRN(x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """x / (bias + alpha/size · Σ x²)^beta, the sum over `size` neighbouring channels (Krizhevsky et al. 2012, section 3.3)."""
    # With an even size the channel after the middle is the one more.
    before, after = (size - 1) // 2, size // 2
    squares = F.pad(x * x, (0, 0) * (x.ndim - 2) + (before, after)).unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * squares) ** beta


@operator(_role("lp_norm", "input"))
def LpNormalization(input: Tensor, *, axis: int = -1, p: int = 2) -> Tensor:
    """x over its p-norm along an axis; zero where that is zero."""
    norm = torch.linalg.vector_norm(input, p, axis, keepdim=True)
    return input / torch.where(norm == 0, torch.ones_like(norm), norm)


@operator(_role("mean_variance_norm"))
def MeanVarianceNormalization(x: Tensor, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """(x - mean) / (standard deviation + 1e-9) over the axes."""
    variance, mean = torch.var_mean(x, list(axes), correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)
