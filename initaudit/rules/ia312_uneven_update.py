"""IA312: layers whose weights and gradients are of different proportions."""

from __future__ import annotations

import math
from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, fresh_layers, initial, names, to_output

# Ratios of norms over layers in healthy networks span up to 1e3; those with gates and LayerScale up to 1e17, by design.
_SPAN = 1e3
_SHOWN = 6


class UnevenUpdate(Rule):
    """The ratio of weight norm to gradient norm differs by orders of magnitude between layers.

    What it does: takes norm(w) / norm(gradient) of every layer, LARS's trust ratio, and gives the multipliers of the learning
    rate that would make plain SGD move all layers by the same share of their size.

    Why it is bad: under SGD one learning rate is too large for one layer and too small for another. Adam evens it out, so that
    this is a remark. Gates that start at zero cause it on purpose.

    Example: a stack in which the gradient shrinks tenfold at every layer.

    Instead: Adam or LARS, or layer-wise learning rates in these proportions.

    Source: You et al. 2017 (LARS), eq. 6.
    """

    code = "IA312"
    name = "uneven-update"
    severity = "info"
    phase = "init"
    summary = (
        "the ratio of weight norm to gradient norm (the trust ratio of LARS) differs by orders of magnitude between layers"
    )
    thresholds = (Threshold("span", _SPAN, "largest / smallest trust ratio", "healthy networks span up to 1e3"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding, with the multipliers."""
        if evidence.trace is None or not initial(evidence):
            return
        ratios = []
        for layer in fresh_layers(evidence):
            found = [r.trust_ratio for r in layer.records if r.trust_ratio is not None and math.isfinite(r.trust_ratio)]
            if found and layer.pair.trainable and found[0] > 0 and not to_output(layer):
                ratios.append((found[0], layer))
        if len(ratios) < 2:
            return
        low, high = min(ratios, key=lambda r: r[0]), max(ratios, key=lambda r: r[0])
        if not high[0] / low[0] > self.limit(evidence, "span"):
            return
        middle = math.exp(sum(math.log(r) for r, _ in ratios) / len(ratios))
        chosen = sorted(ratios, key=lambda r: -abs(math.log(r[0] / middle)))[:_SHOWN]
        multipliers = ", ".join(f"{x.tensor}: {r / middle:.2g}" for r, x in chosen)
        yield self.finding(
            f"norm(w)/norm(gradient) spans a factor of {high[0] / low[0]:.2g} over {len(ratios)} layers, from "
            f"{names([low[1].tensor])} to "
            f"{names([high[1].tensor])}: under plain SGD one learning rate moves the one {high[0] / low[0]:.2g} times as "
            "much, for its "
            "size, as the other",
            f"Adam, LARS, or these multipliers of the learning rate: {multipliers}",
            measured=high[0] / low[0],
            expected=1.0,
            related=tuple(x.tensor for _, x in chosen),
            **fields(high[1]),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """He."""
        return (example("He before 10 ReLU layers", lambda: mlp(64, *[96] * 10, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Sigmoids."""
        return (example("eight sigmoid layers", lambda: mlp(64, *[96] * 8, 5, act="Sigmoid", gain=1.0)),)
