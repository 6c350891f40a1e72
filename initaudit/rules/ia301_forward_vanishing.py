"""IA301: the signal dies on its way to the output."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.culprit import culprit
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import convs, example, linear, mlp
from initaudit.rules.health import SIGNAL, below, health, pair_of
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import initial, names, power, rate, ratio_of, view


class ForwardVanishing(Rule):
    """The second moment of the signal that tells inputs apart shrinks with depth.

    What it does: follows the second moment, times the share of it that differs between examples, from the input or the last
    normalization to the layer that makes the output. Gates, LayerScale and averages over positions do not count.

    Why it is bad: what reaches the output is smaller than the biases and, in half precision, than the smallest number. The
    gradient of every weight is proportional to its input, so the last layers learn nothing about the inputs.

    Example: N(0, 0.01) in twelve plain convolutions.

    Instead: `kaiming_normal_` before ReLU, a normalization, or residual connections.

    Source: Glorot & Bengio 2010, section 4.2; He et al. 2015, section 2.2.
    """

    code = "IA301"
    name = "forward-vanishing"
    severity = "error"
    phase = "init"
    summary = "the second moment shrinks with depth"
    thresholds = pair_of(SIGNAL, "of the power that tells inputs apart")

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        state = health(evidence)
        level = below(state.signal, state.limits.signal)
        if not level or not initial(evidence):
            return
        flow = view(evidence).flow
        left = {n: size * flow.contrast[n] for n, size in flow.size.items()} if flow is not None else {}
        alone = culprit(evidence, state, left, state.signal)
        small = [alone] if alone else [x for x in state.layers if (ratio_of(x) or 1) < 1] or list(state.layers)
        yield self.finding(
            f"of the signal that tells inputs apart {power(state.signal)} in power is left at the output layer after "
            f"{len(state.layers)} "
            f"layers (1 would keep it, healthy networks keep more than 0.01); the weights of {names(small)} are small for "
            "their "
            "activations, and the last layers learn nothing about the inputs" + rate(evidence, "signal_loss", state.signal),
            init_line(*small),
            severity=level,
            measured=state.signal,
            expected=1.0,
            tensor=small[0].tensor,
            site=small[0].pair.site,
            location=small[0].pair.location,
            related=tuple(x.tensor for x in small[1:]),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A deep stack under He, and small weights with norms."""
        return (
            example("He before 16 ReLU layers", lambda: mlp(64, *[96] * 16, 5)),
            example("norms", lambda: convs(norm=True, depth=6)),
            example("a zero head", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[-1].weight.zero_())),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Too small throughout."""
        return (example("a hundredth of He in eight layers", lambda: mlp(32, *[64] * 8, 5, gain=0.15)),)
