"""Operators that look at or change the shape, the type or the grouping of a value, and leave its numbers as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.registry import operator
from initaudit.onnx_ops.tensors import INT4, NARROW, UINT4, ints, normal_axis, scalar, together, torch_type
from initaudit.roles import Role


def _passthrough(name: str, *data: str) -> Role:
    return Role("passthrough", name, data=data or ("data",))


@operator(_passthrough("identity", "input"))
def Identity(input: Tensor) -> Tensor:
    """The input."""
    return input


@operator(Role("shape", "shape"))
def Shape(data: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    """The sizes of the axes from `start` to `end`, as integers on the host."""
    return torch.tensor(list(data.shape)[slice(start, end)], dtype=torch.int64)


@operator(Role("shape", "size"))
def Size(data: Tensor) -> Tensor:
    """The number of elements, as an integer on the host."""
    return torch.tensor(data.numel(), dtype=torch.int64)


@operator(_passthrough("reshape"))
def Reshape(data: Tensor, shape_: Tensor | None = None, *, shape: Sequence[int] | None = None, allowzero: int = 0) -> Tensor:
    """The elements in another shape: -1 is what is left, 0 keeps the size of that axis (unless `allowzero`)."""
    target = ints(shape if shape_ is None else shape_) or []
    if not allowzero:
        target = [data.shape[axis] if n == 0 else n for axis, n in enumerate(target)]
    return data.reshape(target)


@operator(_passthrough("flatten", "input"))
def Flatten(input: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis` by those from it on."""
    axis += input.ndim if axis < 0 else 0
    return input.reshape(math.prod(input.shape[:axis]), math.prod(input.shape[axis:]))


@operator(_passthrough("squeeze"))
def Squeeze(data: Tensor, axes_: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """Without the axes named, or without all axes of size 1."""
    chosen = ints(axes if axes_ is None else axes_)
    if chosen is None:
        return data.squeeze()
    for axis in chosen:
        if data.shape[axis] != 1:
            raise ValueError(f"Squeeze of axis {axis}, which has size {data.shape[axis]}")
    return data.squeeze(tuple(chosen))


@operator(_passthrough("unsqueeze"))
def Unsqueeze(data: Tensor, axes_: Tensor | None = None, *, axes: Sequence[int] | None = None) -> Tensor:
    """With an axis of size 1 at every place named, counted in the result."""
    chosen = ints(axes if axes_ is None else axes_) or []
    rank = data.ndim + len(chosen)
    for axis in sorted(normal_axis(axis, rank) for axis in chosen):
        data = data.unsqueeze(axis)
    return data


@operator(_passthrough("transpose"))
def Transpose(data: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """The axes in the order of `perm`, by default reversed."""
    return data.permute(tuple(perm) if perm is not None else tuple(reversed(range(data.ndim))))


def _broadcast(a: list[int], b: list[int]) -> list[int]:
    """The shape of two shapes broadcast together; the larger of two sizes, unless one of them is 0."""
    rank = max(len(a), len(b))
    pairs = zip([1] * (rank - len(a)) + a, [1] * (rank - len(b)) + b, strict=True)
    return [q if p == 1 else p for p, q in pairs]


@operator(_passthrough("expand", "input"))
def Expand(input: Tensor, shape: Tensor) -> Tensor:
    """The input broadcast with a shape (a view: nothing is copied)."""
    target = _broadcast(list(input.shape), ints(shape) or [])
    reserve(target, "Expand", input)
    return input.expand(target)


@operator(_passthrough("tile", "input"))
def Tile(input: Tensor, repeats: Tensor, axis: Tensor | None = None) -> Tensor:
    """The input repeated along every axis; before opset 6 along one axis given as an input."""
    times = ints(repeats) or []
    if axis is not None:
        times = [times[0] if a == int(scalar(axis)) else 1 for a in range(input.ndim)]
    reserve([n * t for n, t in zip(input.shape, times, strict=True)], "Tile", input)
    return input.repeat(times)


@operator(Role("merge", "concat", data=("inputs",)))
def Concat(*inputs: Tensor, axis: int = 1) -> Tensor:
    """The inputs one after another along an axis."""
    reserve([sum(t.numel() for t in inputs)], "Concat", inputs[0])
    return torch.cat(together(*inputs), axis)


@operator(_passthrough("split", "input"))
def Split(
    input: Tensor,
    split_: Tensor | None = None,
    *,
    axis: int = 0,
    split: Sequence[int] | None = None,
    num_outputs: int | None = None,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, ...]:
    """Pieces along an axis: of the sizes given, or as many equal ones as are wanted (the last may be smaller)."""
    sizes = ints(split if split_ is None else split_)
    if sizes is None:
        count = num_outputs if num_outputs is not None else outputs
        length = input.shape[axis]
        step = -(-length // count)
        sizes = [max(0, min(step, length - i * step)) for i in range(count)]
    pieces = torch.split(input, sizes, axis)
    return pieces[0] if outputs == 1 and len(pieces) == 1 else tuple(pieces) if outputs > 1 else pieces[0]


def _power_of_two(value: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """The magnitude as an 8-bit exponent (float8_e8m0fnu): the power of two above, below or nearest; nan beyond."""
    wide = value.to(torch.float32).abs()
    fraction, exponent = torch.frexp(wide)
    least = {"up": 0.5, "nearest": 0.75, "down": 1.0}[round_mode]
    above = fraction > least if round_mode == "up" else fraction >= least
    code = exponent.to(torch.int64) - 1 + above.to(torch.int64) + 127
    code = torch.where(wide == 0, 0, code)
    code = torch.where(torch.isinf(wide), 255, code)
    code = code.clamp(0, 254) if saturate else torch.where(code > 254, 255, code.clamp(min=0))
    power: Tensor = torch.where(torch.isnan(wide), 255, code).to(torch.uint8).view(torch.float8_e8m0fnu)
    return power


def to_type(value: Tensor, kind: torch.dtype, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """The value in another type as the standard converts it: towards zero to integers, saturated to 8-bit floats.

    Integers of fewer than 8 bits are held one a byte.
    """
    if value.dtype in NARROW:
        value = value.view(NARROW[value.dtype])
    if kind in NARROW:
        bits = 4 if kind in (INT4, UINT4) else 2
        held = NARROW[kind]
        whole = value.to(torch.int64) & (2**bits - 1)
        if held == torch.int8:
            whole = whole - 2**bits * (whole >= 2 ** (bits - 1))
        narrow: Tensor = whole.to(held).view(kind)
        return narrow
    if kind == torch.float8_e8m0fnu:
        return _power_of_two(value, saturate, round_mode)
    if kind.is_floating_point and kind.itemsize == 1:
        largest = torch.finfo(kind).max
        wide = value.to(torch.float32)
        limited = wide.clamp(-largest, largest)
        if not saturate:
            # The largest value is 448, the next would be 480: beyond 464 there is no number, where torch saturates.
            nothing = torch.full_like(wide, math.nan)
            return (torch.where(wide.abs() > 464, nothing, wide) if kind == torch.float8_e4m3fn else wide).to(kind)
        # Saturation is for finite values and infinities alike; nan stays nan.
        return limited.to(kind)
    if value.is_floating_point() and not kind.is_floating_point and kind != torch.bool:
        # A negative float is undefined as an unsigned integer in C; by way of int64 it wraps, as in the reference.
        return value.to(torch.int64).to(kind) if kind != torch.uint64 else value.to(kind)
    return value.to(kind)


@operator(_passthrough("cast", "input"))
def Cast(input: Tensor, *, to: int, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """The input in another element type; booleans are what is not zero."""
    return to_type(input, torch_type(to), bool(saturate), round_mode)


@operator(_passthrough("cast", "input"))
def CastLike(input: Tensor, target_type: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """The input in the element type of another tensor."""
    return to_type(input, target_type.dtype, bool(saturate), round_mode)


@operator(_passthrough("dropout"))
def Dropout(
    data: Tensor,
    ratio_: Tensor | None = None,
    training_mode: Tensor | None = None,
    *,
    ratio: float = 0.5,
    seed: int | None = None,
    is_test: int = 0,
    opset: int = 28,
    outputs: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """The input; in training mode a random part `ratio` of it is zero and the rest scaled up by 1 / (1 - ratio)."""
    chance = scalar(ratio_) if ratio_ is not None else ratio
    training = training_mode is not None and bool(scalar(training_mode))
    if not training or chance == 0:
        # The mask had the type of the data before opset 10.
        mask = torch.ones_like(data, dtype=data.dtype if opset < 10 else torch.bool)
        return data if outputs == 1 else (data, mask)
    # numpy's generator: the mask is the same on every device, and the one that the standard's own tests expect.
    drawn = np.random.RandomState(0 if seed is None else seed).uniform(0, 1, tuple(data.shape))
    mask = torch.from_numpy(np.asarray(drawn >= chance)).to(data.device)
    kept = torch.where(mask, data / (1 - chance), torch.zeros_like(data)) if chance < 1 else torch.zeros_like(data)
    return kept if outputs == 1 else (kept, mask)


def _blocks(input: Tensor, blocksize: int) -> tuple[int, int, int, int, int]:
    n, c, h, w = input.shape
    return n, c, h, w, blocksize


@operator(_passthrough("depth_to_space", "input"))
def DepthToSpace(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Channels spread over space, `n (b b c) h w` ("DCR") or `n (c b b) h w` ("CRD") to `n c (h b) (w b)`."""
    n, c, h, w, b = _blocks(input, blocksize)
    if mode == "DCR":
        value = input.reshape(n, b, b, c // (b * b), h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        value = input.reshape(n, c // (b * b), b, b, h, w).permute(0, 1, 4, 2, 5, 3)
    return value.reshape(n, c // (b * b), h * b, w * b)


@operator(_passthrough("space_to_depth", "input"))
def SpaceToDepth(input: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of space gathered in the channels: the inverse of DepthToSpace."""
    n, c, h, w, b = _blocks(input, blocksize)
    value = input.reshape(n, c, h // b, b, w // b, b)
    value = value.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else value.permute(0, 1, 3, 5, 2, 4)
    return value.reshape(n, c * b * b, h // b, w // b)
