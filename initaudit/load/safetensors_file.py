"""safetensors: the header is read and checked here, the tensors are memory maps.

Format: eight bytes of header length (little-endian), a JSON header, the data. The `safetensors` package reads it too, but hands
out bfloat16 and float8 only through torch, whose import takes longer than a whole static audit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.finish import finish
from initaudit.load.spans import Span, Stored, byte_count, show

FORMAT = "safetensors"
MAX_HEADER = 100_000_000  # the limit of the reference implementation, safetensors/src/tensor.rs
# safetensors/src/tensor.rs, enum Dtype
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn",
}  # fmt: skip


def recognise(path: Path, head: bytes) -> bool:
    """True where eight bytes of a sensible length are followed by the opening brace of the header."""
    return len(head) > 8 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER


def load(path: Path) -> Checkpoint:
    """Reads the header of `path`; raises `UnreadableModel` where it breaks a rule of the format.

    Tensors whose bytes lie past the end of a truncated file become problems; the others are read.
    """
    where = show(path, 200)
    whole = Span.of_file(path)
    header_bytes = int.from_bytes(whole.part(0, 8).read(), "little")
    if 8 + header_bytes > whole.length:
        raise UnreadableModel(
            where, f"a header of {header_bytes} bytes in a file of {whole.length}", advice="the file is truncated"
        )
    header = _header(whole.part(8, header_bytes).read(), where)
    data = whole.part(8 + header_bytes, whole.length - 8 - header_bytes)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnreadableModel(where, "__metadata__ that is not a table of texts")
    arrays: dict[str, Array] = {}
    problems: list[Problem] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _entry(name, entry, where)
        spans.append((begin, end, name))
        if end > data.length:
            found = f"{show(name)}: its bytes end at {end}, the data at {data.length}; the file is truncated"
            problems.append(Problem("IA001", name, found))
            continue
        part = data.part(begin, end - begin)
        arrays[name] = Array(name, shape, dtype, Stored(part, dtype, shape))
    _check_spans(spans, data.length, where)
    return finish(Checkpoint(str(path), FORMAT, arrays, problems=tuple(problems), metadata=metadata))


def _header(raw: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in found if names.count(name) > 1)
            raise UnreadableModel(where, f"{show(repr(twice))} stands twice in the header", "every name once")
        return found

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableModel(where, "a header that is not JSON", advice="the file is damaged") from error
    if not isinstance(header, dict):
        raise UnreadableModel(where, "a header that is not a table")
    return header


def _entry(name: str, entry: Any, where: str) -> tuple[str, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of one tensor, the offsets relative to the data."""
    label = f"{where}: {show(name)}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise UnreadableModel(label, "a header entry without dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise UnreadableModel(label, f"the dtype {show(entry['dtype'])}", "one that safetensors defines")
    dtype = DTYPES[entry["dtype"]]
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise UnreadableModel(label, f"the shape {show(shape)}", "a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(offset) is int for offset in offsets):
        raise UnreadableModel(label, f"the offsets {show(offsets)}", "two of them")
    begin, end = offsets
    try:
        expected = byte_count(dtype, tuple(shape))
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    if begin < 0 or end - begin != expected:
        raise UnreadableModel(label, f"bytes {begin} to {end} for {dtype} of shape {show(shape)}", f"{expected} bytes")
    return dtype, tuple(shape), begin, end


def _check_spans(spans: list[tuple[int, int, str]], available: int, where: str) -> None:
    """The format wants the data covered without holes or overlaps: a hole is room for a second file."""
    place = 0
    for begin, end, name in sorted(spans):
        if begin != place:
            kind = "overlaps the tensor before it" if begin < place else f"leaves {begin - place} bytes unused before it"
            raise UnreadableModel(where, f"{show(name)} {kind}", "tensors side by side", "the file is damaged or forged")
        place = end
    if place < available:
        raise UnreadableModel(
            where, f"{available - place} bytes after the last tensor", "none", "the file is damaged or forged"
        )
