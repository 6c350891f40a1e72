"""Sums and sums of squares of every row and column of a matrix, in the same pass as its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from initaudit.measure import fused
from initaudit.measure.blocks import BLOCK, ROW, WINDOW, Scratch, extremes, forget, split
from initaudit.measure.hashes import row_hashes
from initaudit.measure.moments import Moments, measure_tile, merge, runs

# Squares of values within these bounds, summed over a block, stay in the range of float32.
LARGEST = 1e15
SMALLEST = 1e-15
WIDTH = 4096  # columns of a tile: runs that are summed in float32
_HALVES, _WHOLE = (slice(0, None, 2), slice(1, None, 2)), (slice(None),)


@dataclass(frozen=True)
class UnitSums:
    """What each row (unit) and each column of a matrix of `shape` (rows, columns) adds up to, in float64.

    A row or column that holds a value which is not finite has a sum that is not finite. `row_hashes` are of the rows' bytes:
    those of equal rows are equal, those of others hardly ever are.
    """

    shape: tuple[int, int]
    row_sums: np.ndarray[Any, Any] = field(repr=False)
    row_squares: np.ndarray[Any, Any] = field(repr=False)
    row_hashes: np.ndarray[Any, Any] = field(repr=False)
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
    """The moments and the unit sums of a two-dimensional `matrix`, which is read once, from front to back.

    Raises TypeError for a dtype that is not of real numbers and ValueError for other than two axes.
    """
    moments, sums, _ = measure_matrix(matrix, np.zeros(0, np.int64))
    return moments, sums


def measure_matrix(
    matrix: np.ndarray[Any, Any], places: np.ndarray[Any, Any]
) -> tuple[Moments, UnitSums, np.ndarray[Any, Any]]:
    """The same with the values at `places`, ascending indices into the matrix as one line of rows, as float64."""
    if matrix.ndim != 2:
        raise ValueError(f"a matrix has two axes, this array has shape {matrix.shape}")
    reader = fused.reader_of(matrix.dtype)
    work = _Tiles(matrix) if reader is None else _Bands(matrix, reader)
    rows, columns = matrix.shape
    parts, picked = [], []
    for top in range(0, rows if columns else 0, work.height):
        band = matrix[top : top + work.height]
        parts.append(work.add(band, top))
        ends = (top * columns, (top + len(band)) * columns)
        first, last = np.searchsorted(places, ends) if places.size else (0, 0)
        if last > first:
            here = places[first:last] - top * columns
            with np.errstate(invalid="ignore"):  # arbitrary bytes are signalling NaNs too
                picked.append(band[here // columns, here % columns].astype(np.float64))
        if matrix.nbytes > WINDOW:
            forget(band)
    return merge(*parts), work.sums(), np.concatenate(picked) if picked else np.zeros(0)


class _Bands:
    """The sums of a matrix while bands of its rows are added to them, by the pass in C."""

    def __init__(self, matrix: np.ndarray[Any, Any], reader: fused.Reader) -> None:
        self.shape = rows, columns = matrix.shape
        self.height = max(1, fused.PIECE // max(1, columns))
        self.reader, self.found = reader, fused.new_sums(rows, columns)

    def add(self, band: np.ndarray[Any, Any], top: int) -> Moments:
        """The moments of a band, whose sums are added."""
        values = np.ascontiguousarray(band, self.reader.native)
        return Moments(*fused.add(values, self.reader, self.found, top, self.shape[0]))

    def sums(self) -> UnitSums:
        """What was added up."""
        return UnitSums(self.shape, *fused.split(self.found, *self.shape))


class _Tiles:
    """The sums of a matrix while its tiles, of at most WIDTH columns and BLOCK elements, are added to them."""

    def __init__(self, matrix: np.ndarray[Any, Any]) -> None:
        self.shape = rows, columns = matrix.shape
        self.width = max(1, min(columns, WIDTH))
        self.height = max(1, BLOCK // self.width)
        self.scratch = Scratch(min(self.height, max(1, rows)) * self.width)
        self.row, self.row_squares = np.zeros(rows), np.zeros(rows)
        self.hashes = np.zeros(rows, np.uint64)
        self.column, self.column_squares = np.zeros(columns), np.zeros(columns)
        # Where widening puts columns at even places first, so do the sums of each tile.
        lefts = range(0, columns, self.width)
        self.orders = [_HALVES if split(matrix[:, left : left + self.width]) else _WHOLE for left in lefts]
        self.ones = np.ones(max(self.width, min(self.height, max(1, rows))), np.float32)

    def add(self, band: np.ndarray[Any, Any], top: int) -> Moments:
        """The moments of a band, whose sums are added."""
        self.hashes[top : top + len(band)] = row_hashes(band)
        columns = range(0, self.shape[1], self.width)
        return merge(*(self._add(band[:, left : left + self.width], top, left) for left in columns))

    def _add(self, tile: np.ndarray[Any, Any], top: int, left: int) -> Moments:
        height, width = tile.shape
        values = self.scratch.widen(tile)
        low, high = extremes(tile, values)
        single = values.dtype == np.float32 and SMALLEST < max(abs(low), abs(high)) < LARGEST
        # Infinity less infinity is the NaN that the record promises, and arbitrary bytes are signalling NaNs too.
        with np.errstate(invalid="ignore", over="ignore"):
            own = values if single else values.astype(np.float64)
            square = self.scratch.square[: tile.size].reshape(tile.shape) if single else np.empty(tile.shape)
            np.square(own, out=square)
            ones = self.ones.astype(own.dtype, copy=False)
            rows = np.asarray(own @ ones[:width], np.float64)
            squares = _row_squares(own) if width >= ROW // 4 else np.asarray(square @ ones[:width], np.float64)
            # Widened first: numpy adds numbers of two types a small buffer at a time.
            self.column[left : left + width] += (ones[:height] @ own).astype(np.float64)
            self.column_squares[left : left + width] += (ones[:height] @ square).astype(np.float64)
            self.row[top : top + height] += rows
            self.row_squares[top : top + height] += squares
        known = (float(rows.sum()), float(squares.sum())) if single else None
        return measure_tile(values, tile.dtype, low, high, self.scratch, known)

    def sums(self) -> UnitSums:
        """What was added up."""
        for left, order in zip(range(0, self.shape[1], self.width), self.orders, strict=True):
            for sums in (self.column, self.column_squares) if order is _HALVES else ():
                here = sums[left : left + self.width]
                parts = np.split(here.copy(), len(order))
                for every, part in zip(order, parts, strict=True):
                    here[every] = part
        return UnitSums(self.shape, self.row, self.row_squares, self.hashes, self.column, self.column_squares)


def _row_squares(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    total = np.zeros(len(values))
    for run in runs(values):
        found = np.vecdot(run, run)
        total += found if found.ndim == 1 else np.add.reduce(found, axis=1, dtype=np.float64)
    return total
