"""Convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import ints, together
from initaudit.onnx_ops.windows import sweep, torch_pads
from initaudit.roles import Role, WeightUse


def constant_bias(call: Mapping[str, Any], name: str) -> str | None:
    """The name of the bias, where there is a constant one."""
    bias = call.get(name)
    return name if bias is not None and bias.constant else None


def conv_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    """The kernel `o i k…` of a convolution."""
    w = call["w"]
    if not w.constant or w.shape is None:
        return ()
    axes = ("o", "i") + ("k",) * (len(w.shape) - 2)
    return (WeightUse("w", axes, "conv", bias=constant_bias(call, "b"), groups=call.get("group", 1), unit_axis=1),)


def _transposed_weights(call: Mapping[str, Any]) -> tuple[WeightUse, ...]:
    w = call["w"]
    if not w.constant or w.shape is None:
        return ()
    axes = ("i", "o") + ("k",) * (len(w.shape) - 2)
    overlap = 1 / math.prod(call.get("strides") or [1])
    bias, groups = constant_bias(call, "b"), call.get("group", 1)
    return (WeightUse("w", axes, "conv_transpose", bias=bias, groups=groups, overlap=overlap, unit_axis=1),)


def _convolution(rank: int, transposed: bool = False) -> Any:
    functions: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
    if transposed:
        functions = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    if not 1 <= rank <= 3:
        raise UnsupportedOperator("Conv", f"{rank} spatial axes", "one to three")
    return functions[rank - 1]


@operator(Role("contraction", "conv", data=("x",), weights=conv_weights))
def Conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The cross-correlation of `n i s…` with `o i/group k…`, plus `o`: `n o s…`."""
    x, w = together(x, w)
    by = sweep(x.shape[2:], w.shape[2:], strides, pads, dilations, auto_pad)
    convolve = _convolution(len(by.kernel))
    bias = None if b is None else together(b, w)[0]
    symmetric = by.begin == by.end
    value = x if symmetric else F.pad(x, torch_pads(by.begin, by.end))
    result: Tensor = convolve(value, w, bias, by.strides, by.begin if symmetric else 0, by.dilations, group)
    return result


@operator(Role("contraction", "conv_transpose", data=("x",), weights=_transposed_weights))
def ConvTranspose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The transposed convolution of `n i s…` with `i o/group k…`, plus `o`: `n o s…`."""
    x, w = together(x, w)
    rank = w.ndim - 2
    steps = tuple(strides) if strides else (1,) * rank
    gaps = tuple(dilations) if dilations else (1,) * rank
    more = list(output_padding) if output_padding else [0] * rank
    target = list(output_shape)[-rank:] if output_shape else None
    if target is None and auto_pad.startswith("SAME"):
        target = [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
    full = [s * (n - 1) + (k - 1) * d + 1 for n, s, k, d in zip(x.shape[2:], steps, w.shape[2:], gaps, strict=True)]
    begin, end = [0] * rank, [0] * rank
    if target is not None:
        total = [f + m - t for f, m, t in zip(full, more, target, strict=True)]
        # The odd element goes to the end for SAME_UPPER, else to the beginning; a total below zero is padding.
        begin = [t // 2 if auto_pad == "SAME_UPPER" else t - t // 2 for t in total]
        end = [t - first for t, first in zip(total, begin, strict=True)]
    elif pads and auto_pad != "VALID":
        begin, end = list(pads[:rank]), list(pads[rank:])
    reserve([x.shape[0], w.shape[1] * group, *full], "ConvTranspose", x)
    result: Tensor = _convolution(rank, transposed=True)(x, w, None, steps, 0, 0, group, gaps)
    # Cropped by hand: the standard's paddings may differ at both ends, and output_padding may exceed what torch allows.
    crop = torch_pads([-p for p in begin], [m - p for m, p in zip(more, end, strict=True)])
    result = F.pad(result, crop) if any(crop) else result
    return result if b is None else result + together(b, result)[0].reshape(-1, *(1,) * rank)


def _bilinear(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """`n g c h w` at the places `n g p…` between its pixels, as `n g c p…`; outside it is zero.

    In pixels, not in grid_sample's units of half the image: the rounding of that change of units shows where the result is 0.
    """
    height, width = images.shape[-2:]
    top, left = torch.floor(row).detach(), torch.floor(column).detach()
    total = images.new_zeros(())
    for down in (0, 1):
        for right in (0, 1):
            y, x = (top + down), (left + right)
            share = (1 - (row - y).abs()) * (1 - (column - x).abs())
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
            flat = (y.clamp(0, height - 1) * width + x.clamp(0, width - 1)).to(torch.int64)
            index = flat.flatten(2).unsqueeze(2).expand(-1, -1, images.shape[2], -1)
            pixels = images.flatten(3).gather(3, index).reshape(*images.shape[:3], *flat.shape[2:])
            total = total + pixels * torch.where(inside, share, torch.zeros_like(share)).unsqueeze(2)
    return total


@operator(Role("contraction", "deform_conv", data=("x",), weights=conv_weights))
def DeformConv(
    x: Tensor,
    w: Tensor,
    offset: Tensor,
    b: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """A convolution whose taps are displaced by `offset` and weighed by `mask` (Zhu et al. 2019), `n i h w` to `n o h w`."""
    if x.ndim != 4:
        raise UnsupportedOperator("DeformConv", f"{x.ndim - 2} spatial axes", "two")
    x, w, offset = together(x, w, offset)
    by = sweep(x.shape[2:], w.shape[2:], strides, pads, dilations)
    n, c = x.shape[:2]
    taps, (rows, columns) = math.prod(by.kernel), by.output
    moves = offset.reshape(n, offset_group, taps, 2, rows, columns)
    places = []
    for axis in range(2):
        across = [-1 if a == axis else 1 for a in range(2)]
        inside = (torch.arange(by.kernel[axis]) * by.dilations[axis]).reshape(across).expand(by.kernel)
        corner = (torch.arange(by.output[axis]) * by.strides[axis] - by.begin[axis]).reshape(across)
        places.append((inside.reshape(taps, 1, 1) + corner).to(x) + moves[:, :, :, axis])
    images = x.reshape(n, offset_group, c // offset_group, *x.shape[2:])
    taken = _bilinear(images, places[0], places[1])
    if mask is not None:
        taken = taken * mask.reshape(n, offset_group, 1, taps, rows, columns)
    taken = taken.reshape(n, group, c // group * taps, rows * columns)
    kernel = w.reshape(group, w.shape[0] // group, -1)
    result = torch.einsum("goi,ngis->ngos", kernel, taken).reshape(n, w.shape[0], rows, columns)
    return result if b is None else result + b.reshape(-1, 1, 1)


@operator(Role("passthrough", "col2im", data=("input",)))
def Col2Im(
    input: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The sum of overlapping blocks: `n (c·k…) l` to `n c s…`, in any number of spatial axes."""
    sizes, kernel = ints(image_shape) or [], ints(block_shape) or []
    by = sweep(sizes, kernel, strides, pads, dilations)
    whole = [n + b + e for n, b, e in zip(sizes, by.begin, by.end, strict=True)]
    rank = len(sizes)
    reserve([*input.shape[:1], *whole], "Col2Im", input)
    flat = torch.zeros((), dtype=torch.int64)
    for axis in range(rank):
        inside = torch.arange(kernel[axis]) * by.dilations[axis]
        corner = torch.arange(by.output[axis]) * by.strides[axis]
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = kernel[axis], by.output[axis]
        place = (inside.reshape(-1, 1) + corner).reshape(shape)
        flat = flat * whole[axis] + place
    channels = input.shape[1] // math.prod(kernel)
    values = input.reshape(input.shape[0], channels, -1)
    image = values.new_zeros(input.shape[0], channels, math.prod(whole))
    image = image.index_add(2, flat.reshape(-1).to(values.device), values).reshape(-1, channels, *whole)
    return F.pad(image, torch_pads([-p for p in by.begin], [-p for p in by.end]))
