"""Pooling over space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import ints
from initaudit.onnx_ops.windows import Sweep, padded, sweep, windows
from initaudit.roles import Role


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


@operator(Role("pooling", "global_average_pool"))
def GlobalAveragePool(x: Tensor) -> Tensor:
    """The mean over space, `n c s…` to `n c 1…`."""
    return x.mean(_space(x), keepdim=True) if x.ndim > 2 else x


@operator(Role("pooling", "global_max_pool"))
def GlobalMaxPool(x: Tensor) -> Tensor:
    """The maximum over space, `n c s…` to `n c 1…`."""
    # max, not amax: like every max pool it sends the whole gradient to one element.
    return x.flatten(2).max(-1).values.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))


@operator(Role("pooling", "global_lp_pool"))
def GlobalLpPool(x: Tensor, *, p: int = 2) -> Tensor:
    """The p-norm over space, `n c s…` to `n c 1…`."""
    norm: Tensor = torch.linalg.vector_norm(x, p, _space(x), keepdim=True)
    return norm


@operator(Role("pooling", "max_pool"))
def MaxPool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The maximum of every window, and on demand where in the flattened `n c s…` it lies."""
    by = sweep(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    value = x if x.is_floating_point() else x.to(torch.float64 if x.element_size() > 2 else torch.float32)
    functions: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
    if not 1 <= len(by.kernel) <= 3:
        raise UnsupportedOperator("MaxPool", f"{len(by.kernel)} spatial axes", "one to three")
    pool = functions[len(by.kernel) - 1]
    filled = padded(value, by, -math.inf)
    if outputs == 1:
        result: Tensor = pool(filled, by.kernel, by.strides, 0, by.dilations)
        return result.to(x.dtype)
    result, places = pool(filled, by.kernel, by.strides, 0, by.dilations, return_indices=True)
    return result.to(x.dtype), _unpadded_places(places, by, filled.shape[2:], x.shape, storage_order)


def _unpadded_places(places: Tensor, by: Sweep, whole: Sequence[int], shape: Sequence[int], column_major: int) -> Tensor:
    """Places in one padded plane as places in the flattened, unpadded `n c s…` tensor."""
    coordinates = []
    for axis in reversed(range(len(whole))):
        coordinates.append(places % whole[axis] - by.begin[axis])
        places = places // whole[axis]
    coordinates.reverse()
    order = list(range(len(whole)))
    flat = torch.zeros_like(places)
    for axis in order[::-1] if column_major else order:
        flat = flat * by.sizes[axis] + coordinates[axis]
    plane = torch.arange(shape[0] * shape[1], device=places.device).reshape(shape[0], shape[1], *(1,) * len(whole))
    return flat + plane * math.prod(by.sizes)


@operator(Role("pooling", "average_pool"))
def AveragePool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The mean of every window; padding counts as zeros or, by default, not at all."""
    by = sweep(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    total = windows(x, by, 0.0).sum(tuple(range(-len(by.kernel), 0)))
    counts = torch.ones((), dtype=torch.float64)
    for axis, count in enumerate(by.output):
        low, high = (0, by.begin[axis] + by.sizes[axis] + by.end[axis]) if count_include_pad else (by.begin[axis],) * 2
        high = high if count_include_pad else by.begin[axis] + by.sizes[axis]
        tap = torch.arange(by.kernel[axis]) * by.dilations[axis]
        place = torch.arange(count).reshape(-1, 1) * by.strides[axis] + tap
        inside = ((place >= low) & (place < high)).sum(1).to(counts.dtype)
        counts = counts.unsqueeze(-1) * inside
    return total / counts.to(total)


@operator(Role("pooling", "lp_pool"))
def LpPool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """The p-norm of every window."""
    by = sweep(x.shape[2:], kernel_shape, strides, pads, dilations, auto_pad, ceil_mode)
    norm: Tensor = torch.linalg.vector_norm(windows(x, by, 0.0), p, tuple(range(-len(by.kernel), 0)))
    return norm


@operator(Role("pooling", "max_unpool", data=("x",)))
def MaxUnpool(
    x: Tensor,
    i: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Every value at the place that max pooling took it from, zeros elsewhere."""
    rank = len(kernel_shape)
    steps = strides or (1,) * rank
    margin = pads or (0,) * (2 * rank)
    natural = [(n - 1) * steps[a] - margin[a] - margin[a + rank] + kernel_shape[a] for a, n in enumerate(x.shape[2:])]
    target = [*x.shape[:2], *natural]
    wanted = ints(output_shape) or target
    reserve(wanted, "MaxUnpool", x)
    flat = x.new_zeros(math.prod(target)).index_put((i.reshape(-1).to(x.device),), x.reshape(-1))
    # The places are those in the natural output; a larger one that is asked for has it in its first corner.
    return F.pad(flat.reshape(target), [v for n, t in reversed(list(zip(target, wanted, strict=True))) for v in (0, t - n)])
