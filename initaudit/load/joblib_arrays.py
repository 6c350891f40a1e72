"""Arrays that joblib.dump writes between the opcodes of a pickle: a wrapper is built, and its bytes follow in the stream."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from initaudit.load.pickle_machine import BrokenPickle, Inline, Machine
from initaudit.load.pickle_reader import read
from initaudit.load.pickle_values import Call, Dtype, NdArray, Opaque
from initaudit.load.spans import Span, byte_count

_TEXT = re.compile(r"([SU])(\d{1,9})")  # numpy's codes of fixed-width bytes and text


def _wrapped(machine: Machine, wrapper: Call) -> Any:
    """joblib/numpy_pickle.py, NumpyArrayWrapper.read_array: padding, then the elements in C or F order."""
    state = wrapper.state if isinstance(wrapper.state, dict) else {}
    dtype, shape = state.get("dtype"), state.get("shape")
    if not isinstance(dtype, Dtype) or not isinstance(shape, tuple) or not all(type(size) is int for size in shape):
        return wrapper
    if dtype.code.startswith("O"):  # a pickle of its own follows
        inner = Machine(
            machine.data, machine.known, machine.recorder, nested=machine.nested, inline=INLINE, place=machine.place
        )
        if machine.depth > 8:
            raise BrokenPickle("arrays of objects nested too deeply")
        inner.depth = machine.depth + 1
        value = read(inner)
        machine.place = inner.place
        return value
    if state.get("numpy_array_alignment_bytes") is not None:
        machine.take(machine.take(1)[0])
    text = _TEXT.fullmatch(dtype.code)
    if text is not None:
        machine.take(math.prod(shape) * int(text[2]) * (4 if text[1] == "U" else 1))
        return Opaque("an array of text")
    raw = machine.take(byte_count(dtype.numpy.name, shape))
    return NdArray(shape, dtype, state.get("order") == "F" and math.prod(shape) > 0, Span.of_bytes(Path("."), raw))


INLINE: dict[tuple[str, str], Inline] = {("joblib.numpy_pickle", "NumpyArrayWrapper"): _wrapped}
