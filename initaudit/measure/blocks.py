"""Cut an array into cache-sized blocks without copying it, and widen the blocks to a float type that numpy computes in."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

# 128K elements: 512 KiB of float32, which stay in a second-level cache through the several operations on a block.
BLOCK = 131_072
# Products summed in float32 before the sums are added in float64: runs of 4096 cost 5e-8 of the variance, these 1e-8.
ROW = 512
WINDOW = 1 << 25  # bytes of a memory map that are looked at before they are let go; a system call each
_LITTLE = sys.byteorder == "little"
_DONTNEED: int | None = getattr(mmap, "MADV_DONTNEED", None)  # Windows has none
# The bit pattern of infinity: larger ones, the sign aside, are NaN.
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00}


def flat(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """A one-dimensional view of all elements in memory order, or None where the array is not contiguous in any order."""
    if array.flags.c_contiguous:
        return array.reshape(-1)
    if array.flags.f_contiguous:
        return array.T.reshape(-1)
    return None


def blocks(array: np.ndarray[Any, Any], size: int = BLOCK) -> Iterator[np.ndarray[Any, Any]]:
    """One-dimensional blocks of at most `size` elements which together hold every element once, in no promised order."""
    line = flat(array)
    if line is not None:
        for start in range(0, line.size, size):
            yield line[start : start + size]
        return
    # A strided view (a slice of columns, say) is copied a block at a time.
    flags: tuple[Any, ...] = ("external_loop", "buffered", "zerosize_ok")
    for part in np.nditer(array, flags=flags, order="K", buffersize=size):
        yield np.array(part)


def distinct(values: np.ndarray[Any, Any]) -> int:
    """How many different numbers there are, NaN aside (np.unique would import numpy.ma, a tenth of the start of an audit)."""
    line = np.sort(values[values == values], axis=None)
    return int(np.count_nonzero(line[1:] != line[:-1])) + (line.size > 0)


def forget(array: np.ndarray[Any, Any]) -> None:
    """Lets the pages of a memory-mapped, contiguous `array` go; whoever looks again gets them from the file again.

    Without it a pass over a file leaves all of it in the process's resident memory. Maps that may be written are left alone.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap) or _DONTNEED is None or not array.flags.c_contiguous or array.nbytes == 0:
        return
    whole = np.frombuffer(base, np.uint8)
    if whole.flags.writeable:
        return
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        base.madvise(_DONTNEED, first, length)


class Scratch:
    """Buffers that the tiles of one tensor share: fresh memory for each tile costs more than the sums themselves."""

    def __init__(self, size: int) -> None:
        # Buffers that begin at the same place in a page make the processor wait for stores that only look like its loads.
        gap = 512
        whole = np.zeros(3 * (size + gap), np.float32)
        self.wide, self.square, self.deviation = (whole[i * (size + gap) :][:size] for i in range(3))
        self.mask = np.empty(size, np.bool_)

    def widen(self, tile: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`tile` (rows, columns) as float32 where that holds every value exactly, else as float64 (long integers round to it).

        Where `split(tile)` holds, the columns at even places come first and those at odd places follow. The result is valid
        until the next call. Raises TypeError for a dtype that is not of real numbers.
        """
        dtype = tile.dtype
        if not dtype.isnative:
            tile = tile.astype(dtype.newbyteorder("="))
            dtype = tile.dtype
        if dtype == np.float32 or dtype == np.float64:
            return tile
        # Types registered with numpy by ml_dtypes (bfloat16, float8 of every kind, int4) are `isbuiltin` 2.
        if dtype.kind not in "biuf" and dtype.isbuiltin != 2:
            raise TypeError(f"dtype {dtype} is not of real numbers")
        if dtype.itemsize > 2:
            return tile.astype(np.float64)
        wide = self.wide[: tile.size].reshape(tile.shape)
        if split(tile):
            if dtype.name == "float16" and _beyond(tile):  # whose exponent is no number
                tile = np.concatenate([tile[:, ::2], tile[:, 1::2]], axis=1)
                return np.take(_table(dtype), tile.view(np.uint16), out=wide, mode="clip")
            _widen_pairs(tile, wide)
        elif dtype.itemsize == 1 and tile.shape[1] % 2 == 0:
            pairs = np.ascontiguousarray(tile).view(np.uint16)
            np.take(_pairs(dtype), pairs, out=wide.view(np.complex64), mode="clip")
        else:
            np.take(_table(dtype), np.ascontiguousarray(tile).view(f"u{dtype.itemsize}"), out=wide, mode="clip")
        return wide


def split(tile: np.ndarray[Any, Any]) -> bool:
    """Whether `Scratch.widen` tells two neighbouring columns of a 16-bit type apart by two shifts of one 32-bit word."""
    paired = tile.shape[1] % 2 == 0 and tile.strides[1] == 2 and tile.strides[0] % 4 == 0
    return paired and tile.dtype.isnative and tile.dtype.name in _INFINITY


def _widen_pairs(tile: np.ndarray[Any, Any], wide: np.ndarray[Any, Any]) -> None:
    """A cast of numpy, or of ml_dtypes, takes an element at a time and ten times as long."""
    pairs, bits = tile.view(np.uint32), wide.view(np.uint32)
    half = pairs.shape[1]
    even, odd = (bits[:, :half], bits[:, half:]) if _LITTLE else (bits[:, half:], bits[:, :half])
    np.left_shift(pairs, 16, out=even)
    if tile.dtype.name == "bfloat16":
        # A bfloat16 is the upper half of a float32.
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=odd)
        return
    np.copyto(odd, pairs)
    # Sign, 5 bits of exponent and 10 of fraction are put where a float32 has its own; the bias of its exponent is 112 more.
    signed = wide.view(np.int32)
    np.right_shift(signed, 3, out=signed)
    np.bitwise_and(bits, np.uint32(0x8FFFE000), out=bits)
    np.multiply(wide, np.float32(2.0**112), out=wide)


def extremes(tile: np.ndarray[Any, Any], wide: np.ndarray[Any, Any]) -> tuple[float, float]:
    """(smallest, largest) value of `tile` (rows, columns), which `wide` holds as floats; not finite where a value is not."""
    if not split(tile):
        with np.errstate(invalid="ignore"):  # arbitrary bytes are signalling NaNs too
            return float(wide.min()), float(wide.max())
    # Sign and magnitude: read as signed integers the largest is the largest float, as unsigned ones the most negative one.
    signed, unsigned = tile.view(np.int16), tile.view(np.uint16)
    high, low = int(signed.max()), int(unsigned.max())
    if high < 0:
        high = int(signed.min())
    if low < 0x8000:
        low = int(unsigned.min())
    found = np.array([low & 0xFFFF, high & 0xFFFF], np.uint16).view(tile.dtype).astype(np.float64)
    return float(found[0]) + 0.0, float(found[1]) + 0.0


def _beyond(tile: np.ndarray[Any, Any]) -> bool:
    """Whether a 16-bit float of `tile` is not finite."""
    infinity = _INFINITY[tile.dtype.name]
    return int(tile.view(np.int16).max()) >= infinity or int(tile.view(np.uint16).max()) >= 0x8000 | infinity


@lru_cache(maxsize=32)
def _table(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The float32 value of every bit pattern of a type of one or two bytes."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(dtype).astype(np.float32)


@lru_cache(maxsize=8)
def _pairs(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Two float32 values, as one item, for every bit pattern of two neighbours of a type of one byte."""
    both = np.arange(65536, dtype=np.uint16).view(np.uint8)
    return _table(dtype)[both].view(np.complex64)
