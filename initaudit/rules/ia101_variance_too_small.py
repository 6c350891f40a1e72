"""IA101: weights too small for the activation they feed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import convs, example, linear, mlp
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import activation_of, fields, power, sigmas
from initaudit.rules.variance import LEAST, LIKELY, deviation


class VarianceTooSmall(Rule):
    """Weights vary less than the activation behind them needs, and the signal suffers.

    What it does: compares the variance of each weight with that which keeps the signal's second moment through its activation
    (gain²/fan_in with the activation's exact gain), and reports the deviation where the probe sees signal, gradient or the
    difference between inputs vanish. A weight in front of a normalization, on a residual branch or behind a zero gate may be
    as small as it likes.

    Why it is bad: the loss compounds with depth. At half of the variance needed, 30 layers leave a billionth of the gradient.

    Example: `kaiming_normal_(w, a=math.sqrt(2))`, the gain passed where the slope of a leaky ReLU belongs.

    Instead: `torch.nn.init.kaiming_normal_(w, nonlinearity="relu")`.

    Source: He et al. 2015, eq. 10; Poole et al. 2016 and Schoenholz et al. 2017 for the depth that a signal survives.
    """

    code = "IA101"
    name = "variance-too-small"
    severity = "error"
    phase = "init"
    summary = "observed variance is below what the downstream activation needs, beyond sampling error, and the signal suffers"
    thresholds = (
        Threshold(
            "ratio",
            LEAST,
            "of the variance needed",
            "a smaller deviation compounds to less than a factor of 10 over ten layers",
        ),
        Threshold(
            "untrainable",
            LIKELY,
            "risk with both optimizers",
            "from here any deviation that harms is an error: training is more likely to fail than not",
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all the layers that together lose the signal."""
        found = deviation(evidence, "small")
        if found is None or not found.level:
            return
        first = found.layers[0]
        expected = first.expectation.exact or math.nan
        together = f"; {len(found.layers)} such layers in a row leave {power(found.product)}" if len(found.layers) > 1 else ""
        yield self.finding(
            f"variance {first.moments.variance:.3g} is {first.moments.variance / expected:.2g} of the {expected:.3g} that "
            "keeps "
            f"a signal through {activation_of(first)} (gain²/fan_in), {abs(sigmas(first, expected)):.0f} standard errors below"
            f"{together}: {found.consequence}, so the first layers learn slowly or not at all",
            init_line(*found.layers),
            severity="error" if found.level == "error" else "warning",
            measured=first.moments.variance,
            expected=expected,
            law="gain²/fan_in keeps the signal's second moment (He et al. 2015, eq. 10)",
            standard_errors=sigmas(first, expected),
            related=tuple(x.tensor for x in found.layers[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Small weights that a norm makes up for, and a shallow stack."""
        return (
            example("small weights before BatchNorm", lambda: convs(norm=True, change=lambda m: [_shrink(x) for x in m])),
            example("a shallow default network", lambda: mlp(32, 64, 64, 5, gain=1 / math.sqrt(3))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Depth makes the same weights harmful."""
        return (
            example("a third of the variance in 16 layers", lambda: mlp(32, *[64] * 16, 5, gain=math.sqrt(2 / 3))),
            example(
                "one hidden layer of 1e-4",
                lambda: mlp(32, *[64] * 4, 5, change=lambda m: linear(m)[2].weight.mul_(1e-4)),
            ),
        )


def _shrink(module: Any) -> Any:
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() == 4:
        weight.mul_(0.1)
