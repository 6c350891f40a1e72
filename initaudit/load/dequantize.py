"""Weights that ONNX keeps as integers, as the numbers that these stand for."""

from __future__ import annotations

from typing import Any

import numpy as np

Values = np.ndarray[Any, Any]

# The smallest number of each type: where it stands for zero, nothing below zero can be said.
LOWEST = {"uint8": 0, "uint16": 0, "uint4": 0, "uint2": 0, "int8": -128, "int16": -32768, "int4": -8, "int2": -2}


def dequantized(q: Values, scale: Values, zero_point: Values | None, axis: int, block_size: int = 0) -> Values:
    """scale (q - zero point) as float32: for the whole tensor, along an axis, or in blocks of it.

    As DequantizeLinear says: a scale of one number is for all, one of a single axis lies along `axis`, one of as many axes as
    `q` has blocks along `axis`.
    """
    # 32-bit integers (biases) exceed what float32 holds exactly.
    wide = np.float64 if q.dtype.itemsize > 2 and q.dtype.kind in "iu" else np.float32
    value: Values = q.astype(wide)
    if zero_point is not None:
        value = value - stretched(zero_point.astype(wide), value.shape, axis, block_size)
    value = value * stretched(scale.astype(wide), value.shape, axis, block_size)
    return value.astype(np.float32, copy=False)


def stretched(parameter: Values, shape: tuple[int, ...], axis: int, block_size: int) -> Values:
    """A scale or zero point in a form that broadcasts with `shape`."""
    if parameter.ndim == 0 or (parameter.size == 1 and not block_size):
        return parameter.reshape(())
    axis %= len(shape)
    if parameter.ndim == 1 and not block_size:
        return parameter.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    size = block_size or -(-shape[axis] // parameter.shape[axis])
    return np.take(np.repeat(parameter, size, axis), np.arange(shape[axis]), axis)


def unpacked(packed: Values, bits: int) -> Values:
    """Unsigned integers of 2, 4 or 8 bits out of bytes along the last axis, the lowest bits first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return parts.reshape(*packed.shape[:-1], -1)


def unpacked_blocks(
    b: Values, scales: Values, zero_points: Values | None, columns: int, rows: int, bits: int, block_size: int
) -> Values:
    """The matrix `columns rows` (i o) that MatMulNBits keeps as `rows blocks bytes`, each block with a scale of its own."""
    blocks = -(-columns // block_size)
    values = unpacked(b.reshape(rows, blocks, -1), bits)[..., :block_size].astype(np.float32)
    if zero_points is None:
        values -= 2.0 ** (bits - 1)
    elif zero_points.dtype == np.uint8:
        values -= unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks, None]
    else:
        values -= zero_points.reshape(rows, blocks, 1).astype(np.float32)
    values *= scales.reshape(rows, blocks, 1).astype(np.float32)
    return np.ascontiguousarray(values.reshape(rows, -1)[:, :columns].T)
