"""Weights at their places of use, with shape, axes, fans, provenance and the activations they feed."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from initaudit.graph.calls import Use, arguments, role_of, signal_inputs, weight_uses
from initaudit.graph.constness import constant_nodes
from initaudit.graph.graph import Constant, Graph, location_of
from initaudit.graph.onnx_bodies import ControlCall
from initaudit.graph.onnx_inline import Inlined, has_bodies, inlined
from initaudit.location import Location
from initaudit.meter import Meter, Say, silent
from initaudit.pair.activation import CATALOGUE, LINEAR, Activation
from initaudit.pair.evaluate import ConstantReader
from initaudit.pair.records import Feeds, Pair
from initaudit.pair.walk import Walker

# The two doors' names for one thing.
_OPERATORS = {"gemm": "linear", "matmul": "linear", "rnn_tanh": "rnn", "rnn_relu": "rnn"}


def pair(graph: Graph, constant: Set[fx.Node] | None = None, *, say: Say = silent) -> tuple[Pair, ...]:
    """Every weight of `graph` at every place of use, in forward order, with the activations downstream."""
    if has_bodies(graph):
        return _through_bodies(inlined(graph), say)
    return _pairs(graph, constant_nodes(graph.fx) if constant is None else constant, say)


def _through_bodies(written: Inlined, say: Say) -> tuple[Pair, ...]:
    """The pairs of a graph whose bodies were written out, in the nodes of the original; second trips say nothing new."""
    found = []
    nodes = {n.name: n for n in written.graph.fx.nodes}
    for p in _pairs(written.graph, constant_nodes(written.graph.fx), say):
        if p.node in written.repeated:
            continue
        # A slice that a body takes of a constant exists in the body alone: outside it stands the whole.
        value = next((n for n in reversed(_ancestors(nodes[p.value])) if _stands(n, written)), None)
        if value is not None:
            whole = written.origin[value.name].name
            found.append(replace(p, node=written.origin[p.node].name, value=whole, stored=p.stored and value.name == p.value))
    return tuple(found)


def _stands(node: fx.Node, written: Inlined) -> bool:
    origin = written.origin.get(node.name)
    return origin is not None and not isinstance(origin.target, ControlCall)


def _pairs(graph: Graph, constant: Set[fx.Node], say: Say) -> tuple[Pair, ...]:
    reader = ConstantReader(graph)
    walker = Walker(graph, constant, reader)
    found = []
    meter = Meter(say, "pairing", "weights")
    for node in graph.fx.nodes:
        if node in constant:
            continue
        for use in weight_uses(node, constant):
            made = _pair(graph, use, constant, walker)
            if made is not None:
                meter(made.tensor)
                found.append(made)
    return tuple(found)


def _pair(graph: Graph, use: Use, constant: Set[fx.Node], walker: Walker) -> Pair | None:
    chain = _ancestors(use.weight)
    carriers = _carriers(use.weight)
    stored = [graph.constants[str(n.target)] for n in carriers if n.op == "get_attr"]
    generated = [n for n in carriers if n.op == "call_function" and role_of(n).kind == "generator"]
    shape: tuple[int, ...] | None = use.weight.meta.get("shape")
    if shape is None or not (stored or generated):
        return None
    # Masks may be as large as the weight, scales of integers are smaller.
    main = max(stored, key=lambda c: (c.kind != "buffer", torch.Size(c.shape).numel(), c.dtype.is_floating_point), default=None)
    weights = [c for c in stored if c.dtype.is_floating_point or c.kind == "parameter" or c is main]
    fan_in, fan_out = use.use.fans(shape)
    shape, axes, mapped = _stored_axes(graph, use, chain, main)
    location = location_of(use.node)
    name = _name(main, use, location) if main is not None else location_of(generated[-1]).site or use.weight.name
    return Pair(
        tensor=name,
        site=location.site or use.node.name,
        node=use.node.name,
        value=use.weight.name,
        operator=_OPERATORS.get(use.use.operator, use.use.operator),
        role=role_of(use.node).kind if "v" not in axes else "embedding",
        shape=shape,
        axes=axes,
        fan_in=fan_in,
        fan_out=fan_out,
        groups=use.use.groups,
        gates=use.use.gates,
        overlap=use.use.overlap,
        unit_axis=use.use.unit_axis,
        constants=tuple(c.name for c in weights),
        provenance=tuple(_label(n) for n in chain if n.op == "call_function"),
        stored=mapped,
        trainable=any(c.trainable for c in weights) or not weights,
        feeds=_feeds(use, walker),
        bias=_bias(graph, use, constant),
        location=location,
    )


def _ancestors(node: fx.Node) -> list[fx.Node]:
    """`node` and everything it is made of, in graph order."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return sorted(seen)


def _carriers(node: fx.Node) -> list[fx.Node]:
    """`node` and what its numbers come from, in graph order: not the shapes, axes and indices that only steer."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(signal_inputs(current) if role_of(current).kind not in ("generator", "shape") else ())
    return sorted(seen)


def _label(node: fx.Node) -> str:
    role = role_of(node)
    return getattr(node.target, "__name__", "").split(".")[0] or role.name or role.kind


def _name(main: Constant, use: Use, location: Location) -> str:
    """Of the names of a tied parameter, the one that belongs to the module that uses it here."""
    for name in (main.name, *main.tied):
        if location.site and name.rpartition(".")[0] == location.site:
            return name
    return main.name


def _stored_axes(
    graph: Graph, use: Use, chain: list[fx.Node], main: Constant | None
) -> tuple[tuple[int, ...], tuple[str, ...], bool]:
    """Shape and axes of the stored tensor, where only its layout was changed on the way; else those of the value used.

    Views on the meta device keep their strides, so the strides of the value tell which stored axis each of its axes is.
    """
    shape, axes = tuple(use.weight.meta["shape"]), use.use.axes
    calls = [n for n in chain if n.op == "call_function"]
    if main is None or not calls:
        return shape, axes, main is not None
    if any(role_of(n).kind != "passthrough" for n in calls) or not main.dtype.is_floating_point:
        return shape, axes, False  # computed with, or stored as the integers of a quantised weight
    stored = torch.empty(main.shape, device="meta")
    try:
        view = _on_meta(graph, chain, main, stored)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        return shape, axes, False  # an operator that is no view: its value is measured instead of the stored tensor
    order = _permutation(view, stored) if isinstance(view, torch.Tensor) and view.numel() == stored.numel() else None
    if order is None:
        return shape, axes, False
    letters = [""] * len(order)
    for place, origin in enumerate(order):
        letters[origin] = axes[place]
    return main.shape, tuple(letters), True


def _on_meta(graph: Graph, chain: list[fx.Node], main: Constant, stored: torch.Tensor) -> Any:
    """The chain on `stored` in place of the main constant; the others, integers about shapes, are read as they are."""
    values: dict[fx.Node, Any] = {}
    for node in chain:
        if node.op == "get_attr":
            constant = graph.constants[str(node.target)]
            values[node] = stored if constant is main else constant.value()
        else:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[chain[-1]]


def _permutation(view: torch.Tensor, stored: torch.Tensor) -> list[int] | None:
    """For each axis of `view` the axis of `stored` with the same stride and size; None where the axes are others."""
    if view.dim() != stored.dim():
        return None
    left, order = list(range(stored.dim())), []
    for size, stride in zip(view.shape, view.stride(), strict=True):
        same = [a for a in left if stored.shape[a] == size and (stored.stride(a) == stride or size == 1)]
        if not same:
            return None
        left.remove(same[0])
        order.append(same[0])
    return order


def _feeds(use: Use, walker: Walker) -> tuple[Feeds, ...]:
    if role_of(use.node).kind == "recurrent" and not use.use.gates:
        return (Feeds(LINEAR, (), use.node.name),)  # the projection of an LSTM's state
    if role_of(use.node).kind == "recurrent":
        return tuple(Feeds(a, (f"{_GATE_NAMES[gate]} gate",), use.node.name) for gate, a in _gate_activations(use).items())
    return walker.feeds(use.node)


# torch.nn.LSTM, GRU and RNN; ONNX gives the same by default and names others in its attribute.
_GATE_NAMES = {
    "i": "input",
    "f": "forget",
    "o": "output",
    "g": "cell",
    "c": "cell",
    "r": "reset",
    "z": "update",
    "n": "new",
    "h": "new",
}
_GATES = {"i": "sigmoid", "f": "sigmoid", "o": "sigmoid", "g": "tanh", "c": "tanh", "r": "sigmoid", "z": "sigmoid", "n": "tanh"}


def _gate_activations(use: Use) -> dict[str, Activation]:
    """The activation of every gate of a recurrent weight."""
    names = [str(n).lower() for n in arguments(use.node).get("activations") or ()]
    found = {}
    for gate in use.use.gates:
        name = _GATES.get(gate, "relu" if use.use.operator == "rnn_relu" else "tanh")
        if names:
            candidate = gate in ("g", "c", "n", "h") and len(use.use.gates) > 1
            name = names[min(1 if candidate else 0, len(names) - 1)]
        if name == "relu":
            found[gate] = Activation("relu", function=lambda z: np.maximum(z, 0))
        else:
            found[gate] = Activation(name, function=CATALOGUE.get(name))
    return found


def _bias(graph: Graph, use: Use, constant: Set[fx.Node]) -> str | None:
    value = arguments(use.node).get(use.use.bias) if use.use.bias else None
    if not isinstance(value, fx.Node) or value not in constant:
        return None
    stored = [graph.constants[str(n.target)] for n in _ancestors(value) if n.op == "get_attr"]
    floats = [c for c in stored if c.dtype.is_floating_point]
    return max(floats, key=lambda c: torch.Size(c.shape).numel()).name if floats else None
