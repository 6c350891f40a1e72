"""Which nodes of a graph are weights in the making: their value depends on no input of the model."""

from __future__ import annotations

import math
from collections.abc import Set

import torch
from torch import fx

from initaudit.graph.calls import arguments, role_of, signal_inputs, weight_uses
from initaudit.graph.graph import shape_of


def is_random(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def constant_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """The nodes that depend on no input and draw no random number, less those that are a signal of their own.

    A position table looked up at fixed places, or learned queries sent through a linear layer, depend on no input either, yet
    what the layer makes of them is added to the signal, not used as a weight: such layers, and what they feed, are live.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        fixed = node.op == "get_attr" or (
            node.op == "call_function" and not is_random(node) and all(a in constant for a in node.all_input_nodes)
        )
        if fixed:
            constant.add(node)
    live: set[fx.Node] = set()
    seen: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        if node in constant:
            continue
        as_weight = {use.weight for use in weight_uses(node, constant)}
        for signal in signal_inputs(node):
            # What a product with a live value reads is a weight, unless a layer made it: learned queries, relative positions.
            if signal in constant and (signal not in as_weight or _from_layer(signal, constant)):
                _mark_live(signal, constant, live, seen)
    return frozenset(constant - live)


def _from_layer(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a layer with a bias made this constant, seen through changes of layout and the scale that an attention gives its
    queries. No weight is made by adding a vector."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        current = stack.pop()
        if current in seen or current.op != "call_function":
            continue
        seen.add(current)
        if _biased(current, constant):
            return True
        if role_of(current).kind in ("passthrough", "merge") or _scaled(current):
            stack += signal_inputs(current)
    return False


def _scaled(node: fx.Node) -> bool:
    """Whether a call multiplies or divides by one number."""
    name = (role_of(node).name or str(getattr(node.target, "__name__", ""))).lower().partition(".")[0]
    large = [a for a in node.all_input_nodes if math.prod(shape_of(a) or ()) > 1]
    return role_of(node).kind == "pointwise" and name in ("mul", "multiply", "div", "true_divide") and len(large) == 1


def _biased(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a call is a layer among constants: a product and the addition of a vector, in one operator or in two."""
    role, inputs = role_of(node), node.all_input_nodes
    if not all(a in constant for a in inputs):
        return False
    if role.kind == "contraction":
        return any(_is_vector(b) for name in ("bias", "c") for b in [arguments(node).get(name)])
    if str(getattr(node.target, "__name__", "")).lower().partition(".")[0] != "add":
        return False
    products = [a for a in inputs if a.op == "call_function" and role_of(a).kind == "contraction"]
    return bool(products) and any(_is_vector(a) for a in inputs)


def completed(node: fx.Node, constant: Set[fx.Node]) -> fx.Node:
    """The call with which a layer is complete: the sum behind a product that alone reads it and adds a vector, else the node.

    Exporters write a linear layer as one operator or as two.
    """
    if node.op != "call_function" or role_of(node).kind != "contraction" or len(node.users) != 1:
        return node
    user = next(iter(node.users))
    if user.op != "call_function" or str(getattr(user.target, "__name__", "")).lower().partition(".")[0] != "add":
        return node
    others = [a for a in user.all_input_nodes if a is not node]
    return user if len(others) == 1 and others[0] in constant and _is_vector(others[0]) else node


def _bias_follows(node: fx.Node, constant: set[fx.Node]) -> bool:
    """Whether a product of two constants is a layer's, by the vector that is added to it."""
    if node.op != "call_function" or role_of(node).kind != "contraction":
        return False
    return _biased(node, constant) or any(u.op == "call_function" and _biased(u, constant) for u in node.users)


def _is_vector(value: object) -> bool:
    shape = shape_of(value) if isinstance(value, fx.Node) else None
    return shape is not None and len(shape) == 1 and shape[0] > 1


def _mark_live(node: fx.Node, constant: set[fx.Node], live: set[fx.Node], seen: dict[fx.Node, bool]) -> bool:
    """Marks the layers above `node` that make a signal out of constants, and what lies between; says whether there are any.

    Iterative, because chains of constants may be longer than Python's stack.
    """
    order, stack = [], [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen[current] = False
        order.append(current)
        as_weight = {use.weight for use in weight_uses(current, constant)}
        stack.extend(a for a in current.all_input_nodes if a not in as_weight or _from_layer(a, constant))
    for current in sorted(order):
        layer = current.op == "call_function" and role_of(current).kind in ("contraction", "embedding", "recurrent")
        layer = (layer and bool(weight_uses(current, constant))) or _bias_follows(current, constant)
        seen[current] = layer or any(seen.get(a) for a in current.all_input_nodes)
        if seen[current]:
            live.add(current)
    return seen[node]
