"""IA005: example inputs that are all alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.support import names


class InputsAlike(Rule):
    """The example inputs hold no variation, and the network was judged on others of their shapes.

    What it does: says which of the inputs given are one number throughout, or one example repeated, where no input tells
    examples apart. In their place the probe ran on numbers drawn from N(0, 1), on ids drawn from the whole table, and, for one
    example repeated, on its own numbers drawn anew for each. Everything else about the inputs is kept.

    Why it is bad: on zeros no first layer has a gradient, and equal examples ask for one change: what would be said of the
    network is the inputs' doing.

    Example: `torch.zeros(2, 3, 224, 224)`, which is good enough for an exporter.

    Instead: a batch of real inputs, of which differences between examples are measured.

    Source: the gradient of a linear layer is an outer product with its input (Rumelhart et al. 1986, eq. 6).
    """

    code = "IA005"
    name = "inputs-alike"
    severity = "info"
    phase = "any"
    summary = "the example inputs hold no variation; the network was judged on others of their shapes"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding."""
        if not evidence.varied or evidence.trace is None:
            return
        yield self.finding(
            f"the inputs given are all alike ({names(list(evidence.varied))}): one number throughout, or one example repeated; "
            "what a probe would see on them is their doing, so the network was judged on made-up ones of the same shapes",
            "give a batch of real inputs",
            measured=0.0,
            law=EXACT + "no input given differs from one example to the next",
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A batch, and a single example."""
        return (
            example("a batch", lambda: mlp(32, 64, 5)),
            example("one example", lambda: _with(lambda x: x[:1])),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Zeros, and one row repeated."""
        return (
            example("zeros", lambda: _with(lambda x: 0 * x)),
            example("one row repeated", lambda: _with(lambda x: x[:1].expand(8, -1))),
        )


def _with(change: Any) -> Any:
    model, (x,) = mlp(32, 64, 64, 5)
    return model, (change(x),)
