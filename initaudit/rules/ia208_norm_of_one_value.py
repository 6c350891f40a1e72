"""IA208: a normalization that takes its statistics from one value."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from initaudit.graph.reach import upstream
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.structure import passed_by
from initaudit.rules.support import initial, names

if TYPE_CHECKING:
    from torch import fx


class NormOfOneValue(Rule):
    """A normalization takes its mean and variance from one value, so that its output does not depend on its input.

    What it does: counts the values that each layer, group and instance normalization averages over, by its arguments and the
    shape of its input. Less its own mean a single value is zero, whatever it was, and the output is the norm's shift. What is
    reported stands on the way from the inputs to the output; where another way leads past it, it is a warning, and where the
    size of made-up inputs decides about it as well.

    Why it is bad: nothing of the input passes, and no gradient reaches what stands before: the network computes a constant.

    Example: InstanceNorm, or GroupNorm with as many groups as channels, behind global average pooling; `LayerNorm(1)`.

    Instead: a norm over more values (`GroupNorm(1, channels)`), the norm in front of the pooling, or none.

    Source: Wu & He 2018, "Group Normalization", eq. 1 to 6; Ulyanov et al. 2016, eq. 7: the mean of one value is the value.
    """

    code = "IA208"
    name = "norm-of-one-value"
    severity = "error"
    phase = "init"
    summary = "a normalization takes its mean and variance from one value, and its output does not depend on its input"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all norms of this kind."""
        graph = evidence.graph
        if graph is None or evidence.trace is None or not initial(evidence):
            return
        from initaudit.graph.calls import role_of  # with torch, which only a trace has loaded
        from initaudit.graph.graph import location_of

        found = [n for n in graph.fx.nodes if n.op == "call_function" and _averages_one(n, _shape(evidence, n))]
        behind = upstream(n for n in graph.fx.nodes if n.op == "output")
        found = [n for n in found if n in behind and any(a.op == "placeholder" for a in upstream([n]))]
        if not found:
            return
        first = found[0]
        own = [str(a.target) for a in first.all_input_nodes if a.op == "get_attr"]
        before = upstream([first])
        cut = list(dict.fromkeys(x.tensor for x in evidence.layers if any(n.name == x.pair.node for n in before)))
        site = location_of(first).site or first.name
        made_up = evidence.synthetic and role_of(first).name != "layer_norm"
        passed = passed_by(evidence, found)
        reached = "no gradient passes it" if passed else f"no gradient reaches what stands before ({names(cut)})"
        several = f"; {len(found)} norms are affected" if len(found) > 1 else ""
        yield self.finding(
            f"the {role_of(first).name} at {site} takes its mean and variance from one value each, for a signal of shape "
            f"{_shape(evidence, first)}: it sends on its shift whatever comes in, and {reached}{several}",
            f"torch.nn.Identity()  # in place of {site}; or a norm over more values: before a pooling, or with fewer groups",
            severity="warning" if made_up or passed else "error",
            measured=1.0,
            expected=2.0,
            law=EXACT + "a value less its own mean is zero: a variance takes at least two",
            tensor=own[0] if own else cut[-1] if cut else "",
            site=site,
            location=location_of(first),
            related=() if passed else tuple(cut),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """The same norms over more values."""
        return (
            example("one group behind pooling", lambda: _pooled(1)),
            example("a group for every channel in front of pooling", lambda: _pooled(16, before=True)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """As many groups as channels, and a layer of one unit."""
        return (
            example("a group for every channel behind pooling", lambda: _pooled(16)),
            example("LayerNorm(1)", _single),
        )


def _shape(evidence: Evidence, node: fx.Node) -> tuple[int, ...]:
    assert evidence.trace is not None
    signal = evidence.trace.signals.get(node.name)
    return tuple(signal.shape) if signal is not None else ()


def _averages_one(node: fx.Node, shape: tuple[int, ...]) -> bool:
    """Whether a norm averages over one value of a signal of this shape: examples first, then channels, then places."""
    from initaudit.graph.calls import arguments, role_of

    role, bound = role_of(node), arguments(node)
    if role.kind != "normalization" or len(shape) < 2:
        return False
    if role.name == "layer_norm":
        over, axis = bound.get("normalized_shape"), bound.get("axis", -1)
        return math.prod(over) == 1 if isinstance(over, (list, tuple)) else math.prod(shape[axis:]) == 1
    places = math.prod(shape[2:])
    if role.name == "group_norm":
        groups = bound.get("num_groups", bound.get("group"))
        return isinstance(groups, int) and shape[1] // max(1, groups) * places == 1
    kept = bound.get("use_input_stats") is False
    return role.name == "instance_norm" and places == 1 and not kept


def _pooled(groups: int, *, before: bool = False) -> Any:
    import torch
    from torch import nn

    norm, pool = nn.GroupNorm(groups, 16), nn.AdaptiveAvgPool2d(1)
    body = (norm, nn.ReLU(), pool) if before else (nn.ReLU(), pool, norm)
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *body, nn.Flatten(), nn.Linear(16, 5)), (torch.randn(16, 3, 10, 10),)


def _single() -> Any:
    import torch
    from torch import nn

    layers = (nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 1), nn.LayerNorm(1), nn.Linear(1, 5))
    return nn.Sequential(*layers), (torch.randn(32, 20),)
