"""Calls that are more than one operator: If, Loop and Scan with their bodies, and operators that only the standard defines.

What a body makes of constants alone is made outside of it, before the call, and handed in with the other outer values that it
reads: gradients reach a weight wherever it is written, and a weight is found wherever it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import helper

from initaudit.load.checkpoint import Array
from initaudit.onnx_ops.registry import Operator
from initaudit.onnx_ops.run import Scope, body_of, call_node, output_count


@dataclass(frozen=True, eq=False)
class ControlCall:
    """The target of a call to If, Loop or Scan: its own inputs first, then the values that its bodies read, under `names`.

    `arrays` reads the constants of the functions that a body calls.
    """

    operator: Operator
    node: onnx.NodeProto
    scope: Scope
    inputs: int
    names: tuple[str, ...]
    keywords: Mapping[str, Any]
    bodies: Mapping[str, onnx.GraphProto]
    arrays: Mapping[str, Array]

    @property
    def __name__(self) -> str:
        """As torch.fx asks for it."""
        return self.operator.name

    def __call__(self, *values: Any) -> Any:
        """Runs the operator; its bodies see the captured values under their names."""
        environment = dict(zip(self.names, values[self.inputs :], strict=True))
        bodies = {k: body_of(b, self.scope, environment) for k, b in self.bodies.items()}
        keywords: dict[str, Any] = {**self.keywords, **bodies}
        if self.operator.wants_outputs:
            keywords["outputs"] = output_count(self.node)
        return self.operator.function(*values[: self.inputs], **keywords)


@dataclass(frozen=True, eq=False)
class SchemaCall:
    """The target of a call to an operator that the standard defines by other operators, with the types that arrive."""

    node: onnx.NodeProto
    scope: Scope

    @property
    def __name__(self) -> str:
        """As torch.fx asks for it."""
        return self.node.op_type

    def __call__(self, *values: Any) -> Any:
        """Runs the standard's own body for these inputs."""
        results = tuple(call_node(self.node, values, self.scope, {}))
        return results[0] if output_count(self.node) == 1 else results


class Hoister:
    """Copies a body without what it makes of constants alone; that is handed to `leaf` and `emit`, which make it outside.

    `leaf(name, where)` makes a constant that the body holds and returns its outer name, `emit(node)` makes an operator's
    outputs under the names in the node, `fixed(name)` says whether an outer value is constant. `attributes` are those of the
    function around the body.
    """

    def __init__(
        self,
        leaf: Callable[[str, str], str],
        emit: Callable[[onnx.NodeProto], None],
        fixed: Callable[[str], bool],
        movable: Callable[[onnx.NodeProto], bool],
        attributes: Mapping[str, Any],
    ) -> None:
        self.leaf, self.emit, self.fixed, self.movable, self.attributes = leaf, emit, fixed, movable, attributes

    def body(self, graph: onnx.GraphProto, where: str, outer: Mapping[str, str]) -> onnx.GraphProto:
        """The copy; `where` is the loader's name for the place, `outer` the new names of values of the bodies around it."""
        names = {k: v for k, v in outer.items() if k not in {i.name for i in graph.input}}
        copy = onnx.GraphProto()
        copy.CopyFrom(graph)
        formal = {i.name for i in graph.input}
        for tensor in [*graph.initializer, *(s.values for s in graph.sparse_initializer)]:
            if tensor.name not in formal:
                names[tensor.name] = self.leaf(tensor.name, where)
        kept = [t for t in copy.initializer if t.name in formal]
        del copy.initializer[:], copy.sparse_initializer[:], copy.node[:]
        copy.initializer.extend(kept)
        for index, node in enumerate(graph.node):
            self._node(node, index, where, names, copy)
        for output in copy.output:
            output.name = names.get(output.name, output.name)
        return copy

    def _node(self, node: onnx.NodeProto, index: int, where: str, names: dict[str, str], copy: onnx.GraphProto) -> None:
        """One node, moved outside or kept with its arguments renamed."""
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and not any(a.ref_attr_name for a in node.attribute):
            names[node.output[0]] = self.leaf(node.output[0], where)
            return
        made = resolved(node, self.attributes)
        for place, name in enumerate(node.input):
            made.input[place] = names.get(name, name)
        label = node.name or f"{node.op_type}_{index}"
        if node.input and self.movable(node) and all(not n or self.fixed(n) for n in made.input):
            for place, name in enumerate(node.output):
                names[name] = made.output[place] = f"{where}/{name}" if name else ""
            made.name = f"{where}/{label}"
            self.emit(made)
            return
        for attribute in made.attribute:
            if attribute.HasField("g"):
                inner = self.body(attribute.g, f"{where}/{label}.{attribute.name}", names)
                attribute.g.CopyFrom(inner)
        for name in node.output:
            names.pop(name, None)
        copy.node.append(made)


def resolved(node: onnx.NodeProto, attributes: Mapping[str, Any]) -> onnx.NodeProto:
    """The node with the attributes of the function around it put in; those that the caller left out are left out."""
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    del copy.attribute[:]
    for attribute in node.attribute:
        if not attribute.ref_attr_name:
            copy.attribute.append(attribute)
        elif attribute.ref_attr_name in attributes:
            copy.attribute.append(helper.make_attribute(attribute.name, attributes[attribute.ref_attr_name]))
    return copy


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs that a node carries."""
    return (a.g for a in node.attribute if a.HasField("g"))


def outer_names(bodies: Sequence[onnx.GraphProto]) -> list[str]:
    """The names that bodies read and do not make, in order."""
    found: dict[str, None] = {}
    for body in bodies:
        made = {i.name for i in body.input} | {t.name for t in body.initializer} | {""}
        for node in body.node:
            for name in [*node.input, *outer_names(list(bodies_of(node)))]:
                if name not in made:
                    found[name] = None
            made.update(node.output)
        for output in body.output:
            if output.name not in made:
                found[output.name] = None
    return list(found)
