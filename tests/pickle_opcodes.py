"""Pickles opcode by opcode, for what no pickler writes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4)
MARK, TUPLE, REDUCE, POP, NONE = b"(", b"t", b"R", b"0", b"N"


def text(value: str) -> bytes:
    raw = value.encode("utf-8")
    return b"X" + struct.pack("<I", len(raw)) + raw


def raw(value: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(value)) + value


def by_line(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def by_stack(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def args(*values: bytes) -> bytes:
    return MARK + b"".join(values) + TUPLE


def call(function: bytes, *values: bytes) -> bytes:
    return function + args(*values) + REDUCE


def listed(*values: bytes) -> bytes:
    return b"](" + b"".join(values) + b"e"


def code(canary: Path) -> bytes:
    """A Python statement (which is an expression too) that touches the canary."""
    return text(f"open({str(canary)!r},'w').close()")


def shell(canary: Path) -> bytes:
    return text(f"touch {canary}")


def system(canary: Path) -> bytes:
    return call(by_line("os", "system"), shell(canary))
