"""Which parameters and which signals are factors of a signal: gates, scales of normalizations, LayerScale."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

from initaudit.graph.reach import downstream
from initaudit.rules.evidence import Evidence, LayerEvidence

if TYPE_CHECKING:
    from torch import fx

    from initaudit.graph.graph import Graph

_SCALES = ("weight", "scale")
_PRODUCTS = ("mul", "multiply")


def factors(graph: Graph) -> list[str]:
    """The constants that multiply a signal, element by element or as the scale of a normalization, in forward order."""
    return [str(n.target) for n in graph.fx.nodes if n.op == "get_attr" and _multiplies(n)]


def _multiplies(node: fx.Node) -> bool:
    from initaudit.graph.calls import arguments, role_of

    for user in node.users:
        if user.op != "call_function":
            continue
        role, bound, name = role_of(user), arguments(user), _called(user)
        if role.kind == "pointwise" and name in _PRODUCTS:
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
            if user.op == "call_function" and _called(user) in _PRODUCTS and others:
                return True
            alone = not others and (_called(user) in ("sub", "rsub", "neg") or role_of(user).kind == "passthrough")
            if user.op == "call_function" and alone and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def choosers(evidence: Evidence, copies: Iterable[LayerEvidence]) -> list[str]:
    """The names of zeros that weigh copies against each other, and get no gradient, as it makes no difference what they choose.

    They lead to one factor of a product, and copies to another one: the router of a mixture of experts.
    """
    from initaudit.graph.calls import role_of

    graph, trace = evidence.graph, evidence.trace
    if graph is None or trace is None:
        return []
    idle = {n: p.name for n, p in trace.parameters.items() if p.gradient_zero and p.revived is None and p.norm == 0}
    if not idle:
        return []
    at = {str(n.target): n for n in graph.fx.nodes if n.op == "get_attr"}
    made = downstream(at[c] for x in copies for p in x.pairs for c in p.constants if c in at)

    def weighs(node: fx.Node, behind: Set[fx.Node]) -> bool:
        product = _called(node) in _PRODUCTS or role_of(node).kind == "contraction"
        return (
            product and any(a in behind - made for a in node.all_input_nodes) and any(a in made for a in node.all_input_nodes)
        )

    return [name for key, name in idle.items() if key in at and any(weighs(n, b) for b in [downstream([at[key]])] for n in b)]


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
