"""Attentions that make the tokens of an example alike, and those behind them that find nothing to choose from."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from initaudit.graph.reach import upstream
from initaudit.rules.evidence import Evidence
from initaudit.rules.flow import ROUNDING
from initaudit.rules.structure import weighed
from initaudit.rules.support import view

if TYPE_CHECKING:
    from torch import fx

# Layout and biases move what is left of a difference about: one that an attention leaves of the order of rounding is none a
# step later. A vector handed to all places is equal to the last digit without any.
_ALIKE = 100 * ROUNDING
_FAR = 200  # nodes between an attention and the next signal whose tokens were compared


@dataclass(frozen=True)
class Collapse:
    """Tokens that are one: `merging` is the attention that made them equal, `blind` are those that read equal tokens only.

    `spread` is the largest share of a second moment by which the tokens of an example differ before.
    """

    merging: fx.Node
    blind: tuple[fx.Node, ...]
    spread: float


def collapse(evidence: Evidence) -> Collapse | None:
    """What attentions without a way round them make of the tokens of an example (Dong et al. 2021, theorem 2.2).

    None where no output has a token of its own for each place, where their tokens differ by more than rounding, or where it was
    no attention that made them equal: a vector that is handed to every place on purpose is one from the start.
    """
    graph, trace = evidence.graph, evidence.trace
    if graph is None or trace is None:
        return None
    spread = {n: s.token_spread for n, s in trace.signals.items() if s.token_spread is not None}
    ends = [view(evidence).nodes[n] for n in trace.outputs if spread.get(n, 1.0) <= ROUNDING]
    if not ends:
        return None
    behind = upstream(ends)
    merging: fx.Node | None = None
    blind: list[fx.Node] = []
    for node, values in _attentions(evidence):
        before = [spread[n.name] for n in _nearest(values, lambda n: n.all_input_nodes, spread)]
        after = [spread[n.name] for n in _nearest(node, lambda n: n.users, spread)]
        if node not in behind or not before or not after or max(after) > _ALIKE:
            continue
        if max(before) > ROUNDING:
            merging = node
        elif max(after) <= ROUNDING:
            blind.append(node)
    if merging is None or not blind:
        return None
    return Collapse(merging, tuple(blind), max(spread[n.name] for n in upstream([merging]) if n.name in spread))


def _attentions(evidence: Evidence) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each attention, fused or written out, and the values that it weighs."""
    from initaudit.graph.calls import arguments, role_of

    for node in view(evidence).nodes.values():
        if node.op != "call_function":
            continue
        role = role_of(node)
        if role.kind == "softmax" and (found := weighed(node, view(evidence).constant)) is not None:
            yield found
        elif role.kind == "attention" and len(role.data) > 2 and arguments(node).get(role.data[2]) is not None:
            yield node, arguments(node)[role.data[2]]


def _nearest(start: fx.Node, following: Callable[[fx.Node], Iterable[fx.Node]], known: Container[str]) -> list[fx.Node]:
    """The first nodes whose name is known from `start` on in one direction, itself included, along every way."""
    seen, stack, found = {start}, [start], []
    while stack and len(seen) < _FAR:
        node = stack.pop()
        if node.name in known:
            found.append(node)
            continue
        new = [n for n in following(node) if n not in seen]
        seen.update(new)
        stack += new
    return found
