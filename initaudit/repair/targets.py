"""Where repaired weights are kept: a copy of the file whose bytes are replaced, an ONNX model, or a module's state dict."""

from __future__ import annotations

import dataclasses
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from initaudit.errors import InitauditError, UsageError
from initaudit.load import from_module, load
from initaudit.load.checkpoint import Array, Checkpoint
from initaudit.load.spans import Span, mapped
from initaudit.load.zip_entries import STORED, is_zip, read_entries

Values = np.ndarray[Any, Any]
STATE_DICTS = (".pt", ".pth", ".bin", ".ckpt")
_MOST = (1 << 31) - 1  # bytes of one protobuf message


class Target(Protocol):
    """A model whose weights can be replaced; the file that it becomes is `file`, and nobody else's yet."""

    def open(self) -> Checkpoint:
        """The model as it is now."""

    def writable(self, name: str, array: Array) -> bool:
        """Whether this tensor can be replaced."""

    def put(self, checkpoint: Checkpoint, values: Mapping[str, Values]) -> None:
        """Replaces tensors of the checkpoint that `open` gave."""

    def finish(self) -> None:
        """Makes the file whole; called once, at the end."""


class CopiedFile:
    """A file whose tensors are memory-mapped: a copy of it, in which only the bytes of those tensors change.

    Whatever else the file holds (metadata, an optimizer's state, the nesting of a checkpoint) stays as it is.
    """

    def __init__(self, source: Path, file: Path) -> None:
        self.file = file
        shutil.copyfile(source, file)

    def open(self) -> Checkpoint:
        """The copy, read as any file is."""
        return load(self.file)

    def writable(self, name: str, array: Array) -> bool:
        """Floating-point numbers that stand in the file as they are."""
        if array.quantized or "float" not in array.dtype:
            return False
        try:
            with mapped():
                return self._place(array.read()) is not None
        except InitauditError:
            return False

    def put(self, checkpoint: Checkpoint, values: Mapping[str, Values]) -> None:
        """Writes the numbers over those that the file has, in its dtype and layout."""
        for name, new in values.items():
            with mapped():
                old = checkpoint.arrays[name].read()
            place = self._place(old)
            if place is None:
                raise UsageError(name, "does not stand in the file as it is", "a tensor that can be replaced")
            span = sum((size - 1) * step for size, step in zip(old.shape, old.strides, strict=True)) + old.itemsize
            raw = np.memmap(self.file, dtype=np.uint8, mode="r+", offset=place, shape=(span,))
            view: Values = np.ndarray(old.shape, old.dtype, buffer=raw, strides=old.strides)
            view[...] = new.astype(old.dtype)
            raw.flush()

    def _place(self, values: Values) -> int | None:
        """Where in the file the first element stands; None for what was computed from the bytes."""
        whole: Any = values
        # Between a view with strides of its own and the map stands an object that is no array.
        while getattr(whole, "base", None) is not None and not isinstance(whole.base, mmap.mmap):
            whole = whole.base
        if not isinstance(whole, np.memmap) or whole.filename is None or not os.path.samefile(whole.filename, self.file):
            return None
        return int(whole.offset) + _address(values) - _address(whole)

    def finish(self) -> None:
        """An archive keeps a checksum of each member; numpy, torch and zipfile compare it."""
        with self.file.open("rb") as stream:
            archive = is_zip(stream.read(4))
        if archive:
            _correct_checksums(self.file)


def _address(values: Values) -> int:
    return int(values.__array_interface__["data"][0])


def _correct_checksums(file: Path) -> None:
    """Renews the CRC-32 of stored members: PKWARE APPNOTE 4.3.7 (local header), 4.3.9 (data descriptor), 4.3.12 (directory)."""
    entries = [entry for found in read_entries(Span.of_file(file)).values() for entry in found if entry.method == STORED]
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), 0) as data:
        for entry in entries:
            begin, end = entry.span.offset, entry.span.offset + entry.span.length
            with memoryview(data) as whole, whole[begin:end] as content:
                crc = zlib.crc32(content)
            if crc != entry.crc:
                for place in _checksum_places(data, begin, end, entry.name.encode(), struct.pack("<I", entry.crc)):
                    data[place : place + 4] = struct.pack("<I", crc)


def _checksum_places(data: mmap.mmap, begin: int, end: int, name: bytes, old: bytes) -> Iterator[int]:
    """Where the checksum of the member whose bytes are `begin` to `end` stands."""
    local = data.rfind(b"PK\x03\x04", 0, begin)
    if data[local + 14 : local + 18] == old:
        yield local + 14
    if data[end : end + 8] == b"PK\x07\x08" + old:
        yield end + 4
    record = data.rfind(b"PK\x01\x02")
    while record >= 0:
        size = int.from_bytes(data[record + 28 : record + 30], "little")
        if data[record + 16 : record + 20] == old and data[record + 46 : record + 46 + size] == name:
            yield record + 16
            return
        record = data.rfind(b"PK\x01\x02", 0, record)


class OnnxFile:
    """An ONNX model in one file; weights that were kept beside it move into it."""

    def __init__(self, source: Path, file: Path) -> None:
        import onnx

        self.file = file
        self.model = onnx.load(str(source), load_external_data=False)
        found = load(source)
        outside = [t for t in self.model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
        if sum(found.arrays[t.name].read().nbytes for t in outside if t.name in found.arrays) > _MOST:
            raise UsageError(str(source), "more than 2 GiB of weights beside the graph", "a model that fits into one ONNX file")
        for tensor in outside:
            self._set(tensor, found.arrays[tensor.name].read())
        self._write()

    def open(self) -> Checkpoint:
        """The file, read as any file is."""
        return load(self.file)

    def writable(self, name: str, array: Array) -> bool:
        """An initializer, or the tensor of a Constant node, of floating-point numbers."""
        held = self._held(name)
        return held is not None and not array.quantized and "float" in array.dtype and tuple(held.dims) == array.shape

    def put(self, checkpoint: Checkpoint, values: Mapping[str, Values]) -> None:
        """Replaces them in the model, every copy of what is one weight, and writes it."""
        for name, new in values.items():
            array = checkpoint.arrays[name]
            copies = [a.name for a in checkpoint.arrays.values() if array.storage and a.storage == array.storage]
            for tensor in map(self._held, {name: None, **dict.fromkeys(copies)}):
                if tensor is not None and tuple(tensor.dims) == array.shape:
                    self._set(tensor, new.astype(array.read().dtype))
        self._write()

    def finish(self) -> None:
        """It is whole after each `put`."""

    def _held(self, name: str) -> Any:
        found = [tensor for tensor in self.model.graph.initializer if tensor.name == name]
        for node in self.model.graph.node:
            if node.op_type == "Constant" and name in node.output:
                found += [attribute.t for attribute in node.attribute if attribute.name == "value"]
        return found[0] if len(found) == 1 else None

    @staticmethod
    def _set(tensor: Any, values: Values) -> None:
        for field in ("float_data", "int32_data", "double_data", "int64_data", "uint64_data", "external_data", "data_location"):
            tensor.ClearField(field)
        tensor.raw_data = np.ascontiguousarray(values).tobytes()

    def _write(self) -> None:
        self.file.write_bytes(self.model.SerializeToString())


class StateDict:
    """A module that the user's own code builds; what is kept of it is its state dict."""

    def __init__(self, spec: str, module: Any, file: Path, suffix: str) -> None:
        from initaudit.load.unwrap import unwrap

        self.spec, self.module, self.file, self.suffix = spec, module, file, suffix
        inner, _ = unwrap(module)
        self.tensors: dict[str, torch.Tensor] = {
            **dict(inner.named_buffers(remove_duplicate=False)),
            **dict(inner.named_parameters(remove_duplicate=False)),
        }

    def open(self) -> Checkpoint:
        """The module as it is now."""
        return dataclasses.replace(from_module(self.module), source=self.spec)

    def writable(self, name: str, array: Array) -> bool:
        """Every floating-point parameter and buffer."""
        return name in self.tensors and not array.quantized and self.tensors[name].is_floating_point()

    def put(self, checkpoint: Checkpoint, values: Mapping[str, Values]) -> None:
        """Writes the numbers into the module's own parameters."""
        for name, new in values.items():
            with torch.no_grad():
                self.tensors[name].copy_(torch.from_numpy(new))

    def finish(self) -> None:
        """Saves the state dict."""
        if self.suffix == ".safetensors":
            from safetensors.torch import save_model

            save_model(self.module, str(self.file))
        else:
            torch.save(self.module.state_dict(), self.file)
