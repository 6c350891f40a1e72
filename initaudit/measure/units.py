"""Sums and sums of squares of every row and column of a matrix, in the same pass as its moments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from initaudit.measure.blocks import BLOCK, Scratch
from initaudit.measure.moments import Moments, measure_values, merge

# Squares of values within these bounds, summed over a block, stay in the range of float32.
LARGEST = 1e15
SMALLEST = 1e-15


@dataclass(frozen=True)
class UnitSums:
    """What each row (unit) and each column of a matrix of `shape` (rows, columns) adds up to, in float64.

    A row or column that holds a value which is not finite has a sum that is not finite.
    """

    shape: tuple[int, int]
    row_sums: np.ndarray[Any, Any] = field(repr=False)
    row_squares: np.ndarray[Any, Any] = field(repr=False)
    column_sums: np.ndarray[Any, Any] = field(repr=False)
    column_squares: np.ndarray[Any, Any] = field(repr=False)

    @property
    def row_norms(self) -> np.ndarray[Any, Any]:
        """Euclidean norms, one for each row."""
        norms: np.ndarray[Any, Any] = np.sqrt(self.row_squares)
        return norms

    @property
    def column_norms(self) -> np.ndarray[Any, Any]:
        """Euclidean norms, one for each column."""
        norms: np.ndarray[Any, Any] = np.sqrt(self.column_squares)
        return norms


def as_matrix(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """`array` as (first axis, all others), a view where it is contiguous; one row for fewer than two axes."""
    return array.reshape(1, -1) if array.ndim < 2 else array.reshape(array.shape[0], math.prod(array.shape[1:]))


def measure_units(matrix: np.ndarray[Any, Any]) -> tuple[Moments, UnitSums]:
    """The moments and the unit sums of a two-dimensional `matrix`, which is read once in blocks of 128K elements.

    Raises TypeError for a dtype that is not of real numbers and ValueError for other than two axes.
    """
    if matrix.ndim != 2:
        raise ValueError(f"a matrix has two axes, this array has shape {matrix.shape}")
    rows, columns = matrix.shape
    scratch = Scratch(min(matrix.size, BLOCK))
    sums = UnitSums((rows, columns), np.zeros(rows), np.zeros(rows), np.zeros(columns), np.zeros(columns))
    parts = []
    for r, c in _tiles(rows, columns):
        tile = matrix[r, c]
        values = scratch.widen(np.ascontiguousarray(tile).reshape(-1))
        moments = measure_values(values, matrix.dtype, scratch)
        parts.append(moments)
        _add(sums, r, c, values.reshape(tile.shape), max(abs(moments.min), abs(moments.max)), scratch)
    return merge(*parts), sums


def _tiles(rows: int, columns: int) -> Iterator[tuple[slice, slice]]:
    """Tiles of at most BLOCK elements: whole rows, or pieces of one row where a row is longer than that."""
    if rows == 0 or columns == 0:
        return
    height = max(1, BLOCK // columns)
    for top in range(0, rows, height):
        for left in range(0, columns, BLOCK):
            yield slice(top, min(top + height, rows)), slice(left, min(left + BLOCK, columns))


def _add(sums: UnitSums, r: slice, c: slice, tile: np.ndarray[Any, Any], largest: float, scratch: Scratch) -> None:
    """Add the sums of one `tile` of float32 or float64, whose largest magnitude is `largest`, to those of the matrix."""
    if tile.dtype == np.float32 and SMALLEST < largest < LARGEST:
        square = np.multiply(tile, tile, out=scratch.square[: tile.size].reshape(tile.shape))
    else:
        with np.errstate(invalid="ignore"):  # arbitrary bytes are signalling NaNs too
            tile = tile.astype(np.float64)
        square = tile * tile
    across, down = np.ones(tile.shape[1], tile.dtype), np.ones(tile.shape[0], tile.dtype)
    # Infinity less infinity is the NaN that the record promises.
    with np.errstate(invalid="ignore", over="ignore"):
        sums.row_sums[r] += tile @ across
        sums.row_squares[r] += square @ across
        sums.column_sums[c] += down @ tile
        sums.column_squares[c] += down @ square
