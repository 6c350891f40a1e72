"""IA306: activations in their flat part."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
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
    reports a root mean square slope below 0.3 of the steepest, or units that are flat for every input.

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
        """One finding, at the first layer of this kind."""
        trace = evidence.trace
        if trace is None or not initial(evidence):
            return
        found = []
        for layer in fresh_layers(evidence, "contraction"):
            slope = slope_of(evidence, layer)
            if slope is None or normalised(layer):
                continue
            always = max((s.saturated or 0.0 for f in layer.feeds if (s := trace.signals.get(f.node)) is not None), default=0.0)
            if slope < self.limit(evidence, "slope") or always > self.limit(evidence, "always"):
                found.append((layer, slope, always))
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

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Xavier with tanh's gain."""
        return (example("Xavier before tanh", lambda: mlp(64, 96, 96, 5, act="Tanh", gain=5 / 3)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """N(0, 1)."""
        return (example("N(0, 1) before tanh", lambda: mlp(64, 128, 128, 5, act="Tanh", gain=11.0)),)
