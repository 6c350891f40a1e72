"""Hashes of rows, by which units that are copies of one another are found."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from initaudit.measure.blocks import BLOCK

WORD = 8  # bytes


@lru_cache(maxsize=8)
def factors(width: int) -> np.ndarray[Any, Any]:
    """A random odd number of 64 bits for each word, begun or whole, of a row of `width` bytes."""
    words = -(-width // WORD)
    return np.random.default_rng(0x1D0).integers(0, 2**63, words, dtype=np.uint64) * np.uint64(2) + np.uint64(1)


def row_hashes(matrix: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A 64-bit hash of the bytes of each row of a (rows, columns) `matrix`, in the machine's order; equal rows have equal ones.

    The hash is a sum of words times random odd numbers modulo 2^64, which is universal (Dietzfelbinger et al. 1997): unequal
    rows rarely share one, and whoever needs certainty compares their bytes. A row that ends within a word ends in zeros.
    """
    rows, columns = matrix.shape
    width = columns * matrix.dtype.itemsize
    odd = factors(width)
    hashes = np.empty(rows, np.uint64)
    height = max(1, BLOCK // max(1, columns))
    for top in range(0, rows, height):
        block = np.ascontiguousarray(matrix[top : top + height], matrix.dtype.newbyteorder("="))
        words = np.zeros((len(block), odd.size * WORD), np.uint8)
        words[:, :width] = block.view(np.uint8).reshape(len(block), width)
        found = words.view("<u8").astype(np.uint64, copy=False)
        # Words that differ in their upper bits only would differ in the upper bits of the product only.
        hashes[top : top + height] = np.sum((found ^ (found >> np.uint64(32))) * odd, axis=1, dtype=np.uint64)
    return hashes
