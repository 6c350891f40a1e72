"""IA304: the gradient grows on its way to the input."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.culprit import culprit
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp, residual
from initaudit.rules.health import GRADIENT_GROWTH, health, pair_of
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import fields, initial, off_scale, power, rate, view


class GradientExploding(Rule):
    """The gradient's second moment grows towards the input.

    What it does: compares the squared norm of the gradient at the input of every layer with that at the layer that makes the
    output.

    Why it is bad: no learning rate fits all layers. One small enough for the first layers does not move the last ones, and
    with a larger one the first step destroys the first layers.

    Example: a tanh recurrence whose hidden matrix has a spectral radius of 8, over 24 steps.

    Instead: `orthogonal_` for hidden matrices, `kaiming_normal_` before ReLU; clipping hides the cause.

    Source: Pascanu et al. 2013, section 2; Glorot & Bengio 2010.
    """

    code = "IA304"
    name = "gradient-exploding"
    severity = "error"
    phase = "init"
    summary = "the gradient's second moment grows towards the input"
    thresholds = pair_of(GRADIENT_GROWTH, "times the gradient's power")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        state = health(evidence)
        level, layer = state.gradient_growing, state.worst_gradient_growth
        if not level or layer is None or not initial(evidence):
            return
        flow = view(evidence).flow
        alone = culprit(evidence, state, flow.gradient_growth, state.gradient_growth) if flow is not None else None
        root = alone or layer
        yield self.finding(
            f"the gradient's power at the input of {layer.tensor} is {power(state.gradient_growth)} times that at the "
            "output layer (healthy "
            "networks stay below 100): no learning rate fits both, and one step at a usual one destroys the first layers"
            + (f"; {root.tensor} alone does it" if alone else "")
            + rate(evidence, "gradient_growth", state.gradient_growth),
            init_line(*([alone] if alone else off_scale(state.layers, large=True) or [root])),
            severity=level,
            measured=state.gradient_growth,
            expected=1.0,
            related=tuple(x.tensor for x in state.layers if x is not root),
            **fields(root),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """He, and a residual stack."""
        return (
            example("He before 16 ReLU layers", lambda: mlp(64, *[96] * 16, 5)),
            example("eight residual blocks", lambda: residual(8)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Ten times He's standard deviation."""
        return (example("ten times He's in five layers", lambda: mlp(32, *[64] * 5, 5, gain=14.0)),)
