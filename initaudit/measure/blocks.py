"""Cut an array into cache-sized blocks without copying it, and widen the blocks to a float type that numpy computes in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

# 128K elements: 512 KiB of float32, which stay in a second-level cache through the several operations on a block.
BLOCK = 131_072
# Products summed in float32 before the sums are added in float64: runs of 4096 cost 5e-8 of the variance, these 1e-8.
ROW = 512
UPPER_HALF = 1 if sys.byteorder == "little" else 0


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


class Scratch:
    """Buffers that the blocks of one tensor share: fresh memory for each block costs more than the sums themselves."""

    def __init__(self, size: int) -> None:
        self.deviation = np.empty(size, np.float32)
        self.square = np.empty(size, np.float32)
        self.mask = np.empty(size, np.bool_)
        self.rows = np.empty((4, max(1, size // ROW)), np.float32)
        self.wide = np.zeros(size, np.float32)

    def widen(self, block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """`block` as float32 where that holds every value exactly, else as float64 (long integers round to it).

        The result is valid until the next call. Raises TypeError for a dtype that is not of real numbers.
        """
        dtype, wide = block.dtype, self.wide[: block.size]
        if not dtype.isnative:
            block = block.astype(dtype.newbyteorder("="))
            dtype = block.dtype
        if dtype == np.float32 or dtype == np.float64:
            return block
        # Types registered with numpy by ml_dtypes (bfloat16, float8 of every kind, int4) are `isbuiltin` 2.
        if dtype.kind not in "biuf" and dtype.isbuiltin != 2:
            raise TypeError(f"dtype {dtype} is not of real numbers")
        if dtype.itemsize > 2:
            return block.astype(np.float64)
        if dtype.name == "bfloat16":
            # A bfloat16 is the upper half of a float32: written there, it costs a tenth of a cast. The lower halves stay zero.
            wide.view(np.uint16)[UPPER_HALF::2] = block.view(np.uint16)
            return wide
        return np.take(_table(dtype), block.view(f"u{dtype.itemsize}"), out=wide, mode="clip")


@lru_cache(maxsize=32)
def _table(dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """The float32 value of every bit pattern of a type of one or two bytes."""
    unsigned = np.dtype(f"u{dtype.itemsize}")
    return np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(dtype).astype(np.float32)
