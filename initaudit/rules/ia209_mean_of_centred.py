"""IA209: a mean over the very values that a normalization has centred."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from initaudit.graph.reach import upstream
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example
from initaudit.rules.health import CONTRAST
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Severity
from initaudit.rules.structure import passed_by
from initaudit.rules.support import initial, names, view

if TYPE_CHECKING:
    from torch import fx

# Of what the values under the mean differ by between examples. A mean over n unlike values keeps 1/n, over ten thousand million
# of them so much; float32 rounding leaves some 1e-14.
_LOST = 1e-10


class MeanOfCentred(Rule):
    """A mean, a sum or a pooling is taken over the very values that a normalization has just centred.

    What it does: looks for a reduction whose values differ between examples and whose result does not, where every way from the
    inputs to the output leads through such a one, and names the normalization before it. What is linear in between, a
    convolution of 1x1 or a scale for each channel, changes nothing about it.

    Why it is bad: the mean of values less their own mean is zero, so that the output is the norm's shift whatever comes in. No
    gradient reaches what stands before but that of rounding errors, which Adam amplifies.

    Example: InstanceNorm, or GroupNorm with as many groups as channels, in front of global average pooling.

    Instead: an activation between the two (`relu(norm(x)).mean(...)`), or a norm that averages over other values as well
    (`BatchNorm2d`, `GroupNorm(1, channels)`).

    Source: Ulyanov et al. 2016, "Instance Normalization", eq. 7: the normalized values of a channel of an example sum to zero.
    """

    code = "IA209"
    name = "mean-of-centred"
    severity = "error"
    phase = "init"
    summary = "a mean is taken over the values that a normalization has centred, and does not depend on the input"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all reductions of this kind."""
        graph, trace = evidence.graph, evidence.trace
        if graph is None or trace is None or trace.broken or not initial(evidence):
            return
        from initaudit.graph.calls import role_of  # with torch, which only a trace has loaded
        from initaudit.graph.graph import location_of

        found = [n for n in graph.fx.nodes if n.op == "call_function" and _loses(evidence, n)]
        if not found or passed_by(evidence, found):
            return
        first = found[0]
        norm = _centring(first)
        site = location_of(first).site or first.name
        before = upstream([first])
        cut = list(dict.fromkeys(x.tensor for x in evidence.layers if any(n.name == x.pair.node for n in before)))
        what = (
            f"the {role_of(norm).name} at {location_of(norm).site or norm.name}" if norm is not None else "what stands before"
        )
        own = (
            [graph.constants[str(a.target)].name for a in norm.all_input_nodes if a.op == "get_attr"]
            if norm is not None
            else []
        )
        shape = "x".join(map(str, trace.signals[first.name].shape))
        severity: Severity = "warning" if _comes_alive(evidence) else "error"
        yield self.finding(
            f"the {role_of(first).name} at {site} averages over the values that {what} has centred, and their mean is zero "
            f"whatever comes in: of what tells inputs apart its output ({shape}) keeps nothing but rounding, "
            f"and no gradient but rounding errors reaches what stands before ({names(cut)})",
            f"torch.nn.ReLU()  # between {what.removeprefix('the ')} and {site}; or a norm over other values as well, "
            "BatchNorm or GroupNorm with one group",
            severity=severity,
            measured=0.0,
            expected=1.0,
            law=EXACT + "values less their own mean sum to zero",
            tensor=own[0] if own else cut[-1] if cut else "",
            site=location_of(norm).site if norm is not None else site,
            location=location_of(norm if norm is not None else first),
            related=tuple(dict.fromkeys([*own[1:], *cut])),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """An activation in between, and a norm over other values."""
        return (
            example("an activation between norm and pooling", lambda: _pooled(16, active=True)),
            example("one group in front of pooling", lambda: _pooled(1)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A group for every channel, straight before the pooling."""
        return (example("a group for every channel in front of pooling", lambda: _pooled(16)),)


def _read(evidence: Evidence, node: fx.Node) -> fx.Node | None:
    """The signal that a reduction or pooling reads, where it is its only one; None for anything else."""
    from initaudit.graph.calls import role_of

    if role_of(node).kind not in ("reduction", "pooling"):
        return None
    given = [a for a in node.all_input_nodes if a not in view(evidence).constant]
    return given[0] if len(given) == 1 else None


def _share(evidence: Evidence, node: fx.Node) -> float:
    """What a reduction leaves of the variance between examples; 1 where that was not measured, or was nothing before."""
    trace, given = evidence.trace, _read(evidence, node)
    from initaudit.graph.calls import role_of

    while given is not None and trace is not None and given.name not in trace.signals and role_of(given).kind == "passthrough":
        given = given.all_input_nodes[0] if len(given.all_input_nodes) == 1 else None
    if trace is None or given is None or node.name not in trace.signals or given.name not in trace.signals:
        return 1.0
    before, after = trace.signals[given.name], trace.signals[node.name]
    # What did not differ before the mean was lost elsewhere.
    if not before.moment2 or not before.spread or before.spread < CONTRAST[0] or after.spread is None or after.moment2 is None:
        return 1.0
    return after.spread * after.moment2 / (before.spread * before.moment2)


def _loses(evidence: Evidence, node: fx.Node) -> bool:
    return _share(evidence, node) < _LOST


def _centring(node: fx.Node) -> fx.Node | None:
    """The nearest normalization or softmax before a node."""
    from initaudit.graph.calls import role_of

    seen, queue = {node}, [node]
    for current in queue:
        if current is not node and current.op == "call_function" and role_of(current).kind in ("normalization", "softmax"):
            return current
        new = [a for a in current.all_input_nodes if a not in seen]
        seen.update(new)
        queue += new
    return None


def _comes_alive(evidence: Evidence) -> bool:
    """Whether virtual steps learned: scales that differ by unit give a mean over units something to depend on."""
    from initaudit.probe.features import OPTIMIZERS, lowest_loss
    from initaudit.probe.response import LEARNT

    assert evidence.trace is not None
    losses = [lowest_loss(evidence.trace, name) for name in OPTIMIZERS]
    return any(loss is not None and loss < LEARNT for loss in losses)


def _pooled(groups: int, *, active: bool = False) -> Any:
    import torch
    from torch import nn

    body = (nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(groups, 16), nn.ReLU() if active else nn.Identity())
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    return nn.Sequential(*body, *tail), (torch.randn(32, 3, 10, 10),)
