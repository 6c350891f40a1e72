"""GGUF (llama.cpp), through the `gguf` package where that is installed. Quantised blocks are read as floats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem, numpy_dtype
from initaudit.load.spans import byte_count, reason, show

FORMAT = "gguf"
# gguf/constants.py, GGMLQuantizationType: what is stored as plain numbers
PLAIN = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


def recognise(path: Path, head: bytes) -> bool:
    """True for the magic of GGUF."""
    return head.startswith(b"GGUF")


def load(path: Path) -> Checkpoint:
    """Reads the tensors at `path`; raises `UnreadableModel` where the package is missing or the file is broken."""
    where = show(path, 200)
    try:
        import gguf
    except ImportError as error:
        raise UnreadableModel(where, "a GGUF file, which needs the gguf package", advice="pip install gguf") from error
    try:
        reader = gguf.GGUFReader(str(path))
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, UnicodeError) as error:
        raise UnreadableModel(where, f"a broken GGUF file ({reason(error)})", advice="copy or download it again") from error
    arrays: dict[str, Array] = {}
    problems: list[Problem] = []
    for tensor in reader.tensors:
        name = str(tensor.name)
        try:
            arrays[name] = _array(tensor, name, f"{where}: {show(name)}", gguf.quants.dequantize)
        except UnreadableModel as error:
            problems.append(Problem("IA001", name, str(error)))
    return Checkpoint(str(path), FORMAT, arrays, problems=tuple(problems), metadata={"keys": sorted(map(str, reader.fields))})


def _array(tensor: Any, name: str, label: str, dequantize: Callable[..., Any]) -> Array:
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))  # GGUF counts axes from the fastest
    kind, data = tensor.tensor_type.name, tensor.data
    try:
        byte_count("float32", shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if kind in PLAIN:
        dtype = PLAIN[kind]
        if data.nbytes != byte_count(dtype, shape):
            raise UnreadableModel(label, f"{data.nbytes} bytes for {dtype} of shape {list(shape)}")
        return Array(name, shape, dtype, lambda: data.view(numpy_dtype(dtype)).reshape(shape), trainable=kind[0] != "I")

    def floats() -> np.ndarray[Any, Any]:
        try:
            return np.asarray(dequantize(data, tensor.tensor_type), np.float32).reshape(shape)
        except (ValueError, NotImplementedError, KeyError) as error:
            raise UnreadableModel(label, f"its {kind} blocks cannot be read ({reason(error)})") from error

    return Array(name, shape, "float32", floats, quantized=kind.lower(), trainable=False)
