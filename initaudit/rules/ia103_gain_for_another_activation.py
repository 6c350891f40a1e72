"""IA103: a known scheme, made for another activation."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import SIGMAS, activation_of, error_of, fields, power, sigmas
from initaudit.rules.variance import Deviation, deviation, similar


class GainForAnotherActivation(Rule):
    """The weights follow a known scheme to the letter, but one whose gain belongs to another activation.

    What it does: where variances deviate and harm (see IA101 and IA102), looks whether they are those of Xavier, He, LeCun or
    of PyTorch's own default. Then the formula was applied correctly and only the choice is wrong.

    Why it is bad: Xavier assumes that the activation is linear around zero. Each ReLU keeps half of the second moment that it
    assumes, so that 30 layers leave a billionth. PyTorch's default for Linear and Conv keeps a sixth.

    Example: `xavier_uniform_` throughout a deep stack of ReLU.

    Instead: `kaiming_normal_(w, nonlinearity="relu")` before ReLU, `xavier_normal_(w, gain=5/3)` before tanh.

    Source: He et al. 2015, section 2.2; https://github.com/pytorch/pytorch/issues/15314.
    """

    code = "IA103"
    name = "gain-for-another-activation"
    severity = "error"
    phase = "init"
    summary = "the tensor matches a known scheme, but the one meant for another activation (Xavier before a deep stack of ReLU)"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for the largest group of layers under one scheme."""
        for found in (deviation(evidence, "small"), deviation(evidence, "large")):
            if found is None or not found.level:
                continue
            group = [x for x in similar(found.layers, scheme_of) if scheme_of(x)]
            if not group or 2 * len(group) < len(found.layers):
                continue
            yield self._finding(found, group)

    def _finding(self, found: Deviation, group: list[LayerEvidence]) -> Finding:
        first = group[0]
        expected = first.expectation.exact or math.nan
        return self.finding(
            f"the variance {first.moments.variance:.3g} is that of {scheme_of(first)}, {abs(sigmas(first, expected)):.0f} "
            "standard "
            f"errors from the {expected:.3g} (gain²/fan_in) that {activation_of(first)} needs; {len(group)} such layers leave "
            f"{power(found.product)} of the signal's power: {found.consequence}, so the first layers learn slowly or not "
            "at all",
            init_line(*group),
            severity="error" if found.level == "error" else "warning",
            measured=first.moments.variance,
            expected=expected,
            law="gain²/fan_in keeps the signal's second moment (He et al. 2015, eq. 10)",
            standard_errors=sigmas(first, expected),
            related=tuple(x.tensor for x in found.layers if x is not first),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """The right scheme, and the wrong one where it does no harm."""
        return (
            example("He before 16 ReLU layers", lambda: mlp(64, *[96] * 16, 5)),
            example("Xavier before two ReLU layers", lambda: mlp(64, 64, 64, 5, gain=1.0)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Xavier and the framework's default before many ReLU layers."""
        return (
            example("Xavier before 24 ReLU layers", lambda: mlp(64, *[64] * 24, 5, gain=1.0)),
            example("the default before 12 ReLU layers", lambda: mlp(64, *[64] * 12, 5, gain=1 / math.sqrt(3))),
        )


# Names for a message; each variance is computed from the fans that torch.nn.init would use.
def scheme_of(layer: LayerEvidence) -> str:
    """The classical scheme whose variance this weight has within sampling error, "" for none."""
    pair, error = layer.pair, error_of(layer)
    laws = {
        "Xavier (2/(fan_in + fan_out))": layer.expectation.xavier,
        "He (2/fan_in)": layer.expectation.he,
        "LeCun (1/fan_in)": layer.expectation.lecun,
        "PyTorch's default U(±1/sqrt(fan_in))": None if layer.expectation.lecun is None else layer.expectation.lecun / 3,
        "Xavier with tanh's gain 5/3": None if layer.expectation.xavier is None else layer.expectation.xavier * 25 / 9,
    }
    if pair.role == "recurrent" or not math.isfinite(error):
        return ""
    fits = {name: abs(layer.moments.variance / v - 1) for name, v in laws.items() if v is not None and v > 0}
    fits = {name: off for name, off in fits.items() if off < SIGMAS * error}
    return min(fits, key=lambda name: fits[name], default="")
