"""The state of a pickle stream that is read without unpickling it: stack, memo, and what names and calls stand for.

`pickle.Unpickler` with a guarded `find_class` still looks extension codes up in copyreg's table, calls whatever `find_class`
gave back, runs `__setstate__`, and hashes what the stream built. `pickletools.genops` refuses streams that an unpickler runs
(names that are not ASCII) and cannot say what an opcode is applied to. So the opcodes are interpreted (`pickle_reader`), with
the stack semantics of CPython's Lib/pickle.py, on values that have no behaviour: plain containers, and the records of
`pickle_values`. Nothing is imported by name, nothing of the stream is called; a few known names have a reader of our own
(`pickle_globals`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any

from initaudit.load.pickle_values import Call, Dtype, Global, NdArray, Opaque, Recorder, describe, label_of
from initaudit.load.spans import show

MAX_OPCODES = 4_000_000  # an optimizer's state of 10,000 tensors takes one million
MAX_DIGITS = 4300  # of an integer written in decimal, as in Python itself
NESTED_STREAMS = 4  # streams within streams (torch.storage._load_from_bytes)

Inline = Callable[["Machine", Call], Any]
Handler = Callable[["Machine", tuple[Any, ...]], Any]
KnownGlobals = Mapping[tuple[str, str], Handler | None]
MARK = object()
SET_STATE = Global("numpy", "__setstate__")  # not a name that exists: how BUILD reaches the reader of an array's state


class BrokenPickle(Exception):
    """The stream ends early, misuses its stack, or exceeds a bound: what stands before is kept in `Machine.recorder`."""


class Machine:
    """One stream; `place` is the byte that is read next. `persistent` gives the value of a persistent id, `nested` that of a
    stream within the stream (torch.storage._load_from_bytes), which stands `depth` streams deep, and `inline` that of bytes
    which follow the BUILD of a certain class (joblib).
    """

    def __init__(
        self,
        data: bytes | mmap,
        known: KnownGlobals,
        recorder: Recorder,
        persistent: Callable[[Any], Any] | None = None,
        nested: Callable[[bytes, int], Any] | None = None,
        inline: Mapping[tuple[str, str], Inline] | None = None,
        place: int = 0,
        depth: int = 0,
    ) -> None:
        self.data, self.known, self.recorder, self.place, self.depth = data, known, recorder, place, depth
        self.nested = nested
        self.inline = inline if inline is not None else {}
        self.persistent = persistent if persistent is not None else lambda pid: Opaque(f"persistent id {describe(pid)}")
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.opcodes, self.most, self.broke = 0, MAX_OPCODES, False

    def take(self, count: int) -> bytes:
        """The next `count` bytes; checked before they are copied."""
        end = self.place + count
        if count < 0 or end > len(self.data):
            raise BrokenPickle(f"the stream ends at byte {len(self.data)}, within what it announces")
        found = self.data[self.place : end]
        self.place = end
        return found

    def line(self) -> bytes:
        """The bytes up to the next line feed."""
        end = self.data.find(b"\n", self.place)
        if end < 0:
            raise BrokenPickle("the stream ends within a line")
        found = self.data[self.place : end]
        self.place = end + 1
        return found

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise BrokenPickle(f"nothing is on the stack at byte {self.place}")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is MARK:
            raise BrokenPickle(f"nothing is on the stack at byte {self.place}")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        """What was pushed since the last mark, which is taken off too."""
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is MARK:
                found = self.stack[place + 1 :]
                del self.stack[place:]
                return found
        raise BrokenPickle(f"no mark is on the stack at byte {self.place}")

    def remains(self) -> list[Any]:
        """What a stream that broke off had built: its tensors are read all the same."""
        return [value for value in self.stack if value is not MARK] + list(self.memo.values())

    def find(self, module: Any, name: Any) -> Global:
        """The name a stream asks for; recorded unless it is known, because importing a module runs it."""
        found = Global(_text(module), _text(name))
        if (found.module, found.name) not in self.known:
            self.recorder.note("imports", found.label)
        return found

    def call(self, function: Any, args: Any, verb: str = "calls") -> Any:
        """What `function(*args)` stands for: a known name's own reading, or an inert record that is reported."""
        if isinstance(function, Global) and (function.module, function.name) in self.known:
            handler = self.known[function.module, function.name]
            if handler is None:
                return Call(function, args)
            if isinstance(args, tuple):
                try:
                    found = handler(self, args)
                except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
                    self.recorder.broken.append(f"{function.label}{describe(args)} cannot be read: {show(error)}")
                    return Call(function, args)
                if found is not NotImplemented:
                    return found
        self.recorder.note(verb, label_of(function), args)
        return Call(function, args)

    def build(self, target: Any, state: Any) -> None:
        """BUILD: state for the object on the stack. Only our own records take it; a real object could run code here."""
        if isinstance(target, Call):
            target.state = state
            follows = (
                self.inline.get((target.function.module, target.function.name)) if isinstance(target.function, Global) else None
            )
            if follows is not None:
                self.stack[-1] = follows(self, target)
        elif isinstance(target, Global):
            self.recorder.note("changes", target.label, state)
        elif isinstance(target, NdArray | Dtype):
            self.call(SET_STATE, (target, state))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"<{describe(value)}>"


def as_key(value: Any) -> Any:
    """`value` as a dictionary key: hashing a deep tuple overflows the C stack, so only flat ones are kept as they are."""
    if value is None or isinstance(value, (str, int, float, bytes, Global, Call, Opaque)):
        return value
    if (
        isinstance(value, tuple)
        and len(value) <= 64
        and all(isinstance(v, (str, int, float, bytes, type(None))) for v in value)
    ):
        return value
    return Opaque(describe(value))


def extend(target: Any, values: list[Any], machine: Machine) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif isinstance(target, set):
        target.update(map(as_key, values))
    elif isinstance(target, Call):
        if target.items is None:
            target.items = []
        target.items.extend(values)
    elif isinstance(target, Global):
        machine.recorder.note("changes", target.label, tuple(values))


def set_items(target: Any, values: list[Any], machine: Machine) -> None:
    if len(values) % 2:
        raise BrokenPickle(f"a key without a value at byte {machine.place}")
    pairs = [(as_key(values[i]), values[i + 1]) for i in range(0, len(values), 2)]
    if isinstance(target, dict):
        target.update(pairs)
    elif isinstance(target, Call):
        if target.entries is None:
            target.entries = []
        target.entries.extend(pairs)
    elif isinstance(target, Global):
        machine.recorder.note("changes", target.label, tuple(values))
