"""Pickles that are no archive: PyTorch's older stream, and a plain pickle (pickle.dump, joblib.dump) with tensors in it."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Checkpoint
from initaudit.load.joblib_arrays import INLINE
from initaudit.load.pickle_globals import KNOWN
from initaudit.load.pickle_machine import Machine
from initaudit.load.pickle_reader import BrokenPickle, read
from initaudit.load.pickle_values import Recorder
from initaudit.load.spans import Span, reason, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.torch_stream import is_stream, nested, read_stream

FORMAT = "pickle"
MAX_PICKLES = 64  # one after the other in a file; a loader may go on behind the first
PROTOCOL_0_STARTS = b"(ci]})lNISVFLX"  # opcodes that a pickle without a PROTO opcode begins with
PLAUSIBLE_OPCODES = 4


def recognise(path: Path, head: bytes) -> bool:
    """True for a pickle of any protocol. Protocols 0 and 1 have no magic: the first opcodes must make sense."""
    if head[:1] == b"\x80":
        return head[1:2] in (b"\0", b"\1", b"\2", b"\3", b"\4", b"\5")
    return head[:1] in [bytes([byte]) for byte in PROTOCOL_0_STARTS] and _makes_sense(head)


def _makes_sense(head: bytes) -> bool:
    machine = Machine(head, KNOWN, Recorder())
    try:
        read(machine)
    except BrokenPickle:
        return machine.opcodes >= PLAUSIBLE_OPCODES and machine.place > len(head) - 512
    return machine.opcodes >= 1


def load(path: Path) -> Checkpoint:
    """Reads the pickles at `path`; raises `UnreadableModel` where they hold no tensor and would run nothing."""
    where = show(path, 200)
    whole = Span.of_file(path)
    recorder = Recorder()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if is_stream(data[:64]):
            root, name = read_stream(whole, data, recorder), "torch_legacy"
        else:
            root, name = _read_plain(data, where, recorder), FORMAT
    return checkpoint_of(root, str(path), name, where, recorder)


def _read_plain(data: mmap.mmap, where: str, recorder: Recorder) -> Any:
    values: list[Any] = []
    place = 0
    while place < len(data) and len(values) < MAX_PICKLES:
        machine = Machine(data, KNOWN, recorder, nested=nested(recorder), inline=INLINE, place=place)
        try:
            values.append(read(machine))
        except BrokenPickle as error:
            if values:
                break  # bytes behind the last pickle that are none
            recorder.broken.append(f"{where}: the pickle breaks off: {reason(error)}")
            values.append(machine.remains())
            break
        place = machine.place
    if not values:
        raise UnreadableModel(where, "an empty pickle")
    return values[0] if len(values) == 1 else values
