"""IA110: a standard deviation given as the bound of a uniform law."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.health import health
from initaudit.rules.remedy import each, expression_of
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import SIGMAS, error_of, fields, fresh_layers, initial, normalised, plain, power, sigmas, to_output

_AGAIN = {
    "He": 'torch.nn.init.kaiming_uniform_({}, nonlinearity="relu")',
    "Xavier": "torch.nn.init.xavier_uniform_({})",
}
_UNIFORM_KURTOSIS = 1.8
# The standard error of a uniform sample's kurtosis is sqrt(256/175... /n) < 1.3/sqrt(n).
_KURTOSIS_ERROR = 1.3


class StdUsedAsBound(Rule):
    """Uniform weights whose bound is the standard deviation that a scheme asks for: a third of the variance meant.

    What it does: recognises a uniform law (kurtosis 1.8, largest value at the bound) whose bound is He's standard deviation
    sqrt(2/fan_in), or Xavier's. PyTorch's default U(±1/sqrt(fan_in)) is what it is by design, and left alone.

    Why it is bad: the variance of U(-b, b) is b²/3. Each layer keeps a third of the power that its author meant.

    Example: `std = math.sqrt(2 / fan_in); nn.init.uniform_(w, -std, std)`.

    Instead: `nn.init.kaiming_uniform_(w, nonlinearity="relu")`, or a bound of `math.sqrt(3) * std`.

    Source: https://github.com/SlopDotCash/asi/issues/130; He et al. 2015, eq. 10.
    """

    code = "IA110"
    name = "std-used-as-bound"
    severity = "error"
    phase = "init"
    summary = "uniform with the scheme's std as its bound: a third of the variance meant"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all weights of this kind."""
        if not initial(evidence):
            return
        found = [(x, b) for x in fresh_layers(evidence, "contraction") if not to_output(x) and plain(x) and (b := _bound(x))]
        found = [(x, b) for x, b in found if not normalised(x)]
        if not found:
            return
        first, (law, meant) = found[0]
        level = health(evidence).vanishing
        yield self.finding(
            f"uniform with bound {max(abs(first.moments.min), first.moments.max):.4g}, which is {law}'s standard deviation "
            "for fan_in "
            f"{first.pair.fan_in}: variance {first.moments.variance:.3g}, a third of the {meant:.3g} meant, "
            f"{abs(sigmas(first, meant)):.0f} standard errors below; {len(found)} "
            "such layers leave "
            f"{power(3.0 ** -len(found))} of the signal's power",
            each(_AGAIN[law], [expression_of(x) for x, (other, _) in found if other == law]),
            severity="error" if level == "error" else "warning" if level else "info",
            measured=first.moments.variance,
            expected=meant,
            law=f"{law}; the bound of a uniform law is sqrt(3) standard deviations",
            standard_errors=sigmas(first, meant),
            related=tuple(x.tensor for x, _ in found[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """He's bound, and the framework's default."""
        return (
            example("kaiming_uniform_", lambda: mlp(64, *[96] * 12, 5, change=lambda m: _uniform(m, math.sqrt(6)))),
            example("the default", lambda: mlp(64, 96, 96, 5, change=lambda m: _uniform(m, 1.0))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """He's standard deviation for a bound."""
        return (example("U(±sqrt(2/fan_in))", lambda: mlp(64, *[96] * 12, 5, change=lambda m: _uniform(m, math.sqrt(2)))),)


def _bound(layer: LayerEvidence) -> tuple[str, float] | None:
    """(the law whose standard deviation is the bound, its variance), or None."""
    moments, pair, error = layer.moments, layer.pair, error_of(layer)
    if not moments.m2 > 0 or moments.count < 256 or not math.isfinite(error):
        return None
    if abs(moments.kurtosis - _UNIFORM_KURTOSIS) > SIGMAS * _KURTOSIS_ERROR / math.sqrt(moments.count):
        return None
    largest = max(abs(moments.min), abs(moments.max))
    # What is right by another law, in torch's own reading of the axes too, is no mistake.
    known = [x for x in (layer.expectation.xavier, layer.expectation.he, layer.expectation.lecun) if x]
    second = math.prod(pair.shape[1:]) if len(pair.shape) > 1 else pair.fan_in
    known += [1 / 3 / pair.fan_in, 1 / 3 / second, 1 / second, 2 / second]
    if any(abs(moments.variance / v - 1) < SIGMAS * error for v in known):
        return None
    for law, variance in (("He", 2 / pair.fan_in), ("Xavier", 2 / (pair.fan_in + pair.fan_out))):
        bound = math.sqrt(variance)
        # The largest of n values misses the bound by about 1/n of it.
        near = bound * (1 - 20 / moments.count) <= largest <= bound * (1 + 1e-3)
        if near and abs(moments.variance * 3 / variance - 1) < SIGMAS * error:
            return law, variance
    return None


def _uniform(model: Any, factor: float) -> None:
    for layer in linear(model):
        bound = factor / math.sqrt(layer.in_features)
        layer.weight.uniform_(-bound, bound)
