"""IA111: a bias that outweighs everything the weights can send."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import each, parameter
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, normalised

# A sum of many inputs is normal: beyond four standard deviations a unit is on for one input in thirty thousand.
_DEVIATIONS = 4.0
_SOME, _MOST = 0.1, 0.5
_TRAINED = 0.9  # training uses large negative biases to switch units off that are not needed
_SHIFTED = 4.0  # standard errors of the mean below zero
# Activations that are exactly flat far on the left.
_OFF_BELOW = ("relu", "relu6", "squared_relu", "hardswish", "hardsigmoid", "clip")


class BiasKillsUnits(Rule):
    """The bias outweighs everything the weights can send, so the unit never activates.

    What it does: for every unit in front of a ReLU compares its bias with the standard deviation of what its weights make of
    the inputs that the probe saw, and reports units whose bias lies more than four of them on the flat side, where the probe
    finds them off for every input. Biases that are as often positive as negative are left alone.

    Why it is bad: a unit that never activates gets no gradient, and neither does its bias.

    Example: biases of -6 before ReLU, taken over from a layer whose inputs were larger.

    Instead: zero biases.

    Source: https://github.com/facebookresearch/dlrm/pull/358; Lu et al. 2020, "Dying ReLU and initialization".
    """

    code = "IA111"
    name = "bias-kills-units"
    severity = "error"
    phase = "any"
    summary = "the bias outweighs everything the weights can send; the unit never activates"
    thresholds = (
        Threshold(
            "deviations",
            _DEVIATIONS,
            "standard deviations of what the weights send",
            "beyond four a unit is on for one input in thirty thousand",
        ),
        Threshold(
            "mean", _SHIFTED, "standard errors of the mean below zero", "biases about zero kill half of the units at most"
        ),
        Threshold("share", _SOME, "of the units", "a tenth"),
        Threshold("error", _MOST, "of the units", "most of the layer is off"),
        Threshold(
            "trained",
            _TRAINED,
            "of the units of a trained layer",
            "training switches off units that are not needed: below, a remark",
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers of this kind."""
        limits = self.limit(evidence, "deviations"), self.limit(evidence, "mean")
        least = max(0.0, self.limit(evidence, "share"))
        found = [(x, share) for x in evidence.layers if (share := _killed(evidence, x, *limits)) > least]
        if not found:
            return
        layer, share = found[0]
        bias = layer.pair.bias or ""
        values = evidence.checkpoint.arrays[bias].read().astype(np.float64)
        matters = evidence.phase != "trained" or share > self.limit(evidence, "trained")
        spread = math.sqrt(layer.records[0].input_moment2 or 0) * math.sqrt(layer.moments.moment2 * layer.pair.fan_in)
        yield self.finding(
            f"{100 * share:.0f} % of the units never activate: the biases average {values.mean():.3g}, and what the "
            "weights send has a "
            f"standard deviation of {spread:.3g}, {abs(values.mean()) / max(spread, 1e-30):.3g} times less; such units and "
            "their biases get no gradient",
            each("torch.nn.init.zeros_({})", [parameter(evidence, x.pair.bias or "") for x, _ in found]),
            severity=("error" if share > self.limit(evidence, "error") else "warning") if matters else "info",
            measured=float(values.mean()),
            expected=0.0,
            law=EXACT + "biases start at zero, or within 1/sqrt(fan_in) of it",
            related=(bias, *(x.tensor for x, _ in found[1:])),
            **fields(layer),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Small biases, and a negative one at the output."""
        return (
            example("biases of -0.5", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-0.5))),
            example("a prior at the output", lambda: mlp(32, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-6))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Biases of -9."""
        return (example("biases of -9", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-9))),)


def _student(normal: float, degrees: int) -> float:
    """What Student's t exceeds as seldom as a normal value does `normal` (Wallace 1959): few units have a spread by chance.

    Of two biases about zero the mean lies four estimated standard errors below it in one layer of thirteen.
    """
    if degrees < 1:
        return 0.0  # one value has no spread
    exponent = (normal * (8 * degrees + 3) / (8 * degrees + 1)) ** 2 / degrees
    return math.copysign(math.sqrt(degrees * math.expm1(min(700.0, exponent))), normal)


def _killed(evidence: Evidence, layer: LayerEvidence, deviations: float, shifted: float) -> float:
    """The share of units that their bias switches off."""
    pair = layer.pair
    off = next((f for f in layer.feeds if f.activation.name in _OFF_BELOW), None)
    array = evidence.checkpoint.arrays.get(pair.bias or "")
    if off is None or array is None or evidence.trace is None or not layer.records or normalised(layer) or off.path:
        return 0.0
    signal, power = evidence.trace.signals.get(off.node), layer.records[0].input_moment2
    # Where nothing arrives yet, as behind a zero-initialised branch, any bias outweighs it.
    if signal is None or not signal.dead or not power or not layer.moments.moment2 > 0:
        return 0.0
    bias = array.read().astype(np.float64).ravel()
    axes = [i for i, a in enumerate(pair.axes) if a == "o"]
    weight = layer.read().astype(np.float64)
    if len(axes) != 1 or weight.shape[axes[0]] != bias.size:
        return 0.0
    rows = np.moveaxis(weight, axes[0], 0).reshape(bias.size, -1)
    # A law about zero kills at most half of the units, however small the inputs still are: the other half lets them grow.
    if bias.mean() > -_student(shifted, bias.size - 1) * float(bias.std()) / math.sqrt(max(1, bias.size - 1)):
        return 0.0
    reach = np.sqrt((rows**2).sum(1) * power)
    return min(float(np.mean(bias < -deviations * reach - 1e-12)), signal.dead)
