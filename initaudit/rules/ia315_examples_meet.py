"""IA315: the output of one example depends on which others stand beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import convs, example
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.support import view


class ExamplesMeet(Rule):
    """The output of one example depends on which other examples stand beside it in the batch.

    What it does: exchanges the first example of the probe's batch, and looks whether the outputs of the others change; batch
    normalization is held at what it made of the batch before. The first operator at which examples meet is named. Similarities
    of all examples with all (a contrastive loss) are meant, and so is a batch whose inputs differ in their first axis, as nodes
    and edges of a graph do.

    Why it is bad: where it is not meant, examples are scrambled or blurred into each other. The loss falls all the same, to a
    worse value, and a prediction changes with the company in which it is asked for.

    Example: softmax over axis 0; `transpose` and `reshape` in the wrong order; an LSTM whose `batch_first` was forgotten.

    Instead: the axis within an example. It is right where the first axis counts time (time, batch, feature), the members of a
    set or the nodes of a graph, and for negatives taken from the batch: a remark, therefore, and no warning.

    Source: Ioffe & Szegedy 2015, section 3, on what it means that an example is seen in conjunction with others.
    """

    code = "IA315"
    name = "examples-meet"
    severity = "info"
    phase = "any"
    summary = "the output of one example depends on the others in the batch, and no batch normalization does that"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        trace = evidence.trace
        if trace is None or not trace.met:
            return
        from initaudit.graph.calls import role_of  # with torch, which only a trace has loaded
        from initaudit.graph.graph import location_of

        node = view(evidence).nodes[trace.met]
        place = location_of(node)
        line = f" ({place.source_line})" if place.source_line else ""
        yield self.finding(
            f"the output of one example depends on the other examples of the batch: they first meet in {role_of(node).name} at "
            f"{place.site or node.name}{line}; a prediction changes with the company in which it is asked for",
            "look for a softmax, sum or reshape over axis 0 or a forgotten batch_first=True; it is right where the first axis "
            "counts time, nodes or the members of a set, and for negatives from the batch",
            measured=1.0,
            expected=0.0,
            law=EXACT + "an output that is a function of its own example alone does not change with another",
            site=place.site or node.name,
            location=place,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Attention within an example, and batch normalization."""
        return (
            example("attention within an example", lambda: _attention(-1)),
            example("batch normalization", lambda: convs(norm=True)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Attention over the batch."""
        return (example("a softmax over the batch", lambda: _attention(0)),)


def _attention(axis: int) -> Any:
    import torch
    from torch import nn

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.head = (nn.Linear(32, n) for n in (32, 32, 32, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.query(x) @ self.key(x).transpose(1, 2) / 32**0.5
            y: torch.Tensor = self.head((scores.softmax(axis) @ self.value(x)).mean(1))
            return y

    return Attention(), (torch.randn(32, 6, 32),)
