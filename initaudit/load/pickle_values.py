"""What the pickle reader makes of a stream: plain values, tensors and storages of our own, inert records of the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from initaudit.load.spans import Span, show

_NUMBER = re.compile(r"\?|b1|[iuf][1248]|c(8|16)|f16")  # what numpy calls a bool, an integer, a float, a complex number
ARGUMENT_CHARACTERS = 60  # of each argument that a message repeats
DESCRIBED_DEPTH = 3
DESCRIBED_ITEMS = 4
VARIANTS = 5  # calls of one function with other arguments that are told apart


@dataclass(eq=False, slots=True)
class Global:
    """A name that the stream asks for, never imported. `module` may describe a value that only running it would give."""

    module: str
    name: str

    @property
    def label(self) -> str:
        return f"{show(self.module)}.{show(self.name)}"


@dataclass(eq=False, slots=True)
class Call:
    """What a real unpickler would have called or built, with what it would have put into the result."""

    function: Any
    args: Any
    state: Any = None
    items: list[Any] | None = None
    entries: list[tuple[Any, Any]] | None = None


@dataclass(eq=False, slots=True)
class Opaque:
    """A value that cannot be a dictionary key without being run, or a persistent id that nobody knows."""

    text: str


@dataclass(eq=False, slots=True)
class Storage:
    """Elements that tensors are views of. `span` is None where they are missing, and `problem` then says why.

    `identity` tells it from the storages of other files and archives, which count theirs from 0 too.
    """

    key: str
    dtype: str
    elements: int
    span: Span | None
    big_endian: bool = False
    problem: str = ""
    identity: str = ""


@dataclass(eq=False, slots=True)
class Affine:
    """How a quantised tensor becomes numbers: scale * (q - zero_point), per tensor or along `axis` (-1: per tensor)."""

    scale: Any
    zero_point: Any
    axis: int = -1


@dataclass(eq=False, slots=True)
class Tensor:
    """A strided view of a storage; `offset` and `stride` count elements. `parameter` is True for an nn.Parameter.

    `sparse` is the layout of a sparse tensor, of which only `shape` and `dtype` are its own, and the tensors it is made of.
    Where `conjugate` or `negative` is set, its values are those of the storage after that step.
    """

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    parameter: bool = False
    requires_grad: bool = False
    quantizer: Affine | None = None
    sparse: tuple[str, tuple[Tensor, ...]] | None = None
    conjugate: bool = False
    negative: bool = False


@dataclass(eq=False, slots=True)
class Dtype:
    """numpy.dtype as its pickle builds it: a code such as "f4", then a byte order by its state."""

    code: str
    big_endian: bool = False

    @property
    def numpy(self) -> np.dtype[Any]:
        """numpy's dtype in native order; raises TypeError for a code that is no plain number (text, records, objects)."""
        if _NUMBER.fullmatch(self.code) is None:
            raise TypeError(f"{show(self.code)} is no dtype of numbers")
        return np.dtype(self.code)


@dataclass(eq=False, slots=True)
class NdArray:
    """numpy.ndarray as its pickle builds it; `raw` stays None for one of `objects`."""

    shape: tuple[int, ...] = ()
    dtype: Dtype | None = None
    fortran: bool = False
    raw: Span | None = None
    objects: list[Any] | None = None


@dataclass(slots=True)
class Event:
    """Something that unpickling would do: `verb` is "imports", "calls", "builds", "changes", or "asks for" behind a break."""

    verb: str
    label: str
    detail: str = ""
    count: int = 1


@dataclass
class Recorder:
    """What unpickling would have done, once for each name, in the order of the stream.

    `raw` are the members of archives that a pickle takes for the elements of a storage, by their `id`.
    """

    events: dict[str, Event] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)
    raw: dict[int, object] = field(default_factory=dict)

    def note(self, verb: str, label: str, args: Any = None) -> None:
        """Adds an event, or makes the one of the same name more specific: what is called was imported first.

        The same function with other arguments is another event, up to `VARIANTS` of them.
        """
        detail = "" if args is None else describe(args)
        known = self.events.get(label)
        if known is not None and known.verb != "imports" and verb != "imports" and known.detail != detail:
            label = next((key for key in _variants(label) if self._takes(key, detail)), label)
            known = self.events.get(label)
        if known is None:
            self.events[label] = Event(verb, label.partition("\0")[0], detail)
        elif known.verb == "imports":
            known.verb, known.detail = verb, detail
        elif verb != "imports":
            known.count += 1

    def _takes(self, key: str, detail: str) -> bool:
        return key not in self.events or self.events[key].detail == detail

    def take(self, other: Recorder) -> None:
        """Adds what another recorder holds."""
        for key, event in other.events.items():
            known = self.events.get(key)
            if known is None or known.verb == "imports":
                self.events[key] = event
            elif known.detail == event.detail:
                known.count = max(known.count, event.count)  # the same bytes may have been read twice
            else:
                self.note(event.verb, event.label)
        self.broken += other.broken
        self.raw.update(other.raw)


def _variants(label: str) -> list[str]:
    return [f"{label}\0{number}" for number in range(1, VARIANTS)]


def label_of(value: Any) -> str:
    """What a message calls a function: its name, or how it came about."""
    if isinstance(value, Global):
        return value.label
    if isinstance(value, Call):
        return f"the result of {describe(value)}"
    return describe(value)


def describe(value: Any, depth: int = DESCRIBED_DEPTH) -> str:
    """A short text for a value of a stream; never calls a method of anything that the stream built."""
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return repr(value) if value.bit_length() < 128 else f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes, bytearray)):
        return show(repr(value[:ARGUMENT_CHARACTERS]), ARGUMENT_CHARACTERS)
    if isinstance(value, Global):
        return value.label
    if depth == 0:
        return "..."
    inner: Callable[[Any], str] = lambda item: describe(item, depth - 1)  # noqa: E731
    if isinstance(value, Call):
        arguments = describe(value.args, depth - 1)
        return f"{label_of(value.function) if isinstance(value.function, Global) else inner(value.function)}{arguments}"
    if isinstance(value, tuple):
        return f"({', '.join(map(inner, value[:DESCRIBED_ITEMS]))}{', ...' if len(value) > DESCRIBED_ITEMS else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(inner, value[:DESCRIBED_ITEMS]))}{', ...' if len(value) > DESCRIBED_ITEMS else ''}]"
    if isinstance(value, dict):
        return f"a dict of {len(value)}"
    return f"a {type(value).__name__.lower()}"
