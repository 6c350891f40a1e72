"""IA309: attention that is one-hot at the start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example
from initaudit.rules.remedy import expression_of, init_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.structure import makers, weighs_values
from initaudit.rules.support import fields, initial, power, view

# Entropy as a share of that of a uniform row. At unit variance of the scores it is 0.8 to 0.9; at 0.2 and 16 positions 1.7 of
# them share nine tenths of the weight.
_ONE_HOT = 0.25
_LARGE = 2.0  # times LeCun's: twice that in queries and keys makes scores of variance 4
_LEAST = 4  # positions: with fewer a row has no entropy to speak of


class AttentionEntropy(Rule):
    """Softmax attention is one-hot at the start.

    What it does: takes the mean entropy of the rows of every attention, as a share of that of a uniform row. A softmax counts
    where its rows weigh the values of a product; one that chooses experts or classes does not.

    Why it is bad: the slope of a softmax that has decided is zero: queries and keys get no gradient, and each position copies
    one other at random. In long training such heads make the loss diverge.

    Example: queries and keys drawn from N(0, 1) at width 64, where scores have a standard deviation of hundreds.

    Instead: scores of unit variance: `xavier_uniform_` for each projection and a scale of 1/sqrt(d).

    Source: Zhai et al. 2023 (entropy collapse), section 3; Vaswani et al. 2017, section 3.2.1 for the scale.
    """

    code = "IA309"
    name = "attention-entropy"
    severity = "warning"
    phase = "init"
    summary = "softmax attention is one-hot at the start (or uniform because its input collapsed)"
    thresholds = (Threshold("entropy", _ONE_HOT, "of the largest entropy", "at unit variance of the scores it is 0.8 to 0.9"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all attentions of this kind."""
        if evidence.trace is None or evidence.graph is None or not initial(evidence):
            return
        ends, seen = set(evidence.trace.outputs), view(evidence)
        sharp = [
            s
            for s in sorted(evidence.trace.signals.values(), key=lambda s: s.order)
            if s.entropy is not None
            and s.entropy < self.limit(evidence, "entropy")
            and s.node not in ends
            and len(s.shape) >= 3
            and s.shape[-2] >= _LEAST
            and (s.kind == "attention" or weighs_values(seen.nodes[s.node], seen.constant))
        ]
        if not sharp:
            return
        layers = sorted(makers(evidence, seen.nodes[sharp[0].node]), key=_excess, reverse=True)
        large = [x for x in layers if _excess(x) > _LARGE]
        entropy = sharp[0].entropy or 0.0
        where: dict[str, Any] = fields(layers[0]) if layers else {"site": sharp[0].node}
        many = "an attention" if len(sharp) == 1 else f"{len(sharp)} attentions"
        yield self.finding(
            f"the rows of {many} are nearly one-hot: {100 * entropy:.0f} % of the entropy of uniform ones"
            f"{' in the first' if len(sharp) > 1 else ''}; {_why(evidence, layers, large)}; "
            "queries and keys get almost no gradient through a softmax that has decided",
            init_line(large[0])
            if large
            else f"normalise what {expression_of(layers[0])} reads, or divide the scores by sqrt(d)"
            if layers
            else "divide the scores by sqrt(d), or normalise what queries and keys are made of",
            measured=entropy,
            expected=0.85,
            related=tuple(x.tensor for x in layers[1:]),
            **where,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Scores of unit variance, and a router that has decided, which is no attention."""
        return (example("LeCun's projections", lambda: _attention(1.0)), example("a router", _router))

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """N(0, 1)."""
        return (example("N(0, 1) projections", lambda: _attention(8.0)),)


def _excess(layer: LayerEvidence) -> float:
    return layer.moments.variance / layer.expectation.lecun if layer.expectation.lecun else 0.0


def _why(evidence: Evidence, layers: list[LayerEvidence], large: list[LayerEvidence]) -> str:
    """What makes the scores large: the projections that are `large`, or what the first of `layers` reads."""
    if large:
        times = f"{_excess(large[0]):.3g} times LeCun's variance 1/fan_in"
        return f"{large[0].tensor} has {times}, at which scores have unit variance"
    read = next((r.input_moment2 for x in layers[:1] for r in x.records if r.input_moment2), None)
    if read is not None and read > 1:
        return f"{layers[0].tensor} reads a signal of power {power(read)} where a norm would send 1"
    return "nothing divides their scores by sqrt(d)"


def _attention(gain: float) -> Any:
    import torch
    from torch import nn

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 5)
            for layer in (self.q, self.k, self.v):
                nn.init.normal_(layer.weight, 0, gain / 8)

        def forward(self, x: torch.Tensor) -> Any:
            scores = self.q(x) @ self.k(x).transpose(1, 2) / 8
            return self.head(x + scores.softmax(-1) @ self.v(x))

    return Reader(), (torch.randn(8, 16, 64),)


def _router() -> Any:
    import torch
    from torch import nn

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.choose, self.experts, self.head = nn.Linear(64, 4), nn.Linear(64, 4 * 64), nn.Linear(64, 5)
            nn.init.normal_(self.choose.weight)

        def forward(self, x: torch.Tensor) -> Any:
            shares = self.choose(x).softmax(-1).unsqueeze(-1)
            return self.head((shares * self.experts(x).unflatten(-1, (4, 64))).sum(-2))

    return Router(), (torch.randn(8, 16, 64),)
