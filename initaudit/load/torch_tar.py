"""The tar archives of PyTorch before 0.1.10: members `storages`, `tensors` and `pickle`, each a row of pickles and raw data."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint, numpy_dtype
from initaudit.load.hidden import is_tar, look_into, nested, tar_members
from initaudit.load.pickle_globals import KNOWN, STORAGE_DTYPES
from initaudit.load.pickle_machine import Machine
from initaudit.load.pickle_reader import BrokenPickle, read, read_or_remains
from initaudit.load.pickle_values import Global, Opaque, Recorder, Storage, Tensor
from initaudit.load.spans import Span, reason, show
from initaudit.load.state_dict import checkpoint_of

FORMAT = "torch_tar"
MAX_TENSORS = 1_000_000
MAX_AXES = 64


def recognise(path: Path, head: bytes) -> bool:
    """True for a tar archive with the three members."""
    if not is_tar(head):
        return False
    try:
        return {"storages", "tensors", "pickle"} <= {_plain(name) for name, _ in tar_members(Span.of_file(path))}
    except UnreadableModel:
        return False


def _plain(name: str) -> str:
    return name.removeprefix("./").rstrip("/")


def load(path: Path) -> Checkpoint:
    """Reads the archive at `path`; raises `UnreadableModel` where it is broken.

    Where a name stands twice, the last is what tarfile hands out; every other member is looked into as well.
    """
    where = show(path, 200)
    members = tar_members(Span.of_file(path))
    parts = {_plain(name): span for name, span in members} | dict(members)
    recorder = Recorder()
    tensors: dict[str, Tensor] = {}
    try:
        tensors = _tensors(parts["tensors"], _storages(parts["storages"], recorder), recorder)
    except (BrokenPickle, struct.error, KeyError, TypeError, ValueError, UnreadableModel) as error:
        recorder.broken.append(f"{where}: the archive breaks off: {reason(error)}")

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple):
            return pid[0] if pid else None  # a container: (class, source, file)
        return tensors.get(str(pid), Opaque("a tensor that is not in the archive"))

    machine = Machine(parts["pickle"].read(), KNOWN, recorder, persistent, nested(recorder))
    root = read_or_remains(machine, f"{where}: the object")
    for name, span in members:
        if span != parts["pickle"]:
            look_into(span, f"{where}: {show(name)}", recorder, 1)
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
