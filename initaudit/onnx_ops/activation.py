"""Activation functions, each elementwise but for the softmax family."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import accumulator, computed, together
from initaudit.roles import Role


def _role(name: str) -> Role:
    return Role("pointwise", name)


@operator(_role("relu"))
def Relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return computed(torch.relu, x)


@operator(_role("leaky_relu"))
def LeakyRelu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x above zero, alpha x below."""
    return F.leaky_relu(x, alpha)


@operator(Role("pointwise", "prelu", data=("x",)))
def PRelu(x: Tensor, slope: Tensor, *, opset: int = 28) -> Tensor:
    """x above zero, slope x below; before opset 7 a one-dimensional slope runs along axis 1."""
    if opset < 7 and slope.ndim == 1 and x.ndim > 1:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    return computed(lambda t, s: torch.where(t < 0, s * t, t), x, slope)


@operator(_role("elu"))
def Elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x above zero, alpha (e^x - 1) below."""
    return F.elu(x, alpha)


@operator(_role("selu"))
def Selu(x: Tensor, *, alpha: float = 1.6732631921768188, gamma: float = 1.0507010221481323) -> Tensor:
    """gamma x above zero, gamma alpha (e^x - 1) below."""
    return gamma * F.elu(x, alpha)


@operator(_role("celu"))
def Celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1))."""
    return F.celu(x, alpha)


@operator(_role("sigmoid"))
def Sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x)."""
    return torch.sigmoid(x)


@operator(_role("hardsigmoid"))
def HardSigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """alpha x + beta between 0 and 1."""
    return torch.clamp(alpha * x + beta, 0, 1)


@operator(_role("hardswish"))
def HardSwish(x: Tensor) -> Tensor:
    """x times its hard sigmoid of slope 1/6."""
    return x * torch.clamp(x / 6 + 0.5, 0, 1)


@operator(_role("tanh"))
def Tanh(input: Tensor) -> Tensor:
    """The hyperbolic tangent."""
    return torch.tanh(input)


@operator(_role("softplus"))
def Softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x)."""
    return F.softplus(x)


@operator(_role("softsign"))
def Softsign(input: Tensor) -> Tensor:
    """x / (1 + |x|)."""
    return F.softsign(input)


@operator(_role("gelu"))
def Gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """x Φ(x) (Hendrycks and Gimpel 2016), exactly or by way of the hyperbolic tangent."""
    return F.gelu(x, approximate=approximate)


@operator(_role("mish"))
def Mish(x: Tensor) -> Tensor:
    """x tanh(softplus(x))."""
    return F.mish(x)


@operator(_role("swish"))
def Swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


@operator(Role("pointwise", "swiglu"))
def SwiGLU(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """swish(a) b (Shazeer 2020)."""
    a, b = together(a, b)
    return a * torch.sigmoid(alpha * a) * b


@operator(_role("thresholded_relu"))
def ThresholdedRelu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x above alpha, otherwise 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


@operator(_role("shrink"))
def Shrink(input: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x + bias below -lambd, x - bias above lambd, otherwise 0."""

    def shrink(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero)).to(x.dtype)

    return computed(shrink, input)


def _coerced(x: Tensor, axis: int | None, opset: int) -> tuple[Tensor, int]:
    """The value and the axis to normalise: before opset 13 all axes from `axis` (1 by default) on are one."""
    if opset >= 13:
        return x, -1 if axis is None else axis
    start = 1 if axis is None else axis
    start += x.ndim if start < 0 else 0
    return x.flatten(start) if start < x.ndim else x.unsqueeze(-1), start


_SUMMED_ONE_BY_ONE = 4096  # a longer sum of bfloat16 numbers stops growing anyway


def softmax(x: Tensor, axis: int) -> Tensor:
    """The softmax along an axis; in a 16-bit type every step is rounded to it, as the standard's definition has it."""
    if x.dtype not in (torch.float16, torch.bfloat16) or x.numel() == 0:
        return torch.softmax(x, axis)
    powers = torch.exp(x - x.amax(axis, keepdim=True))
    if x.dtype == torch.float16 or x.shape[axis] > _SUMMED_ONE_BY_ONE:
        return powers / powers.sum(axis, keepdim=True)
    # torch rounds a sum to bfloat16 once, at its end; in the arithmetic of the type every addition is rounded.
    total = torch.zeros_like(powers.select(axis, 0))
    for part in powers.unbind(axis):
        total = total + part
    return powers / total.unsqueeze(axis)


@operator(Role("softmax", "softmax"))
def Softmax(input: Tensor, *, axis: int | None = None, opset: int = 28) -> Tensor:
    """e^x over its sum along an axis."""
    value, axis = _coerced(input, axis, opset)
    return softmax(value, axis).reshape(input.shape)


@operator(Role("softmax", "log_softmax"))
def LogSoftmax(input: Tensor, *, axis: int | None = None, opset: int = 28) -> Tensor:
    """The logarithm of the softmax along an axis."""
    value, axis = _coerced(input, axis, opset)
    return torch.log_softmax(value, axis).reshape(input.shape)


@operator(Role("opaque", "hardmax"))
def Hardmax(input: Tensor, *, axis: int | None = None, opset: int = 28) -> Tensor:
    """1 at the first maximum along an axis, otherwise 0."""
    value, axis = _coerced(input, axis, opset)
    first = value.to(accumulator(value.dtype)).argmax(axis, keepdim=True)
    return torch.zeros_like(value).scatter(axis, first, 1).reshape(input.shape)
