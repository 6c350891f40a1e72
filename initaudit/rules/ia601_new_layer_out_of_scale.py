"""IA601: a new layer on pretrained features, out of scale with them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, trained
from initaudit.rules.remedy import expression_of
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import error_of, fields, to_output

# A linear head of LeCun's variance gives logits of the features' own size. Ten times that in power starts the loss at several
# times that of guessing, and its gradient reaches the features at ten times the strength they were trained under.
_TIMES = 10.0
# A law of free scale is matched by few values of any kind. So many follow it with this p-value in all tests of independence
# only where nothing was learnt: the heads of fourteen networks, trained until they were right, came to 4e-4 at most.
_ENOUGH, _INDEPENDENT = 100, 1e-2
_WEAKER = 4.0


class NewLayerOutOfScale(Rule):
    """A newly initialised layer on pretrained features sends logits or gradients out of scale with them.

    What it does: in a network whose other weights are trained, compares the variance of freshly drawn output layers with that
    which keeps the size of the features, 1/(fan_in times their second moment). Features of made-up inputs, which may be
    many times as strong as those of the data, count as no stronger than 1.

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
    thresholds = (Threshold("times", _TIMES, "times the variance that keeps the size", "an order of magnitude"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each such layer."""
        verdicts = [x.recognition.verdict for x in evidence.layers if x.recognition is not None]
        if evidence.phase not in ("trained", "mixed") or "trained" not in verdicts:
            return
        for layer in evidence.layers:
            head = to_output(layer) and layer.pair.role == "contraction"
            if not head or not layer.moments.m2 > 0 or not _fresh(evidence, layer):
                continue
            meant = 1 / (layer.pair.fan_in * _power(evidence, layer))
            # Whatever law the weights are a sample of: the logits are those of the sample.
            ratio = layer.moments.variance / meant
            error = error_of(layer)
            if ratio > self.limit(evidence, "times"):
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
        """A trained head, a new one of a hundredth, one of zeros."""
        return (
            example("trained", trained),
            example("a small new head", lambda: trained(lambda m: linear(m)[-1].weight.normal_(0, 0.02))),
            example("a new head of zeros", lambda: trained(lambda m: [p.zero_() for p in linear(m)[-1].parameters()])),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """New heads of N(0, 1) and of a scale that no scheme has."""
        return (
            example("a new head of N(0, 1)", lambda: trained(lambda m: linear(m)[-1].weight.normal_())),
            example("a new head of N(0, 9)", lambda: trained(lambda m: linear(m)[-1].weight.normal_(0, 3))),
        )


def _fresh(evidence: Evidence, layer: LayerEvidence) -> bool:
    """Whether nothing was learnt here. Few weights are "unknown" by themselves, trained or not, so that a law of the catalogue
    has to explain them; one of any scale does where the bias still has one value, or where every test finds independence."""
    known = layer.recognition
    if known is None or known.verdict == "trained" or not known.schemes:
        return False
    if not known.free:
        return True
    bias = evidence.tensors.get(layer.pair.bias or "")
    untouched = bias is not None and bias.count > 1 and bias.m2 == 0
    independent = min((p for _, p in known.evidence), default=0.0) > _INDEPENDENT
    return layer.moments.count >= _ENOUGH and (untouched or independent)


def _power(evidence: Evidence, layer: LayerEvidence) -> float:
    """The second moment of the features.

    Inputs that were made up are not those that the body was trained on: features came out at a quarter to 60 times the strength
    that they have on the images themselves. Then they count four times, and as no stronger than the size 1 that initializations
    are made for.
    """
    power = (layer.records[0].input_moment2 if layer.records else None) or 1.0
    return min(_WEAKER * power, 1.0) if evidence.synthetic else power
