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

from initaudit.errors import LimitExceeded


@dataclass(frozen=True)
class Budget:
    """The bounds of one run; `elements` are of one output, `total_elements` of all outputs together, `seconds` wall clock."""

    elements: int = 2**30
    total_elements: int = 2**36
    trips: int = 100_000
    expansions: int = 20_000
    depth: int = 64
    seconds: float = math.inf


@dataclass
class Meter:
    """What a run has spent of its budget so far; every method raises LimitExceeded when a bound is passed."""

    budget: Budget
    elements: int = 0
    trips: int = 0
    expansions: int = 0
    started: float = field(default_factory=time.monotonic)

    def _spend(self, what: str, spent: float, limit: float, where: str) -> None:
        if spent > limit:
            raise LimitExceeded(where, f"{spent:.0f} {what}", f"at most {limit:.0f}", "raise the limit if the model is trusted")

    def reserve(self, count: int, where: str) -> None:
        """Refuse an output of `count` elements that is too large, before it is allocated."""
        self._spend("elements in one output", count, self.budget.elements, where)

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
        self._spend("seconds", time.monotonic() - self.started, self.budget.seconds, where)

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


def reserve(shape: Sequence[int], where: str) -> None:
    """Refuse an output of `shape` that the budget in force does not allow, before it is allocated. Raises LimitExceeded."""
    current_meter().reserve(math.prod(shape), where)
