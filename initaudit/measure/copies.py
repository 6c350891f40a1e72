"""Whether two matrices hold the same units, in whatever order and with whatever signs, read as streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.measure.blocks import BLOCK, WINDOW, forget

Matrix = np.ndarray[Any, Any]

# Units that may have changed places with others whose projections are nearly theirs, and are compared each with each.
_SWAPPED = 64
# The projection of a difference of norm d is N(0, d^2): none of a million is beyond eight times d. Sums of float64 are good to
# 1e-13 of the norm.
_SPREAD, _ROUNDING = 8.0, 1e-12


def same_units(a: Matrix, b: Matrix, axis: int, tolerance: float) -> bool:
    """Whether the units (rows for `axis` 0, columns for 1) of one matrix are those of another of its shape.

    Two units are the same where the norm of their difference, or of their sum, is at most `tolerance` times that of the first.
    Matrices that differ are read once, as their units' projections on one random direction tell; others twice.
    Values that are not finite make a matrix unlike every other.
    """
    left, right = _projections(a, axis), _projections(b, axis)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return False
    order_a, order_b = (np.argsort(np.abs(found[:, 0]), kind="stable") for found in (left, right))
    x, y = left[order_a], right[order_b]
    allowed = _SPREAD * (tolerance + _ROUNDING) * np.maximum(x[:, 1], x[:, 1].max(initial=0.0) * 1e-3)
    if bool(np.any(np.abs(np.abs(x[:, 0]) - np.abs(y[:, 0])) > allowed)):
        return False
    signs = np.where(x[:, 0] * y[:, 0] < 0, -1.0, 1.0)
    apart = np.sqrt(_distances(a, b, axis, order_a, order_b, signs)) > (tolerance + _ROUNDING) * x[:, 1]
    bad = np.flatnonzero(apart)
    return bad.size == 0 or (bad.size <= _SWAPPED and _rematched(a, b, axis, order_a[bad], order_b[bad], tolerance))


def _bands(matrix: Matrix) -> Iterator[tuple[slice, Matrix]]:
    height = max(1, BLOCK // max(1, matrix.shape[1]))
    for top in range(0, matrix.shape[0], height):
        rows = slice(top, min(top + height, matrix.shape[0]))
        yield rows, matrix[rows].astype(np.float64)
        if matrix.nbytes > WINDOW:
            forget(matrix[rows])


def _projections(matrix: Matrix, axis: int) -> Matrix:
    """(units, 2): the product of each unit with one random direction, and its norm."""
    direction = np.random.default_rng(0x1D1).normal(size=matrix.shape[1 - axis])
    found = np.zeros((2, matrix.shape[axis]))
    for rows, band in _bands(matrix):
        with np.errstate(invalid="ignore", over="ignore"):
            if axis == 0:
                found[:, rows] = band @ direction, np.vecdot(band, band)
            else:
                found += np.stack([direction[rows] @ band, np.vecdot(band.T, band.T)])
    return np.stack([found[0], np.sqrt(found[1])], axis=1)


def _distances(a: Matrix, b: Matrix, axis: int, left: Matrix, right: Matrix, signs: Matrix) -> Matrix:
    """The squared norms of the differences between units `left` of `a` and `signs` times units `right` of `b`."""
    found = np.zeros(left.size)
    height = max(1, BLOCK // max(1, a.shape[1]))
    for top in range(0, a.shape[0], height):
        here = slice(top, top + height)
        if axis == 0:
            d = a[left[here]].astype(np.float64) - signs[here, None] * b[right[here]].astype(np.float64)
            found[here] = np.vecdot(d, d)
        else:
            d = a[here][:, left].astype(np.float64) - signs * b[here][:, right].astype(np.float64)
            found += np.vecdot(d.T, d.T)
        for matrix in (a, b):
            if matrix.nbytes > WINDOW:
                forget(matrix)
    return found


def _rematched(a: Matrix, b: Matrix, axis: int, left: Matrix, right: Matrix, tolerance: float) -> bool:
    """Whether these units of `a` are those of `b` in another order, each compared with each."""
    x, y = (np.take(m, at, axis).astype(np.float64) for m, at in ((a, left), (b, right)))
    if axis == 1:
        x, y = x.T, y.T
    free = list(range(len(y)))
    for unit in x:
        limit = (tolerance + _ROUNDING) * np.linalg.norm(unit)
        match = next((j for j in free if min(np.linalg.norm(unit - y[j]), np.linalg.norm(unit + y[j])) <= limit), None)
        if match is None:
            return False
        free.remove(match)
    return True
