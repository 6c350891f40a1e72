"""An ONNX model as a graph: one call for each ONNX node, its target our function for that operator, its name kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import fx

from initaudit.graph.graph import Graph, Input
from initaudit.graph.onnx_build import Builder, Names, identifier
from initaudit.graph.onnx_constants import settle
from initaudit.graph.onnx_folded import folded_norms
from initaudit.graph.unknown import Unknown
from initaudit.load.checkpoint import Array
from initaudit.location import Location
from initaudit.onnx_ops.run import normal_domain, scope_of
from initaudit.onnx_ops.tensors import torch_type


def from_onnx(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> Graph:
    """The graph of `model`; `arrays` reads its initializers and Constant nodes by the loader's names.

    Operators that are not known are kept as `Unknown` calls; what lies downstream of them is marked `meta["tainted"]` and what
    they would have consumed becomes an output, so that everything upstream can still be probed. Raises UnreadableModel where a
    value is used that nobody makes, and LimitExceeded where functions expand beyond bounds.
    """
    graph = model.graph
    folded = folded_norms(graph, arrays)
    builder = Builder(scope_of(model).functions, arrays, folded.restored)
    if folded.sites:
        builder.notes.append(folded.note())
    names = Names({"": None}, {normal_domain(o.domain): o.version for o in model.opset_import})
    inputs = tuple(_inputs(graph, builder, names))
    for name in _initialisers(graph):
        names.values[name] = builder.stored(name, names)
    builder.nodes(graph.node, names)
    results = [builder.read(o.name, names, f"output {o.name}") for o in graph.output]
    builder.out.output(_outputs(builder.out, results))
    _drop_unused(builder.out)
    settle(builder)
    read = {str(n.target) for n in builder.out.nodes if n.op == "get_attr"}
    constants = {k: c for k, c in builder.constants.items() if k in read}
    unread = {str(n.target) for n in builder.hoisted if n.op == "get_attr"} - read
    unused = tuple(k for k, c in builder.constants.items() if k in unread and c.trainable)
    return Graph(builder.out, constants, inputs, "onnx", unused, tuple(builder.notes))


def _initialisers(graph: onnx.GraphProto) -> list[str]:
    return [t.name for t in graph.initializer] + [s.values.name for s in graph.sparse_initializer]


def _inputs(graph: onnx.GraphProto, builder: Builder, names: Names) -> Iterator[Input]:
    """The inputs that no initializer of the same name fills (as files before IR 4 have it)."""
    initialised = set(_initialisers(graph))
    for value in graph.input:
        if value.name in initialised:
            continue
        kind = value.type.tensor_type
        shape: tuple[int | str, ...] | None = None
        if kind.HasField("shape"):
            shape = tuple(
                d.dim_value if d.HasField("dim_value") else d.dim_param or f"{value.name}_{i}"
                for i, d in enumerate(kind.shape.dim)
            )
        node = builder.out.placeholder(identifier(value.name))
        node.meta["location"] = Location(value.name)
        names.values[value.name] = node
        yield Input(value.name, shape, torch_type(kind.elem_type) if kind.elem_type else torch.float32)


def _outputs(graph: fx.Graph, results: Sequence[Any]) -> tuple[fx.Node, ...]:
    """The outputs that can be computed, and what unknown operators would have consumed."""
    nodes = [r for r in results if isinstance(r, fx.Node) and not r.meta.get("tainted")]
    for node in graph.nodes:
        if isinstance(node.target, Unknown):
            nodes += [a for a in node.all_input_nodes if not a.meta.get("tainted") and a.op == "call_function"]
    return tuple(dict.fromkeys(nodes))


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("output", "placeholder") and not node.meta.get("tainted"):
            graph.erase_node(node)
