"""The largest singular value of a block of a matrix, and how alike neighbouring values in it are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from initaudit.measure import fused
from initaudit.measure.blocks import WINDOW, forget
from initaudit.measure.moments import Moments

Vector = np.ndarray[Any, Any]

SIDE = 1024  # rows and columns of the block whose spectrum is taken
# Of the Krylov space: of a draw, whose largest values lie close together, the value found is then 1 to 2 % too small, of a
# block with one value that stands out less than 0.1 %; 24 steps of the power iteration come no nearer.
STEPS = 10
_FEW = 32  # rows or columns: with so few the spectrum itself is sooner found than its largest value
_ROUNDING = 1e-5  # what is left, as a share, of a vector in a space when all directions of the space are taken out
# Mean squares within these bounds leave the squares of sums of products in the range of float32.
_SMALLEST, _LARGEST = 1e-12, 1e12


@dataclass(frozen=True)
class Spectrum:
    """Of a block B of `shape`: the `largest` eigenvalue of B B^T divided by its mean square, and as `lags` the correlations of
    neighbours along rows and, where no row was left out, along columns, each with their count."""

    shape: tuple[int, int] = (0, 0)
    largest: float = math.nan
    lags: tuple[tuple[float, int], ...] = ()


NO_SPECTRUM = Spectrum()


def spectrum(matrix: np.ndarray[Any, Any], alive: Vector, moments: Moments) -> Spectrum:
    """That of a block of the rows `alive` (ascending indices) of a (rows, columns) `matrix`, whose `moments` these are."""
    rows, columns = min(SIDE, alive.size), min(SIDE, matrix.shape[1])
    every = rows == matrix.shape[0]
    # Rows spread over the matrix: of a table, the first are often the ones that training touches most. Columns that lie
    # together, so that neighbours are neighbours.
    picked = np.arange(rows) if every else alive[np.linspace(0, alive.size - 1, rows).astype(np.int64)]
    b = _block(matrix, picked, columns, moments)
    total = _sum_of_products(b, b)
    if not total > 0:
        return NO_SPECTRUM
    lags = [(_sum_of_products(b[:, 1:], b[:, :-1]) / total, rows * (columns - 1))]
    if every:
        lags.append((_sum_of_products(b[1:], b[:-1]) / total, (rows - 1) * columns))
    return Spectrum((rows, columns), largest_eigenvalue(b) * rows * columns / total, tuple(lags))


def largest_eigenvalue(b: Vector) -> float:
    """The largest eigenvalue of B B^T for a float32 matrix `b`; of more than a few rows and columns from below.

    Rayleigh and Ritz's value on a Krylov space, with an orthogonal basis (Golub & Van Loan 2013, section 10.1).
    """
    if min(b.shape) <= _FEW:
        gram = b @ b.T if b.shape[0] <= b.shape[1] else b.T @ b
        return float(np.linalg.eigvalsh(gram.astype(np.float64))[-1])
    rows, columns = b.shape
    basis, images = np.zeros((STEPS + 1, columns), np.float32), np.zeros((STEPS, rows), np.float32)
    basis[0] = np.random.default_rng(0).normal(size=columns)
    if fused.krylov(b, basis, images) is None:
        _krylov(b, basis, images)
    wide = images.astype(np.float64)
    return float(np.linalg.eigvalsh(wide @ wide.T)[-1])


def _krylov(b: Vector, basis: Vector, images: Vector) -> None:
    """As `fused.krylov`, in numpy."""
    for step, image in enumerate(images):
        vector, before = basis[step], basis[:step]
        length = math.sqrt(float(vector @ vector))
        for _ in range(2):  # what rounding leaves of the others the first time is gone after the second
            vector -= (before @ vector) @ before
        rest = math.sqrt(float(vector @ vector))
        if not rest > _ROUNDING * length:
            return  # all directions that B has are in the space
        vector /= np.float32(rest)
        np.matmul(b, vector, out=image)
        np.matmul(image, b, out=basis[step + 1])


def _sum_of_products(a: Vector, b: Vector) -> float:
    return float(np.sum(np.vecdot(a, b), dtype=np.float64))


def _block(matrix: np.ndarray[Any, Any], picked: Vector, columns: int, moments: Moments) -> Vector:
    """The middle `columns` of the rows `picked`, as float32; scaled where squares would leave its range."""
    left, big = (matrix.shape[1] - columns) // 2, matrix.nbytes > WINDOW
    block = np.empty((picked.size, columns), np.float32)
    scale = 1.0 if _SMALLEST < moments.moment2 < _LARGEST else math.sqrt(moments.moment2)
    top = 0
    # With each row of a file some megabytes around it come into memory.
    for places in np.array_split(picked, 32) if big else [picked]:
        part = block[top : top + places.size]
        if scale != 1 or not fused.gather(matrix, places, left, part):
            part[:] = matrix[places, left : left + columns].astype(np.float64) / scale
        top += places.size
        if big:
            forget(matrix)
    return block
