"""Calls that are more than one operator: If, Loop and Scan with their bodies, and operators that only the standard defines.

A body's initializers and the outer values that it reads become arguments of the call, so that gradients reach them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx

from initaudit.onnx_ops.registry import Operator
from initaudit.onnx_ops.run import Scope, body_of, call_node, output_count


@dataclass(frozen=True, eq=False)
class ControlCall:
    """The target of a call to If, Loop or Scan: its own inputs first, then the values that its bodies read."""

    operator: Operator
    node: onnx.NodeProto
    scope: Scope
    inputs: int
    names: tuple[str, ...]
    keywords: Mapping[str, Any]
    bodies: Mapping[str, onnx.GraphProto]

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


def lifted(bodies: Mapping[str, onnx.GraphProto]) -> tuple[dict[str, onnx.GraphProto], list[onnx.TensorProto]]:
    """Copies of `bodies` without their initializers, and these; a name that two bodies give to two tensors stays inside."""
    counts: dict[str, int] = {}
    for graph in (g for body in bodies.values() for g in _graphs(body)):
        for tensor in graph.initializer:
            counts[tensor.name] = counts.get(tensor.name, 0) + 1
    bare, tensors = {}, []
    for key, body in bodies.items():
        copy = onnx.GraphProto()
        copy.CopyFrom(body)
        for graph in _graphs(copy):
            tensors += [t for t in graph.initializer if counts[t.name] == 1]
            kept = [t for t in graph.initializer if counts[t.name] > 1]
            del graph.initializer[:]
            graph.initializer.extend(kept)
        bare[key] = copy
    return bare, tensors


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def outer_names(bodies: Sequence[onnx.GraphProto]) -> list[str]:
    """The names that bodies read and do not make, in order."""
    found: dict[str, None] = {}
    for body in bodies:
        made = {i.name for i in body.input} | {t.name for t in body.initializer} | {""}
        for node in body.node:
            inner = [a.g for a in node.attribute if a.HasField("g")]
            for name in [*node.input, *outer_names(inner)]:
                if name not in made:
                    found[name] = None
            made.update(node.output)
        for output in body.output:
            if output.name not in made:
                found[output.name] = None
    return list(found)
