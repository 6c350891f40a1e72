"""IA102: weights too large for the activation they feed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import convs, example, mlp
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import activation_of, fields, fresh_layers, initial, power, sigmas
from initaudit.rules.variance import DEEP, FLAT, LEAST, LIKELY, TIMES, bounds, deviates, deviation

# The spectral radius of an n x n matrix of independent entries is sqrt(n var) (Girko 1984). Above 1 a linear recurrence grows
# with every step; a tanh recurrence at twice that is chaotic after a few (Sompolinsky et al. 1988).
_RADIUS = 2.0


class VarianceTooLarge(Rule):
    """Weights vary more than the activation behind them needs, and the signal or the gradient suffers.

    What it does: compares the variance of each weight with gain²/fan_in, and reports the deviation where the probe sees signal
    or gradient grow with depth, or a bounded activation driven into its flat part. For a recurrence it looks at the radius of
    the hidden matrix, which every time step applies again.

    Why it is bad: at 64 times the variance needed, eight layers multiply the signal's power by 10^14; the first step of any
    optimizer then throws the weights away. In front of tanh the units stick at -1 and +1 and pass no gradient.

    Example: `torch.nn.init.normal_(w)`, whose standard deviation of 1 is made for a single input.

    Instead: `torch.nn.init.kaiming_normal_(w, nonlinearity="relu")`, `xavier_normal_(w, gain=5/3)` before tanh, and
    `orthogonal_` for a hidden matrix.

    Source: He et al. 2015, eq. 10; Glorot & Bengio 2010, eq. 12; Pascanu et al. 2013 for recurrences.
    """

    code = "IA102"
    name = "variance-too-large"
    severity = "error"
    phase = "init"
    summary = "observed variance is above what the downstream activation needs, beyond sampling error, and the signal suffers"
    thresholds = (
        Threshold(
            "radius", _RADIUS, "spectral radius of a recurrence", "a tanh recurrence there is chaotic (Sompolinsky et al. 1988)"
        ),
        Threshold("ratio", 1 / LEAST, "times the variance needed", "a smaller deviation compounds to less than a factor of 10"),
        Threshold("untrainable", LIKELY, "risk with both optimizers", "from here any deviation that harms is an error"),
        Threshold("slope", FLAT, "of the activation's steepest", "below, seven tenths of the gradient are lost in a layer"),
        Threshold("times", TIMES, "times the variance needed", "a gain may be doubted by a factor of two either way"),
        Threshold("layers", DEEP, "saturated layers in series", "of trained networks with six, half learnt"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all the layers that together blow the signal up, and one for each recurrence."""
        recurrent = list(self._recurrences(evidence))
        yield from recurrent
        found = deviation(evidence, "large")
        if found is None or not found.level or recurrent:
            return
        first = found.layers[0]
        expected = first.expectation.exact or math.nan
        together = (
            f"; {len(found.layers)} such layers together multiply it by {power(found.product)}" if len(found.layers) > 1 else ""
        )
        yield self.finding(
            f"variance {first.moments.variance:.3g} is {first.moments.variance / expected:.3g} times the {expected:.3g} "
            "that keeps "
            f"a signal through {activation_of(first)} (gain²/fan_in), {abs(sigmas(first, expected)):.0f} standard errors above"
            f"{together}: {found.consequence}, so the first steps overshoot or the units pass no gradient",
            init_line(*found.layers),
            severity="error" if found.level == "error" else "warning",
            measured=first.moments.variance,
            expected=expected,
            law="gain²/fan_in keeps the signal's second moment (He et al. 2015, eq. 10)",
            standard_errors=sigmas(first, expected),
            related=tuple(x.tensor for x in found.layers[1:]),
            **fields(first),
        )

    def _recurrences(self, evidence: Evidence) -> Iterator[Finding]:
        if not initial(evidence):
            return
        for layer in fresh_layers(evidence, "recurrent"):
            width = _hidden(layer, bounds(evidence.config, "large").ratio)
            if width is None:
                continue
            radius = math.sqrt(width * layer.moments.variance)
            if radius > self.limit(evidence, "radius"):
                yield self.finding(
                    f"the hidden matrix has variance {layer.moments.variance:.3g} at width {width}: a spectral radius of about "
                    f"{radius:.3g} (Girko 1984), where 1 keeps the state's size; each time step multiplies state and gradient "
                    "by it until the units saturate, so nothing is learnt over more than a few steps",
                    init_line(layer),
                    measured=layer.moments.variance,
                    expected=1 / width,
                    law="a spectral radius of 1 keeps the state's size (Girko 1984)",
                    standard_errors=sigmas(layer, 1 / width),
                    **fields(layer),
                )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Large weights that a norm makes up for, and He's."""
        return (
            example("large weights before BatchNorm", lambda: convs(norm=True, change=lambda m: [_grow(x) for x in m])),
            example("He before 12 ReLU layers", lambda: mlp(32, *[128] * 12, 5)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Growth with depth, saturation, a recurrence."""
        return (
            example("N(0, 1) in six ReLU layers", lambda: mlp(32, *[64] * 6, 5, gain=8.0)),
            example("N(0, 1) before tanh", lambda: mlp(64, *[128] * 4, 5, act="Tanh", gain=11.0)),
            example("an RNN with N(0, 1)", _recurrence),
        )


def _hidden(layer: LayerEvidence, ratio: float) -> int | None:
    """The width of a hidden matrix: square in each gate, and second of a layer's two."""
    pair = layer.pair
    size = dict(zip(pair.axes, pair.shape, strict=True))
    units = size.get("o", 0) // max(1, len(pair.gates))
    hidden = pair.role == "recurrent" and units == size.get("i") and deviates(layer, "large", ratio)
    return units if hidden else None


def _grow(module: Any) -> Any:
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() == 4:
        weight.mul_(10)


def _recurrence() -> Any:
    import torch
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.RNN(8, 48, batch_first=True), nn.Linear(48, 3)
            nn.init.normal_(self.rnn.all_weights[0][1])

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.rnn(x)[0][:, -1])

    return Reader(), (torch.randn(8, 16, 8),)
