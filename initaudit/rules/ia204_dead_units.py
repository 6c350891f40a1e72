"""IA204: rows or columns of zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import fields, init_line, initial, normalised

# One unit of a small layer may be zero by design (a padding class, a null token).
_LEAST = 2
_OFF_AT_ZERO = ("relu", "relu6", "squared_relu", "square")


class DeadUnits(Rule):
    """Whole units of a weight are zero.

    What it does: counts rows (all weights into a unit) that are exactly zero in a weight that is not zero as a whole. It is a
    warning where nothing can bring them back: the bias is zero too, and the activation has no slope at zero, as ReLU in every
    framework; or where the network is trained and they are still zero. Else they learn, and it is a remark.

    Why it is bad: such a unit says nothing, gets no gradient through a ReLU, and is paid for.

    Example: a weight padded to a multiple of 64 with zeros, and nothing in the units that were added.

    Instead: draw the new rows as the others: `nn.init.kaiming_normal_(w[n:])`.

    Source: He et al. 2015, section 2.2; torch's subgradient of ReLU at zero is zero.
    """

    code = "IA204"
    name = "dead-units"
    severity = "warning"
    phase = "any"
    summary = "whole rows or columns are zero"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each weight."""
        for layer in evidence.layers:
            if layer.pair.role not in ("contraction", "recurrent") or not layer.moments.m2 > 0 or not layer.pair.trainable:
                continue
            rows = _zero_rows(layer)
            if rows is None or rows.sum() < _LEAST:
                continue
            stuck = self._stuck(evidence, layer, rows)
            level: Any = "warning" if stuck else "info"
            why = (
                "their biases are zero and the activation is flat there, so they get no gradient"
                if stuck
                else "they may still learn"
            )
            yield self.finding(
                f"{int(rows.sum())} of {rows.size} units have only zero weights; {why}",
                init_line(layer),
                severity=level,
                measured=float(rows.sum()),
                expected=0.0,
                **fields(layer),
            )

    def _stuck(self, evidence: Evidence, layer: LayerEvidence, rows: np.ndarray[Any, Any]) -> bool:
        off = [f for f in layer.feeds if f.activation.name in _OFF_AT_ZERO and not f.path]
        if not off or len(off) < len(layer.feeds) or normalised(layer):
            return False
        if layer.pair.bias is None:
            return True
        array = evidence.checkpoint.arrays.get(layer.pair.bias)
        if array is None or array.size != rows.size:
            return False
        return bool((array.read().ravel()[rows] <= 0).all()) and initial(evidence)

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A zero head, and units whose biases are alive."""
        return (
            example("a zero head", lambda: mlp(32, 64, 5, change=lambda m: linear(m)[-1].weight.zero_())),
            example("He", lambda: mlp(32, 64, 64, 5)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A quarter of the units without weights."""
        return (
            example("every fourth row zero", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].weight[::4].zero_())),
        )


def _zero_rows(layer: LayerEvidence) -> np.ndarray[Any, Any] | None:
    """Which units have only zeros; None where there cannot be two of them."""
    pair = layer.pair
    axes = [i for i, a in enumerate(pair.axes) if a == "o"]
    if len(axes) != 1 or layer.moments.zeros < _LEAST * layer.moments.count // max(1, pair.shape[axes[0]]):
        return None
    values = np.moveaxis(layer.read(), axes[0], 0).reshape(pair.shape[axes[0]], -1)
    return np.asarray(~values.astype(bool).any(axis=1))
