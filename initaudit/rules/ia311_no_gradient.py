"""IA311: a trainable parameter without a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, linear, mlp, residual
from initaudit.rules.rule import Example, Finding, Rule, Severity
from initaudit.rules.support import initial, names


class NoGradient(Rule):
    """A trainable parameter receives no gradient at all.

    What it does: names parameters whose gradient is exactly zero in the probe and after two virtual steps of all others, and
    those that forward never reaches. A zero that another zero explains (the branch behind a zero gate) is healthy: it comes
    alive at the second step. Single tokens and vectors that only training modes use (mask tokens) are left to `info`.

    Why it is bad: such a parameter keeps its random values, and costs memory and an optimizer state.

    Example: a layer that is constructed and then forgotten in forward; a ReLU behind a norm whose scale is zero.

    Instead: call the layer, or remove it; initialise what cuts it off.

    Source: `find_unused_parameters` of torch.nn.parallel.DistributedDataParallel, which stops at the same fault.
    """

    code = "IA311"
    name = "no-gradient"
    severity = "error"
    phase = "init"
    summary = "a trainable parameter receives no gradient at all"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for parameters that are never reached, one for those that are cut off."""
        graph, trace = evidence.graph, evidence.trace
        if graph is None or not initial(evidence):
            return
        yield from self._unreached(evidence)
        if trace is None or trace.first_non_finite is not None or trace.first_non_finite_gradient is not None:
            return
        silent = {n: p for n, p in trace.parameters.items() if p.gradient_zero and p.revived is None}
        if not silent:
            return
        # Where it is cut: a zero weight or scale explains the others, and is named first.
        order = sorted(
            silent.values(), key=lambda p: (p.norm > 0, p.norm == 0 and len(p.shape) == 1 and p.name.endswith("bias"))
        )
        weights = [p for p in order if p.norm == 0 or len(p.shape) > 1]
        large = [p for p in order if _matrix(p.shape) or p.norm > 0]
        if not large:
            return
        first = (weights or order)[0]
        cause = " (it is zero itself)" if first.norm == 0 else ""
        yield self.finding(
            f"{len(silent)} trainable parameters get a gradient of exactly zero, also after two steps of the others: "
            f"{names([p.name for p in order])}{cause and f'; {first.name} is zero itself'}; they keep their values for ever",
            f'torch.nn.init.ones_(model.get_parameter("{first.name}"))'
            if first.norm == 0 and len(first.shape) == 1
            else "initialise what cuts them off, or remove them from the model",
            measured=0.0,
            tensor=first.name,
            related=tuple(p.name for p in order if p is not first),
        )

    def _unreached(self, evidence: Evidence) -> Iterator[Finding]:
        graph = evidence.graph
        assert graph is not None
        if not graph.unused:
            return
        shapes = {n: a.shape for n, a in evidence.checkpoint.arrays.items()}
        layers = [n for n in graph.unused if _matrix(shapes.get(n, ()))]
        traced = any("by running" in note for note in graph.notes)
        share = len(layers) / max(1, len(layers) + len(evidence.layers))
        # A path that one batch does not take (an expert without tokens) is no fault of the weights.
        level: Severity = "error" if layers and not traced else "info"
        yield self.finding(
            f"forward never reaches {len(graph.unused)} trainable parameters: {names(list(graph.unused))}"
            + (f" ({100 * share:.0f} % of the weights)" if layers else "")
            + "; they keep their random values",
            "call the layer in forward, or delete it; or freeze it with requires_grad_(False)",
            severity=level,
            measured=0.0,
            tensor=(layers or list(graph.unused))[0],
            related=tuple(n for n in graph.unused if n != (layers or list(graph.unused))[0]),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Zeros that come alive."""
        return (
            example("zero gates", lambda: residual(3, gate=0.0)),
            example("a zero head", lambda: mlp(32, 64, 5, change=lambda m: linear(m)[-1].weight.zero_())),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A layer that forward goes round, and a cut."""
        return (
            example("a forgotten layer", _forgotten),
            example(
                "biases that switch all units off", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-99))
            ),
        )


def _matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a layer's weight: two axes longer than one. A token or a scale is not."""
    return sum(n > 1 for n in shape) > 1


def _forgotten() -> Any:
    import torch
    from torch import nn

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(torch.relu(self.first(x)))
            return y

    return Skips(), (torch.randn(8, 16),)
