"""Find units that are copies of one another: equal rows, rows equal but for the sign, and rows equal within a tolerance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from initaudit.measure.blocks import BLOCK
from initaudit.measure.hashes import row_hashes

Groups = tuple[tuple[int, ...], ...]
Same = Callable[[int, int], bool]


def duplicate_rows(matrix: np.ndarray[Any, Any], *, sign: bool = False, tolerance: float = 0.0) -> Groups:
    """Groups of two or more rows of a (rows, columns) `matrix` that hold the same values, as ascending row indices.

    With neither option rows are the same when their bytes are. `sign` also takes a row for the same as its negative, and
    `tolerance` rows whose difference has a norm of at most `tolerance` times the larger norm of the two; both compare values.
    Rows of zeros are the same as one another. Raises ValueError for other than two axes.
    """
    if matrix.ndim != 2:
        raise ValueError(f"a matrix has two axes, this array has shape {matrix.shape}")
    if matrix.shape[0] < 2 or matrix.shape[1] == 0:
        return ()
    if sign or tolerance > 0:
        return _alike(matrix, sign, tolerance)
    return _equal(matrix)


def _row_blocks(matrix: np.ndarray[Any, Any]) -> Iterator[tuple[slice, np.ndarray[Any, Any]]]:
    height = max(1, BLOCK // matrix.shape[1])
    for top in range(0, matrix.shape[0], height):
        rows = slice(top, min(top + height, matrix.shape[0]))
        yield rows, np.ascontiguousarray(matrix[rows])


def _equal(matrix: np.ndarray[Any, Any]) -> Groups:
    def same(a: int, b: int) -> bool:
        return bool(matrix[a].tobytes() == matrix[b].tobytes())

    hashes = row_hashes(matrix)
    order = np.argsort(hashes, kind="stable")
    return _groups(order, np.diff(hashes[order]) == 0, same)


def _alike(matrix: np.ndarray[Any, Any], sign: bool, tolerance: float) -> Groups:
    def same(a: int, b: int) -> bool:
        x, y = matrix[a].astype(np.float64), matrix[b].astype(np.float64)
        allowed = tolerance * max(float(np.linalg.norm(x)), float(np.linalg.norm(y)))
        return bool(np.linalg.norm(x - y) <= allowed) or (sign and bool(np.linalg.norm(x + y) <= allowed))

    # Rows that are alike have nearly the same projection on any direction, and projections can be sorted.
    direction = np.random.default_rng(0x1D1).normal(size=matrix.shape[1])
    projections, norms = np.empty(matrix.shape[0]), np.empty(matrix.shape[0])
    for rows, block in _row_blocks(matrix):
        values = block.astype(np.float64)
        with np.errstate(invalid="ignore"):
            projections[rows] = values @ direction
            norms[rows] = np.linalg.norm(values, axis=1)
    # A row that is not finite is like no other.
    kept = np.flatnonzero(np.isfinite(projections) & np.isfinite(norms))
    keys = np.abs(projections[kept]) if sign else projections[kept]
    order = kept[np.argsort(keys, kind="stable")]
    slack = (tolerance + 1e-13) * np.maximum(norms[order][1:], norms[order][:-1]) * np.linalg.norm(direction)
    return _groups(order, np.diff(np.sort(keys)) <= slack, same)


def _groups(order: np.ndarray[Any, Any], joined: np.ndarray[Any, Any], same: Same) -> Groups:
    """Groups out of the runs of `order` whose neighbours are `joined`, each member compared with its group's first."""
    found: list[tuple[int, ...]] = []
    starts = np.flatnonzero(joined & ~np.concatenate([[False], joined[:-1]]))
    stops = np.flatnonzero(joined & ~np.concatenate([joined[1:], [False]])) + 2
    for start, stop in zip(starts, stops, strict=True):
        rest = sorted(int(i) for i in order[start:stop])
        while len(rest) > 1:
            first = rest[0]
            group = [first, *(i for i in rest[1:] if same(first, i))]
            if len(group) > 1:
                found.append(tuple(group))
            members = set(group)
            rest = [i for i in rest if i not in members]
    return tuple(sorted(found))
