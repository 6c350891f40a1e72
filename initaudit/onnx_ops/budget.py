"""What an untrusted graph may spend: elements, loop trips, expanded functions and time.

A few hundred bytes of ONNX can ask for petabytes (ConstantOfShape), double a tensor 45 times (Concat) or call functions
within functions 2^41 times. So operators that make large outputs reserve them before they allocate, and whoever runs a
graph does so under a budget.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from initaudit.errors import LimitExceeded

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """The bounds of one run; `elements` are of one output, `total_elements` of all outputs together.

    `shape_elements` are those of an output of which only the shape is computed, on torch's meta device. `seconds` are of the
    wall clock since the run began, `loop_seconds` those of them that were spent inside of loops.
    """

    elements: int = 2**30
    shape_elements: int = 2**33
    total_elements: int = 2**36
    trips: int = 100_000
    expansions: int = 20_000
    depth: int = 64
    seconds: float = math.inf
    loop_seconds: float = math.inf


@dataclass
class Meter:
    """What a run has spent of its budget so far; every method raises LimitExceeded when a bound is passed."""

    budget: Budget
    elements: int = 0
    trips: int = 0
    expansions: int = 0
    started: float = field(default_factory=time.monotonic)
    looped: float = 0.0
    _loops: int = 0
    _loop_began: float = 0.0

    def _spend(self, what: str, spent: float, limit: float, where: str) -> None:
        if spent > limit:
            raise LimitExceeded(where, f"{spent:.0f} {what}", f"at most {limit:.0f}", "--no-probe runs nothing")

    def reserve(self, count: int, where: str, real: bool = True) -> None:
        """Refuse an output of `count` elements that is too large, before it is allocated; `real` where it takes memory."""
        most = self.budget.elements if real else max(self.budget.elements, self.budget.shape_elements)
        self._spend("elements in one output", count, most, where)

    def produced(self, count: int, where: str) -> None:
        """Account for an output of `count` elements, and look at the clock."""
        self.reserve(count, where)
        self.elements += count
        self._spend("elements in all outputs", self.elements, self.budget.total_elements, where)
        self._spend("seconds", time.monotonic() - self.started, self.budget.seconds, where)

    def trip(self, where: str) -> None:
        """Account for one more trip through a loop's body."""
        self.trips += 1
        self._spend("loop trips", self.trips, self.budget.trips, where)
        looped = self.looped + (time.monotonic() - self._loop_began if self._loops else 0.0)
        self._spend("seconds in loops", looped, self.budget.loop_seconds, where)
        self._spend("seconds", time.monotonic() - self.started, self.budget.seconds, where)

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Around a loop, whose time counts; that of one inside another counts once."""
        if not self._loops:
            self._loop_began = time.monotonic()
        self._loops += 1
        try:
            yield
        finally:
            self._loops -= 1
            if not self._loops:
                self.looped += time.monotonic() - self._loop_began

    def expansion(self, where: str, depth: int) -> None:
        """Account for one more call of a function's body, at `depth` calls within one another."""
        self.expansions += 1
        self._spend("expanded functions", self.expansions, self.budget.expansions, where)
        self._spend("functions within one another", depth, self.budget.depth, where)


# The meter in force travels with the call: an fx graph calls an operator with the standard's arguments only.
_meter: ContextVar[Meter | None] = ContextVar("meter", default=None)


@contextmanager
def metered(budget: Budget) -> Iterator[Meter]:
    """Run the block under a fresh meter of `budget`."""
    meter = Meter(budget)
    token = _meter.set(meter)
    try:
        yield meter
    finally:
        _meter.reset(token)


def current_meter() -> Meter:
    """The meter in force; without one, a fresh one of the default budget."""
    return _meter.get() or Meter(Budget())


def reserve(shape: Sequence[int], where: str, data: Tensor | None = None) -> None:
    """Refuse an output of `shape` that the budget in force does not allow, before it is allocated. Raises LimitExceeded.

    `data` is the input on whose device it will lie.
    """
    current_meter().reserve(math.prod(shape), where, data is None or not data.is_meta)
