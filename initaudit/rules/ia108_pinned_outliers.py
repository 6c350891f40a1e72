"""IA108: weights pinned to a distant truncation bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.measure.blocks import blocks, flat, forget
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import each, expression_of
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, fresh_layers, initial, names

# The largest of 10^9 normal values lies at 6.1 standard deviations: a value at 12 was not drawn.
_FAR = 12.0
_SHARE = 0.01  # more than this share at one value is a distribution of its own, quantised or masked
_POWER = 0.5  # of all other weights together: below, the layer does what its law made it do
_SAMPLE = 1 << 20
_NORMAL_MEDIAN = 0.6745  # of |z| for z ~ N(0, 1)
# So many stretches of so many values tell the spread to a few per cent; a tensor whose largest value is nearer than this share
# of what it takes need not be read again.
_STRETCHES, _LONG, _NEARLY = 32, 512, 0.75


class PinnedOutliers(Rule):
    """A handful of weights sit exactly at a distant truncation bound.

    What it does: compares the largest magnitude with the spread of the bulk (median of |w|), and counts how many weights hold
    exactly that value, in one tensor or, one in each, in several. It is a warning where these weights hold half as much power
    (sum of squares) as all the others of their tensor.

    Why it is bad: a weight of -2 among weights of 0.02 dominates its unit: one input decides what the unit says.

    Example: `trunc_normal_` in bfloat16, where rounding sends the tails of the inverse error function to the bounds.

    Instead: draw in float32 and convert (even that pins one weight in 16 million), or give bounds in proportion:
    `trunc_normal_(w, std=0.02, a=-0.04, b=0.04)`.

    Source: https://github.com/pytorch/pytorch/issues/145498.
    """

    code = "IA108"
    name = "pinned-outliers"
    severity = "warning"
    phase = "init"
    summary = "a handful of weights sit exactly at a distant truncation bound"
    thresholds = (
        Threshold("far", _FAR, "standard deviations of the bulk", "the largest of a billion normal values lies at 6"),
        Threshold(
            "share", _SHARE, "of the values at most", "more at one value are a distribution of its own, quantised or masked"
        ),
        Threshold("power", _POWER, "of all other weights together", "below, the layer does what its law made it do: a remark"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all tensors of this kind."""
        if not initial(evidence):
            return
        seen = {
            x.tensor: (x, *pinned)
            for x in fresh_layers(evidence, "contraction", "recurrent", "embedding")
            if (pinned := _pinned(x, self.limit(evidence, "far"), self.limit(evidence, "share")))
        }
        # One value far out may be a hand's work; the same one in two tensors is a bound.
        bounds = [abs(bound) for _, bound, _, _ in seen.values()]
        found = [f for f in seen.values() if f[2] > 1 or bounds.count(abs(f[1])) > 1]
        if not found:
            return
        # One such weight in a large matrix, as float32 draws it once in 16 million values, is a unit among thousands.
        power = max(count * bound**2 / (x.moments.count * spread**2) for x, bound, count, spread in found)
        layer, bound, count, spread = found[0]
        yield self.finding(
            f"{count} of {layer.moments.count:,} weights {'is' if count == 1 else 'are'} exactly {bound:.4g}, "
            f"{abs(bound) / spread:.0f} standard deviations of the others ({spread:.3g}) from zero; such a weight decides its "
            "unit alone" + (f"; the same in {names([x.tensor for x, *_ in found[1:]])}" if len(found) > 1 else ""),
            each(
                f"{{0}}.data.copy_(torch.nn.init.trunc_normal_(torch.empty({{0}}.shape), std={spread:.3g}, "
                f"a={-2 * spread:.3g}, b={2 * spread:.3g}))",
                [expression_of(x) for x, *_ in found],
            )
            + "  # drawn in float32, converted after",
            severity="warning" if power > self.limit(evidence, "power") else "info",
            measured=bound,
            expected=spread,
            law="the largest of a billion normal values lies at 6.1 standard deviations, and no two are equal",
            standard_errors=bound / spread,
            related=tuple(x.tensor for x, *_ in found[1:]),
            **fields(layer),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A normal law has no such values."""
        return (example("He", lambda: mlp(64, 128, 128, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Three weights at -2."""
        return (example("three weights at -2", lambda: mlp(64, 128, 128, 5, gain=0.3, change=_pin)),)


def _pinned(layer: LayerEvidence, far: float, share: float) -> tuple[float, int, float] | None:
    """(value, how many, spread of the bulk), or None. Moments rule most tensors out before anything is read."""
    moments = layer.moments
    largest = max(abs(moments.min), abs(moments.max))
    if not moments.m2 > 0 or moments.count < 1000 or not largest > min(6.0, far) * moments.std:
        return None
    values = layer.read()
    if largest < _NEARLY * far * _spread(values):
        return None
    step = max(1, values.size // _SAMPLE)
    picked, seen, at = [], 0, 0
    for block in blocks(values):
        size = np.abs(block.astype(np.float32, copy=False))
        picked.append(size[-seen % step :: step])
        seen += size.size
        at += int(np.count_nonzero(size == np.float32(largest)))
        forget(block)
    spread = float(np.median(np.concatenate(picked))) / _NORMAL_MEDIAN
    if not spread > 0 or largest < far * spread or at > share * values.size:
        return None
    return (moments.min if -moments.min >= moments.max else moments.max), at, spread


def _spread(values: np.ndarray[Any, Any]) -> float:
    """The spread of the bulk as a few values tell, in stretches as long as they are far fewer to fetch from a file."""
    line = flat(values)
    if line is None or line.size < _STRETCHES * _LONG * 8:
        return 0.0
    starts = np.linspace(0, line.size - _LONG, _STRETCHES).astype(np.int64)
    picked = np.concatenate([line[start : start + _LONG] for start in starts])
    forget(line)
    return float(np.median(np.abs(picked.astype(np.float32)))) / _NORMAL_MEDIAN


def _pin(model: Any) -> None:
    linear(model)[1].weight.view(-1)[7:5000:2000].fill_(-2.0)
