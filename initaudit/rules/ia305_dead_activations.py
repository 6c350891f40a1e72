"""IA305: units that are zero for every input."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import with_bias
from initaudit.rules.rule import Example, Finding, Rule, Severity, Threshold
from initaudit.rules.support import SIGMAS, fields

# Once all inputs are alike (deep plain stacks), a unit of mean zero is off for all of them with probability 1/2.
_ALIKE = 0.5
_MOST = 0.9  # a layer of which a tenth works
_FEW = 16  # units below which a share says nothing


class DeadActivations(Rule):
    """Units are off for every input of the probe: their activation is flat there, and passes no gradient.

    What it does: evaluates the slope of every activation at the values that reach it, and counts units whose slope is exactly
    zero for all examples and positions. Half of the units may be off where inputs have become alike; more means a shift.

    Why it is bad: a unit that is off for every input gets no gradient and cannot come back.

    Example: biases of -6 before ReLU.

    Instead: zero biases, weights of mean zero, He's variance.

    Source: Lu et al. 2020, "Dying ReLU and initialization", theorem 1.
    """

    code = "IA305"
    name = "dead-activations"
    severity = "error"
    phase = "any"
    summary = "units that are zero for every input"
    thresholds = (
        Threshold("share", _ALIKE, "of the units", "a ReLU is off for half of all inputs where these are alike"),
        Threshold("error", _MOST, "of the units", "a layer of which a tenth works"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding, at the first activation of this kind in forward order."""
        if evidence.trace is None:
            return
        found = []
        steadied = _steadied(evidence)
        for layer in evidence.layers:
            # A ReLU is off at zero: behind a zero-initialised layer that says nothing about its units.
            if not any(r.output_moment2 for r in layer.records):
                continue
            for feed in layer.feeds:
                signal = evidence.trace.signals.get(feed.node)
                if signal is None or signal.dead is None or not signal.shape or feed.node in steadied:
                    continue
                units = min(max(signal.shape[1:], default=1), layer.moments.count)
                if units >= _FEW and signal.dead > self.limit(evidence, "share") + SIGMAS * math.sqrt(0.25 / units):
                    found.append((layer, feed, signal))
        if not found:
            return
        layer, feed, signal = found[0]
        dead = signal.dead or 0.0
        broken = dead >= self.limit(evidence, "error")
        # A trained network may do without some of its units; that all are off is a fault at any time.
        level: Severity = "error" if broken else "warning" if evidence.phase == "init" else "info"
        yield self.finding(
            f"{100 * dead:.0f} % of the units of the {feed.activation.name} behind {layer.tensor} are off for every input "
            "of the probe "
            f"(up to 50 % where all inputs are alike): they pass no gradient and cannot come back"
            + (f"; {len(found)} layers are affected" if len(found) > 1 else ""),
            with_bias(evidence, layer),
            severity=level,
            measured=dead,
            expected=0.0,
            related=tuple(dict.fromkeys(x.tensor for x, _, _ in found[1:])),
            **fields(layer),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """He before a deep stack."""
        return (example("He before 16 ReLU layers", lambda: mlp(64, *[96] * 16, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Biases that switch units off."""
        return (example("biases of -9", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-9))),)


def _steadied(evidence: Evidence) -> frozenset[str]:
    """Exponentials of what a maximum was taken from: a running log-sum-exp, whose lesser terms are meant to underflow."""
    feeds = (feed for layer in evidence.layers for feed in layer.feeds if feed.activation.name == "exp")
    return frozenset(f.node for f in feeds if any(step.lower() in ("maximum", "max") for step in f.path))
