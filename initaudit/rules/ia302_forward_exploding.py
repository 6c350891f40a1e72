"""IA302: the signal grows from layer to layer."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.culprit import culprit
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import convs, example, mlp
from initaudit.rules.health import GROWTH, health, pair_of
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.stream import what_grows
from initaudit.rules.support import fields, initial, off_scale, power, rate, view


class ForwardExploding(Rule):
    """The second moment of the signal grows with depth.

    What it does: compares the second moment behind every linear operator with that of the input, or of what the last
    normalization put out. A growth that a norm right behind the layer takes away does not count. Where no weight is too large
    it names the numbers that forward multiplies the signal by, and the sums with which branches add to it.

    Why it is bad: the loss starts at thousands, its gradient overflows in half precision, and the first step moves the weights
    further than their own size.

    Example: `torch.nn.init.normal_(w)` in eight layers of 128 units: 10^14 in power.

    Instead: `kaiming_normal_`, or a normalization behind the layers.

    Source: He et al. 2015, section 2.2; Zhang et al. 2019 (Fixup), section 2, for residual stacks.
    """

    code = "IA302"
    name = "forward-exploding"
    severity = "error"
    phase = "init"
    summary = "the second moment grows with depth"
    thresholds = pair_of(GROWTH, "times the signal's power")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        state = health(evidence)
        layer = state.worst_growth
        if not state.growing or layer is None or not initial(evidence):
            return
        flow = view(evidence).flow
        alone = culprit(evidence, state, flow.growth, state.growth) if flow is not None else None
        root = alone or layer
        large = [alone] if alone else off_scale(state.layers, large=True)
        clause, help = ("", "") if large else what_grows(evidence, layer, state.growth, state.limits.growth[0])
        yield self.finding(
            f"the signal's second moment has grown {power(state.growth)}-fold at {layer.tensor}, after {len(state.layers)} "
            "layers (healthy "
            "networks stay below 10); the first steps of any optimizer overshoot, and half precision overflows"
            + (f"; {root.tensor} alone does it" if alone else "")
            + clause
            + rate(evidence, "signal_growth", state.growth),
            help or init_line(*(large or [root])),
            severity=state.growing,
            measured=state.growth,
            expected=1.0,
            related=tuple(x.tensor for x in state.layers if x is not root),
            **fields(root),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """He, and large weights that norms take away."""
        return (
            example("He before 16 ReLU layers", lambda: mlp(64, *[96] * 16, 5)),
            example("norms", lambda: convs(norm=True, depth=6)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Ten times He's standard deviation."""
        return (example("ten times He's in five layers", lambda: mlp(32, *[64] * 5, 5, gain=14.0)),)
