"""Pickles that are no archive: PyTorch's older stream, and a plain pickle (pickle.dump, joblib.dump) with tensors in it."""

from __future__ import annotations

import mmap
from pathlib import Path

from initaudit.load.checkpoint import Checkpoint
from initaudit.load.hidden import is_tar, looks_like_pickle, pickles
from initaudit.load.pickle_reader import OPCODES
from initaudit.load.pickle_values import Recorder
from initaudit.load.spans import Span, show
from initaudit.load.state_dict import checkpoint_of
from initaudit.load.torch_stream import is_stream, read_stream
from initaudit.load.zip_entries import is_zip

FORMAT = "pickle"
GUESS = 2


def recognise(path: Path, head: bytes) -> bool:
    """True for a pickle of any protocol. Without the magic number of protocol 2 the first opcodes must make sense."""
    if head[:1] == b"\x80":
        return looks_like_pickle(head)
    if head[:1] not in OPCODES or is_zip(head) or is_tar(head):
        return False
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return looks_like_pickle(data)


def load(path: Path) -> Checkpoint:
    """Reads the pickles at `path`; raises `UnreadableModel` where they hold no tensor and would run nothing."""
    where = show(path, 200)
    whole = Span.of_file(path)
    recorder = Recorder()
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if is_stream(data[:64]):
            root, name = read_stream(whole, data, recorder), "torch_legacy"
        else:
            values = pickles(data, where, recorder)
            root, name = values[0] if len(values) == 1 else values, FORMAT
    return checkpoint_of(root, str(path), name, where, recorder)
