"""IA201: a weight whose values are all equal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp, residual
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.structure import last_layers, leads_to_unknown
from initaudit.rules.support import fields, fresh_layers, initial, to_output


class ConstantWeight(Rule):
    """All values of a weight are equal, zero included, and learning cannot break it.

    What it does: a weight of equal values makes all its units compute the same. They stay copies of each other unless the
    gradient tells them apart: it does for a zero head, for LoRA's B and for the last matrix of a zero-initialised branch, which
    are healthy. Reported are constants that are not zero in hidden layers, constants whose units get equal gradients, and
    zeros that never get a gradient, as the probe found by taking two virtual steps.

    Why it is bad: a layer of a thousand units that are copies is a layer of one unit. A zero layer without a skip cuts the
    network in two: nothing before it learns, and every input looks the same behind it.

    Example: `nn.init.constant_(w, 0.05)`, or `zeros_` in a hidden layer.

    Instead: `nn.init.kaiming_normal_(w)`; zeros only where another drawn factor lets the gradient through.

    Source: Goodfellow et al. 2016, section 8.4 (breaking symmetry).
    """

    code = "IA201"
    name = "constant-weight"
    severity = "error"
    phase = "init"
    summary = "all values equal (zero included) and learning cannot break it"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each such weight."""
        if not initial(evidence):
            return
        for layer in fresh_layers(evidence):
            reason = _reason(evidence, layer)
            if reason:
                yield self.finding(
                    f"all {layer.moments.count:,} weights are exactly {layer.moments.mean:.6g}: {reason}",
                    init_line(layer),
                    measured=0.0,
                    expected=layer.expectation.exact or layer.expectation.lecun or 1 / max(1, layer.pair.fan_in),
                    law=EXACT + "gain²/fan_in is a spread, and a constant has none",
                    **fields(layer),
                )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Zeros that learn at once."""
        return (
            example("a zero head", lambda: mlp(32, 64, 5, change=lambda m: linear(m)[-1].weight.zero_())),
            example(
                "zeros at the end of residual branches",
                lambda: residual(3, change=lambda m: [x.weight.zero_() for x in linear(m) if x.in_features > x.out_features]),
            ),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A constant, and zeros without a way round."""
        return (
            example("0.05 in a hidden layer", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].weight.fill_(0.05))),
            example("one input, and all behind it alike", lambda: mlp(1, 32, 3, change=_alike)),
            example("zeros in a hidden layer", lambda: mlp(32, 64, 64, 64, 5, change=lambda m: linear(m)[1].weight.zero_())),
        )


def _alike(model: Any) -> None:
    first, second = linear(model)
    first.weight.fill_(1.0)
    second.weight[:] = second.weight[:, :1]


def _reason(evidence: Evidence, layer: LayerEvidence) -> str:
    """Why a constant weight is a fault; "" where it is none."""
    moments, pair = layer.moments, layer.pair
    units = 1
    for size, axis in zip(pair.shape, pair.axes, strict=True):
        units *= size if axis == "o" else 1
    if moments.m2 != 0 or moments.count < 2 or units < 2 or not pair.trainable:
        return ""
    # One weight a unit may be a scale, and those begin equal.
    scale = pair.fan_in < 2
    if moments.mean == 0:
        return "" if scale else _zero(evidence, layer)
    copies = _copies(layer)
    if (to_output(layer) and layer.tensor in last_layers(evidence)) or (scale and not copies):
        return ""
    first = f"its {units} units compute one and the same number"
    return first + (", and get the same gradient for ever" if copies else ", apart from their biases, and learn as one")


def _zero(evidence: Evidence, layer: LayerEvidence) -> str:
    trace = evidence.trace
    if trace is None:
        return ""
    beyond = leads_to_unknown(evidence)
    for name in layer.pair.constants:
        record = trace.parameters.get(name)
        if record is not None and record.gradient_zero and name not in beyond:
            if record.revived is not None:
                return ""  # another zero is in front of it, and gone after a step
            silent = sum(p.gradient_zero and p.revived is None for p in trace.parameters.values()) - 1
            more = f", and it cuts {silent} other parameters off from the gradient" if silent else ""
            return f"it gets no gradient, nor after two steps of the others{more}"
    return "its units get the same gradient for ever" if _copies(layer) else ""


def _copies(layer: LayerEvidence) -> bool:
    # Behind a zero head every gradient is zero, and equal, until the head has learnt; where a NaN is about, it says nothing.
    units = [r.units for r in layer.records if r.units is not None and r.gradient_norm and math.isfinite(r.gradient_norm)]
    return any(u.distinct == 1 and u.count > 1 for u in units)
