"""The signal and its gradient by depth: numbers on a logarithmic scale, and as a line of small bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

from initaudit.rules.rule import Block

_BARS = "▁▂▃▄▅▆▇█"


def logs(values: Sequence[float | None]) -> list[float | None]:
    """log10 of each second moment; None for what is unknown, -inf for zero."""
    return [None if v is None or not math.isfinite(v) or v < 0 else math.log10(v) if v else -math.inf for v in values]


def span(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Bottom and top of the scale in decades; at least two of them, so that a healthy signal looks level."""
    finite = [v for v in logs(values) if v is not None and math.isfinite(v)]
    if not finite:
        return None
    low, high = min(finite), max(finite)
    slack = max(0.0, 2.0 - (high - low)) / 2
    return low - slack, high + slack


def sparkline(values: Sequence[float | None], width: int = 60) -> str:
    """One bar a weight; where there are more than `width`, one bar for the geometric mean of several. Unknown: "·"."""
    scale = span(values)
    if scale is None:
        return "·" * min(width, len(values))
    low, high = scale
    bars = ""
    for bucket in _buckets(logs(values), width):
        known = [v for v in bucket if v is not None]
        if not known:
            bars += "·"
            continue
        level = sum(known) / len(known)
        place = 0.0 if level == -math.inf else (level - low) / (high - low)
        bars += _BARS[min(len(_BARS) - 1, max(0, int(place * len(_BARS))))]
    return bars


def ends(values: Sequence[float | None]) -> tuple[float, float] | None:
    """The first and the last known value."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    return (known[0], known[-1]) if known else None


def _buckets(values: Sequence[float | None], width: int) -> list[Sequence[float | None]]:
    count = min(width, len(values))
    return [values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count)]


def in_short(profile: Sequence[Block]) -> str:
    """One line: "over 9 blocks, 1 to 17: signal 0.5 to 1e-06, gradient 2e-12 to 0.1, gain of the gradient 0.1 to 0.2"."""
    parts = []
    for label, values in (("signal", [b.signal for b in profile]), ("gradient", [b.gradient for b in profile])):
        known = [v for v in values if v is not None]
        if known:
            parts.append(f"{label} {known[0]:.2g} to {known[-1]:.2g}")
    gains = [b.gain for b in profile if b.gain is not None]
    if gains:
        parts.append(f"gain of the gradient {min(gains):.2g} to {max(gains):.2g}")
    if not parts:
        return ""
    count = f"{len(profile)} block" + ("s" if len(profile) != 1 else "")
    return f"over {count}, {profile[0].start} to {profile[-1].end}: " + ", ".join(parts)
