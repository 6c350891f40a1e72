"""Operators that sample a signal at other places: padding, resizing, grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from initaudit.errors import UnsupportedOperator
from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import floats, ints, normal_axis, scalar, together
from initaudit.roles import Role


def _positions(size: int, before: int, after: int, mode: str) -> list[int]:
    """Where the elements of an axis padded by reflection, by its edge or periodically come from."""
    places = range(-before, size + after)
    if mode == "edge":
        return [min(max(p, 0), size - 1) for p in places]
    if mode == "wrap":
        return [p % size for p in places]
    if mode != "reflect":
        raise UnsupportedOperator("Pad", f"mode {mode!r}", "constant, reflect, edge or wrap")
    period = max(2 * (size - 1), 1)
    return [min(p % period, period - p % period) if size > 1 else 0 for p in places]


@operator(Role("passthrough", "pad", data=("data",)))
def Pad(
    data: Tensor,
    pads_: Tensor | None = None,
    constant_value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
    pads: Sequence[int] | None = None,
    value: float = 0.0,
) -> Tensor:
    """`data` with elements added (or, by negative amounts, taken away) at the ends of the axes."""
    amounts = ints(pads if pads_ is None else pads_) or []
    chosen = ints(axes) if axes is not None else list(range(data.ndim))
    chosen = [normal_axis(axis, data.ndim) for axis in chosen or []]
    before, after = [0] * data.ndim, [0] * data.ndim
    for place, axis in enumerate(chosen):
        before[axis], after[axis] = amounts[place], amounts[place + len(chosen)]
    reserve([n + b + a for n, b, a in zip(data.shape, before, after, strict=True)], "Pad", data)
    if mode == "constant":
        fill = value if constant_value is None else scalar(constant_value)
        order = [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]
        return F.pad(data, order, value=fill)
    for axis in range(data.ndim):
        if before[axis] or after[axis]:
            start, stop = max(-before[axis], 0), data.shape[axis] - max(-after[axis], 0)
            data = data.narrow(axis, start, stop - start)
            source = _positions(stop - start, max(before[axis], 0), max(after[axis], 0), mode)
            data = data.index_select(axis, torch.tensor(source, dtype=torch.int64, device=data.device))
    return data


@operator(Role("passthrough", "center_crop_pad", data=("input_data",)))
def CenterCropPad(input_data: Tensor, shape: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """The middle of `input_data`, cropped or padded with zeros to the sizes given; the odd element goes to the end."""
    target = ints(shape) or []
    reserve(target, "CenterCropPad", input_data)
    amounts = [(0, 0)] * input_data.ndim
    for axis, size in zip(axes if axes is not None else range(input_data.ndim), target, strict=True):
        axis = normal_axis(axis, input_data.ndim)
        more = size - input_data.shape[axis]
        first = more // 2 if more >= 0 else -(-more // 2)
        amounts[axis] = (first, more - first)
    return F.pad(input_data, [amount for pair in reversed(amounts) for amount in pair])


def _source(out: int, size: int, scale: float, whole: int, mode: str, roi: tuple[float, float]) -> float:
    """Where in the input the output's place `out` lies; `whole` is the output's size, scale · size its exact one."""
    exact = scale * size
    if mode == "align_corners":
        return 0.0 if exact == 1 else out * (size - 1) / (exact - 1)
    if mode == "asymmetric":
        return out / scale
    if mode == "tf_crop_and_resize":
        low, high = roi
        if exact == 1:
            return (high - low) * (size - 1) / 2 + low * (size - 1)
        return out * (high - low) * (size - 1) / (exact - 1) + low * (size - 1)
    if mode == "pytorch_half_pixel" and exact == 1:
        return -0.5
    if mode == "tf_half_pixel_for_nn":
        return (out + 0.5) / scale
    place = (out + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        return place + size / 2 * (1 - whole / exact)
    if mode not in ("half_pixel", "pytorch_half_pixel"):
        raise UnsupportedOperator("Resize", f"coordinate_transformation_mode {mode!r}")
    return place


def _nearest(place: float, mode: str) -> int:
    low = math.floor(place)
    part = place - low
    if mode == "floor" or part == 0:
        return low
    if mode == "ceil":
        return low + 1
    return low + int(part > 0.5 if mode == "round_prefer_floor" else part >= 0.5)


def _linear(distance: float, _: float) -> float:
    return max(0.0, 1 - abs(distance))


def _cubic(distance: float, a: float) -> float:
    """Keys 1981, eq. 4, of parameter a."""
    x = abs(distance)
    if x <= 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


def _taps(
    place: float, size: int, kernel: Callable[[float, float], float], reach: int, a: float, shrink: float, exclude: bool
) -> dict[int, float]:
    """The weights of the input's elements at one place; what lies outside counts as the edge, or not at all."""
    low = math.floor(place)
    width = math.ceil(reach / shrink)
    weights = {i: kernel((i - place) * shrink, a) for i in range(low - width, low + width + 2)}
    if exclude:
        weights = {i: w for i, w in weights.items() if 0 <= i < size}
    total = math.fsum(weights.values()) if exclude or shrink < 1 else 1.0
    taps: dict[int, float] = {}
    for i, w in weights.items():
        edge = min(max(i, 0), size - 1)
        taps[edge] = taps.get(edge, 0.0) + w / total
    return taps


def _matrix(places: Sequence[float], size: int, mode: str, a: float, scale: float, antialias: bool, exclude: bool) -> Tensor:
    kernel, reach = (_linear, 1) if mode == "linear" else (_cubic, 2)
    shrink = min(scale, 1.0) if antialias else 1.0
    matrix = torch.zeros(len(places), size, dtype=torch.float64)
    for row, place in enumerate(places):
        for column, weight in _taps(place, size, kernel, reach, a, shrink, exclude).items():
            matrix[row, column] = weight
    return matrix


def _scales_and_sizes(
    shape: Sequence[int], axes: Sequence[int], scales: list[float] | None, sizes: list[int] | None, policy: str
) -> tuple[list[float], list[int]]:
    extents = [shape[axis] for axis in axes]
    if scales is not None:
        return scales, [math.floor(n * s) for n, s in zip(extents, scales, strict=True)]
    wanted = sizes or []
    if policy == "stretch":
        return [t / n for n, t in zip(extents, wanted, strict=True)], wanted
    scale = (min if policy == "not_larger" else max)(t / n for n, t in zip(extents, wanted, strict=True))
    # Halves are rounded up here, unlike Python's round.
    return [scale] * len(axes), [math.floor(scale * n + 0.5) for n in extents]


@operator(Role("passthrough", "resize", data=("x",)))
def Resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
    opset: int = 28,
) -> Tensor:
    """`x` sampled at the places of another grid: one sparse linear map per axis.

    Opset 10 has scales alone, as the second input, and always the "asymmetric" grid with its corner rounded down.
    """
    if opset < 11:
        scales, roi = (roi if scales is None else scales), None
        coordinate_transformation_mode, nearest_mode = "asymmetric", "floor"
    over = [normal_axis(axis, x.ndim) for axis in axes] if axes is not None else list(range(x.ndim))
    factors, targets = _scales_and_sizes(x.shape, over, floats(scales) or None, ints(sizes), keep_aspect_ratio_policy)
    final = list(x.shape)
    for axis, size in zip(over, targets, strict=True):
        final[axis] = size
    reserve(final, "Resize", x)
    corners = floats(roi) or []
    result, outside = x, []
    for place, (axis, scale, whole) in enumerate(zip(over, factors, targets, strict=True)):
        size = x.shape[axis]
        window = (corners[place], corners[place + len(over)]) if corners else (0.0, 1.0)
        if scale == 1 and whole == size and coordinate_transformation_mode != "tf_crop_and_resize":
            continue
        points = [_source(i, size, scale, whole, coordinate_transformation_mode, window) for i in range(whole)]
        if mode == "nearest":
            index = [min(max(_nearest(p, nearest_mode), 0), size - 1) for p in points]
            result = result.index_select(axis, torch.tensor(index, dtype=torch.int64, device=x.device))
        else:
            matrix = _matrix(points, size, mode, cubic_coeff_a, scale, bool(antialias), bool(exclude_outside))
            result = _mapped(result, matrix, axis)
        if coordinate_transformation_mode == "tf_crop_and_resize":
            outside.append((axis, [not 0 <= p <= size - 1 for p in points]))
    if not x.is_floating_point() and mode != "nearest":
        limits = torch.iinfo(x.dtype)
        result = result.round().clamp(limits.min, limits.max).to(x.dtype)
    for axis, flags in outside:
        blank = torch.tensor(flags, device=x.device).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        result = torch.where(blank, torch.full((), extrapolation_value, dtype=result.dtype, device=x.device), result)
    return result


def _mapped(x: Tensor, matrix: Tensor, axis: int) -> Tensor:
    value = x if x.is_floating_point() else x.to(torch.float64)
    return (value.movedim(axis, -1) @ matrix.to(value).T).movedim(-1, axis)


@operator(Role("passthrough", "upsample", data=("x",)))
def Upsample(
    x: Tensor, scales_: Tensor | None = None, *, mode: str = "nearest", scales: Sequence[float] | None = None
) -> Tensor:
    """`x` enlarged by a factor per axis, its corners fixed (before opset 11)."""
    factors = torch.tensor(floats(scales if scales_ is None else scales_), dtype=torch.float64)
    kind = "linear" if mode == "bilinear" else mode
    return Resize(x, None, factors, mode=kind, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@operator(Role("passthrough", "grid_sample", data=("x",)))
def GridSample(x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros") -> Tensor:
    """`n c s…` sampled at the points of `grid`, `n o… 2` or `n o… 3`, whose corners are -1 and 1."""
    kinds = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}
    if mode not in kinds:
        raise UnsupportedOperator("GridSample", f"mode {mode!r}", "linear, nearest or cubic")
    x, grid = together(x, grid)
    return F.grid_sample(x, grid.to(x.dtype), kinds[mode], padding_mode, bool(align_corners))


@operator(Role("generator", "affine_grid", data=("theta",)))
def AffineGrid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """The points of a regular grid under an affine map, `n 2 3` to `n h w 2` or `n 3 4` to `n d h w 3`."""
    target = ints(size) or []
    reserve(target, "AffineGrid", theta)
    return F.affine_grid(theta, target, bool(align_corners))
