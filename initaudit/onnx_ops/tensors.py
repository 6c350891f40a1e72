"""Small helpers that every family of operators shares: shape integers, element types, devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from initaudit.errors import UnsupportedOperator

# torch has these types at run time, its type stubs do not know them.
_torch: Any = torch
INT4: torch.dtype = _torch.int4
UINT4: torch.dtype = _torch.uint4
INT2: torch.dtype = _torch.int2
UINT2: torch.dtype = _torch.uint2

# onnx.TensorProto.DataType, written out so that operators need not import onnx (strings and complex numbers are not executed).
# A 4-bit or 2-bit integer is held as one byte an element, viewed as torch's own narrow type.
TORCH_TYPES: dict[int, torch.dtype] = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 4: torch.uint16, 5: torch.int16, 6: torch.int32, 7: torch.int64,
    9: torch.bool, 10: torch.float16, 11: torch.float64, 12: torch.uint32, 13: torch.uint64, 16: torch.bfloat16,
    17: torch.float8_e4m3fn, 18: torch.float8_e4m3fnuz, 19: torch.float8_e5m2, 20: torch.float8_e5m2fnuz,
    21: UINT4, 22: INT4, 24: torch.float8_e8m0fnu, 25: UINT2, 26: INT2,
}  # fmt: skip

# torch stores these but computes little with them.
STORAGE_ONLY = frozenset({torch.uint16, torch.uint32, torch.uint64})
NARROW: dict[torch.dtype, torch.dtype] = {INT4: torch.int8, INT2: torch.int8, UINT4: torch.uint8, UINT2: torch.uint8}


def torch_type(number: int) -> torch.dtype:
    """The torch type of an element type of the standard. Raises UnsupportedOperator for one that torch has not."""
    if number not in TORCH_TYPES:
        raise UnsupportedOperator(f"element type {number}", "not held by torch")
    return TORCH_TYPES[number]


def ints(value: Tensor | Sequence[int] | int | None) -> list[int] | None:
    """Integers about shapes as Python integers, whether they came as an attribute or as a tensor; None stays None."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return [int(v) for v in value.detach().reshape(-1).tolist()]
    return [value] if isinstance(value, int) else [int(v) for v in value]


def floats(value: Tensor | Sequence[float] | None) -> list[float] | None:
    """Numbers that steer an operator (scales, a pad value) as Python floats; None stays None."""
    if value is None:
        return None
    return [float(v) for v in (value.detach().reshape(-1).tolist() if isinstance(value, Tensor) else value)]


def scalar(value: Tensor | float) -> float:
    """One number that steers an operator, as a Python number."""
    return value.detach().reshape(-1).tolist()[0] if isinstance(value, Tensor) else value


def together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors on one device: what was computed on the host follows the data to where it lies."""
    device = next((t.device for t in tensors if t.device.type != "cpu"), None)
    return tensors if device is None else tuple(t.to(device) for t in tensors)


def computed(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """`function` of the tensors, by way of int64 where torch only stores their type; the result has the first one's type.

    Addition, subtraction and multiplication modulo 2^64 are the same in both; whoever divides or compares must not come here
    with uint64.
    """
    tensors = together(*tensors)
    kind = tensors[0].dtype
    if kind not in STORAGE_ONLY:
        return function(*tensors)
    return function(*(t.to(torch.int64) for t in tensors)).to(kind)


def ordered(tensor: Tensor) -> Tensor:
    """A tensor of a type that torch compares, in the same order: uint64 is shifted into int64."""
    if tensor.dtype == torch.uint64:
        return tensor.view(torch.int64) ^ torch.iinfo(torch.int64).min
    return tensor.to(torch.int64) if tensor.dtype in STORAGE_ONLY else tensor


def unordered(tensor: Tensor, kind: torch.dtype) -> Tensor:
    """The inverse of `ordered`."""
    if kind == torch.uint64:
        return (tensor ^ torch.iinfo(torch.int64).min).view(torch.uint64)
    return tensor.to(kind) if kind in STORAGE_ONLY else tensor


def normal_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front. Raises IndexError where there is none."""
    if not -rank <= axis < max(rank, 1):
        raise IndexError(f"axis {axis} of a tensor of rank {rank}")
    return axis % max(rank, 1)


def accumulator(kind: torch.dtype) -> torch.dtype:
    """The type in which a reduced-precision value is summed: float32 for the 16-bit types, otherwise the type itself."""
    return torch.float32 if kind in (torch.float16, torch.bfloat16) else kind
