"""IA003: weights whose activation is not known."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule
from initaudit.rules.support import names


class UnpairedWeight(Rule):
    """No downstream activation can be found for a weight.

    What it does: names the weights that are compared with the laws of Xavier, He and LeCun, but with no exact gain.

    Why it is bad: which variance is right depends on the activation. Without it, a deviation is a fact and no fault.

    Example: a state dict without its module.

    Instead: give the module (`initaudit package.module:Net`) or an ONNX file, which hold the graph.

    Source: He et al. 2015, section 2.2, for the dependence on the activation.
    """

    code = "IA003"
    name = "unpaired-weight"
    severity = "info"
    phase = "any"
    summary = "no downstream activation can be found for a weight (no graph, or the graph is cut)"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all of them."""
        unpaired = [x for x in evidence.layers if not x.feeds]
        if not unpaired:
            return
        why = "the file holds no graph" if evidence.graph is None else "the graph is cut behind them"
        why = str(evidence.checkpoint.metadata.get("no_program", why))
        count = "one weight" if len(unpaired) == 1 else f"{len(unpaired)} weights"
        yield self.finding(
            f"the activation behind {count} is not known, because {why}: {names(unpaired)}",
            "audit the module or an ONNX file to have them judged by what they feed",
            tensor=unpaired[0].tensor,
            related=tuple(x.tensor for x in unpaired[1:]),
        )
