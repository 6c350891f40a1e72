"""The tar archives of PyTorch before 0.1.10: members `storages`, `tensors` and `pickle`, each a row of pickles and raw data."""

from __future__ import annotations

import struct
import tarfile
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint, numpy_dtype
from initaudit.load.pickle_globals import KNOWN, STORAGE_DTYPES
from initaudit.load.pickle_machine import Machine
from initaudit.load.pickle_reader import BrokenPickle, read
from initaudit.load.pickle_values import Global, Opaque, Recorder, Storage, Tensor
from initaudit.load.spans import Span, reason, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.torch_stream import nested

FORMAT = "torch_tar"
MAX_TENSORS = 1_000_000
MAX_AXES = 64


def recognise(path: Path, head: bytes) -> bool:
    """True for a tar archive with the three members."""
    if head[257:262] != b"ustar":
        return False
    try:
        return {"storages", "tensors", "pickle"} <= members(path).keys()
    except UnreadableModel:
        return False


def members(path: Path) -> dict[str, Span]:
    """The regular members of a tar archive where they stand in the file; raises `UnreadableModel` for a broken one."""
    whole = Span.of_file(path)
    try:
        with tarfile.open(path, "r:") as archive:
            found = [(info.name.removeprefix("./"), info.offset_data, info.size) for info in archive if info.isreg()]
    except (tarfile.TarError, OSError, ValueError, EOFError) as error:
        raise UnreadableModel(show(path, 200), f"a broken tar archive ({reason(error)})") from error
    return {name: whole.part(offset, size) for name, offset, size in found}


def load(path: Path) -> Checkpoint:
    """Reads the archive at `path`; raises `UnreadableModel` where it is broken."""
    where = show(path, 200)
    parts = members(path)
    recorder = Recorder()
    root: Any = None
    try:
        storages = _storages(parts["storages"], recorder)
        tensors = _tensors(parts["tensors"], storages, recorder)

        def persistent(pid: Any) -> Any:
            if isinstance(pid, tuple):
                return pid[0] if pid else None  # a container: (class, source, file)
            return tensors.get(str(pid), Opaque("a tensor that is not in the archive"))

        root = read(Machine(parts["pickle"].read(), KNOWN, recorder, persistent, nested(recorder)))
    except (BrokenPickle, struct.error, KeyError, TypeError, ValueError) as error:
        recorder.broken.append(f"{where}: the archive breaks off: {reason(error)}")
    return checkpoint_of(root, str(path), FORMAT, where, recorder)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_TENSORS:
        raise ValueError("an impossible number of tensors")
    return value


def _next(machine: Machine) -> Any:
    machine.stack, machine.memo = [], {}
    return read(machine)


def _storages(span: Span, recorder: Recorder) -> dict[str, Storage]:
    """torch/serialization.py, legacy_load: a number, then (key, location, class), a length and the elements of each."""
    machine = Machine(span.read(), KNOWN, recorder)
    found: dict[str, Storage] = {}
    for _ in range(_count(_next(machine))):
        key, _, kind = _next(machine)
        dtype = STORAGE_DTYPES[kind.name] if isinstance(kind, Global) else ""
        elements = int.from_bytes(machine.take(8), "little")
        length = elements * numpy_dtype(dtype).itemsize
        found[str(key)] = Storage(str(key), dtype, elements, span.part(machine.place, length))
        machine.take(length)
    for target, root, offset, size in _next(machine):  # views of another storage
        owner = found[str(root)]
        item = numpy_dtype(owner.dtype).itemsize
        part = owner.span.part(offset * item, size * item) if owner.span is not None else None
        found[str(target)] = Storage(f"{root}@{offset}", owner.dtype, size, part)
    return found


def _tensors(span: Span, storages: dict[str, Storage], recorder: Recorder) -> dict[str, Tensor]:
    machine = Machine(span.read(), KNOWN, recorder)
    found: dict[str, Tensor] = {}
    for _ in range(_count(_next(machine))):
        key, storage_key, _ = _next(machine)
        axes = int.from_bytes(machine.take(4), "little")
        machine.take(4)
        if axes > MAX_AXES:
            raise ValueError(f"a tensor of {axes} axes")
        numbers = struct.unpack(f"<{2 * axes + 1}q", machine.take(8 * (2 * axes + 1)))
        storage = storages[str(storage_key)]
        found[str(key)] = Tensor(storage, numbers[-1], numbers[:axes], numbers[axes:-1], storage.dtype)
    return found
