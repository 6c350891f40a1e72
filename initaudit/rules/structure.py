"""How layers follow each other in the graph: the first, the last, and which reads another one's output directly."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence, Set
from typing import TYPE_CHECKING

from initaudit.graph.probability import certain
from initaudit.graph.reach import upstream
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.support import to_output, view

if TYPE_CHECKING:
    from torch import fx

    from initaudit.graph.graph import Graph

_PRODUCTS = ("mul", "mul_", "multiply")
_STEPS = 12  # nodes between a matrix and the sum that it returns to: bias, dropout, layout
_MOST = 200  # values behind one layer: activation, dropout and layout in primitive operators are a few dozen


def reading_inputs(evidence: Evidence) -> frozenset[str]:
    """The tensors of layers with no other layer before them: what they need depends on the scale of the data."""
    if evidence.graph is None:
        return frozenset()
    at = {p.node: layer.tensor for layer in evidence.layers for p in layer.pairs}
    behind: set[fx.Node] = set()
    found = set()
    for node in evidence.graph.fx.nodes:
        if any(a in behind for a in node.all_input_nodes):
            behind.add(node)
        elif node.name in at:
            found.add(at[node.name])
            behind.add(node)
    return frozenset(found)


def last_layers(evidence: Evidence) -> frozenset[str]:
    """The tensors of layers with no other layer behind them, whatever activation or norm stands before the output."""
    return view(evidence).last


def leads_to_unknown(evidence: Evidence) -> frozenset[str]:
    """The constants from which a path leads to what could not be run, as an operator that is not known, or one whose weight was
    lost with a part of a file: what gradient they get through it, nobody saw."""
    if evidence.graph is None:
        return frozenset()
    lost = evidence.trace.unknown if evidence.trace is not None else {}
    unseen = [n for n in evidence.graph.fx.nodes if n.meta.get("tainted") or n.name in lost]
    return frozenset(str(n.target) for n in upstream(unseen) if n.op == "get_attr")


def is_tie(layers: Sequence[LayerEvidence]) -> bool:
    """Whether these are a table and the layer that makes the output from it: the two places of a tied embedding."""
    tables = [x for x in layers if x.pair.role == "embedding"]
    heads = [x for x in layers if x.pair.role == "contraction" and to_output(x)]
    return bool(tables) and bool(heads) and len(tables) + len(heads) == len(layers)


def passed_by(evidence: Evidence, nodes: Collection[fx.Node]) -> bool:
    """Whether a way leads from an input to the output through none of these nodes."""
    assert evidence.graph is not None
    stack = [n for n in evidence.graph.fx.nodes if n.op == "output"]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node.op == "placeholder":
            return True
        new = [a for a in node.all_input_nodes if a not in seen and a not in nodes]
        seen.update(new)
        stack += new
    return False


def readers(evidence: Evidence, layer: LayerEvidence) -> tuple[LayerEvidence, ...]:
    """The layers that read the output of `layer` unit by unit: activations, norms, dropout and changes of layout lie between.

    Empty where anything else reads it too, or there is no graph.
    """
    if evidence.graph is None:
        return ()
    seen = view(evidence)
    start, at = seen.nodes.get(layer.pair.node), seen.layer_at
    found: dict[str, LayerEvidence] = {}
    for node in _behind(start, seen.constant) if start is not None else ():
        if node is None:
            return ()
        if node.name in at:
            found.setdefault(at[node.name].tensor, at[node.name])
    return tuple(found.values())


def _behind(start: fx.Node, constant: Set[fx.Node]) -> Iterator[fx.Node | None]:
    """The nodes where something else than unit by unit is done with the value of `start`; None where it cannot be followed."""
    from initaudit.graph.calls import role_of, weight_uses

    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            role = role_of(user)
            alone = all(a is node or a in constant or a in seen for a in user.all_input_nodes)
            if user.op != "call_function" or len(seen) > _MOST:
                yield None
            elif weight_uses(user, constant) and role.kind != "normalization":
                yield user
            elif alone and role.kind in ("pointwise", "normalization", "passthrough"):
                stack.append(user)
            else:
                yield None


def sum_behind(node: fx.Node | None, streams: set[fx.Node]) -> fx.Node | None:
    """The sum that a matrix's output goes to unchanged and that is carried on past the next block; None for another.

    Several branches may be added one by one (attention and MLP side by side). `streams` are the sums known so far: behind the
    last block nothing is carried on, but one summand is such a sum.
    """
    from initaudit.graph.calls import role_of

    for _ in range(_STEPS):
        if node is None or len(node.users) != 1:
            return None
        user = next(iter(node.users))
        role = role_of(user)
        name = (role.name or getattr(user.target, "__name__", "")).lower()
        if name in ("add", "add_", "sum") and len(user.all_input_nodes) == 2:
            live = all(a.op != "get_attr" for a in user.all_input_nodes)
            if live and (len(_carried(user).users) > 1 or any(_source(a) in streams for a in user.all_input_nodes)):
                return user
        elif role.kind != "passthrough":
            return None
        node = user
    return None


def _carried(node: fx.Node) -> fx.Node:
    """The value as those who read it see it: a norm in float32 casts the stream, and the next sum takes the result."""
    from initaudit.graph.calls import role_of

    for _ in range(_STEPS):
        user = next(iter(node.users), None)
        if user is None or len(node.users) != 1 or role_of(user).kind != "passthrough":
            break
        node = user
    return node


def _source(node: fx.Node) -> fx.Node:
    """The value before casts and changes of layout."""
    from initaudit.graph.calls import role_of

    for _ in range(_STEPS):
        if node.op != "call_function" or role_of(node).kind != "passthrough" or not node.all_input_nodes:
            break
        node = node.all_input_nodes[0]
    return node


def weighs_values(softmax: fx.Node, constant: Set[fx.Node]) -> bool:
    """Whether a softmax is an attention's: what it makes goes, unit by unit at most, into a product with another signal."""
    return weighed(softmax, constant) is not None


def weighed(softmax: fx.Node, constant: Set[fx.Node]) -> tuple[fx.Node, fx.Node] | None:
    """The product in which an attention's softmax weighs values, and the values; None where it is no attention's."""
    from initaudit.graph.calls import role_of, signal_inputs
    from initaudit.graph.graph import shape_of

    size = math.prod(shape_of(softmax) or ())
    seen, stack = {softmax}, [softmax]
    while stack:
        node = stack.pop()
        for user in node.users:
            if user in seen or user.op != "call_function" or len(seen) > _MOST:
                continue
            seen.add(user)
            kind = role_of(user).kind
            others = [a for a in signal_inputs(user) if a not in seen and a not in constant]
            if kind == "contraction" and others:
                return user, others[0]
            # A gate that is spread over the units of what it weighs, and a choice among places, have other sizes.
            if kind in ("pointwise", "passthrough") and math.prod(shape_of(user) or ()) == size:
                stack.append(user)
    return None


def makers(evidence: Evidence, node: fx.Node) -> list[LayerEvidence]:
    """The linear layers whose outputs the value of `node` is made of, with no other layer in between."""
    from initaudit.graph.calls import role_of, signal_inputs

    seen, found = view(evidence), dict[str, LayerEvidence]()
    visited, stack = {node}, [node]
    while stack and len(visited) <= _MOST:
        current = stack.pop()
        # Of an attention's arguments the first two make its scores.
        sources = signal_inputs(current)[: 2 if role_of(current).kind == "attention" else None]
        for source in sources:
            if source in visited or source in seen.constant:
                continue
            visited.add(source)
            layer = seen.layer_at.get(source.name)
            if layer is not None and layer.pair.role == "contraction":
                found.setdefault(layer.tensor, layer)
            else:
                stack.append(source)
    return list(found.values())


def is_mask(evidence: Evidence, name: str) -> bool:
    """Whether a tensor holds zeros and one other, negative number only: an attention mask that a file keeps as a tensor."""
    array, moments = evidence.checkpoint.arrays.get(name), evidence.tensors.get(name)
    if array is None or moments is None or moments.nan or len(array.shape) < 2 or max(moments.max, 0.0) > 0:
        return False
    if moments.count + moments.inf != array.size or not moments.zeros:
        return False
    values = array.read().ravel()
    return len({float(v) for v in values[:: max(1, values.size // 4096)]}) <= 2


def dropping(graph: Graph) -> str:
    """The first place where training drops everything, also between the layers of one recurrent operator; "" for nowhere."""
    from initaudit.graph.calls import arguments, role_of
    from initaudit.graph.graph import location_of

    for node in graph.fx.nodes:
        between = role_of(node).kind == "recurrent" and arguments(node).get("num_layers", 1) > 1
        if dropped_at(node) is not None or (between and certain(arguments(node).get("dropout"))):
            return location_of(dropped_at(node) or node).site or node.name
    return ""


def dropped_at(node: fx.Node) -> fx.Node | None:
    """Where training drops the whole of what a call takes: the call itself, or the mask of zeros that it multiplies by."""
    from initaudit.graph.calls import arguments, role_of

    role = role_of(node)
    if role.name == "dropped":
        return node
    if role.kind == "attention":
        return node if certain(arguments(node).get("dropout_p")) else None
    name = (role.name or getattr(node.target, "__name__", "")).lower()
    masks = (a for a in node.all_input_nodes if role_of(a).name == "dropped")
    return next((m for m in masks if role_of(m.all_input_nodes[0]).kind == "generator"), None) if name in _PRODUCTS else None
