"""IA111: a bias that outweighs everything the weights can send."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.health import health, is_constant
from initaudit.rules.held_gates import held_gates
from initaudit.rules.remedy import each, parameter
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, initial, normalised, view
from initaudit.rules.variance import LIKELY, vanishing_text

if TYPE_CHECKING:
    from initaudit.pair.activation import Activation

# A sum of many inputs is normal: beyond four standard deviations a unit is on for one input in thirty thousand.
_DEVIATIONS = 4.0
_SOME, _MOST = 0.1, 0.5
_TRAINED = 0.9  # training uses large negative biases to switch units off that are not needed
_SHIFTED = 4.0  # standard errors of the mean below zero
# No activation bends so far out. A step inside its flat part a kink has moved by a thousandth, a tail of tanh by rounding.
_FAR_OUT, _STEP, _BEND = 1e3, 0.1, 1e-3


class BiasKillsUnits(Rule):
    """The bias outweighs everything the weights can send, so the unit never activates.

    What it does: for every unit in front of an activation with a flat side (both sides of a ReLU6) compares its bias with the
    standard deviation of what its weights make of the inputs that the probe saw, and reports units whose bias lies more than
    four of them inside the flat part, where the probe finds them off for every input. Biases that are as often positive as
    negative are left alone. Where the signal of a recurrent layer dies, or all outputs are one, the same is asked of its gates:
    which of them a bias holds shut, or in the flat part of a tanh.

    Why it is bad: a unit that never activates gets no gradient, and neither does its bias.

    Example: biases of -6 before ReLU, taken over from a layer whose inputs were larger; an LSTM's output gate at -15.

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
        yield from self._gates(evidence)
        limits = self.limit(evidence, "deviations"), self.limit(evidence, "mean")
        least = max(0.0, self.limit(evidence, "share"))
        found = [(x, share) for x in evidence.layers if (share := _killed(evidence, x, *limits)) > least]
        if not found:
            return
        layer, share = found[0]
        bias = layer.pair.bias or ""
        values = evidence.checkpoint.arrays[bias].read().astype(np.float64)
        matters = evidence.phase != "trained" or share > self.limit(evidence, "trained")
        held = "activate" if values.mean() < 0 else "leave the flat top"
        spread = math.sqrt(layer.records[0].input_moment2 or 0) * math.sqrt(layer.moments.moment2 * layer.pair.fan_in)
        yield self.finding(
            f"{100 * share:.0f} % of the units never {held}: the biases average {values.mean():.3g}, and what the weights "
            f"send has a standard deviation of {spread:.3g}, {abs(values.mean()) / max(spread, 1e-30):.3g} times less; such "
            "units and their biases get no gradient",
            each("torch.nn.init.zeros_({})", [parameter(evidence, x.pair.bias or "") for x, _ in found]),
            severity=("error" if share > self.limit(evidence, "error") else "warning") if matters else "info",
            measured=float(values.mean()),
            expected=0.0,
            law=EXACT + "biases start at zero, or within 1/sqrt(fan_in) of it",
            related=(bias, *(x.tensor for x, _ in found[1:])),
            **fields(layer),
        )

    def _gates(self, evidence: Evidence) -> Iterator[Finding]:
        """Gates that are no signals of the graph: one finding for each that a bias holds, where the network suffers from it."""
        if not initial(evidence) or evidence.trace is None:
            return
        state, risk = health(evidence), evidence.risk
        likely = risk is not None and min(risk.untrainable_sgd, risk.untrainable_adam) > LIKELY
        flow, signals = view(evidence).flow, evidence.trace.signals
        constant = flow is not None and any(is_constant(signals.get(n), flow.contrast) for n in flow.last)
        constant = constant or evidence.trace.alike
        for gate in held_gates(evidence, self.limit(evidence, "deviations")) if state.vanishing or constant or likely else ():
            # Input and update gates that are drawn shut for long memories (Tallec & Ollivier 2018) open by themselves where
            # anything gets through; no scheme shuts a forget gate.
            if not (state.vanishing or constant or gate.name == "forget gate"):
                continue
            lost = f": {vanishing_text(state)}" if state.vanishing else ""
            yield self.finding(
                f"{100 * gate.share:.0f} % of the units of the {gate.name} are held by their bias: {' + '.join(gate.biases)} "
                f"averages {gate.bias:.3g} there, and what the weights send has a standard deviation of {gate.reach:.3g}; "
                f"{gate.means}, and hardly any gradient reaches the gate{lost}",
                each("torch.nn.init.zeros_({})", [parameter(evidence, n) for n in gate.biases]),
                severity="error" if constant or state.vanishing == "error" else "warning",
                measured=gate.bias,
                expected=0.0,
                law=EXACT + "biases of gates start at zero, or within 1/sqrt(units) of it, those of a forget gate at one",
                tensor=gate.biases[0],
                site=gate.layer.pair.site,
                location=gate.layer.pair.location,
                related=(*gate.biases[1:], gate.layer.tensor),
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
        return (
            example("biases of -9", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-9))),
            example(
                "biases of 40 before ReLU6",
                lambda: mlp(32, 64, 64, 5, act="ReLU6", change=lambda m: linear(m)[1].bias.fill_(40)),
            ),
            example("an output gate at -15", _closed),
        )


def _closed() -> Any:
    import torch
    from torch import nn

    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(10, 32, batch_first=True), nn.Linear(32, 5)
            with torch.no_grad():
                self.lstm.get_parameter("bias_ih_l0")[96:] = -15.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.lstm(x)[0][:, -1])
            return y

    return Closed(), (torch.randn(32, 8, 10),)


def _student(normal: float, degrees: int) -> float:
    """What Student's t exceeds as seldom as a normal value does `normal` (Wallace 1959): few units have a spread by chance.

    Of two biases about zero the mean lies four estimated standard errors below it in one layer of thirteen.
    """
    if degrees < 1:
        return 0.0  # one value has no spread
    exponent = (normal * (8 * degrees + 3) / (8 * degrees + 1)) ** 2 / degrees
    return math.copysign(math.sqrt(degrees * math.expm1(min(700.0, exponent))), normal)


def _killed(evidence: Evidence, layer: LayerEvidence, deviations: float, shifted: float) -> float:
    """The share of units that their bias holds where the activation is flat."""
    pair, array = layer.pair, evidence.checkpoint.arrays.get(layer.pair.bias or "")
    if array is None or evidence.trace is None or not layer.records or normalised(layer):
        return 0.0
    signals, power = evidence.trace.signals, layer.records[0].input_moment2
    dead = ((f, s.dead) for f in layer.feeds if (s := signals.get(f.node)) is not None and s.dead and not f.path)
    off, share = next(dead, (None, 0.0))
    # Where nothing arrives yet, as behind a zero-initialised branch, any bias outweighs it.
    if off is None or not power or not layer.moments.moment2 > 0:
        return 0.0
    bias = array.read().astype(np.float64).ravel()
    axes = [i for i, a in enumerate(pair.axes) if a == "o"]
    weight = layer.read().astype(np.float64)
    if len(axes) != 1 or weight.shape[axes[0]] != bias.size:
        return 0.0
    rows = np.moveaxis(weight, axes[0], 0).reshape(bias.size, -1)
    reach = np.sqrt((rows**2).sum(1) * power)
    low, high = flat_ends(off.activation)
    # A law about zero kills at most half of the units, however small the inputs still are: the other half lets them grow.
    least = _student(shifted, bias.size - 1) * float(bias.std()) / math.sqrt(max(1, bias.size - 1))
    below = float(np.mean(low - bias > deviations * reach + 1e-12)) if bias.mean() <= -least else 0.0
    above = float(np.mean(bias - high > deviations * reach + 1e-12)) if bias.mean() >= least else 0.0
    return min(max(below, above), share)


def flat_ends(activation: Activation) -> tuple[float, float]:
    """Below and above which values an activation is flat to the last digit, by a kink: -inf and inf where it never is.

    A tanh is flat to the last digit too, yet it gets there by degrees: that is saturation, which large weights cause.
    """
    return -_flat_from(activation, -1.0), _flat_from(activation, 1.0)


def _flat_from(activation: Activation, side: float) -> float:
    if activation.function is None:
        return math.inf

    function, onward = activation.function, np.array([0.0, *np.geomspace(_STEP / 10, 2 * _FAR_OUT, 64)])

    def at(z: float) -> float:
        return float(function(np.array([side * z]))[0])

    def flat(z: float) -> bool:
        return bool((function(side * (z + onward)) == end).all())

    end, near, far = at(_FAR_OUT), -_FAR_OUT, _FAR_OUT
    if not math.isfinite(end) or not flat(far):
        return math.inf
    while far - near > 1e-3:
        middle = 0.5 * (near + far)
        near, far = (near, middle) if flat(middle) else (middle, far)
    return far if abs(at(far - _STEP) - end) > _BEND * activation.scale else math.inf
