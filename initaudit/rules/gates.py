"""Which parameters and which signals are factors of a signal: gates, scales of normalizations, LayerScale."""

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
        role, bound, name = role_of(user), arguments(user), _called(user)
        if role.kind == "pointwise" and name in ("mul", "multiply"):
            return True
        if role.kind == "normalization" and any(bound.get(k) is node for k in bound if k.lower() in _SCALES):
            return True
        if role.kind == "passthrough" and _multiplies(user):
            return True
    return False


def opens(graph: Graph, name: str) -> bool:
    """Whether a signal multiplies another one, as it is or as 1 minus itself: a gate, which cuts nothing off by being shut."""
    from initaudit.graph.calls import role_of
    from initaudit.graph.constness import constant_nodes

    constant = constant_nodes(graph.fx)
    stack = [n for n in graph.fx.nodes if n.name == name]
    seen = set(stack)
    while stack:
        for user in stack.pop().users:
            others = [a for a in user.all_input_nodes if a not in seen and a not in constant]
            if user.op == "call_function" and _called(user) in ("mul", "multiply") and others:
                return True
            alone = not others and (_called(user) in ("sub", "rsub", "neg") or role_of(user).kind == "passthrough")
            if user.op == "call_function" and alone and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _called(node: fx.Node) -> str:
    from initaudit.graph.calls import role_of

    return (role_of(node).name or getattr(node.target, "__name__", "")).lower()


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
