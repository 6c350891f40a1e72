"""Everything that a fresh weight's law is recognised by, from one streaming pass and a bounded second look at the tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from initaudit.measure.blocks import WINDOW, forget
from initaudit.measure.fused import PIECE
from initaudit.measure.moments import Moments, measure
from initaudit.measure.spectrum import NO_SPECTRUM, Spectrum, spectrum
from initaudit.measure.units import UnitSums, as_matrix, measure_matrix, measure_units

Vector = np.ndarray[Any, Any]

SAMPLE = 16_384  # values drawn for tests of the distribution
# Bits of a float32's fraction, and how many of them have to be zero in every value of a sample that was rounded: a product of
# a few bits has some zeros, a value of another type has 13 (float16) or more.
_FRACTION, _ROUNDED = 23, 10
_LEAST = 64  # values that tell
# Bits of the fraction and smallest exponent of a normal number.
_NARROW = {
    "bfloat16": (7, -126), "float16": (10, -14), "float8_e4m3fn": (3, -6), "float8_e4m3fnuz": (3, -7), "float8_e5m2": (2, -14),
    "float8_e5m2fnuz": (2, -15), "float8_e4m3": (3, -6), "float8_e4m3b11fnuz": (3, -10), "float8_e3m4": (4, -2),
}  # fmt: skip
_MANY_COLUMNS, _MOST_COLUMNS = 32, 0.75
_VECTORS = (4, 32)  # that are compared with one another to tell an orthogonal matrix


@dataclass(frozen=True)
class Observation:
    """What was seen of a tensor of `shape`; the matrix is (first axis, all others).

    `moments` and `sums` leave out rows of exact zeros (a padding index) and, where `sparsity` is not 0, all zeros. `sample`
    is an ascending sample of at most SAMPLE values, those that were rounded spread evenly over what they were rounded from.
    `spacing` is the relative spacing of the values (of integers: at the largest), 0 where they have the digits of float32.
    `spectrum` is that of a block of it. `structure` is "identity", "dirac", "orthogonal", "delta_orthogonal" or "". `gain` is
    that of an orthogonal matrix.
    """

    shape: tuple[int, ...]
    moments: Moments
    sums: UnitSums | None = field(repr=False)
    sample: Vector = field(repr=False)
    spacing: float = 0.0
    spectrum: Spectrum = NO_SPECTRUM
    structure: str = ""
    gain: float = math.nan
    sparsity: float = 0.0
    zero_rows: int = 0


def observe(array: np.ndarray[Any, Any], bits: int = 0) -> Observation:
    """The observation of `array` of any shape and real dtype. Raises TypeError for a dtype that is not of real numbers.

    `bits` are those that each value was rounded to, as a share of the largest one; 0 where it was not.
    """
    return survey(array, bits)[1]


def survey(
    array: np.ndarray[Any, Any], bits: int = 0, known: tuple[Moments, UnitSums | None] | None = None
) -> tuple[Moments, Observation]:
    """The moments of all values of `array` and its observation, of one pass; `bits` as for `observe`.

    `known` are the moments, and the sums of a matrix of several rows and columns, where these have been measured.
    """
    matrix = as_matrix(array)
    if array.ndim < 2 or array.shape[0] == 1 or array.size == 0 or matrix.shape[1] == 1:
        moments, picked = known[0] if known else measure(array), _gather(array.reshape(-1))
        digits = _digits(picked, array.dtype, bits, moments)
        sample = _sample(picked, digits, False)
        return moments, Observation(array.shape, moments, None, sample, digits.spacing)
    if known is not None and known[1] is not None:
        (moments, sums), picked = (known[0], known[1]), _gather(matrix.reshape(-1))
    else:
        moments, sums, picked = measure_matrix(matrix, _places(array.size))
    seen = _observed(array, matrix, moments, sums, picked, _digits(picked, array.dtype, bits, moments))
    forget(array)
    return moments, seen


@dataclass(frozen=True)
class _Digits:
    """What values were rounded to: a share `relative` of the power of two below them, of 2^`floor` at least, or else `step`.

    `spacing` is that as a share of the largest value.
    """

    spacing: float = 0.0
    relative: float = 0.0
    floor: int = -126
    step: float = 0.0


def _digits(picked: Vector, dtype: np.dtype[Any], bits: int, moments: Moments) -> _Digits:
    """Told by the dtype, by the values themselves where a wider one holds them, or by the `bits` of integers."""
    if bits:
        # The steps lie at the same distance for all values of one scale, of which the largest value tells most.
        return _Digits(2 / (2**bits - 1), step=(moments.max - moments.min) / (2**bits - 1) if moments.count else 0.0)
    zeros, floor = 0, -126
    if dtype.name in _NARROW:
        zeros, floor = _FRACTION - _NARROW[dtype.name][0], _NARROW[dtype.name][1]
    elif dtype in (np.float32, np.float64):
        with np.errstate(over="ignore", invalid="ignore"):
            single = picked.astype(np.float32)
            kept = single[(picked == single) & (single != 0)]
        if kept.size >= max(_LEAST, np.count_nonzero(picked)):
            fraction = int(np.bitwise_or.reduce(kept.view(np.uint32))) & (2**_FRACTION - 1)
            zeros = (fraction & -fraction).bit_length() - 1 if fraction else 0
            zeros, floor = (zeros if zeros >= _ROUNDED else 0), (-14 if zeros == _FRACTION - 10 else floor)
    largest = max(abs(moments.min), abs(moments.max)) if moments.count else 0.0
    if not zeros or not largest > 0:
        return _Digits()
    # Numbers below the smallest normal one keep the same distance, which is then more of the largest of them.
    relative = 2.0 ** (zeros - _FRACTION)
    return _Digits(max(relative, math.ldexp(relative, floor) / largest), relative, floor)


def _observed(
    array: np.ndarray[Any, Any],
    matrix: np.ndarray[Any, Any],
    moments: Moments,
    sums: UnitSums,
    picked: Vector,
    digits: _Digits,
) -> Observation:
    empty, spacing = np.zeros(0), digits.spacing
    if moments.nan or moments.inf or moments.m2 == 0:
        return Observation(array.shape, moments, None, empty, spacing)
    structure, gain = _structure(array, matrix, moments, sums, spacing)
    if structure in ("identity", "dirac", "delta_orthogonal"):
        return Observation(array.shape, moments, None, empty, spacing, structure=structure, gain=gain)
    zero = sums.row_squares == 0
    # A padding index is a row or two; where most rows are zero they are no exception to anything.
    zero &= np.count_nonzero(zero) <= len(zero) // 2
    zero_rows = int(np.count_nonzero(zero))
    sparsity = _sparsity(matrix, moments, zero_rows)
    dropped = moments.zeros if sparsity else zero_rows * matrix.shape[1]
    kept = _without_zeros(moments, dropped)
    if zero_rows:
        sums = replace(
            sums,
            shape=(matrix.shape[0] - zero_rows, matrix.shape[1]),
            row_sums=sums.row_sums[~zero],
            row_squares=sums.row_squares[~zero],
        )
    sample = _sample(picked, digits, dropped > 0)
    found = spectrum(matrix, np.flatnonzero(~zero), kept)
    return Observation(array.shape, kept, sums, sample, spacing, found, structure, gain, sparsity, zero_rows)


def _without_zeros(moments: Moments, dropped: int) -> Moments:
    """The moments of what is left when `dropped` zeros are taken away: Pébay's formulas hold for negative counts as well."""
    if not dropped:
        return moments
    n = moments.count - dropped
    mean = moments.mean * moments.count / n
    # About zero, whose powers the dropped values add nothing to.
    a, m = moments.mean, moments
    raw2 = m.m2 + m.count * a**2
    raw3 = m.m3 + 3 * a * m.m2 + m.count * a**3
    raw4 = m.m4 + 4 * a * m.m3 + 6 * a * a * m.m2 + m.count * a**4
    m2 = raw2 - n * mean**2
    m3 = raw3 - 3 * mean * raw2 + 2 * n * mean**3
    m4 = raw4 - 4 * mean * raw3 + 6 * mean**2 * raw2 - 3 * n * mean**4
    return replace(moments, count=n, mean=mean, m2=m2, m3=m3, m4=m4, zeros=moments.zeros - dropped)


def _places(size: int) -> np.ndarray[Any, Any]:
    """At most SAMPLE indices below `size`, one at random from each of as many equal stretches; always the same ones."""
    if size <= SAMPLE:
        return np.arange(size)
    rng = np.random.default_rng(size)
    return np.minimum(((np.arange(SAMPLE) + rng.random(SAMPLE)) * (size / SAMPLE)).astype(np.int64), size - 1)


def _gather(line: np.ndarray[Any, Any]) -> Vector:
    """The values of a vector at `_places`, as float64."""
    if line.size <= SAMPLE:
        with np.errstate(invalid="ignore"):
            return line.astype(np.float64)
    picked = []
    for places in np.array_split(_places(line.size), 16):
        with np.errstate(invalid="ignore"):  # arbitrary bytes are signalling NaNs too
            picked.append(line[places].astype(np.float64))
        if line.nbytes > WINDOW:
            forget(line)
    return np.concatenate(picked)


def _sample(values: Vector, digits: _Digits, drop_zeros: bool) -> Vector:
    """The finite values in ascending order, each spread over what it was rounded from."""
    values = values[np.isfinite(values)]
    if drop_zeros:
        values = values[values != 0]
    if digits.step:
        values = values + digits.step * (np.random.default_rng(values.size).random(values.size) - 0.5)
    elif digits.relative:
        step = np.ldexp(digits.relative, np.maximum(np.frexp(np.abs(values))[1] - 1, digits.floor))
        values = values + step * (np.random.default_rng(values.size).random(values.size) - 0.5)
    return np.sort(values)


def _structure(
    array: np.ndarray[Any, Any], matrix: np.ndarray[Any, Any], moments: Moments, sums: UnitSums, spacing: float
) -> tuple[str, float]:
    """(the deterministic structure of the matrix or "", the gain of an orthogonal one)."""
    taps = math.prod(array.shape[2:])
    kept = moments.count - moments.zeros
    if kept <= max(array.shape[:2]) and moments.max == 1 and moments.min >= 0 and sums.row_squares.max() == 1:
        name = _unit_entries(array)
        if name:
            return name, 1.0
    if taps > 1 and kept <= array.size // taps:
        centre = array[(slice(None), slice(None), *(n // 2 for n in array.shape[2:]))]
        if np.count_nonzero(centre) == kept:
            gain = orthogonal_gain(centre, measure_units(centre)[1], spacing)
            return ("delta_orthogonal", gain) if not math.isnan(gain) else ("", math.nan)
    gain = orthogonal_gain(matrix, sums, spacing)
    return ("orthogonal", gain) if not math.isnan(gain) else ("", math.nan)


def _unit_entries(array: np.ndarray[Any, Any]) -> str:
    """ "identity" or "dirac" where the ones of `array` (o, i, taps) lie as torch.nn.init puts them, else ""."""
    places = np.argwhere(array.astype(np.float32) == 1)
    centred = all(bool(np.all(places[:, axis] == array.shape[axis] // 2)) for axis in range(2, array.ndim))
    # One input channel for each output channel, in order, over again for each group.
    in_order = bool(np.array_equal(places[:, 1], places[:, 0] % array.shape[1])) and len(np.unique(places[:, 0])) == len(places)
    if not (centred and in_order):
        return ""
    return "identity" if array.ndim == 2 else "dirac"


def orthogonal_gain(matrix: np.ndarray[Any, Any], sums: UnitSums, spacing: float) -> float:
    """g where the rows (or, of a tall matrix, the columns) are orthogonal and of norm g; NaN where they are not."""
    rows, columns = matrix.shape
    wide = rows <= columns
    squares = sums.row_squares if wide else sums.column_squares
    length = max(rows, columns)
    # Two rows that were rounded to 16 bits are of one norm and orthogonal by chance once in a thousand times; three hardly ever
    # (two conditions more on the norms and inner products), nor are two of full precision.
    if min(rows, columns) < (3 if spacing else 2):
        return math.nan
    mean = float(squares.mean())
    # Rounding a value moves its square by at most `spacing` of itself.
    allowed = 2e-4 + spacing
    if not mean > 0 or float(np.max(np.abs(squares / mean - 1))) > allowed:
        return math.nan
    # Of independent rows the inner products have a mean square of 1/length. A few tell nearly all draws.
    limit = 1e-5 + spacing / math.sqrt(length)
    for many in _VECTORS:
        picked = np.linspace(0, squares.size - 1, min(many, squares.size)).astype(np.int64)
        inner = _gram(matrix, picked, wide)[np.triu_indices(len(picked), 1)] / mean
        if not float(np.sqrt(np.mean(inner**2))) < limit:
            return math.nan
    return math.sqrt(mean)


def _gram(matrix: np.ndarray[Any, Any], picked: Vector, wide: bool) -> np.ndarray[Any, Any]:
    """The inner products of the rows `picked`, or of the columns where the matrix is not `wide`."""
    if wide:
        rows = matrix[picked].astype(np.float64)
        return rows @ rows.T
    gram = np.zeros((picked.size, picked.size))
    height = max(1, PIECE // matrix.shape[1])
    for top in range(0, len(matrix), height):
        band = matrix[top : top + height]
        columns = band[:, picked].astype(np.float64)
        gram += columns.T @ columns
        if matrix.nbytes > WINDOW:
            forget(band)
    return gram


def _sparsity(matrix: np.ndarray[Any, Any], moments: Moments, zero_rows: int) -> float:
    """The share of exact zeros where every column has the same number of them, else 0.

    A few draws are zero too, or become it in float16: in a matrix of many columns, most then still have the same number.
    """
    if moments.zeros <= max(zero_rows * matrix.shape[1], moments.size // 100) or moments.zeros >= moments.size - 8:
        return 0.0
    zeros = np.zeros(matrix.shape[1], np.int64)
    height = max(1, 131_072 // matrix.shape[1])
    for top in range(0, matrix.shape[0], height):
        zeros += np.count_nonzero(matrix[top : top + height].astype(np.float32) == 0, axis=0)
    least = int(zeros.min())
    # Zeros that fall by chance spread as a binomial law does, of which no number of zeros has three quarters.
    alike = _MOST_COLUMNS if zeros.size >= _MANY_COLUMNS else 1.0
    return least / matrix.shape[0] if np.count_nonzero(zeros == least) >= alike * zeros.size else 0.0
