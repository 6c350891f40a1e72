"""The pointwise cluster behind a value: the maximal set of nodes that are functions of it, element by element.

Such a cluster is a scalar function and is recognised by evaluating it. A cluster that also averages over axes and is unmoved by
the scale of its input is a normalization, however it is written.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx

from initaudit.graph.calls import role_of, signal_inputs
from initaudit.graph.graph import shape_of
from initaudit.pair.activation import LINEAR, Activation, recognise
from initaudit.pair.evaluate import ConstantReader, run

# Elementwise identities that are not tagged pointwise.
_IDENTITIES = "_to_copy to type_as clone contiguous alias lift_fresh_copy dropout native_dropout Identity Cast CastLike Dropout"
_SAME_ELEMENTS = frozenset(_IDENTITIES.split())
# Yes or no for each element: part of a function (x * (x > 0)), never a signal of its own.
_COMPARED = "eq ne lt le gt ge logical_and logical_or logical_not logical_xor isnan isinf Equal Greater GreaterOrEqual Less"
_COMPARISONS = frozenset([*_COMPARED.split(), "LessOrEqual", "Not", "And", "Or", "Xor", "IsNaN", "IsInf"])
_LIKE = frozenset(("zeros_like", "ones_like", "full_like"))  # the same number everywhere
_LIMIT = 400  # nodes: the longest activation written out in primitive operators has about twenty


def _elementwise(node: fx.Node) -> bool:
    role = role_of(node)
    if role.kind == "pointwise":
        return role.name not in ("glu", "swiglu")
    name = _plain_name(node)
    return (
        role.kind == "passthrough" and (role.name in _SAME_ELEMENTS or name in _SAME_ELEMENTS)
    ) or name in _LIKE | _COMPARISONS


def _plain_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", "").partition(".")[0]


def compares(node: fx.Node) -> bool:
    """Whether the values of `node` say yes or no."""
    return _plain_name(node) in _COMPARISONS


@dataclass(frozen=True)
class Cluster:
    """The nodes of a cluster in graph order, `start` not among them."""

    start: fx.Node
    nodes: tuple[fx.Node, ...]
    constants: ConstantReader

    @cached_property
    def members(self) -> frozenset[fx.Node]:
        """The nodes and the start."""
        return frozenset((self.start, *self.nodes))

    def above(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The members that `node` is made of, itself included, in order."""
        needed, stack = set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current not in needed and current in self.members and current is not self.start:
                needed.add(current)
                stack.extend(current.all_input_nodes)
        return tuple(n for n in self.nodes if n in needed)

    def activation(self, node: fx.Node) -> Activation:
        """What `node` computes of the cluster's start, element by element."""
        if node is self.start:
            return LINEAR
        nodes = self.above(node)

        def function(z: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            value = torch.from_numpy(np.ascontiguousarray(z, dtype=np.float64))
            result = run(nodes, self.start, value, self.constants)[node]
            result = result[0] if isinstance(result, tuple) else result
            return np.asarray(result.to(torch.float64).numpy(), dtype=np.float64).reshape(z.shape)

        return recognise(function)


def pointwise_cluster(start: fx.Node, constant: Set[fx.Node], constants: ConstantReader) -> Cluster:
    """The nodes that are scalar functions of `start`: pointwise, all other inputs scalar constants.

    The slopes of a PReLU, one a channel, are read as their mean.
    """
    inside, order = {start}, []
    for node in _followers(start):
        if not _elementwise(node):
            continue
        # What a cast is like lends its type only: it is neither the signal nor a number in the formula.
        given = signal_inputs(node) if role_of(node).kind == "passthrough" else tuple(node.all_input_nodes)
        carried = any(i in inside for i in given)
        others = [i for i in given if i not in inside]
        if carried and all(i in constant and constants.size(i) == 1 for i in others) and not _shut(node, others, constants):
            inside.add(node)
            order.append(node)
    return Cluster(start, tuple(order), constants)


def _shut(node: fx.Node, others: list[fx.Node], constants: ConstantReader) -> bool:
    """A product with a trainable number that is 0: a gate that training opens, not the constant 0."""
    if not others or not _divides(node):
        return False
    return any(constants.trainable(i) and float(constants.value(i).reshape(())) == 0 for i in others)


def _followers(start: fx.Node) -> list[fx.Node]:
    """Nodes reachable from `start` through elementwise operators only, in graph order."""
    found, stack = set[fx.Node](), list(start.users)
    while stack and len(found) < _LIMIT:
        node = stack.pop()
        if node not in found and node.op == "call_function" and _elementwise(node):
            found.add(node)
            stack.extend(node.users)
    return sorted(found)


@dataclass(frozen=True)
class WrittenOut:
    """A normalization that is written out in primitive operators: its last node and everything inside it."""

    node: fx.Node
    inside: frozenset[fx.Node]
    name: str


def written_normalization(start: fx.Node, constant: Set[fx.Node], constants: ConstantReader) -> WrittenOut | None:
    """The normalization of `start` that the graph spells out by averages, products and roots, if there is one.

    Judged by what it computes: for a random input of the right shape, multiplying the input by 3 leaves the result as it is.
    """
    shape = shape_of(start)
    if shape is None or not shape:
        return None
    inside, order, stack = {start}, list[fx.Node](), set(start.users)
    averaged = False
    while stack and len(order) < 40:
        node = min(stack)
        stack.discard(node)
        if node.op != "call_function" or node in inside:
            continue
        local = _elementwise(node) or role_of(node).kind in ("reduction", "passthrough")
        if not local or not all(i in inside or i in constant for i in node.all_input_nodes):
            continue
        inside.add(node)
        order.append(node)
        averaged = averaged or role_of(node).kind == "reduction"
        stack.update(node.users)
    ends = [n for n in order if _divides(n) and sum(i in inside for i in n.all_input_nodes) > 1]
    if not averaged or not ends:
        return None
    return _scale_free(start, shape, tuple(order), ends, constants)


def _divides(node: fx.Node) -> bool:
    name = role_of(node).name or getattr(node.target, "__name__", "")
    return name.lower() in ("mul", "div", "divide", "multiply", "true_divide")


def _scale_free(
    start: fx.Node, shape: tuple[int, ...], order: tuple[fx.Node, ...], ends: list[fx.Node], constants: ConstantReader
) -> WrittenOut | None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cluster = Cluster(start, order, constants)
    for end in ends:
        nodes = cluster.above(end)
        try:
            plain, larger, shifted = (run(nodes, start, v, constants)[end] for v in (x, 3 * x, x + 1))
        except (RuntimeError, TypeError, ValueError, IndexError):
            continue  # the piece does not run on its own, so it is not recognised
        if plain.shape != x.shape or not torch.isfinite(plain).all() or plain.std() < 1e-3:
            continue
        # 1e-2: epsilon inside the root is at most 1e-5 of a unit variance, tripled inputs leave it that much smaller.
        if (larger - plain).abs().max() < 1e-2 * plain.abs().max():
            centred = (shifted - plain).abs().max() < 1e-2 * plain.abs().max()
            return WrittenOut(end, frozenset(nodes), "layer_norm" if centred else "rms_norm")
    return None
