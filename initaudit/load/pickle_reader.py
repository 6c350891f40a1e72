"""The opcodes of pickle protocols 0 to 5, after CPython's Lib/pickle.py, on the inert values of `pickle_machine`.

Where CPython's C implementation takes more than its Python one (a number that ends at a zero byte, an octal one), so does this
reader: a stream that it gave up earlier than a real unpickler could hide what runs behind. A value that cannot be told is a
record of that, and reading goes on; only a lost position in the stream ends it.
"""

from __future__ import annotations

import codecs
import re
import struct
import sys
from collections.abc import Callable
from typing import Any

from initaudit.load.pickle_machine import MARK, MAX_DIGITS, BrokenPickle, Machine, as_key, extend, set_items
from initaudit.load.pickle_values import Opaque
from initaudit.load.spans import reason, show

__all__ = ["BrokenPickle", "read", "read_or_remains"]

Step = Callable[[Machine], None]
# What asks for a name, where reading stopped: GLOBAL or INST, or two short texts before a STACK_GLOBAL
_NAMES = re.compile(
    rb"[ci]([A-Za-z_][\w.]{1,80})\n([A-Za-z_][\w.]{1,80})\n"
    rb"|\x8c.([A-Za-z_][\w.]{1,80})(?:\x94|[qr].{1,4}?)?\x8c.([A-Za-z_][\w.]{1,80})(?:\x94|[qr].{1,4}?)?\x93",
    re.DOTALL,
)
_SCANNED = 64 << 20  # bytes behind the place where a stream broke off


class TooManyOpcodes(BrokenPickle):
    """The bound of ours: what stands behind was not looked at."""


def read_or_remains(machine: Machine, label: str) -> Any:
    """The value of the stream; where it breaks off, what it had built, and the names that the bytes behind ask for.

    A real unpickler may get further than this one, so names of the standard library behind the break are reported too.
    """
    try:
        return read(machine)
    except BrokenPickle as error:
        recorder = machine.recorder
        machine.broke = True
        recorder.broken.append(f"{label} breaks off: {reason(error)}")
        if isinstance(error, TooManyOpcodes):
            recorder.note(
                "takes", f"more than {machine.most} opcodes, which no checkpoint needs: what stands behind was not read"
            )
        for found in _NAMES.finditer(machine.data[machine.place : machine.place + _SCANNED]):
            module, name = (part.decode() for part in found.groups() if part is not None)
            if module.partition(".")[0] in sys.stdlib_module_names and (module, name) not in machine.known:
                recorder.note("asks for", f"{module}.{name}, behind the place where reading stopped")
        return machine.remains()


def read(machine: Machine) -> Any:
    """Runs the stream to its STOP and gives the value on the stack.

    Raises `BrokenPickle` where a real unpickler would fail too, or at a bound of ours; what was recorded until then stays.
    """
    while True:
        opcode = machine.take(1)
        if opcode == b".":
            return machine.pop()
        step = OPCODES.get(opcode)
        machine.opcodes += 1
        if step is None:
            raise BrokenPickle(f"byte {machine.place - 1} is no opcode")
        if machine.opcodes > machine.most:
            raise TooManyOpcodes(f"more than {machine.most} opcodes")
        try:
            step(machine)
        except (ValueError, TypeError, IndexError, OverflowError, struct.error) as error:
            raise BrokenPickle(f"opcode {show(opcode)} at byte {machine.place}: {show(error)}") from error


def _number(machine: Machine, width: int) -> int:
    return int.from_bytes(machine.take(width), "little")


def _sized(width: int, signed: bool = False) -> Callable[[Machine], bytes]:
    """Reads a length of `width` bytes and that many bytes."""
    return lambda machine: machine.take(int.from_bytes(machine.take(width), "little", signed=signed))


def _pushing(make: Callable[[Machine], Any]) -> Step:
    return lambda machine: machine.stack.append(make(machine))


def _c_text(machine: Machine) -> bytes:
    """A line as C sees it: it ends at a zero byte."""
    return machine.line().partition(b"\0")[0]


def _int_line(machine: Machine) -> Any:
    text = _c_text(machine)
    if text in (b"00", b"01"):
        return text == b"01"
    return _integer(text, 0)


def _integer(text: bytes, base: int) -> Any:
    if len(text) > MAX_DIGITS:
        return Opaque(f"a number of {len(text)} digits")
    for tried in (base, 8, 10):  # strtol reads a leading zero as octal
        try:
            return int(text, tried)
        except ValueError:
            continue
    return Opaque("a text where a number was announced")


def _float_line(machine: Machine) -> Any:
    text = _c_text(machine)
    try:
        return float(text)
    except ValueError:
        return Opaque("a text where a number was announced")


def _quoted(machine: Machine) -> Any:
    text = machine.line().strip()
    if len(text) < 2 or text[:1] != text[-1:] or text[:1] not in (b'"', b"'"):
        return Opaque("a text without quotes")
    try:
        return str(codecs.escape_decode(text[1:-1])[0].decode("latin-1"))
    except ValueError:
        return Opaque("a text with a broken escape")


def _text(read_bytes: Callable[[Machine], bytes], encoding: str) -> Step:
    def make(machine: Machine) -> Any:
        raw = read_bytes(machine)
        try:
            return raw.decode(encoding, "surrogatepass" if encoding == "utf-8" else "strict")
        except ValueError:
            return raw.decode("latin-1")

    return _pushing(make)


def _mark(machine: Machine) -> None:
    machine.stack.append(MARK)


def _pop(machine: Machine) -> None:
    if not machine.stack:
        raise BrokenPickle(f"nothing is on the stack at byte {machine.place}")
    machine.stack.pop()


def _tuple(count: int) -> Step:
    def step(machine: Machine) -> None:
        values = [machine.pop() for _ in range(count)]
        machine.stack.append(tuple(reversed(values)))

    return step


def _dict(machine: Machine) -> None:
    found: dict[Any, Any] = {}
    set_items(found, machine.pop_mark(), machine)
    machine.stack.append(found)


def _append(machine: Machine) -> None:
    value = machine.pop()
    extend(machine.top(), [value], machine)


def _appends(machine: Machine) -> None:
    values = machine.pop_mark()
    extend(machine.top(), values, machine)


def _set_item(machine: Machine) -> None:
    value, key = machine.pop(), machine.pop()
    set_items(machine.top(), [key, value], machine)


def _set_many(machine: Machine) -> None:
    values = machine.pop_mark()
    set_items(machine.top(), values, machine)


def _get(number: Callable[[Machine], int]) -> Step:
    def step(machine: Machine) -> None:
        place = number(machine)
        if place not in machine.memo:
            raise BrokenPickle(f"nothing is remembered as {place}")
        machine.stack.append(machine.memo[place])

    return step


def _put(number: Callable[[Machine], int]) -> Step:
    def step(machine: Machine) -> None:
        place = number(machine)
        if place < 0:
            raise ValueError("a negative place in the memo")
        machine.memo[place] = machine.top()

    return step


def _memoize(machine: Machine) -> None:
    machine.memo[len(machine.memo)] = machine.top()


def _global(machine: Machine) -> None:
    machine.stack.append(machine.find(*_two_lines(machine)))


def _two_lines(machine: Machine) -> tuple[str, str]:
    module, name = machine.line(), machine.line()
    return module.decode("utf-8", "backslashreplace"), name.decode("utf-8", "backslashreplace")


def _stack_global(machine: Machine) -> None:
    name, module = machine.pop(), machine.pop()
    machine.stack.append(machine.find(module, name))


def _extension(width: int) -> Step:
    # A real unpickler looks the code up in copyreg's table, which any imported module may have filled
    return _pushing(lambda machine: machine.find("copyreg extension", str(_number(machine, width))))


def _reduce(machine: Machine) -> None:
    args, function = machine.pop(), machine.pop()
    machine.stack.append(machine.call(function, args))


def _new_object(machine: Machine) -> None:
    args, kind = machine.pop(), machine.pop()
    machine.stack.append(machine.call(kind, args, "builds"))


def _new_object_ex(machine: Machine) -> None:
    keywords, args, kind = machine.pop(), machine.pop(), machine.pop()
    machine.stack.append(machine.call(kind, (*args, keywords) if keywords and isinstance(args, tuple) else args, "builds"))


def _instance(machine: Machine) -> None:
    values = machine.pop_mark()
    found = machine.find(*_two_lines(machine))
    machine.stack.append(machine.call(found, tuple(values)))


def _object(machine: Machine) -> None:
    values = machine.pop_mark()
    if not values:
        raise BrokenPickle("OBJ without a class")
    machine.stack.append(machine.call(values[0], tuple(values[1:])))


def _build(machine: Machine) -> None:
    state = machine.pop()
    machine.build(machine.top(), state)


def _persistent(make: Callable[[Machine], Any]) -> Step:
    return _pushing(lambda machine: machine.persistent(make(machine)))


def _out_of_band(machine: Machine) -> None:
    machine.stack.append(Opaque("an out-of-band buffer, which is not in the file"))


def _byte(machine: Machine) -> int:
    return _number(machine, 1)


def _quad(machine: Machine) -> int:
    return _number(machine, 4)


def _line_number(machine: Machine) -> int:
    return int(_c_text(machine)[:MAX_DIGITS], 10)


def _nothing(machine: Machine) -> None:
    """PROTO's and FRAME's bytes are read by their own steps; READONLY_BUFFER changes nothing here."""


OPCODES: dict[bytes, Step] = {
    b"\x80": lambda m: _nothing(m) if m.take(1) else None,
    b"\x95": lambda m: _nothing(m) if m.take(8) else None,
    b"\x98": _nothing,
    b"\x97": _out_of_band,
    b"(": _mark,
    b"0": _pop,
    b"1": lambda m: m.pop_mark().clear(),
    b"2": _pushing(lambda m: m.top()),
    # numbers
    b"N": _pushing(lambda m: None),
    b"\x88": _pushing(lambda m: True),
    b"\x89": _pushing(lambda m: False),
    b"I": _pushing(_int_line),
    b"L": _pushing(lambda m: _integer(_c_text(m).removesuffix(b"L"), 0)),
    b"J": _pushing(lambda m: int.from_bytes(m.take(4), "little", signed=True)),
    b"K": _pushing(_byte),
    b"M": _pushing(lambda m: _number(m, 2)),
    b"\x8a": _pushing(lambda m: int.from_bytes(_sized(1)(m), "little", signed=True)),
    b"\x8b": _pushing(lambda m: int.from_bytes(_sized(4, signed=True)(m), "little", signed=True)),
    b"F": _pushing(_float_line),
    b"G": _pushing(lambda m: struct.unpack(">d", m.take(8))[0]),
    # text and bytes; Python 2's str is read as Latin-1, which loses nothing
    b"S": _pushing(_quoted),
    b"T": _text(_sized(4, signed=True), "latin-1"),
    b"U": _text(_sized(1), "latin-1"),
    b"V": _text(Machine.line, "raw-unicode-escape"),
    b"X": _text(_sized(4), "utf-8"),
    b"\x8c": _text(_sized(1), "utf-8"),
    b"\x8d": _text(_sized(8), "utf-8"),
    b"B": _pushing(_sized(4)),
    b"C": _pushing(_sized(1)),
    b"\x8e": _pushing(_sized(8)),
    b"\x96": _pushing(_sized(8)),
    # containers
    b"]": _pushing(lambda m: []),
    b"}": _pushing(lambda m: {}),
    b")": _pushing(lambda m: ()),
    b"\x8f": _pushing(lambda m: set()),
    b"t": _pushing(lambda m: tuple(m.pop_mark())),
    b"l": _pushing(lambda m: m.pop_mark()),
    b"d": _dict,
    b"\x85": _tuple(1),
    b"\x86": _tuple(2),
    b"\x87": _tuple(3),
    b"\x91": _pushing(lambda m: frozenset(map(as_key, m.pop_mark()))),
    b"a": _append,
    b"e": _appends,
    b"\x90": _appends,
    b"s": _set_item,
    b"u": _set_many,
    # memo
    b"g": _get(_line_number),
    b"h": _get(_byte),
    b"j": _get(_quad),
    b"p": _put(_line_number),
    b"q": _put(_byte),
    b"r": _put(_quad),
    b"\x94": _memoize,
    # names, calls and objects
    b"c": _global,
    b"\x93": _stack_global,
    b"\x82": _extension(1),
    b"\x83": _extension(2),
    b"\x84": _extension(4),
    b"R": _reduce,
    b"\x81": _new_object,
    b"\x92": _new_object_ex,
    b"i": _instance,
    b"o": _object,
    b"b": _build,
    b"P": _persistent(lambda m: m.line().decode("utf-8", "replace")),
    b"Q": _persistent(lambda m: m.pop()),
}
