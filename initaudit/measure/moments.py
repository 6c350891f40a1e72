"""Count, mean, variance, skewness, kurtosis and extremes of a tensor in one streaming pass, mergeable in any order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from initaudit.measure import fused
from initaudit.measure.blocks import BLOCK, ROW, WINDOW, Scratch, blocks, extremes, forget

ONES = np.ones(ROW, np.float32)
# Values that the pilot mean is taken over; a block with fewer is summed in float64 throughout.
PILOT = 4096
# Fourth powers of deviations within these bounds, summed over a ROW, stay in the range of float32.
LARGEST_DEVIATION = 1e8
SMALLEST_DEVIATION = 1e-6


@dataclass(frozen=True)
class Moments:
    """Moments of the finite values of a tensor.

    `count` values are finite; `mean` is theirs, and `m2`, `m3`, `m4` are the sums of the second, third and fourth powers of
    their deviations from it (m4 leaves the range of float64 where these are beyond 1e75 or below 1e-75). `min` and `max` are
    of the finite values, NaN where there is none. `zeros` counts exact zeros (either sign); `nan` and `inf` what was left out.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    min: float = math.nan
    max: float = math.nan
    zeros: int = 0
    nan: int = 0
    inf: int = 0

    @property
    def variance(self) -> float:
        """Centred, of the population (divided by the count); NaN without values."""
        return self.m2 / self.count if self.count else math.nan

    @property
    def std(self) -> float:
        """The square root of the variance."""
        return math.sqrt(self.variance)

    @property
    def moment2(self) -> float:
        """The mean square, not centred; NaN without values."""
        return self.variance + self.mean**2

    @property
    def skewness(self) -> float:
        """m3/n over std cubed; NaN where all values are equal."""
        if not self.m2 > 0:
            return math.nan
        return (self.m3 / self.count) / self.variance / math.sqrt(self.variance)

    @property
    def kurtosis(self) -> float:
        """Pearson's, 3 for a normal distribution; NaN where all values are equal."""
        if not self.m2 > 0:
            return math.nan
        # Divided one by one: the square of a variance below 1e-154 is zero.
        return (self.m4 / self.count) / self.variance / self.variance

    @property
    def size(self) -> int:
        """Elements, finite or not."""
        return self.count + self.nan + self.inf


def merge(*parts: Moments) -> Moments:
    """The moments of the union of `parts`; associative, commutative, and `Moments()` for none."""
    if len(parts) == 1:
        return parts[0]
    zeros, nan, inf = sum(p.zeros for p in parts), sum(p.nan for p in parts), sum(p.inf for p in parts)
    parts = tuple(p for p in parts if p.count)
    if not parts:
        return Moments(zeros=zeros, nan=nan, inf=inf)
    if len(parts) == 1:
        return replace(parts[0], zeros=zeros, nan=nan, inf=inf)
    table = np.array([(p.count, p.mean, p.m2, p.m3, p.m4) for p in parts], np.float64)
    count, means, m2, m3, m4 = table.T
    total = float(count.sum())
    # About the first mean, so that means far from zero lose nothing in their average.
    mean = float(means[0] + np.dot(count, means - means[0]) / total)
    # Pébay 2008, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order statistical moments",
    # eq. 3.1 with each set moved to the mean of all: deviations d + x have (d + x)^p expanded by the binomial theorem.
    shift = means - mean
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        square = shift * shift
        moved2 = m2 + count * square
        moved3 = m3 + 3 * shift * m2 + count * square * shift
        moved4 = m4 + 4 * shift * m3 + 6 * square * m2 + count * square * square
        sums = (float(np.sum(moved2)), float(np.sum(moved3)), float(np.sum(moved4)))
    return Moments(
        round(total), mean, *sums, min(p.min for p in parts), max(p.max for p in parts), zeros=zeros, nan=nan, inf=inf
    )


def measure(array: np.ndarray[Any, Any]) -> Moments:
    """The moments of `array`, of any shape and dtype of numbers of numpy or ml_dtypes; booleans count as 0 and 1.

    Of complex numbers they are those of the real and imaginary parts, each counted by itself. No more than a million elements
    are copied at a time, so a `numpy.memmap` is read once from front to back, and what has been read is let go. Raises
    TypeError for strings and objects.
    """
    if array.dtype.kind == "c":
        array = np.ascontiguousarray(array).reshape(-1).view(array.real.dtype)
    reader = fused.reader_of(array.dtype)
    parts = []
    if reader is not None:
        for block in blocks(array, fused.PIECE):
            parts.append(Moments(*fused.moments_of(np.ascontiguousarray(block, reader.native), reader)))
            if array.nbytes > WINDOW:
                forget(block)
        return merge(*parts)
    scratch = Scratch(min(array.size, BLOCK))
    for block in blocks(array):
        tile = block.reshape(1, -1)
        if tile.size:
            values = scratch.widen(tile)
            parts.append(measure_tile(values, tile.dtype, *extremes(tile, values), scratch))
        if array.nbytes > WINDOW:
            forget(block)
    return merge(*parts)


def measure_tile(
    values: np.ndarray[Any, Any],
    stored: np.dtype[Any],
    low: float,
    high: float,
    scratch: Scratch,
    sums: tuple[float, float] | None = None,
) -> Moments:
    """The moments of a tile (rows, columns) of `stored` type, in `values` as float32 or float64, with these `extremes`.

    `sums` are the sums of float32 values and of their squares, where these are known already and stand in `scratch.square`.
    """
    if math.isfinite(low) and math.isfinite(high):
        return _measure_finite(values, stored, low, high, scratch, sums)
    finite = values[np.isfinite(values)].reshape(1, -1)
    nan = int(np.count_nonzero(np.isnan(values)))
    part = Moments()
    if finite.size:
        part = _measure_finite(finite, stored, float(finite.min()), float(finite.max()), scratch)
    return replace(part, nan=nan, inf=values.size - finite.size - nan)


def _measure_finite(
    values: np.ndarray[Any, Any],
    stored: np.dtype[Any],
    low: float,
    high: float,
    scratch: Scratch,
    sums: tuple[float, float] | None = None,
) -> Moments:
    if low == high:
        return Moments(values.size, low, 0.0, 0.0, 0.0, low, high, values.size if low == 0 else 0)
    average = sums[0] / values.size if sums is not None else _head_mean(values)
    average = min(max(average, low), high)
    pilot = _on_grid(average, max(high - average, average - low), stored)
    reach = max(high - pilot, pilot - low)
    holds_zero = low <= 0 <= high
    if values.dtype == np.float64 or values.size < PILOT or not SMALLEST_DEVIATION < reach < LARGEST_DEVIATION:
        powers = _power_sums_float64(values.reshape(-1), pilot, reach)
    else:
        powers, least = _power_sums_float32(values, pilot, scratch, sums)
        holds_zero &= least == 0 or pilot != 0
    zeros = 0
    if holds_zero:
        zeros = int(np.count_nonzero(np.equal(values, 0, out=scratch.mask[: values.size].reshape(values.shape))))
    return Moments(*_central(values.size, pilot, *powers), low, high, zeros)


def _head_mean(values: np.ndarray[Any, Any]) -> float:
    head = values.reshape(-1)[:PILOT] if values.flags.c_contiguous else values[0, :PILOT]
    with np.errstate(over="ignore"):
        return float(np.add.reduce(head, dtype=np.float64)) / head.size


def _on_grid(average: float, reach: float, stored: np.dtype[Any]) -> float:
    """`average` rounded to the precision of float32, or for a 16-bit type to its spacing at `reach`.

    Deviations then are exact and have few digits; a 16-bit type takes so few values that their rounding would not average out.
    """
    # Weights are mostly centred: a pilot this near to zero is worth no pass over the block.
    if abs(average) < reach / 64:
        return 0.0
    digits = {"bfloat16": 8, "float16": 11}.get(stored.name)
    if digits is None or not math.isfinite(reach):
        return average if stored == np.float64 else float(np.float32(average))
    spacing = math.ldexp(1.0, math.frexp(reach)[1] - digits)
    return round(average / spacing) * spacing


def _power_sums_float64(values: np.ndarray[Any, Any], pilot: float, reach: float) -> tuple[float, float, float, float]:
    """Sums of the first four powers of `values - pilot`, none of which exceeds `reach`."""
    # A power of two, so exact: fourth powers of deviations above 1e77 or below 1e-81 would leave the range of float64.
    exponent = 0 if 1e-60 < reach < 1e60 else math.frexp(reach)[1]
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        d = np.ldexp(values.astype(np.float64) - pilot, -exponent)
        square = d * d
        sums = np.array([np.sum(d), np.sum(square), np.dot(square, d), np.dot(square, square)])
        s1, s2, s3, s4 = np.ldexp(sums, exponent * np.arange(1, 5)).tolist()
    return s1, s2, s3, s4


def _power_sums_float32(
    values: np.ndarray[Any, Any], pilot: float, scratch: Scratch, known: tuple[float, float] | None
) -> tuple[tuple[float, float, float, float], float]:
    """The same with products in float32, runs of them summed in float32 and these sums in float64; and the least square.

    `known` are the first two sums about 0, whose squares then stand in `scratch.square`.
    """
    square = scratch.square[: values.size].reshape(values.shape)
    d = values
    if pilot != 0:
        known = None
        d = np.subtract(values, np.float32(pilot), out=scratch.deviation[: values.size].reshape(values.shape))
    if known is None:
        np.square(d, out=square)
    s1, s2 = known if known is not None else (_sum_of_products(d, None), _sum_of_products(d, d))
    powers = s1, s2, _sum_of_products(square, d), _sum_of_products(square, square)
    return powers, float(square.min())


def _sum_of_products(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any] | None) -> float:
    """The sum of a*b over all elements (of a where b is None)."""
    others = [None] * 2 if b is None else runs(b)
    total = 0.0
    for x, y in zip(runs(a), others, strict=False):
        total += float(np.add.reduce(np.vecdot(x, ONES[: x.shape[-1]] if y is None else y), axis=None, dtype=np.float64))
    return total


def runs(values: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    """`values` (rows, columns) as arrays whose last axis is short enough for a sum in float32 and long enough to be fast."""
    rows, columns = values.shape
    if columns < ROW // 4:
        values = values.reshape(1, -1)
        rows, columns = values.shape
    whole = columns // ROW * ROW
    parts = [values[:, :whole].reshape(rows, -1, ROW), values[:, whole:]]
    return [part for part in parts if part.size]


def _central(count: int, pilot: float, s1: float, s2: float, s3: float, s4: float) -> tuple[int, float, float, float, float]:
    """(count, mean, m2, m3, m4) from the sums of powers of deviations from `pilot`."""
    e = s1 / count
    with np.errstate(over="ignore", invalid="ignore"):
        m2 = s2 - e * s1
        m3 = s3 - 3 * e * s2 + 2 * e * e * s1
        m4 = s4 - 4 * e * s3 + 6 * e * e * s2 - 3 * e * e * e * s1
    return count, pilot + e, max(m2, 0.0), m3, max(m4, 0.0)
