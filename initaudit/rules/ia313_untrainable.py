"""IA313: nothing in particular is wrong, and yet the network does not begin to learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import convs, example, mlp
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import initial

# Of 276 networks that were trained, those of a usual initialization that train stay below 0.5 under the better optimizer, the
# healthy ones of the controls below 0.2.
_LIKELY, _CERTAIN = 0.5, 0.95


class Untrainable(Rule):
    """The network does not begin to learn under any optimizer of customary step size.

    What it does: asks the risk model, where it could watch some virtual steps of SGD and of Adam on a task of memory (those of
    `--rehearse` count as well), and reports a network that is likely to fail under both and learns in 200 steps of Adam neither
    that task nor to be what it is with other weights. Any other finding that explains it takes its place.

    Why it is bad: the training run would be paid for and end at the accuracy of guessing.

    Example: an LSTM that reads eight steps and then two dozen zeros before it answers.

    Instead: what the message names; else a shorter way from the input to the loss: skips, normalizations, fewer layers.

    Source: 276 networks that were trained (docs/trainability.md).
    """

    code = "IA313"
    name = "untrainable"
    severity = "warning"
    phase = "init"
    summary = "some virtual steps of SGD and Adam learn nothing, and no other rule says why"
    thresholds = (
        Threshold("warning", _LIKELY, "probability for the better optimizer", "more likely to fail than not"),
        Threshold("error", _CERTAIN, "probability for the better optimizer", "calibrated, docs/trainability.md"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        risk, trace = evidence.risk, evidence.trace
        if risk is None or trace is None or "unlearnt_sgd" not in risk.features or not initial(evidence):
            return
        from initaudit.probe.features import learnt_later  # with torch, which only a trace has loaded

        if learnt_later(trace) is not None:
            return
        least = min(risk.untrainable_sgd, risk.untrainable_adam)
        if least < self.limit(evidence, "warning"):
            return
        yield self.finding(
            f"the network is likely not to learn: {risk.untrainable_sgd:.2f} with SGD, {risk.untrainable_adam:.2f} with Adam"
            + (f"; {risk.cause}" if risk.cause else ""),
            "shorten the way from the input to the loss (skips, normalizations, fewer layers), or give real inputs with --data",
            severity="error" if least >= self.limit(evidence, "error") else "warning",
            measured=least,
            expected=0.0,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A deep stack under He, and a tiny layer that one step undoes."""
        return (
            example("He before 8 ReLU layers", lambda: mlp(64, *[96] * 8, 5)),
            example("a tiny layer before a norm", lambda: convs(norm=True, change=lambda m: m[6].weight.mul_(1e-4))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A memory that is asked for too much."""
        return (example("an LSTM over two dozen zeros", _forgets),)


def _forgets() -> Any:
    import torch
    from torch import nn

    class Forgets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(self.lstm(nn.functional.pad(x, (0, 0, 0, 32)))[0][:, -1])
            return y

    return Forgets(), (torch.randn(32, 8, 8),)
