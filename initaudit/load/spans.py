"""Spans of bytes, in a file or in memory, out of which tensors are viewed without reading them first."""

from __future__ import annotations

import io
import math
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import numpy_dtype

MAX_ELEMENTS = 1 << 48  # beyond every machine; keeps a product of hostile sizes away from numpy's own overflow
SMALL = 1 << 16  # bytes: as many are read in a quarter of the time in which they are mapped
_SHORTER = "the file has become shorter since it was opened"
_MAPPED: ContextVar[bool] = ContextVar("mapped", default=False)
PACKED_BITS = {"int4": 4, "uint4": 4, "float4_e2m1fn": 4, "int2": 2, "uint2": 2}  # several elements a byte, the first lowest


@contextmanager
def mapped() -> Iterator[None]:
    """Inside, arrays of any size are maps of their file, so that where they stand in it can be told."""
    before = _MAPPED.set(True)
    try:
        yield
    finally:
        _MAPPED.reset(before)


def show(value: object, limit: int = 80) -> str:
    """`value` for a message: printable characters of one line, at most `limit` of them; the value comes out of a file."""
    text = str(value)[: limit + 1]
    if len(text) <= limit and text.isprintable():
        return text
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


@dataclass(frozen=True)
class Span:
    """`length` bytes from `offset` on, of the file at `path` or of `data` where that is given."""

    path: Path
    offset: int
    length: int
    data: bytes | None = field(default=None, repr=False)

    @staticmethod
    def of_file(path: Path) -> Span:
        """The whole file; raises `UnreadableModel` where it cannot be looked at."""
        try:
            return Span(path, 0, path.stat().st_size)
        except OSError as error:
            raise UnreadableModel(show(path), reason(error)) from error

    @staticmethod
    def of_bytes(path: Path, data: bytes) -> Span:
        """Bytes that were taken out of `path`, which is named in messages."""
        return Span(path, 0, len(data), data)

    def part(self, offset: int, length: int) -> Span:
        """A span inside this one; raises `UnreadableModel` where it would stick out."""
        if offset < 0 or length < 0 or offset + length > self.length:
            raise UnreadableModel(
                show(self.path), f"bytes {offset} to {offset + length} lie outside the {self.length} that are there",
                advice="the file is truncated or damaged",
            )  # fmt: skip
        return Span(self.path, self.offset + offset, length, self.data)

    @contextmanager
    def mapped(self) -> Iterator[memoryview]:
        """The bytes as a view for many small looks; raises `UnreadableModel` where the file cannot be mapped."""
        if self.data is not None:
            yield memoryview(self.data)[self.offset : self.offset + self.length]
            return
        try:
            with open(self.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                view = memoryview(data)
                part = view[self.offset : self.offset + self.length]
                try:
                    yield part
                finally:
                    part.release()
                    view.release()
        except (OSError, ValueError) as error:
            raise UnreadableModel(show(self.path), reason(error)) from error

    @contextmanager
    def opened(self) -> Iterator[io.RawIOBase | io.BytesIO]:
        """The bytes as a file that is read from its own start; raises `UnreadableModel` where it cannot be mapped."""
        if self.data is not None:
            yield io.BytesIO(self.read())
            return
        with self.mapped() as view:
            yield _View(view)

    def read(self) -> bytes:
        """The bytes themselves; raises `UnreadableModel` where the file has become shorter."""
        if self.data is not None:
            return self.data[self.offset : self.offset + self.length]
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offset)
                found = file.read(self.length)
        except OSError as error:
            raise UnreadableModel(show(self.path), reason(error)) from error
        if len(found) != self.length:
            raise UnreadableModel(show(self.path), f"{len(found)} bytes at {self.offset}", f"{self.length}")
        return found

    def array(self, dtype: str, shape: tuple[int, ...], *, big_endian: bool = False) -> np.ndarray[Any, Any]:
        """The span as an array of `dtype` and `shape`, read-only; mapped unless it is small or has to be converted.

        Raises `UnreadableModel` unless the span has exactly the bytes that the shape takes.
        """
        check_bytes(show(self.path), dtype, shape, self.length)
        if self.length == 0:
            return np.zeros(shape, dtype=numpy_dtype(dtype))
        bits = PACKED_BITS.get(dtype)
        if bits is not None:
            return unpack(self._raw(np.dtype(np.uint8), (self.length,)), math.prod(shape), bits, dtype).reshape(shape)
        target = numpy_dtype(dtype)
        if not big_endian or target.itemsize == 1:
            return self._raw(target, shape)
        # ml_dtypes has no byte-swapped form, so the swap is made on integers (complex numbers are pairs of them)
        width = target.itemsize // (2 if target.kind == "c" else 1)
        swapped = self._raw(np.dtype(f">u{width}"), (self.length // width,)).astype(f"=u{width}")
        return swapped.view(target).reshape(shape)

    def _raw(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        if self.data is not None:
            flat = np.frombuffer(self.data, np.uint8, self.length, self.offset)
            return flat.view(dtype).reshape(shape)
        try:
            if self.length <= SMALL and not _MAPPED.get():
                return np.frombuffer(self._few_bytes(), dtype).reshape(shape)
            # A page behind the end of a file that shrank would end the process with SIGBUS
            if os.stat(self.path).st_size < self.offset + self.length:
                raise UnreadableModel(show(self.path), _SHORTER)
            return np.memmap(self.path, dtype=dtype, mode="r", offset=self.offset, shape=shape)
        except (OSError, ValueError) as error:
            raise UnreadableModel(show(self.path), reason(error)) from error

    def _few_bytes(self) -> bytes:
        """What `read` reads, without the layers of a file object, which take longer than a few bytes."""
        handle = os.open(self.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            os.lseek(handle, self.offset, os.SEEK_SET)
            found = os.read(handle, self.length)
        finally:
            os.close(handle)
        if len(found) != self.length:
            raise UnreadableModel(show(self.path), _SHORTER)
        return found


@dataclass(frozen=True)
class Stored:
    """Opens an array of `dtype` and `shape` that lies in `span` as it is, in the machine's order of bytes."""

    span: Span
    dtype: str
    shape: tuple[int, ...]

    def __call__(self) -> np.ndarray[Any, Any]:
        """The values; raises `UnreadableModel` as `Span.array` does."""
        return self.span.array(self.dtype, self.shape)


class _View(io.RawIOBase):
    """A memory map as a file."""

    def __init__(self, view: memoryview) -> None:
        super().__init__()
        self.view, self.place = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.place = max(0, offset + (0, self.place, len(self.view))[whence])
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int | None = -1) -> bytes:
        end = len(self.view) if size is None or size < 0 else self.place + size
        found = bytes(self.view[self.place : end])
        self.place += len(found)
        return found


def reason(error: BaseException) -> str:
    """One clause that says what went wrong, without the path that an OSError repeats."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[0].lower() + error.strerror[1:]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return show(lines[0] if lines else type(error).__name__, 200)


def byte_count(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that an array takes in a file; raises ValueError for a dtype or a shape that cannot be."""
    if any(size < 0 for size in shape):
        raise ValueError(f"shape {show(shape)} has a negative size")
    elements = math.prod(shape)
    if elements > MAX_ELEMENTS or any(size > MAX_ELEMENTS for size in shape):
        raise ValueError(f"shape {show(shape)} has more elements than any machine holds")
    if dtype in PACKED_BITS:
        return (elements * PACKED_BITS[dtype] + 7) // 8
    try:
        return elements * numpy_dtype(dtype).itemsize
    except TypeError as error:
        raise ValueError(f"unknown dtype {show(dtype)}") from error


def check_bytes(where: str, dtype: str, shape: tuple[int, ...], length: int) -> None:
    """Raises `UnreadableModel` unless `length` bytes are just what `shape` takes."""
    try:
        expected = byte_count(dtype, shape)
    except ValueError as error:
        raise UnreadableModel(where, str(error)) from error
    if expected != length:
        raise UnreadableModel(where, f"{length} bytes for {dtype} of shape {show(list(shape))}", f"{expected}")


def unpack(raw: np.ndarray[Any, Any], count: int, bits: int, dtype: str) -> np.ndarray[Any, Any]:
    """`count` elements out of `raw` (uint8), several a byte and the first in the lowest bits."""
    per_byte = 8 // bits
    spread = np.empty((raw.size, per_byte), np.uint8)
    for place in range(per_byte):
        spread[:, place] = (raw >> (bits * place)) & ((1 << bits) - 1)
    codes = spread.reshape(-1)[:count]
    if dtype.startswith("int"):
        shift = 8 - bits
        return ((codes << shift).astype(np.uint8).view(np.int8) >> shift).astype(getattr(ml_dtypes, dtype))
    if dtype.startswith("uint"):
        return codes.astype(getattr(ml_dtypes, dtype))
    return codes.view(getattr(ml_dtypes, dtype))
