"""Count, mean, variance, skewness, kurtosis and extremes of a tensor in one streaming pass, mergeable in any order."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from initaudit.measure.blocks import BLOCK, ROW, Scratch, blocks

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
    zeros, nan, inf = sum(p.zeros for p in parts), sum(p.nan for p in parts), sum(p.inf for p in parts)
    parts = tuple(p for p in parts if p.count)
    if not parts:
        return Moments(zeros=zeros, nan=nan, inf=inf)
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
    """The moments of `array`, of any shape and any real dtype of numpy or ml_dtypes; booleans count as 0 and 1.

    No more than one block of 128K elements is copied at a time, so a `numpy.memmap` is read once from front to back.
    Raises TypeError for complex numbers, strings and objects.
    """
    scratch = Scratch(min(array.size, BLOCK))
    return merge(*(measure_block(block, scratch) for block in blocks(array)))


def measure_block(block: np.ndarray[Any, Any], scratch: Scratch) -> Moments:
    """The moments of a one-dimensional `block` that is no longer than `scratch`."""
    if block.size == 0:
        return Moments()
    return measure_values(scratch.widen(block), block.dtype, scratch)


def measure_values(values: np.ndarray[Any, Any], stored: np.dtype[Any], scratch: Scratch) -> Moments:
    """The moments of float32 or float64 `values`; the pilot mean is rounded to `pilot_dtype`."""
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        finite = values[np.isfinite(values)]
        nan = int(np.count_nonzero(np.isnan(values)))
        part = measure_values(finite, stored, scratch) if finite.size else Moments()
        return replace(part, nan=nan, inf=values.size - finite.size - nan)
    zeros = 0
    if low <= 0 <= high:
        zeros = int(np.count_nonzero(np.equal(values, 0, out=scratch.mask[: values.size])))
    if low == high:
        return Moments(values.size, low, 0.0, 0.0, 0.0, low, high, zeros)
    with np.errstate(over="ignore"):
        head = values[:PILOT]
        average = min(max(float(np.add.reduce(head, dtype=np.float64)) / head.size, low), high)
    pilot = _on_grid(average, max(high - average, average - low), stored)
    reach = max(high - pilot, pilot - low)
    if values.dtype == np.float64 or values.size < PILOT or not SMALLEST_DEVIATION < reach < LARGEST_DEVIATION:
        sums = _power_sums_float64(values, pilot, reach)
    else:
        sums = _power_sums_float32(values, pilot, scratch)
    return Moments(*_central(values.size, pilot, *sums), low, high, zeros)


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


def _power_sums_float32(values: np.ndarray[Any, Any], pilot: float, scratch: Scratch) -> tuple[float, float, float, float]:
    """The same with products in float32, ROW of them to a sum, and the sums added in float64."""
    d = values if pilot == 0 else np.subtract(values, np.float32(pilot), out=scratch.deviation[: values.size])
    square = np.multiply(d, d, out=scratch.square[: values.size])
    whole = values.size // ROW * ROW
    total = np.zeros(4)
    for start, stop, length in ((0, whole, ROW), (whole, values.size, values.size - whole)):
        if stop == start:
            continue
        first, second = d[start:stop].reshape(-1, length), square[start:stop].reshape(-1, length)
        rows = scratch.rows[:, : len(first)]
        np.vecdot(first, ONES[:length], out=rows[0])
        np.vecdot(first, first, out=rows[1])
        np.vecdot(second, first, out=rows[2])
        np.vecdot(second, second, out=rows[3])
        total += np.add.reduce(rows, axis=1, dtype=np.float64)
    s1, s2, s3, s4 = total.tolist()
    return s1, s2, s3, s4


def _central(count: int, pilot: float, s1: float, s2: float, s3: float, s4: float) -> tuple[int, float, float, float, float]:
    """(count, mean, m2, m3, m4) from the sums of powers of deviations from `pilot`."""
    e = s1 / count
    with np.errstate(over="ignore", invalid="ignore"):
        m2 = s2 - e * s1
        m3 = s3 - 3 * e * s2 + 2 * e * e * s1
        m4 = s4 - 4 * e * s3 + 6 * e * e * s2 - 3 * e * e * e * s1
    return count, pilot + e, max(m2, 0.0), m3, max(m4, 0.0)
