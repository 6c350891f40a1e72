"""IA202: units that are copies of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.measure.symmetry import duplicate_rows
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.gates import choosers
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.structure import readers
from initaudit.rules.support import fields, initial, names

if TYPE_CHECKING:
    from initaudit.pair.records import Feeds


# A unit of fewer weights can be equal to another by chance where values are rounded to 16 bits (of 64 units of one weight some
# eight are, before gradients are compared), but never half of them.
_LEAST, _BY_CHANCE = 4, 0.5
# Shares of copies from which they cost capacity worth a warning, and from which the layer is broken.
_SOME, _MANY = 0.02, 0.1
# Rows whose difference is this share of their norm are the same but for rounding.
_NEAR = 1e-6


class DuplicateUnits(Rule):
    """Units with the same incoming weights get the same gradient, so that they stay copies for ever.

    What it does: counts units (rows along the output) that have equal values (within a millionth), equal biases and equal
    gradients in the probe, whatever their order; a unit and its negative count as equal where their gradients are each other's
    negatives too, as behind tanh. Without a probe the outgoing weights are compared. Equal values alone are not reported:
    different outgoing weights tell copies apart at the first step.

    Why it is bad: a thousand units of which half are copies are five hundred, at the cost of a thousand.

    Example: widening a network by repeating both the incoming and the outgoing weights.

    Instead: repeat the incoming weights, and divide the outgoing ones unevenly; or draw the new units.

    Source: Goodfellow et al. 2016, section 8.4; Chen et al. 2016 (Net2Net), section 2.3, which adds noise for this reason.
    """

    code = "IA202"
    name = "duplicate-units"
    severity = "error"
    phase = "any"
    summary = "units with the same incoming and outgoing weights, which get the same gradient for ever"
    thresholds = (
        Threshold("share", _SOME, "of the units", "a fiftieth of copies costs capacity worth a warning"),
        Threshold("error", _MANY, "of the units", "with a tenth of copies the layer is broken"),
        Threshold(
            "weights", _LEAST, "weights of a unit, at least", "fewer can be equal by chance where values are rounded to 16 bits"
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each weight."""
        trace = evidence.trace
        if trace is None:
            yield from self._unprobed(evidence)
            return
        if trace.broken:
            return
        for layer in evidence.layers:
            # Copies at one place of use that differ at another are none.
            seen = [r.units for r in layer.records if r.units is not None and r.gradient_norm]
            units = max(seen, key=lambda u: u.distinct, default=None)
            if units is None or units.distinct >= units.count or layer.moments.m2 == 0 or not layer.pair.trainable:
                continue
            # Rows of zeros are dead units, not copies: another rule's.
            copies = units.count - units.distinct
            if copies and len(rows := _rows_of(layer)) == units.count:
                # The probe compares with the largest row of all: beside one of 1e5 all small rows look equal.
                copies = min(copies, sum(len(g) - 1 for g in duplicate_rows(rows, sign=True, tolerance=_NEAR)))
            copies -= max(0, _zero_rows(layer) - 1)
            few = layer.moments.count / units.count < self.limit(evidence, "weights")
            if copies < max(1.0, (_BY_CHANCE if few else self.limit(evidence, "share")) * units.count):
                continue
            yield self._copies(evidence, layer, copies, units.count, "equal weights, biases and gradients in the probe")

    def _copies(self, evidence: Evidence, layer: LayerEvidence, copies: int, units: int, why: str) -> Finding:
        idle = choosers(evidence, [layer])
        return self.finding(
            f"{copies} of {units} units ({100 * copies / units:.0f} %) are copies of others, or their negatives: {why}, so "
            f"they stay equal for ever and the layer works as one of {units - copies}; no draw gives two equal units"
            + (f"; {names(idle)} is to choose between them, and gets no gradient as they are equal" if idle else ""),
            init_line(layer),
            severity="error" if copies >= self.limit(evidence, "error") * units else "warning",
            measured=float(units - copies),
            expected=float(units),
            law=EXACT + "two drawn units are never equal",
            related=tuple(idle),
            **fields(layer),
        )

    def _unprobed(self, evidence: Evidence) -> Iterator[Finding]:
        """Without a probe: units that are equal in all that goes in and in all that reads them, by their values alone."""
        for layer in evidence.layers:
            if layer.pair.role != "contraction" or not layer.moments.m2 > 0 or not layer.pair.trainable:
                continue
            behind = readers(evidence, layer) if initial(evidence) else ()
            rows = _rows_of(layer)
            if not behind or len(rows) < 2 or rows.shape[1] < self.limit(evidence, "weights"):
                continue
            odd = all(_is_odd(f) for f in layer.feeds)
            # What else belongs to a unit is compared for those alone that are equal here: a copy of all would take gigabytes.
            alike = [g for g in duplicate_rows(rows, sign=odd, tolerance=_NEAR) if rows[g[0]].any()]
            blocks = [rows, *_bias_of(evidence, layer, len(rows)), *(_columns_of(x) for x in behind)] if alike else []
            if not alike or any(len(b) != len(rows) for b in blocks):
                continue
            kept = [b[sorted(i for g in alike for i in g)].astype(np.float64) for b in blocks]
            scaled = np.concatenate([b / max(float(np.abs(b).max()), 1e-300) for b in kept], axis=1)
            copies = sum(len(g) - 1 for g in duplicate_rows(scaled, sign=odd, tolerance=_NEAR))
            if copies >= max(1.0, self.limit(evidence, "share") * len(rows)):
                yield self._copies(evidence, layer, copies, len(rows), "equal weights in, equal biases and equal weights out")

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Copies that their outgoing weights tell apart."""
        return (
            example("equal rows, different columns behind", lambda: mlp(32, 64, 48, 5, change=_rows)),
            # Shang et al. 2016; Balduzzi et al. 2017 (looks-linear initialization): ReLU tells a unit from its negative.
            example("a unit and its negative before ReLU", lambda: mlp(32, 64, 48, 5, change=_mirrored)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Copies on both sides."""
        return (
            example("equal rows and equal columns behind", lambda: mlp(32, 64, 48, 5, change=_both)),
            example("one input, and units of two kinds", lambda: mlp(1, 32, 3, change=_two_kinds)),
            example("a unit and its negative before tanh", lambda: mlp(32, 64, 48, 5, act="Tanh", gain=1.0, change=_mirrored)),
        )


def _is_odd(feed: Feeds) -> bool:
    """Whether the activation turns round with its input."""
    function = feed.activation.function
    at = np.linspace(0.1, 3.0, 7)
    return function is not None and bool(np.allclose(function(-at), -function(at), rtol=1e-6, atol=1e-9))


def _bias_of(evidence: Evidence, layer: LayerEvidence, units: int) -> list[np.ndarray[Any, Any]]:
    array = evidence.checkpoint.arrays.get(layer.pair.bias or "")
    return [] if array is None or array.size != units else [array.read().reshape(units, 1)]


def _columns_of(layer: LayerEvidence) -> np.ndarray[Any, Any]:
    """The values with one unit that is read a row; no rows where the axes do not tell."""
    axes = [i for i, a in enumerate(layer.pair.axes) if a == "i"]
    if len(axes) != 1 or layer.pair.groups > 1:
        return np.zeros((0, 1))
    return np.moveaxis(layer.read(), axes[0], 0).reshape(layer.pair.shape[axes[0]], -1)


def _zero_rows(layer: LayerEvidence) -> int:
    return int((~_rows_of(layer).any(axis=1)).sum())


def _rows_of(layer: LayerEvidence) -> np.ndarray[Any, Any]:
    """The values with one unit a row."""
    values = layer.read()
    axes = [i for i, a in enumerate(layer.pair.axes) if a == "o"]
    others = [i for i in range(values.ndim) if i not in axes]
    units = int(np.prod([values.shape[i] for i in axes])) if axes else 1
    return values.transpose(*axes, *others).reshape(units, -1)


def _rows(model: Any) -> None:
    first = linear(model)[0].weight
    first[32:] = first[:32]


def _both(model: Any) -> None:
    _rows(model)
    second = linear(model)[1].weight
    second[:, 32:] = second[:, :32]


def _two_kinds(model: Any) -> None:
    first, second = linear(model)
    first.weight[:16], first.weight[16:] = 1.0, -2.0
    second.weight[:, :16], second.weight[:, 16:] = second.weight[:, :1].clone(), second.weight[:, -1:].clone()


def _mirrored(model: Any) -> None:
    first, second = linear(model)[0].weight, linear(model)[1].weight
    first[32:] = -first[:32]
    second[:, 32:] = -second[:, :32]
