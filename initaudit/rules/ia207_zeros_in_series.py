"""IA207: two zero factors of one product."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, linear, residual
from initaudit.rules.gates import factors
from initaudit.rules.remedy import reset_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.structure import leads_to_unknown
from initaudit.rules.support import fields, initial, names


class ZerosInSeries(Rule):
    """Two zero factors of one product: neither ever receives a gradient.

    What it does: looks for weights that are zero and whose gradient is zero, and stays zero after two virtual steps of all
    other parameters. One zero factor learns, because the other lets its gradient through; two wait for each other.

    Why it is bad: the branch is dead for the whole of training, and nothing else shows it: the loss goes down without it.

    Example: two zero convolutions in a row, or LoRA with both A and B zero.

    Instead: draw the first factor and leave the last zero: `nn.init.kaiming_uniform_(lora_A.weight, a=math.sqrt(5))`.

    Source: https://github.com/lllyasviel/ControlNet/issues/510; Hu et al. 2021 (LoRA), section 4.1.
    """

    code = "IA207"
    name = "zeros-in-series"
    severity = "error"
    phase = "init"
    summary = "two zero factors of one product: neither ever receives a gradient"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all weights that wait for each other."""
        trace = evidence.trace
        if trace is None or not initial(evidence):
            return
        beyond = leads_to_unknown(evidence)
        silent = {
            n for n, p in trace.parameters.items() if p.gradient_zero and p.revived is None and p.norm == 0 and n not in beyond
        }
        layers = [x for x in evidence.layers if x.moments.m2 == 0 and x.moments.mean == 0]
        weights = [x.tensor for x in layers if any(name in silent for name in x.pair.constants)]
        gates = factors(evidence.graph) if evidence.graph is not None else []
        stuck = list(dict.fromkeys([*weights, *(name for name in gates if name in silent)]))
        if len(stuck) < 2:
            return
        first = evidence.layer(stuck[0])
        where = fields(first) if first is not None else {"tensor": stuck[0]}
        needed = first.expectation.exact if first is not None else None
        yield self.finding(
            f"{names(stuck)} are zero and wait for each other: the gradient of each is a product with another zero, and stays "
            "zero after two steps of all other parameters, so they never learn",
            reset_line(evidence, stuck[0]),
            measured=0.0,
            expected=needed if needed is not None else 1.0,
            law=EXACT + "one factor of a product may start at zero, the other is drawn (gain²/fan_in) or one",
            related=tuple(stuck[1:]),
            **where,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """One zero factor."""
        return (example("LoRA with B zero", lambda: _adapter(zero_a=False)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Both."""
        return (
            example("LoRA with A and B zero", lambda: _adapter(zero_a=True)),
            example("a gate of zero on a branch that ends in zeros", lambda: residual(3, gate=0.0, change=_silence)),
        )


def _adapter(*, zero_a: bool) -> Any:
    import torch
    from torch import nn

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.a, self.b = (
                nn.Linear(32, 16).requires_grad_(False),
                nn.Linear(32, 4, bias=False),
                nn.Linear(4, 16, bias=False),
            )
            nn.init.zeros_(self.b.weight)
            if zero_a:
                nn.init.zeros_(self.a.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.base(x) + self.b(self.a(x))
            return y

    return Adapter(), (torch.randn(8, 32),)


def _silence(model: Any) -> None:
    last = next(x for x in linear(model) if x.in_features > x.out_features)
    last.weight.zero_()
    last.bias.zero_()
