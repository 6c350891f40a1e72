"""IA504: a gate that is still zero after training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, trained
from initaudit.rules.gates import silent
from initaudit.rules.norms import norms
from initaudit.rules.remedy import parameter
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.support import names


class DeadGate(Rule):
    """A scale or gate is exactly zero after training, so its branch contributes nothing.

    What it does: finds parameters that multiply a signal (a scalar, one number a channel, or a normalization's scale), in a
    trained network, whose values are all exactly zero, also behind a function that keeps the zero. Without a graph only the
    scales of normalizations are known: vectors that stand without a matrix beside them.

    Why it is bad: the branch was never used: it was frozen, left out of the optimizer, or lost when the checkpoint was saved.
    Its layers cost time and do nothing.

    Example: a residual scale that starts at zero and was not given to the optimizer.

    Instead: give it to the optimizer and train on, or remove the branch.

    Source: https://github.com/gallenszl/CFNet/issues/21; Bachlechner et al. 2020 (ReZero).
    """

    code = "IA504"
    name = "dead-gate"
    severity = "warning"
    phase = "trained"
    summary = "a scale or gate is zero after training, so its branch contributes nothing"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all gates of this kind."""
        if evidence.phase not in ("trained", "mixed"):
            return
        zero = {n for n, m in evidence.tensors.items() if m.count and m.min == m.max == 0.0}
        if evidence.graph is not None:
            gates = silent(evidence.graph, zero)
        else:
            gates = [n.scale for n in norms(evidence) if n.scale in zero and evidence.tensors[n.scale].count > 1]
        if gates:
            gate = parameter(evidence, gates[0])
            yield self.finding(
                f"{names(gates)} {'is' if len(gates) == 1 else 'are'} exactly zero in a trained network: what "
                f"{'it multiplies' if len(gates) == 1 else 'they multiply'} contributes nothing, and learns nothing",
                f'optimizer.add_param_group({{"params": [{gate}]}})  # and train on; or open it: torch.nn.init.ones_({gate})',
                tensor=gates[0],
                measured=0.0,
                expected=float(evidence.tensors[gates[0]].count),
                law=EXACT + "values that differ from zero: a step moves every one whose gradient is not zero",
                related=tuple(dict.fromkeys(gates[1:])),
            )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A gate that has opened."""
        return (example("an open gate", lambda: _gated(0.3)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A gate that never did."""
        return (
            example("a gate of zero", lambda: _gated(0.0)),
            example("a gate of zero behind a tanh", lambda: _gated(0.0, bounded=True)),
        )


def _gated(value: float, *, bounded: bool = False) -> Any:
    import torch
    from torch import nn

    body, inputs = trained()
    branch, _ = trained()

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.branch, self.gate = body, branch, nn.Parameter(torch.full((5,), value))

        def forward(self, x: torch.Tensor) -> Any:
            return self.body(x) + (self.gate.tanh() if bounded else self.gate) * self.branch(x)

    return Gated(), inputs
