"""Which floating-point constants of an ONNX file training would change, and which of them are one tensor by accident.

A file does not say. Exporters write the numbers of a program (an initial state, the scales of a resize, the unit scale of a
norm that has none) like weights, and merge initializers of equal values: the biases of twenty layers, all zero, are then one.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

from torch import fx

from initaudit.graph.calls import arguments, role_of, signal_inputs
from initaudit.graph.graph import Constant
from initaudit.graph.onnx_build import Builder

# Where a tensor of one value throughout tells nothing of whose it is.
_VECTORS = ("normalization", "pointwise", "contraction", "recurrent")


def settle(builder: Builder) -> None:
    """Makes buffers of running statistics, literals of the program's numbers, and gives merged vectors back to their owners."""
    _only(builder, _is_statistic, "buffer")
    _only(builder, _steers, "literal")
    _only(builder, lambda node, user: _starts(builder, node, user), "literal")
    _only(builder, lambda node, user: _neutral(builder, node, user), "literal")
    _only(builder, lambda node, user: _fills(builder, node, user), "literal")
    _part(builder)


def _only(builder: Builder, serves: Callable[[fx.Node, fx.Node], bool], kind: str) -> None:
    """Gives that kind to the constants that serve in one way and in no other, seen through what is computed from them."""
    only: set[fx.Node] = set()
    for node in reversed(list(builder.out.nodes)):
        if _root(node) is None or not node.users:
            continue
        if all(user in only or serves(node, user) for user in node.users):
            only.add(node)
    keys = {str(n.target) for n in only if n.op == "get_attr"}
    others = {str(n.target) for n in builder.out.nodes if n.op == "get_attr" and n not in only}
    for key in keys - others:
        if builder.constants[key].kind == "parameter":
            builder.constants[key] = dataclasses.replace(builder.constants[key], kind=kind, trainable=False)  # type: ignore[arg-type]


def _is_statistic(node: fx.Node, user: fx.Node) -> bool:
    """A running mean or variance: exporters merge equal tensors, and fresh ones are often the very weights and biases."""
    return user.meta.get("onnx") == "BatchNormalization" and node not in user.args[:3]


def _steers(node: fx.Node, user: fx.Node) -> bool:
    """Beside the signal of an operator that moves elements: scales of a resize, the value of a pad, a table of sines."""
    role = role_of(user)
    return role.kind == "passthrough" and bool(role.data) and node not in signal_inputs(user)


def _starts(builder: Builder, node: fx.Node, user: fx.Node) -> bool:
    """An initial state of zeros, which is what the standard takes where a file has none (ONNX, operators LSTM, GRU and RNN)."""
    if role_of(user).kind != "recurrent":
        return False
    bound = arguments(user)
    return any(bound.get(name) is node for name in ("initial_h", "initial_c")) and _uniform(builder, node) == 0


def _neutral(builder: Builder, node: fx.Node, user: fx.Node) -> bool:
    """A scale of 1 or a shift of 0 in a Constant node: the operator asks for one, the norm that it stands for has none."""
    if role_of(user).kind != "normalization" or node.op != "get_attr" or str(node.target) not in builder.written:
        return False
    return node not in signal_inputs(user) and _uniform(builder, node) in (0, 1)


def _fills(builder: Builder, node: fx.Node, user: fx.Node) -> bool:
    """What meets no signal: an output as it stands, the shape of noise; or one number written out for a whole batch."""
    kind = role_of(user).kind
    if user.op == "output" or kind == "generator":
        return True
    root = _root(node)
    if root is None or str(root.target) not in builder.written or kind not in ("pointwise", "passthrough", "merge"):
        return False
    return sum(n > 1 for n in builder.constants[str(root.target)].shape) > 1 and _uniform(builder, node) is not None


def _root(node: fx.Node) -> fx.Node | None:
    """The constant whose elements a node moves, to whatever shape; None where there is none, or arithmetic lies between."""
    while node.op == "call_function" and not node.meta.get("tainted") and role_of(node).kind == "passthrough":
        sources = signal_inputs(node)
        if len(sources) != 1:
            return None
        node = sources[0]
    return node if node.op == "get_attr" else None


def _uniform(builder: Builder, node: fx.Node) -> float | None:
    """The one value that all elements of a constant have; None for several, and for what is no constant."""
    root = _root(node)
    value = builder.constants[str(root.target)].value() if root is not None else None
    if value is None or value.numel() == 0 or not value.is_floating_point():
        return None
    first = value.flatten()[0]
    return float(first) if bool((value == first).all()) else None


def _part(builder: Builder) -> None:
    """A leaf for each owner of a vector of one value: what is merged moves together and takes the sum of strangers' gradients.

    A layer that is called twice is an owner twice, yet it shares its matrix as well, and stays one.
    """
    users: dict[str, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    for node in builder.out.nodes:
        for read in dict.fromkeys(node.all_input_nodes):
            root = _alias(read)
            if root is not None and _alias(node) is None:
                users[str(root.target)].append((node, read))
    for key, places in users.items():
        constant = builder.constants[key]
        if constant.kind != "parameter" or sum(n > 1 for n in constant.shape) > 1 or len(places) < 2:
            continue
        if any(role_of(user).kind not in _VECTORS for user, _ in places) or _uniform(builder, places[0][1]) is None:
            continue
        owners: dict[object, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
        for user, read in places:
            owners[_partners(builder, user, read)].append((user, read))
        for shared in list(owners.values())[1:]:
            _own(builder, constant, key, shared)


def _alias(node: fx.Node) -> fx.Node | None:
    """The constant that a node is, seen through Identity, by which exporters name a merged one again."""
    while node.op == "call_function" and node.meta.get("onnx") == "Identity" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node if node.op == "get_attr" else None


def _partners(builder: Builder, user: fx.Node, read: fx.Node) -> object:
    """What tells the owner: the matrices that a call uses beside this vector, or that made its signal; else the call itself."""
    for call in (user, *(a for a in user.all_input_nodes if a is not read and a.op == "call_function")):
        fixed = [n for n in call.all_input_nodes if n is not read and builder.is_fixed(n)]
        matrices = {n.name if (a := _alias(n)) is None else str(a.target) for n in fixed if _is_matrix(builder, n)}
        if matrices:
            return frozenset(matrices)
    return user


def _is_matrix(builder: Builder, node: fx.Node) -> bool:
    root = _alias(node)
    if root is None:
        return True  # made of constants: a weight that is computed
    constant = builder.constants[str(root.target)]
    return constant.kind == "parameter" and sum(n > 1 for n in constant.shape) > 1


def _own(builder: Builder, constant: Constant, key: str, places: list[tuple[fx.Node, fx.Node]]) -> None:
    mine = f"{key} at {places[0][0].name}"
    builder.constants[mine] = constant
    for user, read in places:
        with builder.out.inserting_before(user):
            leaf = builder.out.create_node("get_attr", mine, name=read.name)
        leaf.meta.update(read.meta)
        user.replace_input_with(read, leaf)
        while not read.users and read.op in ("get_attr", "call_function"):
            above = read.all_input_nodes
            builder.out.erase_node(read)
            if not above:
                break
            read = above[0]
