"""The names that a checkpoint may ask for, and how each is read here. Every other name is reported and stays inert.

A name is in this table because calling it builds plain data and nothing else; a handler of None makes an inert record. The
readers follow torch/_utils.py, torch/storage.py and numpy's own __reduce__; none of them calls what it is named after.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from initaudit.load.pickle_machine import NESTED_STREAMS, SET_STATE, Handler, Machine
from initaudit.load.pickle_values import Affine, Call, Dtype, Global, NdArray, Storage, Tensor
from initaudit.load.spans import Span
from initaudit.load.sparse import LAYOUTS

# torch/storage.py, _new_dtypes and the legacy storage classes
STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8",
    "BoolStorage": "bool", "ComplexFloatStorage": "complex64", "ComplexDoubleStorage": "complex128",
    "QInt8Storage": "int8", "QUInt8Storage": "uint8", "QInt32Storage": "int32", "UntypedStorage": "uint8",
}  # fmt: skip
_SAME_NAME = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 uint16 uint32 uint64 bool complex64 complex128 "
    "float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu"
)
TORCH_DTYPES = {name: name for name in _SAME_NAME.split()} | {
    "double": "float64", "float": "float32", "half": "float16", "long": "int64", "int": "int32", "short": "int16",
    "qint8": "int8", "quint8": "uint8", "qint32": "int32",
}  # fmt: skip
# The types of tensors and the dtypes that torch itself takes for safe and that no NumPy type stands for
# (torch/_weights_only_unpickler.py, _get_allowed_globals)
_TENSOR_TYPES = [name.replace("Storage", "Tensor") for name in STORAGE_DTYPES]
_NO_NUMBERS = [
    "complex32", "float4_e2m1fn_x2", "bits8", "bits16", "bits1x8", "bits2x4", "bits4x2", "quint2x4", "quint4x2",
    "QUInt2x4Storage", "QUInt4x2Storage", *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
]  # fmt: skip


def sizes(value: Any) -> tuple[int, ...]:
    """A torch.Size, or a tuple of whole numbers; raises TypeError for anything else."""
    if isinstance(value, Call):  # torch.Size((2, 3))
        value = value.args[0] if value.args else ()
    if not isinstance(value, (tuple, list)) or not all(isinstance(size, int) for size in value):
        raise TypeError("sizes are whole numbers")
    return tuple(value)


def torch_dtype(value: Any) -> str:
    """The dtype that a name such as torch.float32 stands for; raises KeyError for another."""
    if not isinstance(value, Global) or value.module != "torch":
        raise TypeError("not a dtype")
    return TORCH_DTYPES[value.name]


def _storage(value: Any) -> Storage:
    if isinstance(value, Storage):
        return value
    if isinstance(value, Call) and isinstance(value.args, tuple):  # TypedStorage(wrap_storage=..., dtype=...)
        for item in value.args:
            if isinstance(item, Storage):
                return item
    raise TypeError("not a storage")


def _tensor(machine: Machine, args: tuple[Any, ...]) -> Tensor:
    """_rebuild_tensor(storage, offset, size, stride) and _rebuild_tensor_v2(..., requires_grad, hooks, metadata)."""
    storage = _storage(args[0])
    grad = bool(args[4]) if len(args) > 4 else False
    found = Tensor(storage, _whole(args[1]), sizes(args[2]), sizes(args[3]), storage.dtype, requires_grad=grad)
    return _steps(found, args[6] if len(args) > 6 else None)


def _steps(tensor: Tensor, metadata: Any) -> Tensor:
    """What PyTorch sets on the tensor beside its view: {"conj": True, "neg": True}."""
    if isinstance(metadata, dict):
        tensor.conjugate, tensor.negative = bool(metadata.get("conj")), bool(metadata.get("neg"))
    return tensor


def _whole(value: Any) -> int:
    if not isinstance(value, int):
        raise TypeError("an offset is a whole number")
    return value


def _tensor_v3(machine: Machine, args: tuple[Any, ...]) -> Tensor:
    """_rebuild_tensor_v3(untyped storage, offset, size, stride, requires_grad, hooks, dtype, metadata)."""
    storage = _storage(args[0])
    found = Tensor(storage, _whole(args[1]), sizes(args[2]), sizes(args[3]), torch_dtype(args[6]), requires_grad=bool(args[4]))
    return _steps(found, args[7] if len(args) > 7 else None)


def _quantized(machine: Machine, args: tuple[Any, ...]) -> Tensor:
    """_rebuild_qtensor(storage, offset, size, stride, quantizer, requires_grad, hooks)."""
    found = _tensor(machine, (*args[:4], args[5]))
    scheme = args[4]
    if scheme[0].name == "per_tensor_affine":
        found.quantizer = Affine(float(scheme[1]), int(scheme[2]))
    else:
        found.quantizer = Affine(scheme[1], scheme[2], int(scheme[3]))
    return found


def _parameter(machine: Machine, args: tuple[Any, ...]) -> Any:
    """_rebuild_parameter(data, requires_grad, hooks[, state]), and Parameter(data, requires_grad)."""
    data = args[0]
    if isinstance(data, Tensor):
        data.parameter = True
        data.requires_grad = bool(args[1]) if len(args) > 1 else True
    return data


def _from_type(machine: Machine, args: tuple[Any, ...]) -> Any:
    """torch._tensor._rebuild_from_type_v2(function, type, args, state): calls the function it is given.

    A subclass that wraps other tensors keeps them in its state.
    """
    found = machine.call(args[0], args[2])
    if isinstance(found, Call) and len(args) > 3:
        found.state = args[3]
    return found


def _meta_tensor(machine: Machine, args: tuple[Any, ...]) -> Tensor:
    """_rebuild_meta_tensor_no_storage(dtype, size, stride, requires_grad)."""
    size, stride = sizes(args[1]), sizes(args[2])
    storage = Storage(
        "meta", torch_dtype(args[0]), math.prod(size), None, problem="was saved from the meta device: it has no values"
    )
    return Tensor(storage, 0, size, stride, storage.dtype)


def _sparse(machine: Machine, args: tuple[Any, ...]) -> Any:
    """_rebuild_sparse_tensor(layout, (indices, values, size[, coalesced]) or (compressed, plain, values, size))."""
    layout, data = args
    name = layout.name if isinstance(layout, Global) else str(layout.args[0]).removeprefix("torch.")
    count = 2 if name == "sparse_coo" else 3
    parts = tuple(data[:count])
    if name not in LAYOUTS or not all(isinstance(part, Tensor) and part.sparse is None for part in parts):
        raise TypeError("not the parts of a sparse tensor")
    values = parts[-1]
    size = sizes(data[count])
    return Tensor(values.storage, 0, size, (), values.dtype, requires_grad=values.requires_grad, sparse=(name, parts))


def _from_numpy(machine: Machine, args: tuple[Any, ...]) -> Any:
    """_rebuild_device_tensor_from_numpy(data, dtype, device, requires_grad) and its relatives: the data come first."""
    return args[0]


def _nested(machine: Machine, args: tuple[Any, ...]) -> Any:
    """torch.storage._load_from_bytes(b): another stream, which is read as this one is."""
    if machine.nested is None or machine.depth >= NESTED_STREAMS or not isinstance(args[0], bytes):
        return NotImplemented
    return machine.nested(args[0], machine.depth + 1)


def _ordered(machine: Machine, args: tuple[Any, ...]) -> Any:
    return _pairs(args[0]) if args else {}


def _default(machine: Machine, args: tuple[Any, ...]) -> Any:
    return _pairs(args[1]) if len(args) > 1 else {}


def _pairs(value: Any) -> dict[Any, Any]:
    if isinstance(value, dict):
        return value
    return {key: item for key, item in value if isinstance(key, (str, int))}


def _encode(machine: Machine, args: tuple[Any, ...]) -> Any:
    """_codecs.encode(text, "latin1"): how Python 3 writes bytes for protocol 2."""
    if len(args) == 2 and isinstance(args[0], str) and args[1] in ("latin1", "latin-1"):
        return args[0].encode("latin-1")
    return NotImplemented


def _first(machine: Machine, args: tuple[Any, ...]) -> Any:
    return args[0]


def _reconstructor(machine: Machine, args: tuple[Any, ...]) -> Any:
    """copyreg._reconstructor(class, base, state): how protocols 0 and 1 build an object."""
    return machine.call(args[0], (), "builds")


def _dtype(machine: Machine, args: tuple[Any, ...]) -> Dtype:
    code = args[0]
    if not isinstance(code, str) or len(code) > 16:
        raise TypeError("a dtype is a short code")
    return Dtype(code.lstrip("<>=|"), code.startswith(">"))


def _array(machine: Machine, args: tuple[Any, ...]) -> NdArray:
    return NdArray()


def _from_buffer(machine: Machine, args: tuple[Any, ...]) -> Any:
    """numpy._core.numeric._frombuffer(buffer, dtype, shape, order)."""
    if not isinstance(args[0], bytes) or not isinstance(args[1], Dtype):
        return NotImplemented
    return NdArray(sizes(args[2]), args[1], args[3] == "F", Span.of_bytes(Path("."), args[0]))


def _scalar(machine: Machine, args: tuple[Any, ...]) -> Any:
    if isinstance(args[0], Dtype) and len(args) > 1 and isinstance(args[1], bytes):
        return NdArray((), args[0], False, Span.of_bytes(Path("."), args[1]))
    return None


def _set_numpy_state(machine: Machine, args: tuple[Any, ...]) -> None:
    """BUILD on a dtype: (3, "<", ...). On an array: (version, shape, dtype, is_fortran, bytes)."""
    target, state = args
    if isinstance(target, Dtype):
        target.big_endian = state[1] == ">"
        return
    if not isinstance(state[-3], Dtype):
        raise TypeError("an array without a dtype")
    target.shape, target.dtype, target.fortran = sizes(state[-4]), state[-3], bool(state[-2])
    raw = state[-1]
    if isinstance(raw, list):
        target.objects = raw
    if isinstance(raw, str):  # written by Python 2
        raw = raw.encode("latin-1")
    if isinstance(raw, bytes):
        target.raw = Span.of_bytes(Path("."), raw)


def _known() -> dict[tuple[str, str], Handler | None]:
    known: dict[tuple[str, str], Handler | None] = {
        (SET_STATE.module, SET_STATE.name): _set_numpy_state,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_v3,
        ("torch._utils", "_rebuild_qtensor"): _quantized,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._utils", "_rebuild_meta_tensor_no_storage"): _meta_tensor,
        ("torch._utils", "_rebuild_device_tensor_from_numpy"): _from_numpy,
        ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): _from_numpy,
        ("torch._utils", "_rebuild_xla_tensor"): _from_numpy,
        ("torch._utils", "_rebuild_nested_tensor"): _first,
        ("torch._utils", "_rebuild_wrapper_subclass"): None,
        ("torch._utils", "_rebuild_sparse_tensor"): _sparse,
        ("torch._utils", "_rebuild_sparse_csr_tensor"): _sparse,
        ("torch._tensor", "_rebuild_from_type_v2"): _from_type,
        ("torch._tensor", "_rebuild_from_type"): _from_type,
        ("torch.nn.parameter", "Parameter"): _parameter,
        ("torch.nn.parameter", "Buffer"): _first,
        ("torch.storage", "_load_from_bytes"): _nested,
        ("collections", "OrderedDict"): _ordered,
        ("collections", "defaultdict"): _default,
        ("_codecs", "encode"): _encode,
        ("copyreg", "_reconstructor"): _reconstructor,
        ("copy_reg", "_reconstructor"): _reconstructor,
        ("numpy", "dtype"): _dtype,
        ("joblib.numpy_pickle", "NumpyArrayWrapper"): None,
    }
    for package in ("numpy.core", "numpy._core"):
        known[f"{package}.multiarray", "_reconstruct"] = _array
        known[f"{package}.multiarray", "scalar"] = _scalar
        known[f"{package}.numeric", "_frombuffer"] = _from_buffer
    for name in ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist", "restore_type_tag"):
        known["torch.jit._pickle", name] = _first
    inert = {
        "torch": [*STORAGE_DTYPES, *TORCH_DTYPES, *_TENSOR_TYPES, *_NO_NUMBERS,
                  "Size", "device", "Tensor", "strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc",
                  "per_tensor_affine", "per_channel_affine", "per_tensor_symmetric", "per_channel_symmetric",
                  "per_channel_affine_float_qparams", "preserve_format",
                  "contiguous_format", "channels_last", "channels_last_3d"],
        "torch.storage": ["UntypedStorage", "TypedStorage"],
        "torch.cuda": [*STORAGE_DTYPES, *_TENSOR_TYPES],
        "torch.sparse": _TENSOR_TYPES,
        "torch.cuda.sparse": _TENSOR_TYPES,
        "torch.serialization": ["_get_layout"],
        "numpy": ["ndarray"],
        "builtins": ["set", "frozenset", "bytearray", "complex", "slice", "range", "list", "dict", "tuple", "int", "float",
                     "bool", "str", "bytes", "object"],
        "__builtin__": ["set", "frozenset", "bytearray", "complex", "slice", "xrange", "list", "dict", "tuple", "int", "long",
                        "float", "bool", "str", "unicode", "object"],
        "argparse": ["Namespace"],
        "collections": ["deque", "Counter"],
        "datetime": ["datetime", "date", "time", "timedelta", "timezone"],
        "decimal": ["Decimal"],
        "fractions": ["Fraction"],
        "pathlib": ["PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path", "PurePath"],
        "pathlib._local": ["PosixPath", "WindowsPath"],
        "uuid": ["UUID"],
    }  # fmt: skip
    for module, names in inert.items():
        for name in names:
            known.setdefault((module, name), None)
    return known


KNOWN = _known()
