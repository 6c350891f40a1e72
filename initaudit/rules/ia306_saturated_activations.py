"""IA306: activations in their flat part."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.gates import opens
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, fresh_layers, initial, normalised
from initaudit.rules.variance import slope_of

# A tanh fed with N(0, 1) has 0.68 of its steepest slope in the root mean square; at 0.3 a layer passes a tenth of the power.
_FLAT = 0.3
_ALWAYS = 0.5  # share of units that are in the flat part for every input


class SaturatedActivations(Rule):
    """The inputs of a bounded activation are so large that it is flat for nearly all of them.

    What it does: evaluates the slope of tanh, sigmoid and their relatives at the values that the probe sends through, and
    reports a root mean square slope below 0.3 of the steepest, or units that are flat for every input. A gate, which multiplies
    another signal, may be nearly shut: only units that are flat for every input count there.

    Why it is bad: where the slope is zero no gradient passes; the few units that are not flat get all of it, so that learning
    is slow and erratic.

    Example: N(0, 1) weights before tanh at width 128, whose sums have a standard deviation of 11.

    Instead: `xavier_normal_(w, gain=5/3)` before tanh, `xavier_normal_(w)` before sigmoid.

    Source: Glorot & Bengio 2010, section 3; LeCun et al. 1998, section 4.4.
    """

    code = "IA306"
    name = "saturated-activations"
    severity = "error"
    phase = "init"
    summary = "units in the flat part of their activation for every input"
    thresholds = (
        Threshold("slope", _FLAT, "of the steepest slope", "a tanh fed with N(0, 1) has 0.68, a sigmoid 0.83"),
        Threshold("always", _ALWAYS, "of the units", "half of the layer answers to no input"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, at the first layer of this kind; one at each recurrent layer that is fed too much."""
        trace = evidence.trace
        if trace is None or not initial(evidence):
            return
        found = []
        for layer in fresh_layers(evidence, "contraction"):
            slope = slope_of(evidence, layer)
            if slope is None or normalised(layer):
                continue
            always = max((s.saturated or 0.0 for f in layer.feeds if (s := trace.signals.get(f.node)) is not None), default=0.0)
            gate = evidence.graph is not None and any(opens(evidence.graph, f.node) for f in layer.feeds)
            if (slope < self.limit(evidence, "slope") and not gate) or always > self.limit(evidence, "always"):
                found.append((layer, slope, always))
        yield from self._recurrent(evidence)
        if not found:
            return
        layer, slope, always = found[0]
        yield self.finding(
            f"the {layer.feeds[0].activation.name} behind {layer.tensor} works in its flat part: {slope:.2g} of its steepest "
            "slope (root mean square; 0.7 for inputs of N(0, 1))"
            + (f", and {100 * always:.0f} % of its units are flat for every input" if always > 0 else "")
            + f"; {slope**2:.1g} of the gradient's power passes"
            + (f" each of {len(found)} such layers" if len(found) > 1 else "")
            + ", so what stands before learns slowly",
            init_line(*(x for x, _, _ in found)),
            severity="error" if always > self.limit(evidence, "always") else "warning",
            measured=slope,
            expected=0.7,
            related=tuple(x.tensor for x, _, _ in found[1:]),
            **fields(layer),
        )

    def _recurrent(self, evidence: Evidence) -> Iterator[Finding]:
        """Gates are not signals of the graph: what the input's weights hand them is computed from the input's second moment."""
        first: dict[str, LayerEvidence] = {}
        for layer in evidence.layers:
            if layer.pair.role == "recurrent" and layer.records:
                first.setdefault(layer.pair.node, layer)  # the weights of the input stand before those of the state
        for layer in {x.tensor: x for x in first.values()}.values():
            moments, given = layer.moments, layer.records[0].input_moment2
            if not given or not moments.count:
                continue
            sums = math.sqrt(layer.pair.fan_in * (moments.mean**2 + moments.m2 / moments.count) * given)
            # The second moment of the slope 1 - tanh² at N(0, s²), for s above 2: its integral 4/3 times the density at zero.
            slope = math.sqrt(4 / 3 / (sums * math.sqrt(2 * math.pi))) if sums > 2 else 1.0
            if slope < self.limit(evidence, "slope"):
                yield self.finding(
                    f"the sums that {layer.tensor} hands to the gates have a standard deviation of {sums:.2g}, as the "
                    f"input has one of {math.sqrt(given):.2g}: the gates work in their flat part, {slope:.2g} of their "
                    f"steepest slope (root mean square; 0.7 for sums of N(0, 1)); {slope**2:.1g} of the gradient's power "
                    "passes each step",
                    "scale the input to a standard deviation of 1: normalise the data, or draw the table smaller",
                    severity="warning",
                    measured=slope,
                    expected=0.7,
                    **fields(layer),
                )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Xavier with tanh's gain, and gates that begin nearly shut."""
        return (
            example("Xavier before tanh", lambda: mlp(64, 96, 96, 5, act="Tanh", gain=5 / 3)),
            example("highway gates at -3", _highway),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """N(0, 1), and inputs that are too large for a recurrent layer."""
        return (
            example("N(0, 1) before tanh", lambda: mlp(64, 128, 128, 5, act="Tanh", gain=11.0)),
            example("a table of N(0, 100²) before an LSTM", _loud),
        )


def _loud() -> Any:
    import torch
    from torch import nn

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lstm, self.head = nn.Embedding(20, 32), nn.LSTM(32, 48, batch_first=True), nn.Linear(48, 20)
            nn.init.normal_(self.table.weight, std=100.0)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.lstm(self.table(ids))[0])
            return y

    return Words(), (torch.randint(20, (8, 12)),)


def _highway() -> Any:
    import torch
    from torch import nn

    class Highway(nn.Module):
        """Srivastava et al. 2015: a layer carries its input past itself until its gate opens."""

        def __init__(self) -> None:
            super().__init__()
            self.change, self.gate = nn.Linear(48, 48), nn.Linear(48, 48)
            nn.init.kaiming_normal_(self.change.weight)
            nn.init.constant_(self.gate.bias, -3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            t = torch.sigmoid(self.gate(x))
            return t * torch.relu(self.change(x)) + (1 - t) * x

    return nn.Sequential(*(Highway() for _ in range(8)), nn.Linear(48, 5)), (torch.randn(32, 48),)
