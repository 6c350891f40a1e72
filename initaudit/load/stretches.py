"""Small tensors of one type that lie near each other in a file, to be read and measured together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from initaudit.load.checkpoint import Array, numpy_dtype
from initaudit.load.spans import PACKED_BITS, SMALL, Span, Stored

_REACH = 1 << 25  # bytes of a file that one stretch maps: what is looked at of them stays resident while it is
# Tensors of a stretch: their sums, some hundred bytes each, then stay in a second-level cache.
_MOST, _LEAST = 1024, 2


@dataclass(frozen=True)
class Stretch:
    """The bytes in which several arrays of one `dtype` lie, their names, and the `places` (arrays, 3) of each: where it begins,
    its rows and its columns.

    The rows are the first axis; what has one row or one column is one row.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    span: Span
    places: np.ndarray[Any, Any] = field(repr=False, compare=False)

    def read(self) -> np.ndarray[Any, Any]:
        """All the bytes (uint8), mapped where they are many; raises `UnreadableModel` where the file has become shorter."""
        return np.asarray(self.span.array("uint8", (self.span.length,)))

    def values(self, data: np.ndarray[Any, Any], index: int) -> np.ndarray[Any, Any]:
        """One of the arrays, out of the bytes that `read` gave."""
        offset, rows, columns = self.places[index].tolist()
        dtype = numpy_dtype(self.dtype)
        return data[offset : offset + rows * columns * dtype.itemsize].view(dtype).reshape(self.shapes[index])


def stretches(arrays: Mapping[str, Array]) -> Iterator[Stretch]:
    """Stretches of those real `arrays` that are small and lie in a file as they are; most of what is alone is in none."""
    groups: dict[tuple[Path, int, str], list[tuple[Span, str, tuple[int, ...]]]] = {}
    for name, array in arrays.items():
        stored = array.open
        if not isinstance(stored, Stored) or (stored.dtype, stored.shape) != (array.dtype, array.shape):
            continue
        span = stored.span
        if stored.dtype in PACKED_BITS or stored.dtype.startswith("complex") or not 0 < span.length <= SMALL:
            continue
        groups.setdefault((span.path, id(span.data), stored.dtype), []).append((span, name, array.shape))
    for (_, _, dtype), group in groups.items():
        group.sort(key=lambda item: item[0].offset)
        first = 0
        for i, (span, _, _) in enumerate(group):
            if i - first == _MOST or span.offset - group[first][0].offset > _REACH:
                yield from _stretch(group[first:i], dtype)
                first = i
        yield from _stretch(group[first:], dtype)


def _stretch(group: list[tuple[Span, str, tuple[int, ...]]], dtype: str) -> Iterator[Stretch]:
    if len(group) < _LEAST:
        return
    spans, names, shapes = zip(*group, strict=True)
    begin, end = spans[0].offset, max(span.offset + span.length for span in spans)
    places = np.array([(span.offset - begin, *_as_rows(shape)) for span, _, shape in group], np.int64)
    yield Stretch(names, shapes, dtype, Span(spans[0].path, begin, end - begin, spans[0].data), places)


def _as_rows(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = math.prod(shape[:1]), math.prod(shape[1:])
    return (rows, columns) if rows > 1 and columns > 1 else (1, rows * columns)
