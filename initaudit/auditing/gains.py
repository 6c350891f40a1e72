"""Exact gains of recognised activations."""

from __future__ import annotations

from typing import Any

from initaudit.expect.gain import Gain, gain_of
from initaudit.pair.records import Feeds


class Gains:
    """Exact gains of activations, each computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Gain | None] = {}

    def of(self, feeds: Feeds) -> Gain | None:
        """The gain of an activation; a linear unit has gain 1 whatever constant multiplies it."""
        activation = feeds.activation
        if activation.name == "linear" or activation.function is None:
            return Gain(1.0, 1.0, 0.0, 1.0, 1.0, 0.0) if activation.name in ("linear", "softmax") else None
        custom = id(activation.function) if activation.name == "custom" else None
        key = (activation.name, tuple(sorted(activation.parameters.items())), round(activation.scale, 9), custom)
        if key not in self._known:
            self._known[key] = gain_of(activation.function)
        return self._known[key]


def main_feed(feeds: tuple[Feeds, ...]) -> Feeds | None:
    """The activation that a weight is judged by: the nearest that is not linear, else the nearest."""
    return next((f for f in feeds if f.activation.name != "linear"), feeds[0] if feeds else None)
