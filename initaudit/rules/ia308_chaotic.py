"""IA308: nearly equal inputs become unrelated."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.health import health
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import bounded, fields, initial, power


class Chaotic(Rule):
    """Nearly equal inputs become unrelated: small differences grow with depth while the signal keeps its size.

    What it does: the gradient's power on its way back is what a small difference of the inputs is multiplied by on its way
    forward. It is reported where it explodes (see IA304) although the signal itself, bounded by its activations, does not grow.

    Why it is bad: the network answers to noise. What it learns about one input says nothing about its neighbour.

    Example: N(0, 1) weights before tanh in six layers.

    Instead: the variance of the activation's gain, at which a difference keeps its size.

    Source: Poole et al. 2016, eq. 9 (chi1 > 1); Schoenholz et al. 2017, section 3.
    """

    code = "IA308"
    name = "chaotic"
    severity = "warning"
    phase = "init"
    summary = "nearly equal inputs become unrelated"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        state = health(evidence)
        layer = state.worst_gradient_growth
        if not initial(evidence) or layer is None or state.growth > state.limits.growth[0] or not state.gradient_growing:
            return
        if not bounded(evidence, state.layers):
            return
        yield self.finding(
            f"a small difference between inputs grows {power(state.gradient_growth)}-fold in power between {layer.tensor} "
            "and the output, "
            f"while the signal grows {power(state.growth)}-fold: neighbouring inputs become unrelated, and nothing learnt "
            "carries over",
            init_line(layer),
            measured=state.gradient_growth,
            expected=1.0,
            **fields(layer),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Xavier with tanh's gain."""
        return (example("Xavier before tanh", lambda: mlp(64, *[96] * 8, 5, act="Tanh", gain=1.5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """N(0, 1) before tanh."""
        return (example("N(0, 1) before tanh", lambda: mlp(64, *[128] * 8, 5, act="Tanh", gain=11.0)),)
