"""The pass in C over every element (kernel/kernel.c), where the package was built with a compiler; where not, numpy does it.

So are what is slow, or keeps other threads from running, in numpy: a block of rows as float32, and products with it.

What it finds differs from numpy's in nothing but the last digits: it sums in float64 (types of one byte in float32, a few at a
time), numpy in float32 in runs of 512.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.measure.hashes import factors

if TYPE_CHECKING:
    from initaudit.measure import _kernel as kernel
else:
    try:
        from initaudit.measure import _kernel as kernel
    except ImportError:
        kernel = None
    if getattr(kernel, "VERSION", None) != 4:  # what a working copy built before its sources were changed
        kernel = None

Vector = np.ndarray[Any, Any]
Found = tuple[int, float, float, float, float, float, float, int, int, int]

# Elements of one call: few enough that a map of a file stays some megabytes, so many that several threads seldom wait for
# Python's lock, which each takes between its calls (two threads: 1.5 times one with a quarter of it, 1.7 with this).
PIECE = 1 << 22
_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2}
_BYTE = 3
# Which of the instruction sets of the processor is used; -1 is the best. Tests look at each.
level = -1


@dataclass(frozen=True)
class Reader:
    """How the pass reads a type: its `kind`, unsigned integers `raw` of its size, and the bfloat16 of each byte, if it is one.

    `native` is the type in the order of bytes that the pass reads.
    """

    native: np.dtype[Any]
    kind: int
    raw: np.dtype[Any]
    table: Vector | None


def reader_of(dtype: np.dtype[Any]) -> Reader | None:
    """None where numpy has to do it: there is no kernel, or it does not know the type."""
    return None if kernel is None else _reader(dtype)


@lru_cache(maxsize=64)
def _reader(dtype: np.dtype[Any]) -> Reader | None:
    native = dtype.newbyteorder("=")
    raw = np.dtype(f"u{dtype.itemsize}") if dtype.itemsize in (1, 2, 4) else dtype
    if dtype.name in _KINDS:
        return Reader(native, _KINDS[dtype.name], raw, None)
    # Types registered with numpy by ml_dtypes (float8 of every kind, int4) are `isbuiltin` 2.
    if dtype.itemsize != 1 or (dtype.kind not in "biu" and dtype.isbuiltin != 2):
        return None
    wide = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    bits = wide.view(np.uint32)
    # Eight digits are enough for the floats and the integers of one byte.
    exact = bool(np.all((bits & 0xFFFF == 0) | np.isnan(wide)))
    return Reader(native, _BYTE, raw, (bits >> 16).astype(np.uint16)) if exact else None


def moments_of(line: Vector, reader: Reader) -> Found:
    """What `Moments` holds, of a contiguous vector in the reader's order of bytes."""
    return kernel.measure(reader.kind, line.view(reader.raw), 1, line.size, reader.table, None, None, 0, 1, level)


def measure_many(data: Vector, reader: Reader, places: Vector) -> tuple[Vector, Vector, Vector, Vector]:
    """The moments of tensors that lie in the same bytes `data`: numbers and counts of each, as `measure.together` has them.

    `places` (tensors, 3) are where each begins and its rows and columns, of int64. Then come the sums of those of several rows
    and columns, one after another in the order of `new_sums`, and where those of each tensor start.
    """
    numbers, counts, starts = np.empty((len(places), 6)), np.empty((len(places), 4), np.int64), np.empty(len(places), np.int64)
    sums = np.empty(kernel.lay_out(places, starts))
    odd = factors(int(places[:, 2].max(initial=0)) * reader.native.itemsize)
    kernel.measure_many(reader.kind, data, reader.table, odd, places, numbers, counts, sums, level)
    return numbers, counts, sums, starts


def survey(line: Vector) -> tuple[float, float, float, float] | None:
    """(sum, sum of squares, least, greatest) of a contiguous float32 vector; None where there is no kernel.

    Squares beyond the range of float32 are lost, and the extremes mean nothing where a value is not a number: the sum of
    squares is then 0, infinite or not a number.
    """
    return None if kernel is None else kernel.survey(line, level)


def gather(matrix: Vector, places: Vector, left: int, to: Vector) -> bool:
    """Puts rows `places` of a matrix, from column `left` on, into the float32 rows of `to`; False where numpy has to do it."""
    reader = reader_of(matrix.dtype)
    if reader is None or not (matrix.flags.c_contiguous and matrix.dtype.isnative):
        return False
    (rows, columns), at = matrix.shape, np.ascontiguousarray(places)
    kernel.gather(reader.kind, matrix.view(reader.raw), rows, columns, reader.table, at, left, to.shape[1], to, level)
    return True


def krylov(block: Vector, basis: Vector, images: Vector) -> int | None:
    """How many directions the Krylov space of a contiguous float32 `block` has, len(images) at most; None without a kernel.

    `basis` begins with the vector to start from and has one row more than `images`, the products of the block with the basis.
    """
    rows, columns = block.shape
    return None if kernel is None else kernel.krylov(block, rows, columns, len(images), basis, images, level)


def new_sums(rows: int, columns: int) -> Vector:
    """Room for `add` to a matrix of this shape."""
    return np.zeros(3 * rows + 2 * columns)


def add(band: Vector, reader: Reader, sums: Vector, top: int, rows: int) -> Found:
    """The moments of rows `top` and following of a matrix of `rows`; their sums are added to `sums`.

    `band` is contiguous and in the reader's order of bytes.
    """
    height, columns = band.shape
    odd = factors(columns * band.dtype.itemsize)
    return kernel.measure(reader.kind, band.view(reader.raw), height, columns, reader.table, odd, sums, top, rows, level)


def split(sums: Vector, rows: int, columns: int) -> tuple[Vector, Vector, Vector, Vector, Vector]:
    """(row sums, row squares, row hashes, column sums, column squares) of what was added up."""
    line = sums[: 3 * rows].reshape(3, rows)
    return line[0], line[1], line[2].view(np.uint64), sums[3 * rows : 3 * rows + columns], sums[3 * rows + columns :]
