"""PyTorch's zip format (torch.save since 1.6): one pickle of names, one stored member for each storage.

The pickle is read by `pickle_reader`, never unpickled; storages are memory-mapped where they stand in the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint, numpy_dtype
from initaudit.load.hidden import look_into_member, looks_like_pickle, nested, pickles
from initaudit.load.pickle_globals import KNOWN, STORAGE_DTYPES, torch_dtype
from initaudit.load.pickle_machine import KnownGlobals, Machine
from initaudit.load.pickle_reader import read_or_remains
from initaudit.load.pickle_values import Global, Opaque, Recorder, Storage, describe
from initaudit.load.spans import Span, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.zip_entries import Entry, is_zip, member_names, read_entries

FORMAT = "torch_zip"
MAX_PICKLE = 256 << 20  # bytes of a pickle; tensors are no part of it
MAIN = ("data.pkl", "constants.pkl")  # what torch.load and torch.jit.load open
_EXAMPLES = re.compile(
    r"/(data/sample_inputs/[^/]+\.pt|traced_inputs\.pkl|bytecode\.pkl|[^/]+\.debug_pkl)$"
)  # what PyTorch itself puts there
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
    return ["data.pkl"] if names is None else [name for name in names if is_main(name)]


def is_main(name: str, main: str = "data.pkl") -> bool:
    """Whether a member is called so in any folder; PyTorch's reader does not tell capitals from small letters."""
    return name.rpartition("/")[2].lower() == main


def is_torchscript(path: Path) -> bool:
    """True where constants.pkl stands beside data.pkl, in one folder: torch.jit.save writes both."""
    names = member_names(path) or ()
    return any(is_main(name, "constants.pkl") and _has_data(name.rpartition("/")[0], names) for name in names)


def _has_data(folder: str, names: tuple[str, ...]) -> bool:
    return any(is_main(name) and name.rpartition("/")[0].lower() == folder.lower() for name in names)


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
    roots = [read_pickle(entries, name, where, recorder) for name in entries if is_main(name)]
    return roots[0] if len(roots) == 1 else roots


def hidden_notes(entries: Entries) -> tuple[str, ...]:
    """What is odd about the members: names that repeat or differ, bits that mislead other readers."""
    notes = [f"{show(name)} stands {len(found)} times in the archive" for name, found in entries.items() if len(found) > 1]
    notes += [f"{show(name)} {remark}" for name, found in entries.items() for entry in found for remark in entry.remarks]
    return tuple(notes[:20])


def read_hidden(entries: Entries, where: str, recorder: Recorder) -> list[str]:
    """Reads what every other member holds for what it would run; a loader may be told to open it."""
    notes = []
    for name, found in entries.items():
        if any(is_main(name, main) for main in MAIN):
            continue
        for entry in found:
            try:
                if look_into_member(entry, f"{where}: {show(name)}", recorder, 1) and _EXAMPLES.search(name) is None:
                    notes.append(f"{show(name)} is a pickle beside the main one")
            except UnreadableModel as error:
                if not entry.name.rpartition("/")[2].isdigit():  # a storage says so itself
                    recorder.broken.append(str(error))
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
    storages = ZipStorages(entries, root, folder, recorder)
    data = entry.data().read()
    machine = Machine(data, known, recorder, storages, nested(recorder))
    value = read_or_remains(machine, f"{where}: {show(name)}")
    if not machine.broke and looks_like_pickle(data[machine.place :]):
        pickles(data, f"{where}: {show(name)}", recorder, place=machine.place)
    return value


class ZipStorages:
    """Persistent ids of one archive: ("storage", class, key, location, elements) -> the storage, one for each key."""

    def __init__(self, entries: Entries, root: str, folder: str, recorder: Recorder) -> None:
        self.entries, self.folder, self.recorder = entries, f"{root}/{folder}" if root else folder, recorder
        self.found: dict[tuple[str, str], Storage] = {}
        self.lowered = {name.lower(): found for name, found in entries.items()}
        order = self._members(f"{root}/byteorder" if root else "byteorder")
        self.big_endian = bool(order) and order[0].data().read()[:8] == b"big"

    def __call__(self, pid: Any) -> Any:
        """The storage that a persistent id names; an inert record for an id of another make."""
        made = storage_id(pid)
        if made is None:
            return Opaque(f"persistent id {describe(pid)}")
        key, dtype, elements = made
        if (key, dtype) not in self.found:
            self.found[key, dtype] = self._storage(key, dtype, elements)
        return self.found[key, dtype]

    def _members(self, name: str) -> list[Entry]:
        return self.entries.get(name) or self.lowered.get(name.lower(), [])

    def _storage(self, key: str, dtype: str, elements: int) -> Storage:
        name = f"{self.folder}/{key}"
        members = self._members(name)
        if not members:
            problem = f"the storage {show(name)} is missing from the archive"
            return Storage(key, dtype, elements, None, problem=problem)
        identity = f"{members[0].span.path.name}@{members[0].span.offset}"
        if members[0].size == elements * numpy_dtype(dtype).itemsize:
            self.recorder.raw[id(members[0])] = members[0]
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
