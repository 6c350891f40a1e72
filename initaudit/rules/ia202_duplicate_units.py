"""IA202: units that are copies of each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import fields

# A unit of fewer weights can be equal to another by chance where values are rounded to 16 bits.
_LEAST = 4
# Shares of copies from which they cost capacity worth a warning, and from which the layer is broken.
_SOME, _MANY = 0.02, 0.1


class DuplicateUnits(Rule):
    """Units with the same incoming weights get the same gradient, so that they stay copies for ever.

    What it does: counts units (rows along the output) that have equal values, equal biases and equal gradients in the probe.
    Equal values alone are not reported: different outgoing weights tell copies apart at the first step.

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

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each weight."""
        trace = evidence.trace
        if trace is None or trace.broken:
            return
        for layer in evidence.layers:
            units = next((r.units for r in layer.records if r.units is not None), None)
            if units is None or units.distinct >= units.count or layer.moments.m2 == 0 or not layer.pair.trainable:
                continue
            if layer.moments.count / units.count < _LEAST:
                continue
            # Rows of zeros are dead units, not copies: another rule's.
            copies = units.count - units.distinct - max(0, _zero_rows(layer) - 1)
            if copies < max(1.0, _SOME * units.count):
                continue
            yield self.finding(
                f"{copies} of {units.count} units are copies of others: equal weights, biases and gradients in the probe, "
                "so they stay "
                f"equal for ever and the layer works as one of {units.count - copies}",
                init_line(layer),
                severity="error" if copies >= _MANY * units.count else "warning",
                measured=float(units.distinct),
                expected=float(units.count),
                **fields(layer),
            )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Copies that their outgoing weights tell apart."""
        return (example("equal rows, different columns behind", lambda: mlp(32, 64, 48, 5, change=_rows)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Copies on both sides."""
        return (example("equal rows and equal columns behind", lambda: mlp(32, 64, 48, 5, change=_both)),)


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
