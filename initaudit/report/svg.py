"""The signal's path through a network as a picture: second moments by depth on a logarithmic axis, inline SVG."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from initaudit.report.depth import logs, span
from initaudit.report.style import number

WIDTH, HEIGHT = 860, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 14, 30


def depth_picture(depth: Sequence[tuple[float | None, float | None]], names: Sequence[str]) -> str:
    """Both curves over the weights in forward order; every point names its weight. "" where nothing is known."""
    scale = span([value for pair in depth for value in pair])
    if scale is None:
        return ""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Second moment of signal and gradient by depth">',
        *_axis(*scale),
        *_curve([pair[0] for pair in depth], names, scale, "signal"),
        *_curve([pair[1] for pair in depth], names, scale, "gradient"),
        f'<text x="{LEFT}" y="{HEIGHT - 8}">first weight</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">last weight</text>',
        "</svg>",
    ]
    return "".join(parts)


def _axis(low: float, high: float) -> list[str]:
    """A line at whole decades, at most about six of them."""
    step = max(1, math.ceil((high - low) / 6))
    parts = []
    for decade in range(math.ceil(low / step) * step, math.floor(high) + 1, step):
        y = _y(decade, low, high)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">1e{decade}</text>')
    return parts


def _curve(values: Sequence[float | None], names: Sequence[str], scale: tuple[float, float], kind: str) -> list[str]:
    """Line segments between neighbours that are known, and a point at each; a zero lies on the floor."""
    low, high = scale
    pieces: list[list[str]] = [[]]
    dots = []
    for index, level in enumerate(logs(values)):
        if level is None:
            pieces.append([])
            continue
        x = LEFT + (WIDTH - LEFT - RIGHT) * (index / max(1, len(values) - 1))
        y = _y(max(low, level), low, high)
        pieces[-1].append(f"{x:.1f},{y:.1f}")
        label = html.escape(f"{names[index] if index < len(names) else index}: {kind} {number(values[index])}")
        dots.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{label}</title></circle>')
    lines = [f'<polyline class="{kind}" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1]
    return lines + dots


def _y(level: float, low: float, high: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (high - level) / (high - low)
