"""PyTorch's older stream (torch.save before 1.6, and what `pickle.dump` makes of a tensor): pickles one after the other.

magic number, protocol version, system information, the object, the keys of its storages, then each storage:
its number of elements (8 bytes) and its elements
"""

from __future__ import annotations

from dataclasses import dataclass, field
from mmap import mmap
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import numpy_dtype
from initaudit.load.hidden import nested
from initaudit.load.pickle_globals import KNOWN, STORAGE_DTYPES
from initaudit.load.pickle_machine import Machine
from initaudit.load.pickle_reader import read_or_remains
from initaudit.load.pickle_values import Global, Opaque, Recorder, Storage, describe
from initaudit.load.spans import Span, show

MAGIC = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
MAGIC_PICKLE = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # as it stands behind the PROTO opcode

# The third tells the writer's byte order; storages are little-endian all the same (torch/csrc/serialization.cpp).
PARTS = ("magic number", "version", "system information", "object", "list of storages")


def is_stream(head: bytes) -> bool:
    """True for the magic number that opens a stream."""
    return MAGIC_PICKLE in head[:24]


@dataclass
class StreamStorages:
    """Persistent ids of one stream; the storages get their bytes once the object has been read."""

    found: dict[str, Storage] = field(default_factory=dict)
    views: list[tuple[Storage, str, int]] = field(default_factory=list)

    def __call__(self, pid: Any) -> Any:
        """The storage of ("storage", class, key, location, elements[, (view key, offset, view elements)])."""
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            return pid[1]  # ("module", class, source file, source): the class, with its code for a comparison
        if (
            not isinstance(pid, tuple)
            or len(pid) < 5
            or pid[0] not in ("storage", b"storage")
            or not isinstance(pid[1], Global)
        ):
            return Opaque(f"persistent id {describe(pid)}")
        dtype, key, elements = STORAGE_DTYPES.get(pid[1].name), str(pid[2]), pid[4]
        if dtype is None or type(elements) is not int or elements < 0:
            return Opaque(f"persistent id {describe(pid)}")
        storage = self.found.setdefault(
            key, Storage(key, dtype, elements, None, problem="its storage is missing from the stream")
        )
        view = pid[5] if len(pid) > 5 else None
        if isinstance(view, tuple) and len(view) == 3 and all(type(part) is int for part in view[1:]):
            part = Storage(f"{key}@{view[1]}", dtype, view[2], None, problem=storage.problem)
            self.views.append((part, key, view[1]))
            return part
        return storage

    def attach(self, whole: Span, place: int, keys: Any) -> str:
        """Gives each storage its bytes from `place` on, in the order of `keys`; says what is wrong, or nothing."""
        wrong = ""
        for key in keys if isinstance(keys, list) else []:
            storage = self.found.get(str(key))
            if storage is None:
                return f"the stream lists the storage {show(key)}, which nothing uses"
            try:
                elements = int.from_bytes(whole.part(place, 8).read(), "little")
                if elements != storage.elements:
                    return f"the storage {show(key)} has {elements} elements where {storage.elements} were announced"
                length = elements * numpy_dtype(storage.dtype).itemsize
                storage.span = whole.part(place + 8, length)
                storage.identity = f"{whole.path.name}@{place + 8}" if whole.data is None else key
                place += 8 + length
            except UnreadableModel as error:
                storage.problem = wrong = str(error)
        for part, key, offset in self.views:
            owner, item = self.found[key], numpy_dtype(part.dtype).itemsize
            if owner.span is not None and 0 <= offset * item <= owner.span.length - part.elements * item:
                part.span = owner.span.part(offset * item, part.elements * item)
        return wrong


def read_stream(whole: Span, data: bytes | mmap, recorder: Recorder, depth: int = 0) -> Any:
    """The object of a stream whose bytes up to the storages are `data`; what is broken goes to `recorder`."""
    storages = StreamStorages()
    where = show(whole.path, 200)
    machine = Machine(data, KNOWN, recorder, storages, nested(recorder), depth=depth)
    values: list[Any] = []
    for part in PARTS:
        machine.stack, machine.memo = [], {}
        values.append(read_or_remains(machine, f"{where}: the {part} of the stream"))
        if machine.broke:
            return values[3] if len(values) > 3 else values
    if values[0] != MAGIC:
        recorder.broken.append(f"{where}: no magic number of PyTorch at the start of the stream")
    value, keys = values[3:]
    wrong = storages.attach(whole, machine.place, keys)
    if wrong:
        recorder.broken.append(f"{where}: {wrong}")
    return value
