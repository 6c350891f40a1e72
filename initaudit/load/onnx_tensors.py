"""ONNX tensors as lazy arrays: raw bytes, typed fields, sparse form, and external data that is mapped by our own rules.

onnx itself is never asked to open external data: it copies all of it, lets a length of 2**50 through its checker, and its
older versions followed links out of the folder. A tensor that cannot be read raises `UnreadableModel`; its caller makes that
a `Problem` of the tensor, so that the rest of the model is still audited.
"""

from __future__ import annotations

import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, numpy_dtype
from initaudit.load.spans import PACKED_BITS, Span, byte_count, check_bytes, reason, show
from initaudit.load.sparse import MAX_DENSE_BYTES

if TYPE_CHECKING:
    import onnx

# onnx.proto, TensorProto.DataType; 8 is STRING and 0 UNDEFINED, which hold no numbers
DTYPES = {
    1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16",
    11: "float64", 12: "uint32", 13: "uint64", 14: "complex64", 15: "complex128", 16: "bfloat16", 17: "float8_e4m3fn",
    18: "float8_e4m3fnuz", 19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4_e2m1fn",
    24: "float8_e8m0fnu", 25: "uint2", 26: "int2",
}  # fmt: skip
STRING = 8
# onnx.proto, TensorProto: the typed field of each dtype; every dtype that is not listed uses int32_data
TYPED_FIELD = {
    "float32": "float_data", "complex64": "float_data", "int64": "int64_data", "float64": "double_data",
    "complex128": "double_data", "uint32": "uint64_data", "uint64": "uint64_data",
}  # fmt: skip


def tensor_array(tensor: onnx.TensorProto, name: str, where: str, folder: Path | None, span: Span | None = None) -> Array:
    """The lazy array of `tensor`, called `name`; external data is looked for in `folder`, `span` are bytes already found.

    Raises `UnreadableModel` for an unknown dtype, an impossible shape, or bytes that are missing or do not fit the shape.
    """
    label = f"{where}: {show(name)}"
    shape = tuple(int(size) for size in tensor.dims)
    dtype = DTYPES.get(tensor.data_type)
    if dtype is None:
        kind = "strings" if tensor.data_type == STRING else f"data type {tensor.data_type}, which ONNX does not define"
        raise UnreadableModel(label, f"holds {kind}")
    try:
        expected = byte_count(dtype, shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if tensor.HasField("segment"):
        raise UnreadableModel(label, "is stored in segments, which no runtime reads")
    if span is not None or tensor.data_location == 1:  # EXTERNAL
        held, storage = (span, "") if span is not None else _external(tensor, label, folder, expected)
        check_bytes(label, dtype, shape, held.length)
        return Array(name, shape, dtype, lambda: held.array(dtype, shape), storage)
    if tensor.HasField("raw_data"):
        check_bytes(label, dtype, shape, len(tensor.raw_data))
        return Array(name, shape, dtype, lambda: _raw(tensor, dtype, shape))
    _check_typed(tensor, label, dtype, shape)
    return Array(name, shape, dtype, lambda: _typed(tensor, label, dtype, shape))


def sparse_array(sparse: onnx.SparseTensorProto, name: str, where: str) -> Array:
    """The dense form of a sparse tensor, made when it is read; raises `UnreadableModel` as `tensor_array` does."""
    label = f"{where}: {show(name)}"
    shape = tuple(int(size) for size in sparse.dims)
    values = tensor_array(sparse.values, f"{name}.values", where, None)
    indices = tensor_array(sparse.indices, f"{name}.indices", where, None)
    try:
        dense_bytes = byte_count(values.dtype, shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if dense_bytes > MAX_DENSE_BYTES:
        raise UnreadableModel(label, f"a sparse tensor of {dense_bytes} bytes once dense", f"at most {MAX_DENSE_BYTES}")
    count = values.size
    if indices.dtype != "int64" or indices.shape not in ((count,), (count, len(shape))):
        raise UnreadableModel(label, f"indices of shape {list(indices.shape)}", f"int64 of {count} entries")
    return Array(name, shape, values.dtype, lambda: _dense(values, indices, shape, label))


def _dense(values: Array, indices: Array, shape: tuple[int, ...], label: str) -> np.ndarray[Any, Any]:
    where = indices.read()
    flat = np.zeros(math.prod(shape), numpy_dtype(values.dtype))
    if where.ndim == 2:
        if where.size and ((where < 0).any() or (where >= np.array(shape)).any()):
            raise UnreadableModel(label, "an index lies outside the shape")
        where = np.ravel_multi_index(tuple(where.T), shape) if where.size else where.reshape(-1)
    if where.size and (where.min() < 0 or where.max() >= flat.size):
        raise UnreadableModel(label, "an index lies outside the shape")
    flat[where] = values.read().reshape(-1)
    return flat.reshape(shape)


def _raw(tensor: onnx.TensorProto, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return Span.of_bytes(Path("."), tensor.raw_data).array(dtype, shape)


def _check_typed(tensor: onnx.TensorProto, label: str, dtype: str, shape: tuple[int, ...]) -> None:
    name = TYPED_FIELD.get(dtype, "int32_data")
    elements = math.prod(shape)
    if dtype.startswith("complex"):
        elements *= 2
    if dtype in PACKED_BITS:
        elements = (elements * PACKED_BITS[dtype] + 7) // 8
    found = len(getattr(tensor, name))
    if found != elements:
        raise UnreadableModel(label, f"{found} entries of {name} for shape {list(shape)}", f"{elements}")


def _typed(tensor: onnx.TensorProto, label: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    from onnx import numpy_helper

    try:
        values: np.ndarray[Any, Any] = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise UnreadableModel(label, reason(error)) from error
    return values.astype(numpy_dtype(dtype), copy=False).reshape(shape)


def _external(tensor: onnx.TensorProto, label: str, folder: Path | None, expected: int) -> tuple[Span, str]:
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    if folder is None:
        raise UnreadableModel(label, f"keeps its data in {show(repr(location))}", advice="give the path of the model instead")
    path, size = resolve_external(folder, location, label)
    try:
        offset = int(entries.get("offset", "0") or "0")
        length = int(entries["length"]) if entries.get("length") else expected
    except ValueError as error:
        raise UnreadableModel(label, f"external data with {show(reason(error))}") from error
    if offset < 0 or length < 0 or offset + length > size:
        found = f"external data from {offset} to {offset + length}, but {show(location)} has {size} bytes"
        raise UnreadableModel(label, found, advice="the data file is truncated or belongs to another model")
    return Span(path, offset, length), f"{location}@{offset}"


def resolve_external(folder: Path, location: str, label: str) -> tuple[Path, int]:
    """The file that `location` names inside `folder`, and its size in bytes.

    Raises `UnreadableModel` unless it is a relative path to a regular file, reached through no link, with a single name:
    a graph from a stranger must not make us read (and report statistics of) any other file of this machine.
    """
    shown = show(repr(location))
    parts = location.split("/")
    if not location or "\0" in location or "\\" in location or os.path.isabs(location) or ".." in parts or ":" in parts[0]:
        raise UnreadableModel(label, f"external data in {shown}", "a relative path inside the model's folder")
    root = Path(os.path.realpath(folder))
    path = Path(os.path.normpath(root / location))
    try:
        if Path(os.path.realpath(path)) != path or not path.is_relative_to(root):
            raise UnreadableModel(label, f"external data in {shown}, a link", "a file of its own", "copy the file it points to")
        found = path.lstat()
    except OSError as error:
        raise UnreadableModel(label, f"external data in {shown}: {reason(error)}") from error
    if not stat.S_ISREG(found.st_mode):
        raise UnreadableModel(label, f"external data in {shown}, which is not a regular file")
    if found.st_nlink > 1:
        raise UnreadableModel(label, f"external data in {shown}, a hard link", "a file of its own", "copy the file")
    return path, found.st_size
