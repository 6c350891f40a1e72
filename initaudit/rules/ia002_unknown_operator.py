"""IA002: an operator that is not executed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule


class UnknownOperator(Rule):
    """An operator is not executed here, and what lies downstream of it is unknown.

    What it does: names each operator that is not known, or that failed to run, and how many nodes depend on it.

    Why it is bad: nothing is wrong with the model; but no statement about signal and gradient holds behind this node.

    Example: a node of a custom domain in an ONNX file.

    Instead: export the model without the custom operator, or give the PyTorch module itself.

    Source: https://onnx.ai/onnx/operators/ lists the operators of the standard.
    """

    code = "IA002"
    name = "unknown-operator"
    severity = "info"
    phase = "any"
    summary = "an operator is not executed; what lies downstream of it is marked unknown, never guessed"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each operator, however often it occurs."""
        if evidence.graph is None:
            return
        from initaudit.graph.graph import location_of
        from initaudit.graph.unknown import Unknown

        first: dict[str, Any] = {}
        count: dict[str, int] = {}
        for node in evidence.graph.fx.nodes:
            if isinstance(node.target, Unknown):
                operator = ".".join(part for part in (node.target.domain, node.target.op_type) if part)
                first.setdefault(operator, node)
                count[operator] = count.get(operator, 0) + 1
        behind = sum(bool(n.meta.get("tainted")) for n in evidence.graph.fx.nodes)
        for operator, node in first.items():
            yield self.finding(
                f"the operator {operator} is not known ({count[operator]} nodes); {behind} nodes downstream of unknown "
                "operators "
                "are not judged",
                "audit the PyTorch module, or export without this operator",
                site=location_of(node).site,
                location=location_of(node),
            )
        if first or evidence.trace is None or not evidence.trace.unknown:
            return
        node, reason = next(iter(evidence.trace.unknown.items()))
        unknown = len(evidence.trace.unknown)
        lost = "it is not judged" if unknown == 1 else f"{unknown} nodes are not judged"
        yield self.finding(
            f"{node} could not be run ({reason}); {lost}",
            "give inputs that the model accepts with --input or --data",
            site=node,
        )
