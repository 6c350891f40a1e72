"""Many small tensors that lie in the same bytes, measured in one call: a call for each takes longer than the pass over it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from initaudit.measure import fused
from initaudit.measure.moments import Moments, measure
from initaudit.measure.units import UnitSums, measure_units

Vector = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Together:
    """What was measured of each of several tensors, in columns; records are made of those that are asked for.

    `places` (tensors, 3) say where in the bytes each begins, and its rows and columns. `numbers` (tensors, 6) are mean, m2, m3,
    m4, min and max of `Moments`, and `counts` (tensors, 4) count, zeros, nan and inf. `sums` are those of `UnitSums` of each
    tensor of several rows and columns, from `starts` on.
    """

    places: Vector
    numbers: Vector = field(repr=False)
    counts: Vector = field(repr=False)
    sums: Vector = field(repr=False)
    starts: Vector = field(repr=False)

    def moments(self, index: int) -> Moments:
        """The moments of one tensor."""
        count, zeros, nan, inf = self.counts[index].tolist()
        mean, m2, m3, m4, low, high = self.numbers[index].tolist()
        return Moments(count, mean, m2, m3, m4, low, high, zeros, nan, inf)

    def unit_sums(self, index: int) -> UnitSums | None:
        """The sums of the rows and columns of one tensor; None where it has but one of either."""
        _, rows, columns = self.places[index].tolist()
        if rows < 2 or columns < 2:
            return None
        start = int(self.starts[index])
        return UnitSums((rows, columns), *fused.split(self.sums[start : start + 3 * rows + 2 * columns], rows, columns))


def measure_together(data: Vector, dtype: np.dtype[Any], places: Vector) -> Together:
    """The moments and unit sums of tensors of `dtype`, in the machine's order of bytes, that lie in `data` (uint8) at `places`.

    Raises ValueError where one does not lie within the bytes, and TypeError for a dtype that is not of real numbers.
    """
    reader = fused.reader_of(dtype)
    if reader is not None:
        return Together(places, *fused.measure_many(data, reader, places))
    rows, columns = places[:, 1], places[:, 2]
    room = np.where((rows > 1) & (columns > 1), 3 * rows + 2 * columns, 0)
    ends = np.cumsum(room)
    sums, starts = np.empty(int(room.sum())), ends - room
    numbers, counts = np.empty((len(places), 6)), np.empty((len(places), 4), np.int64)
    for i, (offset, height, width) in enumerate(places.tolist()):
        matrix = np.frombuffer(data, dtype, height * width, offset).reshape(height, width)
        if height > 1 and width > 1:
            m, of = measure_units(matrix)
            parts = (of.row_sums, of.row_squares, of.row_hashes.view(np.float64), of.column_sums, of.column_squares)
            sums[starts[i] : ends[i]] = np.concatenate(parts)
        else:
            m = measure(matrix)
        numbers[i], counts[i] = (m.mean, m.m2, m.m3, m.m4, m.min, m.max), (m.count, m.zeros, m.nan, m.inf)
    return Together(places, numbers, counts, sums, starts)
