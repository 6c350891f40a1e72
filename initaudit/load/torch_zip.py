"""PyTorch's zip format (torch.save since 1.6): one pickle of names, one stored member for each storage.

The pickle is read by `pickle_reader`, never unpickled; storages are memory-mapped where they stand in the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint, numpy_dtype
from initaudit.load.pickle_globals import KNOWN, STORAGE_DTYPES, torch_dtype
from initaudit.load.pickle_machine import KnownGlobals, Machine
from initaudit.load.pickle_reader import BrokenPickle, read
from initaudit.load.pickle_values import Global, Opaque, Recorder, Storage, describe
from initaudit.load.spans import Span, reason, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.torch_stream import nested
from initaudit.load.zip_entries import STORED, Entry, is_zip, member_names, read_entries

FORMAT = "torch_zip"
MAX_PICKLE = 256 << 20  # bytes of a pickle; tensors are no part of it
MAIN = ("data.pkl", "constants.pkl")  # what torch.load and torch.jit.load open
Entries = dict[str, list[Entry]]


def recognise(path: Path, head: bytes) -> bool:
    """True for an archive with a data.pkl that is no TorchScript."""
    return bool(main_pickles(path, head)) and not is_torchscript(path)


def main_pickles(path: Path, head: bytes) -> list[str]:
    """The members of an archive that are called data.pkl; none for anything that is no archive.

    A broken archive is claimed as if it had one, so that `load` says what is wrong with it.
    """
    if not is_zip(head):
        return []
    names = member_names(path)
    return ["data.pkl"] if names is None else [name for name in names if name.rpartition("/")[2] == "data.pkl"]


def is_torchscript(path: Path) -> bool:
    """True where constants.pkl stands beside data.pkl: torch.jit.save writes both."""
    return any(name.rpartition("/")[2] == "constants.pkl" for name in member_names(path) or ())


def load(path: Path) -> Checkpoint:
    """Reads the archive at `path`; raises `UnreadableModel` where it is broken, hostile, or holds no tensor."""
    where = show(path, 200)
    entries = read_entries(Span.of_file(path))
    recorder = Recorder()
    root = _roots(entries, where, recorder)
    notes = (*hidden_notes(entries), *read_hidden(entries, where, recorder))
    return checkpoint_of(root, str(path), FORMAT, where, recorder, notes=notes)


def read_archive(span: Span, where: str, recorder: Recorder) -> Any:
    """The value of a torch.save archive that stands inside another file."""
    return _roots(read_entries(span), where, recorder)


def _roots(entries: Entries, where: str, recorder: Recorder) -> Any:
    roots = [read_pickle(entries, name, where, recorder) for name in entries if name.rpartition("/")[2] == "data.pkl"]
    return roots[0] if len(roots) == 1 else roots


def hidden_notes(entries: Entries) -> tuple[str, ...]:
    """What is odd about the members: names that repeat or differ, bits that mislead other readers."""
    notes = [f"{show(name)} stands {len(found)} times in the archive" for name, found in entries.items() if len(found) > 1]
    notes += [f"{show(name)} {remark}" for name, found in entries.items() for entry in found for remark in entry.remarks]
    return tuple(notes[:20])


def read_hidden(entries: Entries, where: str, recorder: Recorder) -> list[str]:
    """Reads every other member that is a pickle for what it would run; a loader may be told to open it."""
    notes = []
    for name, found in entries.items():
        if name.rpartition("/")[2] in MAIN or not found:
            continue
        for entry in found:
            front = entry.front if entry.method == STORED else b""
            if name.endswith((".pkl", ".pickle")) or (front[:1] == b"\x80" and front[1:2] in (b"\2", b"\3", b"\4", b"\5")):
                _read_one(entries, name, entry, where, recorder)
                notes.append(f"{show(name)} is a pickle beside the main one")
    return notes


def read_pickle(
    entries: Entries, name: str, where: str, recorder: Recorder, known: KnownGlobals = KNOWN, folder: str = "data"
) -> Any:
    """The value of the pickle member `name`; its storages stand in `folder` beside it.

    Where the name stands twice, both are read: which one a loader takes is its own affair.
    """
    values = [_read_one(entries, name, entry, where, recorder, known, folder) for entry in entries[name]]
    return values[0] if len(values) == 1 else values


def _read_one(
    entries: Entries, name: str, entry: Entry, where: str, recorder: Recorder, known: KnownGlobals = KNOWN, folder: str = "data"
) -> Any:
    if entry.size > MAX_PICKLE:
        raise UnreadableModel(where, f"{show(name)} has {entry.size} bytes", f"at most {MAX_PICKLE}")
    root = name.rpartition("/")[0]
    storages = ZipStorages(entries, root, folder)
    machine = Machine(entry.data().read(), known, recorder, storages, nested(recorder))
    try:
        return read(machine)
    except BrokenPickle as error:
        recorder.broken.append(f"{where}: {show(name)} breaks off: {reason(error)}")
        return machine.remains()


class ZipStorages:
    """Persistent ids of one archive: ("storage", class, key, location, elements) -> the storage, one for each key."""

    def __init__(self, entries: Entries, root: str, folder: str) -> None:
        self.entries, self.folder = entries, f"{root}/{folder}" if root else folder
        self.found: dict[tuple[str, str], Storage] = {}
        order = entries.get(f"{root}/byteorder" if root else "byteorder")
        self.big_endian = order is not None and bool(order) and order[0].data().read()[:8] == b"big"

    def __call__(self, pid: Any) -> Any:
        """The storage that a persistent id names; an inert record for an id of another make."""
        made = storage_id(pid)
        if made is None:
            return Opaque(f"persistent id {describe(pid)}")
        key, dtype, elements = made
        if (key, dtype) not in self.found:
            self.found[key, dtype] = self._storage(key, dtype, elements)
        return self.found[key, dtype]

    def _storage(self, key: str, dtype: str, elements: int) -> Storage:
        name = f"{self.folder}/{key}"
        members = self.entries.get(name)
        if not members:
            problem = f"the storage {show(name)} is missing from the archive"
            return Storage(key, dtype, elements, None, problem=problem)
        identity = f"{members[0].span.path.name}@{members[0].span.offset}"
        try:
            return Storage(f"{self.folder}/{key}", dtype, elements, members[0].data(), self.big_endian, identity=identity)
        except UnreadableModel as error:
            return Storage(key, dtype, elements, None, problem=str(error))


def storage_id(pid: Any) -> tuple[str, str, int] | None:
    """(key, dtype, elements) of a persistent id as torch.save writes it; None for any other."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
        return None
    kind, key, elements = pid[1], pid[2], pid[4]
    if not isinstance(kind, Global) or not isinstance(key, (str, int)) or type(elements) is not int or elements < 0:
        return None
    dtype = STORAGE_DTYPES.get(kind.name)
    if dtype is None:
        try:
            dtype = torch_dtype(kind)
        except (KeyError, TypeError):
            return None
    numpy_dtype(dtype)
    return str(key), dtype, elements
