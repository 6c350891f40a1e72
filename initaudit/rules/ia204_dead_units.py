"""IA204: rows or columns of zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.structure import readers, reading_inputs
from initaudit.rules.support import fields, initial, normalised, to_output

if TYPE_CHECKING:
    from initaudit.pair.records import Feeds

# One unit of a small layer may be zero by design (a padding class, a null token).
_LEAST = 2
# Units picked by their size lie anywhere: the chance that 8 of 128 are neighbours is one in ten billion.
_RUN = 8
_OFF_AT_ZERO = ("relu", "relu6", "squared_relu", "square")


class DeadUnits(Rule):
    """Whole units of a weight are zero.

    What it does: counts rows (all weights into a unit) that are exactly zero in a weight that is not zero as a whole. It is a
    warning where nothing can bring them back: the bias is zero too, and the activation has no slope at zero, as ReLU in every
    framework, or all weights out of these units are zero as well; or where the network is trained and they are still zero, or
    are zero in a row beside biases that were trained, as after a write that broke off. Else they learn, and it is a remark,
    as it is for columns (a unit that is read with zeros) and for a padding at the end.

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
    thresholds = (Threshold("units", _LEAST, "units, at least", "one may be zero by design: a padding class, a null token"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each weight."""
        inputs, least = reading_inputs(evidence), self.limit(evidence, "units")
        for layer in evidence.layers:
            if layer.pair.role not in ("contraction", "recurrent") or not layer.moments.m2 > 0 or not layer.pair.trainable:
                continue
            rows = _zeros_along(layer, "o", least)
            if rows is None or rows.sum() < least:
                yield from self._columns(layer, inputs, least)
                continue
            why = self._stuck(evidence, layer, rows)
            yield self.finding(
                f"{int(rows.sum())} of {rows.size} units have only zero weights; {why or 'they may still learn'}",
                init_line(layer),
                severity="warning" if why else "info",
                measured=float(rows.sum()),
                expected=0.0,
                law=EXACT + "a drawn weight is not zero",
                **fields(layer),
            )

    def _columns(self, layer: LayerEvidence, inputs: frozenset[str], least: float) -> Iterator[Finding]:
        if layer.tensor in inputs or layer.pair.groups > 1:
            return
        columns = _zeros_along(layer, "i", least)
        if columns is not None and columns.sum() >= least:
            yield self.finding(
                f"{int(columns.sum())} of the {columns.size} units that this weight reads are read with zeros only; they are "
                "heard again as soon as these weights have learnt",
                init_line(layer),
                severity="info",
                measured=float(columns.sum()),
                expected=0.0,
                law=EXACT + "a drawn weight is not zero",
                **fields(layer),
            )

    def _stuck(self, evidence: Evidence, layer: LayerEvidence, rows: np.ndarray[Any, Any]) -> str:
        """Why these units stay as they are, "" where they may learn."""
        bias = _bias(evidence, layer, rows)
        if bias is None:
            return ""
        if not initial(evidence):
            if _wiped(rows, bias) and not to_output(layer):
                return "they stand side by side and their biases were trained, so the weights were wiped or not loaded"
            padding = bool(rows[np.argmax(rows) :].all())  # up to a multiple of 8 or 64, at the end
            quiet = padding or to_output(layer) or bool(np.any(bias))
            return "" if quiet else "the network is trained, and they still say nothing"
        off = [f for f in layer.feeds if f.activation.name in _OFF_AT_ZERO and not f.path]
        if off and len(off) == len(layer.feeds) and not normalised(layer) and bool((bias <= 0).all()):
            return "their biases are zero and the activation is flat there, so they get no gradient"
        unheard = bool(following := readers(evidence, layer)) and not np.any(bias)
        for reader in following:
            columns = _zeros_along(reader, "i")
            unheard = unheard and columns is not None and columns.size == rows.size and bool(columns[rows].all())
        if unheard and all(_passes_zero(feed) for feed in layer.feeds):
            return "all that reads them is zero too, so neither side ever gets a gradient"
        return ""

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
            example("zero in and zero out", lambda: mlp(32, 64, 64, 5, act="GELU", change=_unheard)),
        )


def _wiped(rows: np.ndarray[Any, Any], bias: np.ndarray[Any, Any]) -> bool:
    """Whether units without weights had learnt: their biases differ, none is zero, and no pruning picks so many in a row."""
    places = np.flatnonzero(rows)
    in_a_row = len(places) >= _RUN and places[-1] - places[0] + 1 == len(places)
    return bool(in_a_row and bias.all() and np.ptp(bias) > 0)


def _bias(evidence: Evidence, layer: LayerEvidence, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any] | None:
    """The biases of these units, zeros where the layer has none; None where they cannot be told."""
    if layer.pair.bias is None:
        return np.zeros(int(rows.sum()))
    array = evidence.checkpoint.arrays.get(layer.pair.bias)
    if array is None or array.size != rows.size:
        return None
    bias: np.ndarray[Any, Any] = array.read().ravel()[rows]
    return bias


def _passes_zero(feed: Feeds) -> bool:
    """Whether the activation is zero at zero."""
    function = feed.activation.function
    return function is not None and abs(float(function(np.zeros(1))[0])) < 1e-12


def _zeros_along(layer: LayerEvidence, letter: str, least: float = 1) -> np.ndarray[Any, Any] | None:
    """Which slices along the axis of this letter have only zeros; None without one axis, or with too few zeros."""
    pair = layer.pair
    axes = [i for i, a in enumerate(pair.axes) if a == letter]
    if len(axes) != 1 or layer.moments.zeros < least * layer.moments.count // max(1, pair.shape[axes[0]]):
        return None
    others = tuple(i for i in range(len(pair.axes)) if i != axes[0])
    return np.asarray(~np.logical_or.reduce(layer.read(), axis=others))


def _unheard(model: Any) -> None:
    linear(model)[1].weight[40:].zero_()
    linear(model)[2].weight[:, 40:].zero_()
