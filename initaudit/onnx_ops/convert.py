"""Values of an ONNX file as torch tensors, and back to numpy."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor

from initaudit.errors import InitauditError, UnsupportedOperator
from initaudit.onnx_ops.budget import reserve
from initaudit.onnx_ops.tensors import INT2, INT4, NARROW, TORCH_TYPES, UINT2, UINT4, torch_type

# numpy types of ml_dtypes that torch holds under the same bits.
_SAME_BITS = {
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e5m2fnuz": torch.float8_e5m2fnuz,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
}
_NARROW_NAMES = {"int4": INT4, "uint4": UINT4, "int2": INT2, "uint2": UINT2}
_ML_NAMES = {kind: name for name, kind in _SAME_BITS.items()}


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy of the array as a tensor. Raises UnsupportedOperator for strings, complex numbers and 4-bit floats."""
    name = array.dtype.name
    array = np.array(array, order="C", copy=True)
    if name in _SAME_BITS:
        bits: Any = np.uint16 if name == "bfloat16" else np.uint8
        return torch.from_numpy(array.view(bits)).view(_SAME_BITS[name])
    if name in _NARROW_NAMES:
        kind = _NARROW_NAMES[name]
        return torch.from_numpy(array.astype(np.int8 if NARROW[kind] == torch.int8 else np.uint8)).view(kind)
    if array.dtype.kind not in "biuf" or name.startswith("float4"):
        raise UnsupportedOperator(f"element type {name}", "not held by torch")
    return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's values as an array of the same element type (that of ml_dtypes where numpy has none)."""
    value = tensor.detach().cpu().contiguous()
    if value.dtype in _ML_NAMES:
        bits = torch.uint16 if value.dtype == torch.bfloat16 else torch.uint8
        raw: np.ndarray[Any, Any] = value.view(bits).numpy()
        return raw.view(getattr(ml_dtypes, _ML_NAMES[value.dtype]))
    if value.dtype in NARROW:
        narrow = next(name for name, kind in _NARROW_NAMES.items() if kind == value.dtype)
        return value.view(NARROW[value.dtype]).numpy().astype(getattr(ml_dtypes, narrow))
    return value.numpy()


def from_proto(proto: onnx.TensorProto) -> Tensor:
    """The tensor that is written into the file. Raises InitauditError for external data and for data of another size."""
    where = f"tensor {proto.name!r}"
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        raise InitauditError(where, "its data lie in another file", "data within the graph", "read it with initaudit.load")
    if any(n < 0 for n in proto.dims):
        raise InitauditError(where, f"negative sizes {tuple(proto.dims)}")
    torch_type(proto.data_type)
    try:
        return from_numpy(numpy_helper.to_array(proto)).reshape(tuple(proto.dims))
    except (ValueError, KeyError, TypeError) as error:
        raise InitauditError(where, f"unreadable data: {error}") from error


def from_sparse(proto: onnx.SparseTensorProto) -> Tensor:
    """A sparse tensor, dense."""
    shape = tuple(proto.dims)
    reserve(shape, "sparse tensor")
    values, indices = from_proto(proto.values), from_proto(proto.indices)
    flat = values.new_zeros(math.prod(shape))
    if indices.ndim == 2:
        place = torch.zeros(len(indices), dtype=torch.int64)
        for axis, size in enumerate(shape):
            place = place * size + indices[:, axis]
        indices = place
    flat[indices] = values
    return flat.reshape(shape)


def onnx_type(kind: torch.dtype) -> int:
    """The standard's number of a torch type. Raises UnsupportedOperator where there is none."""
    for number, known in TORCH_TYPES.items():
        if known == kind:
            return number
    raise UnsupportedOperator(f"element type {kind}", "not one of ONNX")
