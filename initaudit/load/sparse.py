"""Sparse tensors of PyTorch: coordinates (COO) and compressed rows or columns, also in blocks, written out when they are read.

What is not stored is a zero of the tensor, and is counted as one. Source: torch/_utils.py, _rebuild_sparse_tensor; the meaning
of the layouts: https://docs.pytorch.org/docs/stable/sparse.html.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.spans import byte_count, show

MAX_DENSE_BYTES = 1 << 30  # what a sparse tensor may take when it is written out
COMPRESSED = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
LAYOUTS = ("sparse_coo", *COMPRESSED)
Values = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Parts:
    """Readers of what a sparse tensor is made of: (indices, values), or (compressed, plain, values)."""

    layout: str
    read: tuple[Callable[[], Values], ...]


def check_dense(dtype: str, shape: tuple[int, ...], label: str) -> None:
    """Raises `UnreadableModel` for a tensor that is too large to be written out."""
    try:
        dense = byte_count(dtype, shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if dense > MAX_DENSE_BYTES:
        raise UnreadableModel(label, f"a sparse tensor of {dense} bytes once dense", f"at most {MAX_DENSE_BYTES}")


def dense(parts: Parts, shape: tuple[int, ...], label: str) -> Values:
    """The whole tensor; raises `UnreadableModel` for indices that do not fit it. Values at one place add up, as in PyTorch."""
    try:
        if parts.layout == "sparse_coo":
            return _coordinates(parts, shape)
        return _compressed(parts, shape)
    except (IndexError, ValueError, TypeError) as error:
        found = f"indices that do not fit a {parts.layout.removeprefix('sparse_').upper()} tensor of shape {list(shape)}"
        raise UnreadableModel(label, f"{found} ({show(error)})", advice="the file is damaged") from error


def _coordinates(parts: Parts, shape: tuple[int, ...]) -> Values:
    """indices [s, n] of the first s axes; values [n, *the other axes]."""
    indices, values = (read() for read in parts.read)
    axes = indices.shape[0]
    _check(indices, np.asarray(shape[:axes]).reshape(-1, 1))
    found = np.zeros(shape, values.dtype)
    if values.shape != (indices.shape[1], *shape[axes:]):
        raise ValueError(f"values of shape {list(values.shape)}")
    if values.dtype == bool:
        found[tuple(indices)] = values
    else:
        np.add.at(found, tuple(indices), values)
    return found


def _compressed(parts: Parts, shape: tuple[int, ...]) -> Values:
    """compressed [*batch, rows + 1], plain [*batch, n], values [*batch, n, *block, *dense]; columns first in CSC and BSC."""
    compressed, plain, values = (read() for read in parts.read)
    batch = compressed.shape[:-1]
    blocked, by_column = parts.layout[7] == "b", parts.layout.endswith("sc")
    block = values.shape[len(batch) + 1 : len(batch) + 3] if blocked else (1, 1)
    rest = shape[len(batch) + 2 :]
    rows, columns = (size // side for size, side in zip(shape[len(batch) : len(batch) + 2], block, strict=True))
    first, second = (columns, rows) if by_column else (rows, columns)
    if compressed.shape[-1] != first + 1 or plain.shape[:-1] != batch or values.shape[: plain.ndim] != plain.shape:
        raise ValueError("parts of other sizes")
    found = np.zeros((*batch, rows, block[0], columns, block[1], *rest), values.dtype)
    for place in np.ndindex(*batch):
        counts = np.diff(compressed[place])
        if compressed[place][0] != 0 or (counts < 0).any() or compressed[place][-1] != plain.shape[-1]:
            raise ValueError("compressed indices that do not count the plain ones")
        _check(plain[place], second)
        along = np.repeat(np.arange(first), counts)
        at = (plain[place], along) if by_column else (along, plain[place])
        held = values[place] if blocked else values[place].reshape(plain.shape[-1], 1, 1, *rest)
        found[place][at[0], :, at[1]] = held
    return found.reshape(shape)


def _check(indices: Values, sizes: Any) -> None:
    if indices.dtype.kind not in "iu":
        raise ValueError(f"indices of type {indices.dtype}")
    if indices.size and ((indices < 0).any() or (indices >= sizes).any()):
        raise ValueError("an index that is out of range")
