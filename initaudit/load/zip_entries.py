"""The directory of a zip archive, read as PyTorch's own reader does, with the tricks that fool others refused or named.

Python's zipfile stops at a wrong checksum, a set encryption bit or a local name that differs; PyTorch's reader (miniz) loads
such archives all the same, so a scanner built on zipfile sees nothing where a model is loaded. What counts here is the central
directory, as for miniz; contradictions become remarks. Nothing is ever extracted to disk.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from initaudit.errors import UnreadableModel
from initaudit.load.spans import Span, show

STORED, DEFLATED = 0, 8
MAX_ENTRIES = 1_000_000
MAX_INFLATED = 1 << 30  # bytes of one compressed entry; PyTorch stores without compression
# PKWARE APPNOTE 4.3.7 (local header), 4.3.12 (central), 4.3.14 to 4.3.16 (end of central directory)
_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"


@dataclass(frozen=True)
class Entry:
    """One member: `span` holds its bytes as stored; `size` is what they inflate to, `front` its first four."""

    name: str
    method: int
    crc: int
    size: int
    span: Span
    front: bytes
    remarks: tuple[str, ...] = ()

    def data(self) -> Span:
        """Its content, mapped where it is stored; raises `UnreadableModel` for a bomb or an unknown compression."""
        label = f"{show(self.span.path)}: {show(self.name)}"
        if self.method == STORED:
            return self.span
        if self.method != DEFLATED:
            raise UnreadableModel(label, f"compression method {self.method}", "stored or deflated")
        if self.size > MAX_INFLATED:
            raise UnreadableModel(label, f"inflates to {self.size} bytes", f"at most {MAX_INFLATED}")
        try:
            inflater = zlib.decompressobj(-15)
            found = inflater.decompress(self.span.read(), self.size + 1)
        except zlib.error as error:
            raise UnreadableModel(label, "cannot be decompressed", advice="the file is damaged") from error
        if len(found) != self.size:
            raise UnreadableModel(
                label, f"inflates to other than the {self.size} bytes announced", advice="the file is damaged"
            )
        return Span.of_bytes(self.span.path, found)


def read_entries(whole: Span) -> dict[str, list[Entry]]:
    """Every member by name, in the order of the directory; a name that stands twice has both.

    Raises `UnreadableModel` for a broken directory and for entries that overlap (a bomb, or a file hidden in another).
    """
    where = show(whole.path, 200)
    found: dict[str, list[Entry]] = {}
    spans: list[tuple[int, int, str]] = []
    with whole.mapped() as data:
        for record in _records(whole, where):
            entry = _entry(whole, data, record, where)
            found.setdefault(entry.name, []).append(entry)
            spans.append((record.start, entry.span.offset - whole.offset + entry.span.length, entry.name))
    _check_overlaps(spans, where)
    return found


def member_names(path: Path) -> tuple[str, ...] | None:
    """The names in the directory of the archive at `path`, None where it is broken; looked up once for all formats."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _member_names(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=1)
def _member_names(path: Path, size: int, changed: int) -> tuple[str, ...] | None:
    try:
        return tuple(record.name for record in _records(Span(path, 0, size), show(path, 200)))
    except UnreadableModel:
        return None


@dataclass(frozen=True)
class _Record:
    """One record of the central directory."""

    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    start: int

    @property
    def name(self) -> str:
        return self.raw_name.decode("utf-8", "replace")


def _records(whole: Span, where: str) -> Iterator[_Record]:
    offset, length, count = _directory(whole, where)
    if count > MAX_ENTRIES:
        raise UnreadableModel(where, f"a zip archive of {count} entries", f"at most {MAX_ENTRIES}")
    directory = whole.part(offset, length).read()
    place = 0
    for _ in range(count):
        if directory[place : place + 4] != _CENTRAL or place + 46 > len(directory):
            raise UnreadableModel(where, "a zip directory that breaks off", advice="the file is truncated or damaged")
        fields = struct.unpack_from("<6H3L5H2L", directory, place + 4)
        name_end = place + 46 + fields[9]
        extra_end = name_end + fields[10]
        size, packed, start = _zip64(directory[name_end:extra_end], fields[8], fields[7], fields[15])
        yield _Record(directory[place + 46 : name_end], fields[2], fields[3], fields[6], packed, size, start)
        place = extra_end + fields[11]


def is_zip(head: bytes) -> bool:
    """True for what PyTorch takes for an archive: the first four bytes decide, whatever stands at the end."""
    return head.startswith(_LOCAL)


def _directory(whole: Span, where: str) -> tuple[int, int, int]:
    """(offset, size, entries) of the central directory."""
    tail_size = min(whole.length, 22 + 0xFFFF)
    tail = whole.part(whole.length - tail_size, tail_size).read()
    place = tail.rfind(_END)
    if place < 0 or place + 22 > len(tail):
        raise UnreadableModel(where, "a zip archive without its directory", advice="the file is truncated: copy it again")
    count, size, offset = struct.unpack("<H2L", tail[place + 10 : place + 20])
    if 0xFFFF in (count,) or 0xFFFFFFFF in (size, offset) or tail[place - 20 : place - 16] == _LOCATOR64:
        at = whole.length - tail_size + place - 20
        locator = whole.part(at, 20).read()
        if locator[:4] == _LOCATOR64:
            end64 = whole.part(struct.unpack("<Q", locator[8:16])[0], 56).read()
            if end64[:4] != _END64:
                raise UnreadableModel(where, "a zip archive with a broken directory", advice="the file is damaged")
            count, size, offset = struct.unpack("<3Q", end64[32:56])
    return offset, size, count


def _entry(whole: Span, data: memoryview, record: _Record, where: str) -> Entry:
    """The member that a record of the directory names; `data` are the bytes of `whole`."""
    name, start = record.name, record.start
    if start < 0 or data[start : start + 4] != _LOCAL or start + 30 > len(data):
        raise UnreadableModel(where, f"no member where the directory puts {show(name)}", advice="the file is damaged")
    flags, name_size, extra_size = (struct.unpack_from("<H", data, start + at)[0] for at in (6, 26, 28))
    remarks = []
    if data[start + 30 : start + 30 + name_size] != record.raw_name:
        remarks.append("bears another name in its own header")
    if (record.flags | flags) & 1:
        remarks.append("is marked as encrypted")
    if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
        remarks.append("would be unpacked outside its folder")
    if record.method == STORED and record.packed != record.size:
        found = f"{show(name)} is stored, yet its two sizes differ"
        raise UnreadableModel(where, found, advice="the file is damaged or forged")
    span = whole.part(start + 30 + name_size + extra_size, record.packed)
    begin = start + 30 + name_size + extra_size
    front = bytes(data[begin : begin + min(4, record.packed)])
    return Entry(name, record.method, record.crc, record.size, span, front, tuple(remarks))


def _zip64(extra: bytes, size: int, packed: int, start: int) -> tuple[int, int, int]:
    """The three numbers, those that are all ones taken from the zip64 field (APPNOTE 4.5.3), in that order."""
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack("<2H", extra[place : place + 4])
        if kind == 1:
            wide = [int.from_bytes(extra[at : at + 8], "little") for at in range(place + 4, place + 4 + length - 7, 8)]
            values = [wide.pop(0) if value == 0xFFFFFFFF and wide else value for value in (size, packed, start)]
            return values[0], values[1], values[2]
        place += 4 + length
    return size, packed, start


def _check_overlaps(spans: list[tuple[int, int, str]], where: str) -> None:
    end = 0
    for start, stop, name in sorted(spans):
        if start < end:
            raise UnreadableModel(where, f"{show(name)} overlaps another member", advice="a zip bomb or a forged archive")
        end = stop
