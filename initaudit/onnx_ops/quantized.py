"""Quantised arithmetic: integers that stand for scale · (q - zero point)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.conv import Conv, conv_weights
from initaudit.onnx_ops.linear import matmul_weights
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.shape import to_type
from initaudit.onnx_ops.tensors import INT2, INT4, NARROW, UINT2, UINT4, normal_axis, together, torch_type
from initaudit.roles import Role

MICROSOFT = "com.microsoft"
_LIMITS = {INT4: (-8, 7), UINT4: (0, 15), INT2: (-2, 1), UINT2: (0, 3)}


def stretched(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point as a tensor that broadcasts with `x`: one for all, one an index of `axis`, or one a block of it."""
    if parameter.dtype in NARROW:
        parameter = parameter.view(NARROW[parameter.dtype])
    if parameter.ndim == 0 or (parameter.numel() == 1 and not block_size):
        return parameter.reshape(())
    axis = normal_axis(axis, x.ndim)
    if parameter.ndim == 1 and not block_size:
        return parameter.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    size = block_size or -(-x.shape[axis] // parameter.shape[axis])
    return parameter.repeat_interleave(size, axis).narrow(axis, 0, x.shape[axis])


def _rounded(x: Tensor, zero_point: Tensor | None, kind: torch.dtype) -> Tensor:
    """x to the nearest integer (halves to even), plus the zero point, saturated to the type."""
    if kind in _LIMITS:
        low, high = _LIMITS[kind]
    else:
        low, high = torch.iinfo(kind).min, torch.iinfo(kind).max
    whole = torch.round(x).to(torch.float64)
    whole = whole if zero_point is None else whole + zero_point.to(whole)
    return to_type(whole.clamp(low, high), kind)


@operator(Role("passthrough", "quantize", data=("x",)), domain=MICROSOFT)
@operator(Role("passthrough", "quantize", data=("x",)))
def QuantizeLinear(
    x: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
) -> Tensor:
    """round(x / scale) + zero point, saturated; to an 8-bit float: x / scale."""
    x, scale = together(x, y_scale)
    kind = y_zero_point.dtype if y_zero_point is not None else torch_type(output_dtype or 2)
    wide = torch_type(precision) if precision else scale.dtype
    value = x.to(wide) / stretched(scale, x, axis, block_size).to(wide)
    if kind.is_floating_point:
        return to_type(value, kind, bool(saturate))
    point = None if y_zero_point is None else stretched(together(y_zero_point, x)[0], x, axis, block_size)
    return _rounded(value, point, kind)


@operator(Role("passthrough", "dequantize", data=("x",)), domain=MICROSOFT)
@operator(Role("passthrough", "dequantize", data=("x",)))
def DequantizeLinear(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Tensor:
    """scale (x - zero point), for the whole tensor, along an axis or in blocks of it."""
    x, scale = together(x, x_scale)
    kind = torch_type(output_dtype) if output_dtype else scale.dtype
    held = x.view(NARROW[x.dtype]) if x.dtype in NARROW else x
    # 32-bit integers exceed what float32 holds exactly, so the difference is taken in float64.
    value = held.to(torch.float64 if held.dtype in (torch.int32, torch.uint32) else torch.float32)
    if x_zero_point is not None:
        value = value - stretched(together(x_zero_point, x)[0], x, axis, block_size).to(value)
    product: Tensor = value * stretched(scale, x, axis, block_size).to(value)
    return product.to(kind)


@operator(Role("passthrough", "quantize", data=("x",)))
def DynamicQuantizeLinear(x: Tensor, *, outputs: int = 3) -> Tensor | tuple[Tensor, ...]:
    """x as uint8 with the scale and zero point that its own range, widened to include 0, asks for."""
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    low, high = torch.minimum(x.amin(), zero), torch.maximum(x.amax(), zero)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    point = torch.round((-low / scale).clamp(0, 255)).to(torch.uint8)
    y = _rounded(x / scale, point, torch.uint8)
    return y if outputs == 1 else (y, scale, point)


def _centred(x: Tensor, zero_point: Tensor | None, axis: int) -> Tensor:
    """x - zero point as float64, in which products of 8-bit integers and their sums are exact."""
    value = x.to(torch.float64)
    if zero_point is None:
        return value
    return value - stretched(together(zero_point, x)[0].to(torch.float64), x, axis, 0)


def _centred_left(a: Tensor, zero_point: Tensor | None) -> Tensor:
    """The left operand of a product: a zero point for each row stands along the last axis but one."""
    return _centred(a, zero_point, max(a.ndim - 2, 0))


@operator(Role("contraction", "matmul_integer", data=("a", "b"), weights=matmul_weights))
def MatMulInteger(a: Tensor, b: Tensor, a_zero_point: Tensor | None = None, b_zero_point: Tensor | None = None) -> Tensor:
    """(a - zero point) (b - zero point) as int32."""
    a, b = together(a, b)
    return (_centred_left(a, a_zero_point) @ _centred(b, b_zero_point, b.ndim - 1)).to(torch.int32)


@operator(Role("contraction", "qlinear_matmul", data=("a", "b"), weights=matmul_weights))
def QLinearMatMul(
    a: Tensor,
    a_scale: Tensor,
    a_zero_point: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
) -> Tensor:
    """The product of two quantised matrices, quantised."""
    a, b = together(a, b)
    product = _centred_left(a, a_zero_point) @ _centred(b, b_zero_point, b.ndim - 1)
    scale = stretched(a_scale, a, max(a.ndim - 2, 0), 0).double() * stretched(b_scale, b, b.ndim - 1, 0).double()
    value = product * scale.to(product.device) / stretched(y_scale, product, product.ndim - 2, 0).double()
    point = stretched(y_zero_point, product, product.ndim - 2, 0)
    return _rounded(value, point, y_zero_point.dtype)


@operator(Role("contraction", "conv_integer", data=("x",), weights=conv_weights))
def ConvInteger(
    x: Tensor,
    w: Tensor,
    x_zero_point: Tensor | None = None,
    w_zero_point: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The convolution of (x - zero point) with (w - zero point) as int32."""
    value, kernel = _centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0)
    sweep = {"auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides}
    return torch.round(Conv(value, kernel, **sweep)).to(torch.int32)  # type: ignore[arg-type]


@operator(Role("contraction", "qlinear_conv", data=("x",), weights=conv_weights))
def QLinearConv(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor,
    w: Tensor,
    w_scale: Tensor,
    w_zero_point: Tensor,
    y_scale: Tensor,
    y_zero_point: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The convolution of a quantised image with a quantised kernel, quantised; the bias is in units of both scales."""
    value, kernel = _centred(x, x_zero_point, 1), _centred(w, w_zero_point, 0)
    sweep = {"auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides}
    total = Conv(value, kernel, None if b is None else b.to(torch.float64), **sweep)  # type: ignore[arg-type]
    scale = (x_scale.double() * w_scale.double()).reshape(-1, *(1,) * (x.ndim - 2)) / y_scale.double()
    return _rounded(total * scale.to(total.device), y_zero_point, y_zero_point.dtype)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Unsigned integers of a few bits out of bytes along the last axis, the lowest bits first."""
    if bits not in (2, 4, 8):
        raise UnsupportedOperator("MatMulNBits", f"{bits} bits", "2, 4 or 8")
    shifts = torch.arange(0, 8, bits, device=packed.device)
    values: Tensor = (packed.to(torch.int64).unsqueeze(-1) >> shifts) & (2**bits - 1)
    return values.flatten(-2)


def dequantized_blocks(
    b: Tensor, scales: Tensor, zero_points: Tensor | None, columns: int, rows: int, bits: int, block_size: int
) -> Tensor:
    """The matrix `rows columns` (o i) that MatMulNBits keeps as `rows blocks bytes`, each block with a scale of its own."""
    blocks = -(-columns // block_size)
    values = unpacked(b.reshape(rows, blocks, -1), bits)[..., :block_size].to(scales.dtype)
    if zero_points is None:
        point: Tensor | float = 2.0 ** (bits - 1)
    elif zero_points.dtype == torch.uint8:
        point = unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks].to(scales.dtype).unsqueeze(-1)
    else:
        point = zero_points.reshape(rows, blocks, 1)
    matrix: Tensor = (values - point) * scales.reshape(rows, blocks, 1)
    return matrix.reshape(rows, -1)[:, :columns]


@operator(Role("contraction", "matmul_nbits", data=("a",)), domain=MICROSOFT)
def MatMulNBits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int = 32,
    weight_prepacked: int = 0,
) -> Tensor:
    """a times the transpose of a matrix `N K` kept in blocks of few bits."""
    if g_idx is not None or weight_prepacked:
        raise UnsupportedOperator("MatMulNBits", "a permuted or prepacked weight")
    weight = dequantized_blocks(b, scales, zero_points, K, N, bits, block_size)
    a, weight = together(a, weight)
    product = a @ weight.to(a.dtype).T
    return product if bias is None else product + together(bias, product)[0]
