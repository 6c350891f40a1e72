"""What a long stage says while it goes on: where it is, how far, and at what rate."""

from __future__ import annotations

import time
from collections.abc import Callable

Say = Callable[[str], None]


def silent(_: str) -> None:
    """Nobody is waiting at a terminal."""


class Meter:
    """Call it with the name of what is being done and how much of it was done: "measuring fc1.weight, 1.2 of 4.0 GB, 800 MB/s".

    `unit` is a plural ("edges", "tensors") or "MB", of which amounts are then given in bytes; `total` is in the same.
    """

    def __init__(self, say: Say, stage: str, unit: str, total: float = 0.0) -> None:
        self.say, self.stage, self.unit, self.total = say, stage, unit, total
        self.done = 0.0
        self.began = time.monotonic()

    def __call__(self, name: str, amount: float = 1.0) -> None:
        """Says that `amount` more is done."""
        self.done += amount
        scale = 1e-6 if self.unit == "MB" else 1.0
        # In the first moments a rate is an accident of the clock.
        rate = self.done * scale / max(time.monotonic() - self.began, 1e-3)
        of = f"{self.done * scale:,.0f}" + (f" of {self.total * scale:,.0f}" if self.total else "")
        self.say(f"{self.stage}{' ' * bool(name)}{name}, {of} {self.unit}, {rate:,.0f} {self.unit}/s")
