"""Pickles wherever they stand: in the members of an archive, in archives within archives, compressed, behind other bytes.

No name and no ending counts, only content. What a pickle would run goes to the recorder; its value is given back, so that
tensors in it can be read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import mmap
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.joblib_arrays import INLINE
from initaudit.load.pickle_globals import KNOWN
from initaudit.load.pickle_machine import BrokenPickle, Machine
from initaudit.load.pickle_reader import OPCODES, read, read_or_remains
from initaudit.load.pickle_values import Event, Recorder
from initaudit.load.spans import Span, reason, show
from initaudit.load.zip_entries import Entry, is_zip, read_entries

MAX_DEPTH = 4  # archives within archives
MAX_PICKLES = 64  # one after the other; a loader may go on behind the first
MAX_PICKLE = 256 << 20  # bytes of a pickle that is no file of its own
MAX_INFLATED = 1 << 28
TRIED = 2000  # opcodes of a stream that has no magic number: as many of them are no accident
PLAUSIBLE = 4
FRONT = 512
Found = list[tuple[str, Any]]

# The compressions that joblib writes and reads, by their magic number (joblib/compressor.py)
COMPRESSED: tuple[tuple[bytes, Callable[[io.BytesIO], Any]], ...] = (
    (b"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),
    (b"BZh", bz2.BZ2File),
    (b"\xfd7zXZ", lzma.LZMAFile),
    (b"\x5d\x00", lzma.LZMAFile),
)


def inflated(raw: bytes) -> bytes | None:
    """What gzip, zlib, bzip2, xz or lzma bytes hold, at most `MAX_INFLATED` of it; None for anything else or damage."""
    try:
        if raw[:1] == b"\x78" and len(raw) > 1 and (raw[0] * 256 + raw[1]) % 31 == 0:  # RFC 1950, FCHECK
            return zlib.decompressobj().decompress(raw, MAX_INFLATED)
        for magic, opened in COMPRESSED:
            if raw.startswith(magic):
                found: bytes = opened(io.BytesIO(raw)).read(MAX_INFLATED)
                return found
    except (OSError, ValueError, EOFError, zlib.error, lzma.LZMAError):
        return None
    return None


def is_tar(head: bytes) -> bool:
    """True for a header whose checksum is right, as Python's tarfile asks; the magic `ustar` may be missing."""
    if len(head) < 512 or not any(head[:512]):
        return False
    try:
        announced = int(head[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        return False
    blank = head[:148] + b" " * 8 + head[156:512]
    return announced in (sum(blank), sum(byte if byte < 128 else byte - 256 for byte in blank))


def tar_members(whole: Span) -> list[tuple[str, Span]]:
    """The members of a tar archive where they stand, in its order, links as what they lead to inside it.

    Raises `UnreadableModel` for a broken archive.
    """
    found: list[tuple[str, Span]] = []
    try:
        with whole.opened() as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                target = info
                if info.issym() or info.islnk():
                    try:
                        target = archive._find_link_target(info)  # type: ignore[attr-defined]
                    except KeyError:
                        continue
                if target.isreg():
                    found.append((info.name, whole.part(target.offset_data, target.size)))
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError) as error:
        raise UnreadableModel(show(whole.path, 200), f"a broken tar archive ({reason(error)})") from error
    return found


def looks_like_pickle(data: bytes | mmap.mmap) -> bool:
    """True for a pickle of any protocol: the first opcodes make sense up to an end, or call something before they do not."""
    if data[:1] == b"\x80":
        return len(data) > 1 and data[1] <= 5
    if len(data) == 0 or data[:1] not in OPCODES:
        return False
    machine = Machine(data, KNOWN, Recorder())
    machine.most = TRIED
    try:
        read(machine)
    except BrokenPickle:
        if machine.opcodes > TRIED or any(_acts(event) for event in machine.recorder.events.values()):
            return True
        return machine.opcodes >= PLAUSIBLE and machine.place > len(data) - FRONT
    return machine.opcodes >= 1


def _named(event: Event) -> bool:
    """Whether what it asks for can be a name in a module; bytes of a tensor that happen to be opcodes call None or 7070."""
    parts = event.label.split(".")
    plausible = len(parts) > 1 and not parts[0][:1].isdigit() and all(part.replace("_", "a").isalnum() for part in parts)
    return plausible or event.verb == "asks for"


def _acts(event: Event) -> bool:
    return event.verb in ("calls", "builds") and _named(event)


def _is_program(recorder: Recorder, complete: bool) -> bool:
    """Whether a stream did what bytes of numbers do not: it asked for a name, or came to its STOP and called something.

    What it called may have any name that a module can be given, or be an extension code; numbers and constants are no function.
    """
    events = recorder.events.values()
    called = (e.label for e in events if complete and e.verb in ("calls", "builds"))
    return any(map(_named, events)) or any("." in label and label[0] not in "-0123456789" for label in called)


def pickles(data: bytes | mmap.mmap, label: str, recorder: Recorder, depth: int = 0, place: int = 0) -> list[Any]:
    """The values of the pickles that stand one after the other in `data`; bytes behind the last that are none are left."""
    values: list[Any] = []
    while place < len(data) and len(values) < MAX_PICKLES:
        own = Recorder() if values else recorder  # what stands behind the first may be raw numbers
        machine = Machine(data, KNOWN, own, nested=nested(own), inline=INLINE, place=place, depth=depth)
        if not values:
            values.append(read_or_remains(machine, f"{label}: the pickle"))
            if machine.data[machine.place - 1 : machine.place] != b".":
                break
        else:
            try:
                value = read(machine)
            except BrokenPickle:
                if _is_program(own, complete=False):
                    recorder.take(own)
                break
            if own.events and not _is_program(own, complete=True):
                break
            recorder.take(own)
            values.append(value)
        place = machine.place
    return values


def nested(recorder: Recorder) -> Callable[[bytes, int], Any]:
    """Reads what torch.storage._load_from_bytes would hand to torch.load: a stream, an archive or a plain pickle."""

    def read_bytes(data: bytes, depth: int) -> Any:
        from initaudit.load.torch_stream import is_stream, read_stream
        from initaudit.load.torch_zip import read_archive

        whole = Span.of_bytes(Path("."), data)
        try:
            if is_stream(data[:64]):
                return read_stream(whole, data, recorder, depth)
            if is_zip(data[:4]):
                return read_archive(whole, "an archive within the stream", recorder)
        except UnreadableModel as error:
            recorder.broken.append(str(error))
            return None
        if looks_like_pickle(data):
            return pickles(data, "a stream within the stream", recorder, depth)[0]
        return NotImplemented

    return read_bytes


def look_into(span: Span, label: str, recorder: Recorder, depth: int = 0) -> Found:
    """(where, value) of every pickle in `span`: it may be one, or an archive, an array of objects or compressed bytes with one.

    What cannot be opened says so in `recorder.broken`; what is none of these gives nothing.
    """
    if depth > MAX_DEPTH or span.length < 2:
        return []
    head = span.part(0, min(FRONT, span.length)).read()
    try:
        if is_zip(head):
            return list(_in_zip(span, label, recorder, depth))
        if is_tar(head):
            members = [(f"{label}: {show(name)}", part) for name, part in tar_members(span)]
            return [found for where, part in members for found in look_into(part, where, recorder, depth + 1)]
    except UnreadableModel as error:
        recorder.broken.append(str(error))
        return []
    if head.startswith(b"\x93NUMPY"):
        from initaudit.load.numpy_file import objects_in

        value = objects_in(span, label, recorder)
        return [] if value is None else [(label, value)]
    compressed = head[:1] == b"\x78" or any(head.startswith(magic) for magic, _ in COMPRESSED)
    if compressed and span.length <= MAX_PICKLE:
        content = inflated(span.read())
        return [] if content is None else look_into(Span.of_bytes(span.path, content), label, recorder, depth + 1)
    return _as_pickle(span, head, label, recorder, depth)


def _in_zip(span: Span, label: str, recorder: Recorder, depth: int) -> Iterator[tuple[str, Any]]:
    from initaudit.load.torch_zip import is_main, read_pickle

    entries = read_entries(span)
    for name in filter(is_main, entries):  # first, because they say which of the others are raw numbers
        yield f"{label}: {show(name)}", read_pickle(entries, name, label, recorder)
    for name, found in entries.items():
        for entry in () if is_main(name) else found:
            try:
                yield from look_into_member(entry, f"{label}: {show(name)}", recorder, depth + 1)
            except UnreadableModel as error:
                recorder.broken.append(str(error))


def look_into_member(entry: Entry, label: str, recorder: Recorder, depth: int) -> Found:
    """`look_into` for a member of an archive; of one that is the elements of a storage only what calls something counts.

    torch.load never unpickles a storage, but some libraries keep a pickle of their own in a tensor of bytes. Whatever else
    its numbers spell is an accident. Raises `UnreadableModel` where the member cannot be read.
    """
    if id(entry) not in recorder.raw:
        return look_into(entry.data(), label, recorder, depth)
    alone = Recorder()
    look_into(entry.data(), label, alone, depth)
    recorder.take(Recorder({key: event for key, event in alone.events.items() if _acts(event)}))
    return []


def _as_pickle(span: Span, head: bytes, label: str, recorder: Recorder, depth: int) -> Found:
    """The bytes as a pickle, if that is what they are: a tensor's elements may look like one for a while."""
    from initaudit.load.torch_stream import is_stream, read_stream

    if head[:1] not in OPCODES or span.length > MAX_PICKLE:
        return []
    if is_stream(head):
        return [(label, read_stream(span, span.read(), recorder, depth))]
    with span.mapped() as view:
        if not looks_like_pickle(bytes(view[:FRONT])) and not looks_like_pickle(bytes(view[: 1 << 20])):
            return []
    alone = Recorder()
    values = pickles(span.read(), label, alone, depth)
    plain = not alone.events and not alone.broken and head[:1] == b"\x80"
    if not plain and not _is_program(alone, complete=not alone.broken):
        return []
    recorder.take(alone)
    return [(label, value) for value in values]


def polyglot(span: Span, recorder: Recorder) -> None:
    """Notes what a file would run for a loader that takes it for a pickle from its first byte on, whatever else it is."""
    if not span.length:
        return
    head = span.part(0, min(4, span.length)).read()
    if head[:1] not in OPCODES or is_zip(head):
        return
    with open(span.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if looks_like_pickle(data):
            alone = Recorder()
            pickles(data, show(span.path), alone)
            if any(_acts(event) for event in alone.events.values()):
                alone.broken.clear()
                recorder.take(alone)
