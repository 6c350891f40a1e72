"""Which parameters are factors of a signal: gates, scales of normalizations, LayerScale."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from initaudit.graph.graph import Graph

_SCALES = ("weight", "scale")


def factors(graph: Graph) -> list[str]:
    """The constants that multiply a signal, element by element or as the scale of a normalization, in forward order."""
    return [str(n.target) for n in graph.fx.nodes if n.op == "get_attr" and _multiplies(n)]


def _multiplies(node: fx.Node) -> bool:
    from initaudit.graph.calls import arguments, role_of

    for user in node.users:
        if user.op != "call_function":
            continue
        role, bound = role_of(user), arguments(user)
        name = (role.name or getattr(user.target, "__name__", "")).lower()
        if role.kind == "pointwise" and name in ("mul", "multiply"):
            return True
        if role.kind == "normalization" and any(bound.get(k) is node for k in bound if k.lower() in _SCALES):
            return True
        if role.kind == "passthrough" and _multiplies(user):
            return True
    return False


def silent(graph: Graph, zero: Set[str]) -> list[str]:
    """Those of the `zero` constants that multiply a signal by zero, as they are or through functions that keep it (tanh)."""
    from initaudit.graph.constness import constant_nodes
    from initaudit.pair.evaluate import ConstantReader

    constant, reader = constant_nodes(graph.fx), ConstantReader(graph)
    found = []
    for start in graph.fx.nodes:
        stack = [start] if start.op == "get_attr" and str(start.target) in zero else []
        while stack:
            node = stack.pop()
            if _multiplies(node):
                found.append(str(start.target))
                break
            stack += [u for u in node.users if u in constant and not reader.value(u).any()]
    return found
