"""IA303: the gradient dies on its way to the input."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.culprit import culprit
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp, residual
from initaudit.rules.health import GRADIENT, below, health, pair_of
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import activation_of, fields, initial, off_scale, power, rate, view


class GradientVanishing(Rule):
    """The gradient's second moment shrinks towards the input.

    What it does: follows the squared norm of the gradient from the layer that makes the output back to every other layer,
    along whichever way keeps most of it. Gates and averages over positions do not count, norms do.

    Why it is bad: the first layers keep their random values. SGD cannot move them at all; Adam rescales a gradient that is
    mostly rounding error once it falls below 1e-8 in size, its default epsilon.

    Example: a stack of sigmoids, whose steepest slope is 1/4: sixteen times less power at each layer.

    Instead: ReLU with `kaiming_normal_`, residual connections or normalization.

    Source: Hochreiter 1991; Glorot & Bengio 2010, section 4.2.2; Schoenholz et al. 2017.
    """

    code = "IA303"
    name = "gradient-vanishing"
    severity = "error"
    phase = "init"
    summary = "the gradient's second moment shrinks towards the input"
    thresholds = pair_of(GRADIENT, "of the gradient's power")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        state = health(evidence)
        level, layer = below(state.gradient, state.limits.gradient), state.worst_gradient
        if not level or layer is None or not initial(evidence):
            return
        flow = view(evidence).flow
        alone = culprit(evidence, state, flow.gradient, state.gradient) if flow is not None else None
        root = alone or layer
        yield self.finding(
            f"{power(state.gradient)} of the gradient's power at the output layer reaches {layer.tensor}, "
            f"{len(state.layers)} layers before "
            f"it (healthy networks keep more than 0.001; the activation here is {activation_of(layer)}): the first layers "
            "keep their random "
            "values, as SGD cannot move them and Adam amplifies rounding errors"
            + (f"; {root.tensor} alone does it" if alone else "")
            + rate(evidence, "gradient_loss", state.gradient),
            init_line(*([alone] if alone else off_scale(state.layers, large=False) or [root])),
            severity=level,
            measured=state.gradient,
            expected=1.0,
            related=tuple(x.tensor for x in state.layers if x is not root),
            **fields(root),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A deep stack under He, and LayerScale, whose branches get little gradient on purpose."""
        return (
            example("He before 16 ReLU layers", lambda: mlp(64, *[96] * 16, 5)),
            example("LayerScale 1e-6", lambda: residual(6, gate=1e-6)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Sigmoids."""
        return (example("ten sigmoid layers", lambda: mlp(32, *[64] * 10, 5, act="Sigmoid", gain=1.0)),)
