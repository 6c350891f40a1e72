"""The protobuf wire format of an ONNX file, looked at before onnx may parse it.

Is this a ModelProto at all? Would parsing it take far more memory than the file has bytes (a submessage takes two bytes in a
file and about a hundred in memory, so a file of empty nodes swells fiftyfold)? Where do its weights stand, so that they can be
mapped and need not be parsed?
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from initaudit.errors import UnreadableModel

# https://protobuf.dev/programming-guides/encoding: wire types; 3 and 4 (groups) occur in no ONNX message
VARINT, FIXED64, LENGTH, FIXED32 = 0, 1, 2, 5
# onnx.proto, ModelProto: field number -> wire type
MODEL_FIELDS = {
    1: VARINT, 2: LENGTH, 3: LENGTH, 4: LENGTH, 5: VARINT, 6: LENGTH, 7: LENGTH, 8: LENGTH, 14: LENGTH, 20: LENGTH,
    25: LENGTH, 26: LENGTH,
}  # fmt: skip
IR_VERSION, GRAPH = 1, 7
INITIALIZER = 5  # GraphProto
RAW_DATA, DATA_LOCATION = 9, 14  # TensorProto
LARGE_BYTES = 1 << 16  # raw data from this size on stays in the file
GRAPH_TAGS = {number << 3 | LENGTH for number in (1, 2, 5, 10, 11, 12, 13, 14, 15)}  # one byte each; 16 (metadata) takes two
MAX_TOP_FIELDS = 10_000
SMALL_FILE = 8 << 20  # swollen a hundredfold, a file of this size still fits; larger ones are counted first
MAX_MESSAGES = 2_000_000
Buffer = mmap.mmap | bytes


class CutOff(ValueError):
    """The bytes end within a field: a truncated file, which is another thing than bytes that are no protobuf."""


def looks_like_model(path: Path) -> bool:
    """True where the top-level fields are a ModelProto's, up to a graph or (in a truncated file) up to the end.

    The graph must begin as a GraphProto does: the length that opens a safetensors file can pass for `ir_version` and a tag.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        seen = set()
        try:
            for count, (number, wire, begin, end) in enumerate(fields(data, 0, len(data))):
                if MODEL_FIELDS.get(number) != wire:
                    return False
                seen.add(number)
                if number == GRAPH and end > begin:
                    return begin >= len(data) or data[begin] in GRAPH_TAGS
                if count > MAX_TOP_FIELDS:
                    return True
        except CutOff:
            return bool(seen & {IR_VERSION, GRAPH})
        except ValueError:
            return False
        return IR_VERSION in seen


def fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, wire type, start, end) of each field between two offsets; raises ValueError where the bytes are none.

    A length-delimited field that sticks out is yielded with its declared end before the error, so that a truncated file is
    still known for what it is.
    """
    place = start
    while place < end:
        tag = data[place]
        if tag < 0x80:  # one byte in nearly every field; a file of millions of fields is counted in seconds
            place += 1
        else:
            tag, place = _varint(data, place, end)
        number, wire = tag >> 3, tag & 7
        if number == 0:
            raise ValueError("field number 0")
        begin = place
        if wire == VARINT:
            _, place = _varint(data, place, end)
        elif wire == FIXED64:
            place += 8
        elif wire == FIXED32:
            place += 4
        elif wire == LENGTH:
            length = data[place] if place < end else 0x80
            if length < 0x80:
                begin = place + 1
            else:
                length, begin = _varint(data, place, end)
            place = begin + length
        else:
            raise ValueError(f"wire type {wire}")
        yield number, wire, begin, place
        if place > end:
            raise CutOff("a field sticks out")


def _varint(data: Buffer, place: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while place < end and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise (CutOff if place >= end else ValueError)("an unfinished number")


def without_weights(data: Buffer) -> tuple[bytes, list[tuple[int, int] | None]]:
    """The model without the large raw data of the main graph's initializers, and where these stand in `data`.

    The list has an entry (begin, end) for each initializer in order, None for one that was left as it is. What is given to
    onnx to parse is then as small as the graph, and the weights are mapped from the file. Raises ValueError where the bytes
    are no model.
    """
    places: list[tuple[int, int] | None] = []
    kept = bytearray()
    for number, kind, begin, end, start in _placed(data, 0, len(data)):
        if number != GRAPH or kind != LENGTH:
            kept += data[start:end]
            continue
        graph = bytearray()
        copied = begin  # everything up to here is in `graph`
        for inner, wire, first, last, head in _placed(data, begin, end):
            if inner != INITIALIZER or wire != LENGTH:
                continue
            tensor, place = _without_raw(data, first, last)
            places.append(place)
            if place is not None:
                graph += data[copied:head] + _tagged(INITIALIZER, tensor)
                copied = last
        kept += _tagged(GRAPH, bytes(graph + data[copied:end]))
    return bytes(kept), places


def _placed(data: Buffer, begin: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """`fields` with the place of each field's tag as a fifth number; a field that sticks out raises here at once."""
    start = begin
    for number, wire, first, last in fields(data, begin, end):
        if last > end:
            raise CutOff("a field sticks out")
        yield number, wire, first, last, start
        start = last


def _without_raw(data: Buffer, begin: int, end: int) -> tuple[bytes, tuple[int, int] | None]:
    if end - begin < LARGE_BYTES:
        return b"", None
    place = None
    kept = bytearray()
    for number, wire, first, last, start in _placed(data, begin, end):
        if number == RAW_DATA and wire == LENGTH:
            place = (first, last)  # a repeated field counts once, the last time
        elif number == DATA_LOCATION:
            return b"", None
        else:
            kept += data[start:last]
    large = place is not None and place[1] - place[0] >= LARGE_BYTES
    return (bytes(kept), place) if large else (b"", None)


def _tagged(number: int, content: bytes) -> bytes:
    size, encoded = len(content), bytearray([number << 3 | LENGTH])
    while size > 127:
        encoded.append(size & 127 | 128)
        size >>= 7
    encoded.append(size)
    return bytes(encoded) + content


def check_messages(path: Path, where: str) -> None:
    """Raises `UnreadableModel` for a large file that is made of tiny messages; what does not parse is left to onnx."""
    import onnx

    if path.stat().st_size <= SMALL_FILE:
        return
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        count = 0
        stack = [(0, len(data), onnx.ModelProto.DESCRIPTOR)]
        while stack:
            begin, end, message = stack.pop()
            known = message.fields_by_number
            try:
                for number, wire, inner, stop in fields(data, begin, end):
                    count += 1
                    if count > MAX_MESSAGES:
                        raise UnreadableModel(where, f"more than {MAX_MESSAGES} fields", "a graph of sensible size")
                    if wire == LENGTH and number in known and known[number].message_type is not None:
                        stack.append((inner, stop, known[number].message_type))
            except ValueError:
                continue
