"""NumPy's .npy and .npz. An array of objects is a pickle: what that would run is named, and it is never unpickled."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.finish import finish
from initaudit.load.hidden import looks_like_pickle, pickles
from initaudit.load.pickle_arrays import code_problems
from initaudit.load.pickle_values import Recorder
from initaudit.load.spans import Span, check_bytes, reason, show
from initaudit.load.torch_zip import hidden_notes
from initaudit.load.zip_entries import is_zip, member_names, read_entries

FORMAT = "numpy"
MAGIC = b"\x93NUMPY"
MAX_HEADER = 1 << 20  # numpy allows 10,000 bytes, and any number where the caller trusts the file
MAX_TABLE = 10_000  # characters of the literal in it
MAX_PICKLE = 256 << 20


def recognise(path: Path, head: bytes) -> bool:
    """True for the magic of .npy, and for an archive of nothing but .npy members."""
    if head.startswith(MAGIC):
        return True
    if not is_zip(head):
        return False
    names = member_names(path)
    return names is not None and bool(names) and all(name.endswith(".npy") for name in names)


def load(path: Path) -> Checkpoint:
    """Reads the arrays at `path`; raises `UnreadableModel` for an archive that is broken."""
    where = show(path, 200)
    whole = Span.of_file(path)
    notes: tuple[str, ...] = ()
    if whole.part(0, len(MAGIC)).read() == MAGIC:
        members = [("array", whole)]
        problems: list[Problem] = []
    else:
        entries = read_entries(whole)
        notes, problems, members = hidden_notes(entries), [], []
        for name, found in entries.items():
            try:
                # zipfile hands out the last of two members of one name
                members += [(name.removesuffix(".npy"), entry.data()) for entry in reversed(found)]
            except UnreadableModel as error:
                problems.append(Problem("IA001", name, str(error)))
    arrays: dict[str, Array] = {}
    recorder = Recorder()
    for name, span in members:
        try:
            array = _array(name, span, f"{where}: {show(name)}", recorder)
            arrays.setdefault(name, array)
        except UnreadableModel as error:
            problems.append(Problem("IA001", name, str(error)))
    problems += code_problems(recorder)
    return finish(Checkpoint(str(path), FORMAT, arrays, problems=tuple(problems), notes=notes))


def _array(name: str, span: Span, label: str, recorder: Recorder) -> Array:
    try:
        dtype, shape, fortran, begin = _header(span, label)
    except UnreadableModel:
        objects_in(span, label, recorder)
        raise
    data = span.part(begin, span.length - begin)
    if dtype.hasobject:
        objects_in(span, label, recorder)
        raise UnreadableModel(label, "an array of Python objects, which is a pickle and is not read")
    if dtype.kind not in "biufc" or dtype.itemsize > 16 or dtype.subdtype is not None:
        raise UnreadableModel(label, f"an array of {show(dtype)}, which holds no plain numbers")
    check_bytes(label, dtype.newbyteorder("=").name, shape, data.length)
    big_endian = dtype.byteorder == ">"
    return Array(name, shape, dtype.newbyteorder("=").name, _reader(data, dtype, shape, fortran, big_endian))


def _header(span: Span, label: str) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """(dtype, shape, column order, where the data begin) of a .npy member.

    NEP 1: magic, two bytes of version, the header's length in 2 bytes (version 1) or 4, then a Python literal. numpy's own
    reader repairs headers of Python 2 with the tokenizer and warns; those are refused here.
    """
    head = span.part(0, min(span.length, MAX_HEADER + 16)).read()
    try:
        if not head.startswith(MAGIC) or head[6] not in (1, 2, 3):
            raise ValueError("no magic number or an unknown version")
        width = 2 if head[6] == 1 else 4
        begin = _begin(head)
        if begin > len(head):
            raise ValueError(f"{begin} bytes of header")
        table = ast.literal_eval(head[8 + width : begin].decode("latin-1" if head[6] < 3 else "utf-8").strip()[:MAX_TABLE])
        if not isinstance(table, dict) or table.keys() != {"descr", "fortran_order", "shape"}:
            raise ValueError("not the three entries of a header")
        shape = table["shape"]
        if not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
            raise ValueError("a shape that is no tuple of sizes")
        return npy.descr_to_dtype(table["descr"]), shape, table["fortran_order"] is True, begin
    except (ValueError, IndexError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise UnreadableModel(label, f"a broken .npy header ({reason(error)})") from error


def _reader(data: Span, dtype: np.dtype[Any], shape: tuple[int, ...], fortran: bool, big_endian: bool) -> Any:
    name = dtype.newbyteorder("=").name
    if fortran:
        return lambda: data.array(name, shape[::-1], big_endian=big_endian).T
    return lambda: data.array(name, shape, big_endian=big_endian)


def objects_in(span: Span, label: str, recorder: Recorder) -> Any:
    """What an array of Python objects holds, read as the pickle that it is; None for an array of numbers."""
    head = span.part(0, min(span.length, 12)).read()
    try:
        dtype, _, _, begin = _header(span, label)
        if not dtype.hasobject:
            return None
    except UnreadableModel:
        # NumPy repairs some headers; behind one that cannot be read a pickle may stand all the same
        begin = _begin(head)
    if begin >= span.length:
        return None
    data = span.part(begin, span.length - begin)
    if data.length > MAX_PICKLE:
        recorder.broken.append(f"{label}: a pickle of {data.length} bytes was not looked at")
        return None
    raw = data.read()
    return pickles(raw, label, recorder)[0] if looks_like_pickle(raw) else None


def _begin(head: bytes) -> int:
    width = 2 if head[6:7] == b"\x01" else 4
    return 8 + width + int.from_bytes(head[8 : 8 + width], "little")
