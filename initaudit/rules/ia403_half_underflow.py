"""IA403: numbers below the range of half precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, initial, names

# The smallest positive number of each type (subnormal), IEEE 754-2008, table 3.5, and bfloat16's.
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}
# Weights of which a tenth round to zero although the others are as small as that.
_ROUNDED = 0.1
_NEAR = 100.0


class HalfUnderflow(Rule):
    """Weights or gradients fall below the smallest number of their type.

    What it does: reports 16-bit weights of which a tenth are exactly zero while all the others lie within a hundred times the
    type's smallest number (a pruned weight has zeros among numbers of usual size), and float16 models most of whose gradients
    in the probe are below it.

    Why it is bad: what falls below is zero. Weights lose their distribution, and gradients that are zero teach nothing.

    Example: N(0, 1e-8) cast to float16.

    Instead: a variance that the type can hold; loss scaling (`torch.amp.GradScaler`) for gradients in float16; or bfloat16.

    Source: Micikevicius et al. 2018 (mixed precision), section 3.2.
    """

    code = "IA403"
    name = "half-underflow"
    severity = "warning"
    phase = "any"
    summary = "weights or gradients fall below the smallest number of the dtype"
    thresholds = (
        Threshold("share", _ROUNDED, "of the weights", "a tenth that rounds to zero deforms the distribution"),
        Threshold("near", _NEAR, "times the smallest number", "zeros among numbers of usual size are pruned weights"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each weight, one for the gradients."""
        for layer in evidence.layers:
            array = evidence.checkpoint.arrays.get(layer.tensor)
            kind = evidence.config.dtype or (array.dtype if array is not None else "")
            smallest = SMALLEST.get(kind)
            moments = layer.moments
            if smallest is None or not moments.m2 > 0 or not moments.count:
                continue
            largest = max(abs(moments.min), abs(moments.max))
            lost = moments.zeros / moments.count
            if array is not None and array.dtype != kind:
                # Not cast yet: of N(0, std²) this share lies below half of the smallest number.
                lost = math.erf(smallest / 2 / math.sqrt(2) / moments.std)
            if lost > self.limit(evidence, "share") and largest < self.limit(evidence, "near") * smallest:
                yield self.finding(
                    f"{100 * lost:.0f} % of the weights are zero in {kind}, whose smallest number is {smallest:.2g}; the "
                    "largest weight is "
                    f"{largest:.2g}: what was drawn is lost, and the signal with it",
                    init_line(layer),
                    measured=lost,
                    expected=0.0,
                    law=EXACT + f"values below half of {smallest:.2g} round to zero",
                    **fields(layer),
                )
        yield from self._gradients(evidence)

    def _gradients(self, evidence: Evidence) -> Iterator[Finding]:
        if evidence.trace is None or not initial(evidence):
            return
        small: list[tuple[float, LayerEvidence]] = []
        for layer in evidence.layers:
            array = evidence.checkpoint.arrays.get(layer.tensor)
            kind = evidence.config.dtype or (array.dtype if array is not None else "")
            if kind != "float16" or not layer.records or not layer.pair.trainable:
                continue
            norm, count = layer.records[0].gradient_norm, layer.records[0].elements
            if norm is not None and 0 < norm / math.sqrt(count) < SMALLEST["float16"]:
                small.append((norm / math.sqrt(count), layer))
        if small:
            yield self.finding(
                f"gradients of {names([x for _, x in small])} are below {SMALLEST['float16']:.2g} in size, the smallest "
                "float16: without loss scaling they are zero",
                "scaler = torch.amp.GradScaler()  # scales the loss; or train in bfloat16",
                severity="info",
                measured=small[0][0],
                expected=SMALLEST["float16"],
                law=EXACT + "the smallest number of float16 (IEEE 754)",
                related=tuple(x.tensor for _, x in small[1:]),
                **fields(small[0][1]),
            )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A pruned float16 weight of usual size."""
        return (example("half of the weights pruned", lambda: _half(lambda m: linear(m)[1].weight[:, ::2].zero_())),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """1e-8 in float16."""
        return (example("N(0, 1e-8) in float16", lambda: _half(lambda m: linear(m)[1].weight.normal_(0, 1e-8))),)


def _half(change: Any) -> Any:
    model, inputs = mlp(64, 128, 128, 5, change=change)
    return model.half(), tuple(x.half() for x in inputs)
