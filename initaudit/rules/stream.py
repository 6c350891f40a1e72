"""What makes a signal grow beside the weights: factors that it is multiplied by, and sums with what branches made of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.support import view

if TYPE_CHECKING:
    from torch import fx

_SUMS = ("add", "add_", "sum")
_AT = (1.0, 2.0, -3.0)  # a function that multiplies these by one number does so anywhere, but for what is made by hand


@dataclass(frozen=True)
class Stream:
    """What the largest part of a signal went through since its last normalization, or since the input, the last step first.

    `factors` are multiplications by one number, and `sums` the nodes at which several signals were added.
    """

    factors: tuple[tuple[fx.Node, float], ...] = ()
    sums: tuple[fx.Node, ...] = ()

    @property
    def power(self) -> float:
        """What the factors together multiply the second moment by."""
        return float(10 ** min(2 * sum(math.log10(abs(f)) for _, f in self.factors), 300.0))


def stream_to(evidence: Evidence, layer: LayerEvidence) -> Stream:
    """The way of the largest second moment back from what a layer reads."""
    seen = view(evidence)
    node = seen.nodes.get(layer.pair.node)
    if evidence.graph is None or evidence.trace is None or node is None:
        return Stream()
    from initaudit.graph.calls import role_of

    signals, factors, sums = evidence.trace.signals, [], []
    while (live := [a for a in node.all_input_nodes if a not in seen.constant]) and node.op == "call_function":
        role = role_of(node)
        if role.kind == "normalization":
            break
        if len(live) > 1 and (role.name or "").lower() in _SUMS:
            sums.append(node)
        elif len(live) == 1 and role.kind == "pointwise" and (factor := _factor(evidence, node, live[0])) not in (None, 1.0):
            factors.append((node, float(factor or 1.0)))
        node = max(live, key=lambda a: (s.moment2 or 0.0) if (s := signals.get(a.name)) is not None else 0.0)
    return Stream(tuple(factors), tuple(sums))


def _factor(evidence: Evidence, node: fx.Node, source: fx.Node) -> float | None:
    """The number that a node multiplies whatever comes in by; None for any other function, and for zero."""
    import torch

    from initaudit.pair.evaluate import ConstantReader, run

    assert evidence.graph is not None
    given = torch.tensor(_AT, dtype=torch.float64)
    try:
        made = run([node], source, given, ConstantReader(evidence.graph))[node]
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
        return None
    if not isinstance(made, torch.Tensor) or made.shape != given.shape:
        return None
    factor = float(made[0])
    linear = bool(torch.allclose(made.double(), factor * given, rtol=1e-6, atol=0.0))
    return factor if linear and factor != 0 and math.isfinite(factor) else None


def what_grows(evidence: Evidence, layer: LayerEvidence, growth: float, least: float) -> tuple[str, str]:
    """A clause for the message and a line of help where weights that are drawn right are not what makes a signal grow.

    Factors are named where by themselves they multiply the second moment by `least`, sums where what is left of the `growth`
    does so and weights cannot have made it. Both are empty where nothing of that kind is found.
    """
    stream = stream_to(evidence, layer)
    clause, parts, left = "", [], growth
    if stream.power >= least:
        clause = f"; {_counted(stream)} on the way make {2 * _decades(stream):.3g} decades of power of it"
        more = len(stream.factors) - 1
        parts.append(
            f"multiply by 1 in place of {stream.factors[-1][1]:.4g} {_place(stream.factors[-1][0])}"
            + (f", and in {more} more place{'s' if more > 1 else ''}" if more else "")
        )
        left = growth / stream.power
    if left >= least and (sums := len(stream.sums)) > 1:
        # Divided by the root of their number, branches that share a mean still add up to exp(sqrt(n)).
        parts.append(
            f"divide what each of the {sums} sums adds to the signal by {sums}, or normalise what it adds to: the first is "
            f"{_place(stream.sums[-1])}"
        )
    return clause, "; and ".join(parts)


def _decades(stream: Stream) -> float:
    return sum(math.log10(abs(f)) for _, f in stream.factors)


def _counted(stream: Stream) -> str:
    values = sorted({abs(f) for _, f in stream.factors})
    by = f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"
    count = len(stream.factors)
    return f"{count} multiplications by {by}" if count > 1 else f"a multiplication by {by}"


def _place(node: fx.Node) -> str:
    from initaudit.graph.graph import location_of

    place = location_of(node)
    line = f" ({place.source_line})" if place.source_line else ""
    return f"at {place.site or node.name}{line}"
