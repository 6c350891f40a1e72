"""Arrays of a file as torch tensors, without a copy where the element type allows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch

from initaudit.errors import UnsupportedOperator
from initaudit.load.checkpoint import Array

_THROUGH_BITS = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
_FLOAT8 = {"float8_e4m3fnuz": torch.float8_e4m3fnuz, "float8_e5m2fnuz": torch.float8_e5m2fnuz}


def torch_dtype(name: str) -> torch.dtype:
    """torch's type for a numpy or ml_dtypes name; 4-bit and 2-bit types are widened to a byte."""
    bits = {**_THROUGH_BITS, **_FLOAT8}
    if name in bits:
        return bits[name]
    if name.startswith(("int4", "int2")):
        return torch.int8
    if name.startswith(("uint4", "uint2")):
        return torch.uint8
    found = getattr(torch, {"bool": "bool"}.get(name, name), None)
    if name.startswith("float") and not isinstance(found, torch.dtype):
        return torch.float32
    if not isinstance(found, torch.dtype):
        raise UnsupportedOperator(f"element type {name}", "not held by torch")
    return found


def literal(array: Array) -> torch.Tensor:
    """The values of `array` as a tensor that nobody may write to; memory-mapped files stay mapped."""
    held = array.read()
    if held.dtype.name in _THROUGH_BITS or held.dtype.name in _FLOAT8:
        bits = np.ascontiguousarray(held).view(np.uint16 if held.dtype.itemsize == 2 else np.uint8)
        return _shared(bits).view(torch_dtype(held.dtype.name)).reshape(held.shape)
    if held.dtype.name in dir(ml_dtypes):
        wide = np.float32 if held.dtype.name.startswith("float") else np.uint8 if held.dtype.name.startswith("u") else np.int8
        return _shared(held.astype(wide)).reshape(held.shape)
    return _shared(held).reshape(held.shape)


def _shared(held: np.ndarray[Any, Any]) -> torch.Tensor:
    if not held.dtype.isnative:
        held = held.astype(held.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        # torch warns that a read-only array must not be written to; nothing here writes to a constant.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.ascontiguousarray(held))


def untrained_norm(values: Sequence[torch.Tensor | None]) -> bool:
    """Whether training will use the statistics of the batch, by a norm's scale, shift, mean and variance, None where unknown.

    Statistics at 0 and 1 have seen no data, scales at 1 and shifts at 0 no training.
    """
    if len(values) < 4:
        return False
    scale, shift, mean, variance = values
    fresh = ((mean, 0), (variance, 1)), ((scale, 1), (shift, 0))
    return any(all(v is not None and bool((v == n).all()) for v, n in pair) for pair in fresh)
