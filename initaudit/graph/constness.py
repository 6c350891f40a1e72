"""Which nodes of a graph are weights in the making: their value depends on no input of the model."""

from __future__ import annotations

import torch
from torch import fx

from initaudit.graph.calls import role_of, signal_inputs, weight_uses


def _is_random(node: fx.Node) -> bool:
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
            node.op == "call_function" and not _is_random(node) and all(a in constant for a in node.all_input_nodes)
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
            if signal in constant and signal not in as_weight:
                _mark_live(signal, constant, live, seen)
    return frozenset(constant - live)


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
        stack.extend(a for a in current.all_input_nodes if a not in as_weight)
    for current in sorted(order):
        layer = current.op == "call_function" and role_of(current).kind in ("contraction", "embedding", "recurrent")
        seen[current] = (layer and bool(weight_uses(current, constant))) or any(seen.get(a) for a in current.all_input_nodes)
        if seen[current]:
            live.add(current)
    return seen[node]
