"""IA601: a new layer on pretrained features, out of scale with them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, linear, trained
from initaudit.rules.remedy import expression_of
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import SIGMAS, error_of, fields, to_output

# A linear head of LeCun's variance gives logits of the features' own size. Ten times that in power starts the loss at several
# times that of guessing, and its gradient reaches the features at ten times the strength they were trained under.
_TIMES = 10.0


class NewLayerOutOfScale(Rule):
    """A newly initialised layer on pretrained features sends logits or gradients out of scale with them.

    What it does: in a network whose other weights are trained, compares the variance of freshly drawn output layers with that
    which keeps the size of the features, 1/(fan_in times their second moment).

    Why it is bad: the first steps fit the new layer's noise. Its gradients tear apart the features that were to be kept.

    Example: `nn.init.normal_(head.weight)` before fine-tuning.

    Instead: `nn.init.normal_(head.weight, std=0.02)`, or zeros; or train the head alone first.

    Source: Kumar et al. 2022 (fine-tuning can distort pretrained features), section 3.
    """

    code = "IA601"
    name = "new-layer-out-of-scale"
    severity = "warning"
    phase = "any"
    summary = "a newly initialised layer on pretrained features sends logits or gradients out of scale with them"
    thresholds = (
        Threshold("times", _TIMES, "times the variance that keeps the size", "an order of magnitude, sampling error aside"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each such layer."""
        verdicts = [x.recognition.verdict for x in evidence.layers if x.recognition is not None]
        if evidence.phase not in ("trained", "mixed") or verdicts.count("trained") < 2:
            return
        for layer in evidence.layers:
            # A trained head of few weights is "unknown", but no law of the catalogue explains it.
            known = layer.recognition
            fresh = known is not None and known.verdict != "trained" and bool(known.schemes) and not known.free
            if not fresh or not to_output(layer) or layer.pair.role != "contraction" or not layer.moments.m2 > 0:
                continue
            power = layer.records[0].input_moment2 if layer.records else 1.0
            meant = 1 / (layer.pair.fan_in * (power if power else 1.0))
            ratio = layer.moments.variance / meant
            error = error_of(layer)
            if ratio * (1 - SIGMAS * min(error, 0.15)) > self.limit(evidence, "times"):
                yield self.finding(
                    f"this layer is freshly drawn on trained features, with variance {layer.moments.variance:.3g}, "
                    f"{ratio:.3g} times the "
                    f"{meant:.3g} that gives outputs of the features' size ({abs(ratio - 1) / (error * ratio):.0f} "
                    "standard errors): its "
                    "first gradients tear the features apart",
                    f"torch.nn.init.normal_({expression_of(layer)}, std={min(0.02, math.sqrt(meant)):.3g})",
                    measured=layer.moments.variance,
                    expected=meant,
                    law="1/(fan_in E[x²]) gives outputs of the features' size (LeCun)",
                    standard_errors=(ratio - 1) / (error * max(ratio, 1.0)),
                    **fields(layer),
                )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A trained head, and a new one of a hundredth."""
        return (
            example("trained", trained),
            example("a small new head", lambda: trained(lambda m: linear(m)[-1].weight.normal_(0, 0.02))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A new head of N(0, 1)."""
        return (example("a new head of N(0, 1)", lambda: trained(lambda m: linear(m)[-1].weight.normal_())),)
