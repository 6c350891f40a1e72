"""An ONNX model as a graph: one call for each ONNX node, its target our function for that operator, its name kept."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import fx

from initaudit.errors import LimitExceeded, UnreadableModel
from initaudit.graph.graph import Constant, Graph, Input
from initaudit.graph.onnx_bodies import ControlCall, SchemaCall, lifted, outer_names
from initaudit.graph.onnx_values import literal, torch_dtype
from initaudit.graph.unknown import Unknown
from initaudit.load.checkpoint import Array
from initaudit.location import Location
from initaudit.onnx_ops import registry
from initaudit.onnx_ops.convert import from_proto
from initaudit.onnx_ops.run import Scope as RunScope
from initaudit.onnx_ops.run import normal_domain, scope_of
from initaudit.onnx_ops.tensors import torch_type

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_MOST_NODES = 200_000  # expanded functions included; the largest exported language models have some ten thousand
_IGNORED = ("consumed_inputs",)  # a hint about memory that old opsets carry; it never had a meaning for the result
_DEEPEST = 32  # functions within one another


@dataclass
class _Scope:
    """Names of values within one graph or function body. `prefix` keeps the constants of two expansions apart."""

    values: dict[str, Any]
    opsets: Mapping[str, int]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    depth: int = 0


def from_onnx(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> Graph:
    """The graph of `model`; `arrays` reads its initializers and Constant nodes by name.

    Operators that are not known are kept as `Unknown` calls; what lies downstream of them is marked `meta["tainted"]` and what
    they would have consumed becomes an output, so that everything upstream can still be probed. Raises UnreadableModel where a
    value is used that nobody makes, and LimitExceeded where functions expand beyond bounds.
    """
    return _Builder(model, arrays).build()


class _Builder:
    def __init__(self, model: onnx.ModelProto, arrays: Mapping[str, Array]) -> None:
        self.model, self.arrays = model, arrays
        self.out = fx.Graph()
        self.constants: dict[str, Constant] = {}
        self.functions = {(f.domain, f.name): f for f in model.functions}
        self.statistics = _statistics(model.graph)
        self.notes: list[str] = []
        self.count = 0

    def build(self) -> Graph:
        graph = self.model.graph
        scope = _Scope({"": None}, {o.domain or "": o.version for o in self.model.opset_import})
        inputs = list(self._inputs(graph, scope))
        for tensor in graph.initializer:
            self._initializer(tensor.name, scope)
        for sparse in graph.sparse_initializer:
            self._initializer(sparse.values.name, scope)
        self._nodes(graph.node, scope)
        results = [self._read(o.name, scope, f"output {o.name}") for o in graph.output]
        self.out.output(self._outputs(results))
        self._drop_unused()
        read = {str(n.target) for n in self.out.nodes if n.op == "get_attr"}
        constants = {k: c for k, c in self.constants.items() if k in read}
        return Graph(self.out, constants, tuple(inputs), "onnx", notes=tuple(self.notes))

    # ------------------------------------------------------------------ leaves

    def _inputs(self, graph: onnx.GraphProto, scope: _Scope) -> Iterator[Input]:
        initialised = {t.name for t in graph.initializer}
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
            node = self.out.placeholder(_identifier(value.name))
            node.meta["location"] = Location(value.name)
            scope.values[value.name] = node
            yield Input(value.name, shape, torch_type(kind.elem_type) if kind.elem_type else torch.float32)

    def _initializer(self, name: str, scope: _Scope) -> None:
        array = self.arrays.get(scope.prefix + name)
        if array is None:
            # A tensor that could not be read was reported by the loader; whoever uses it is unknown.
            scope.values[name] = self._unknown("", "unreadable initializer", (), Location(name), 1)[0]
            return
        scope.values[name] = self._constant(array, name in self.statistics)

    def _constant(self, array: Array, statistic: bool = False) -> fx.Node:
        dtype = torch_dtype(array.dtype)
        floating = dtype.is_floating_point
        single = array.size == 1 and len(array.shape) < 2
        kind: Any = "buffer" if statistic else "parameter" if floating and not single else "literal"
        if kind == "literal" and floating and _is_zero(array):
            kind = "parameter"  # a factor of zero that nobody folded away is a gate that training opens
        self.constants[array.name] = Constant(
            array.name, kind, array.shape, dtype, lambda: literal(array), trainable=kind == "parameter"
        )
        node = self.out.create_node("get_attr", array.name, name=_identifier(array.name))
        node.meta.update(shape=array.shape, dtype=dtype, location=Location(array.name))
        return node

    # ------------------------------------------------------------------ nodes

    def _nodes(self, nodes: Sequence[NodeProto], scope: _Scope) -> None:
        for node in nodes:
            self.count += 1
            if self.count > _MOST_NODES:
                raise LimitExceeded("graph", f"more than {_MOST_NODES} nodes once its functions are expanded", "fewer")
            self._node(node, scope)

    def _node(self, node: NodeProto, scope: _Scope) -> None:
        location = _location(node, scope)
        given = [self._read(name, scope, f"node {node.name or node.op_type}") for name in node.input]
        domain = "" if node.domain == "ai.onnx" else node.domain
        if node.op_type == "Constant" and not domain:
            self._constant_node(node, scope)
            return
        function = self.functions.get((node.domain, node.op_type))
        known = registry.lookup(node.op_type, domain)
        if function is not None:
            self._expand(function, node, given, scope)
        elif known is not None:
            self._known(known, node, given, scope, location)
        else:
            if self._defined(node, scope):
                self._emit(SchemaCall(self._resolved(node, scope), self._run_scope(scope)), given, {}, node, scope, location)
            else:
                made = self._unknown(domain, node.op_type, given, location, len(node.output))
                scope.values.update(zip(node.output, made, strict=True))

    def _constant_node(self, node: NodeProto, scope: _Scope) -> None:
        name = scope.prefix + node.output[0]
        array = self.arrays.get(name)
        if array is None:
            value = next((a for a in node.attribute if a.name != "sparse_value"), None)
            if value is None:
                raise UnreadableModel(f"node {node.name or name}", "a Constant without a value")
            data = helper.get_attribute_value(value)
            held = numpy_helper.to_array(data) if value.name == "value" else _as_numpy(value.name, data)
            array = Array(name, tuple(held.shape), str(held.dtype), lambda: held)
        scope.values[node.output[0]] = self._constant(array)

    def _known(self, known: registry.Operator, node: NodeProto, given: list[Any], scope: _Scope, location: Location) -> None:
        attributes = self._attributes(node, scope)
        bodies = {k: v for k, v in attributes.items() if isinstance(v, onnx.GraphProto)}
        if bodies:
            self._control(known, node, given, attributes, bodies, scope, location)
            return
        stray = set(attributes) - known.attributes
        if stray:
            self.notes.append(f"{location.site}: attribute {', '.join(sorted(stray))} of {node.op_type} is not understood")
            made = self._unknown(node.domain, node.op_type, given, location, len(node.output))
            scope.values.update(zip(node.output, made, strict=True))
            return
        if node.op_type == "CastLike" and self._floating_constant(given[0]):
            scope.values[node.output[0]] = given[0]  # of another precision at most; what is probed is probed in one
            return
        if node.op_type == "Dropout":
            given, attributes = given[:1], {}  # as in evaluation: what is measured is the signal, not the noise
        if node.op_type == "BatchNormalization" and self._batch_statistics(given, attributes):
            attributes = {**attributes, "training_mode": 1}
        self._emit(known.function, given, attributes, node, scope, location, known)

    def _control(
        self,
        known: registry.Operator,
        node: NodeProto,
        given: list[Any],
        attributes: Mapping[str, Any],
        bodies: Mapping[str, onnx.GraphProto],
        scope: _Scope,
        location: Location,
    ) -> None:
        """If, Loop or Scan: what their bodies read becomes an argument."""
        bare, tensors = lifted(bodies)
        for tensor in tensors:
            self._initializer(tensor.name, scope)
        names = [n for n in outer_names(list(bare.values())) if n in scope.values]
        keywords = {k: v for k, v in attributes.items() if k not in bodies}
        target = ControlCall(known, node, self._run_scope(scope), len(given), tuple(names), keywords, bare)
        self._emit(target, [*given, *(scope.values[n] for n in names)], {}, node, scope, location)

    def _run_scope(self, scope: _Scope) -> RunScope:
        whole = scope_of(self.model)
        return RunScope({normal_domain(d): v for d, v in scope.opsets.items()}, whole.functions, depth=scope.depth)

    def _defined(self, node: NodeProto, scope: _Scope) -> bool:
        """Whether the standard defines the operator by others."""
        version = scope.opsets.get(normal_domain(node.domain), 1 if node.domain else registry.NEWEST_OPSET)
        if not onnx.defs.has(node.op_type, version, normal_domain(node.domain)):
            return False
        schema = onnx.defs.get_schema(node.op_type, version, normal_domain(node.domain))
        return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]

    def _resolved(self, node: NodeProto, scope: _Scope) -> NodeProto:
        """The node with the attributes of the function around it put in."""
        copy = NodeProto()
        copy.CopyFrom(node)
        del copy.attribute[:]
        for attribute in node.attribute:
            if not attribute.ref_attr_name:
                copy.attribute.append(attribute)
            elif attribute.ref_attr_name in scope.attributes:
                copy.attribute.append(helper.make_attribute(attribute.name, scope.attributes[attribute.ref_attr_name]))
        return copy

    def _floating_constant(self, value: Any) -> bool:
        """Whether a value is a floating-point constant, seen through changes of layout."""
        while isinstance(value, fx.Node) and value.op == "call_function" and not value.meta.get("tainted"):
            known = registry.lookup(value.meta.get("onnx", ""))
            if known is None or known.role.kind != "passthrough" or known.name == "Cast":
                return False
            value = value.args[0] if value.args else None
        return isinstance(value, fx.Node) and value.op == "get_attr" and bool(value.meta["dtype"].is_floating_point)

    def _batch_statistics(self, given: list[Any], attributes: Mapping[str, Any]) -> bool:
        """Running statistics at 0 and 1 have seen no data: training will replace them by those of the batch."""
        if attributes.get("training_mode"):
            return False
        try:
            mean, variance = (self.constants[str(n.target)].value() for n in given[3:5])
        except (KeyError, AttributeError, ValueError):
            return False
        return bool((mean == 0).all()) and bool((variance == 1).all())

    def _emit(
        self,
        target: Any,
        given: Sequence[Any],
        attributes: Mapping[str, Any],
        node: NodeProto,
        scope: _Scope,
        location: Location,
        known: registry.Operator | None = None,
    ) -> None:
        """One call, and one getitem for each of its outputs where there are several."""
        keywords = dict(attributes)
        last = max((i for i, name in enumerate(node.output) if name), default=0) + 1
        if node.op_type in ("BatchNormalization", "Dropout") and not node.domain:
            last = 1  # running statistics and masks are not signals
        if known is not None and known.wants_opset:
            keywords["opset"] = scope.opsets.get("", registry.NEWEST_OPSET)
        if known is not None and known.wants_outputs:
            keywords["outputs"] = last
        call = self.out.create_node(
            "call_function", target, tuple(given), keywords, name=_identifier(node.name or node.output[0])
        )
        call.meta["location"] = location
        call.meta["onnx"] = node.op_type
        self._taint(call)
        if last == 1:
            scope.values[node.output[0]] = call
            return
        for i, name in enumerate(node.output[:last]):
            if name:
                item = self.out.call_function(_getitem, (call, i))
                item.meta["location"] = location
                self._taint(item)
                scope.values[name] = item

    def _expand(self, function: onnx.FunctionProto, node: NodeProto, given: list[Any], scope: _Scope) -> None:
        """A model-local function, node by node, so that the weights handed to it are found at their places of use."""
        if scope.depth >= _DEEPEST:
            raise LimitExceeded(f"function {function.name}", f"calls nested deeper than {_DEEPEST}", "fewer")
        names = [*function.input]
        values = {"": None, **dict(zip(names, given, strict=False)), **dict.fromkeys(names[len(given) :])}
        attributes = {a.name: helper.get_attribute_value(a) for a in function.attribute_proto}
        attributes.update(self._attributes(node, scope))
        opsets = {**scope.opsets, **{o.domain or "": o.version for o in function.opset_import}}
        prefix = f"{scope.prefix}{node.name or node.output[0]}/"
        inner = _Scope(values, opsets, attributes, prefix, scope.depth + 1)
        self._nodes(function.node, inner)
        for outer, name in zip(node.output, function.output, strict=False):
            scope.values[outer] = self._read(name, inner, f"function {function.name}")

    def _attributes(self, node: NodeProto, scope: _Scope) -> dict[str, Any]:
        """Attributes as Python values; those of a function's caller are put in where a body refers to them."""
        found: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in scope.attributes:
                    found[attribute.name] = scope.attributes[attribute.ref_attr_name]
                continue
            value = helper.get_attribute_value(attribute)
            if attribute.name in _IGNORED:
                continue
            if isinstance(value, bytes):
                value = value.decode("utf-8", "replace")
            elif isinstance(value, onnx.TensorProto):
                value = from_proto(value)
            elif isinstance(value, list) and value and isinstance(value[0], bytes):
                value = [v.decode("utf-8", "replace") for v in value]
            found[attribute.name] = (
                list(value) if not isinstance(value, (str, int, float, torch.Tensor, onnx.GraphProto)) else value
            )
        return found

    # ------------------------------------------------------------------ the unknown

    def _unknown(self, domain: str, op_type: str, given: Sequence[Any], location: Location, outputs: int) -> list[fx.Node]:
        target = Unknown(domain, op_type)
        made = []
        for i in range(max(1, outputs)):
            node = self.out.create_node("call_function", target, tuple(given), {"output": i} if i else {})
            node.meta.update(location=location, onnx=op_type, tainted=True)
            made.append(node)
        return made[: max(outputs, 1)]

    def _taint(self, node: fx.Node) -> None:
        if any(a.meta.get("tainted") for a in node.all_input_nodes):
            node.meta["tainted"] = True

    def _outputs(self, results: Sequence[Any]) -> tuple[fx.Node, ...]:
        """The outputs that can be computed, and what unknown operators would have consumed."""
        nodes = [r for r in results if isinstance(r, fx.Node) and not r.meta.get("tainted")]
        for node in self.out.nodes:
            if isinstance(node.target, Unknown):
                nodes += [a for a in node.all_input_nodes if not a.meta.get("tainted") and a.op == "call_function"]
        return tuple(dict.fromkeys(nodes))

    def _read(self, name: str, scope: _Scope, where: str) -> Any:
        if name not in scope.values:
            raise UnreadableModel(
                where, f"uses the value {name!r}", "one that an input, an initializer or an earlier node makes"
            )
        return scope.values[name]

    def _drop_unused(self) -> None:
        for node in reversed(list(self.out.nodes)):
            if not node.users and node.op not in ("output", "placeholder") and not node.meta.get("tainted"):
                self.out.erase_node(node)


def _getitem(values: Sequence[Any], index: int) -> Any:
    """One of several outputs; an operator that was asked for one may hand it over alone."""
    return values[index] if isinstance(values, (tuple, list)) else values


def _identifier(name: str) -> str:
    """A name that torch.fx accepts; the true one is in the node's location."""
    return re.sub(r"\W", "_", name)[:80] or "value"


def _location(node: NodeProto, scope: _Scope) -> Location:
    """The node's name, and the source line that exporters leave in its metadata."""
    name = scope.prefix + (node.name or (node.output[0] if node.output else node.op_type))
    trace = next((p.value for p in node.metadata_props if p.key.endswith("stack_trace")), "")
    frames = [f for f in _FRAME.findall(trace) if "/torch/" not in f[0]]
    return Location(name, frames[-1][0], int(frames[-1][1])) if frames else Location(name)


def _statistics(graph: onnx.GraphProto) -> set[str]:
    """Names of running means and variances: what a BatchNormalization keeps and no gradient changes."""
    return {name for node in graph.node if node.op_type == "BatchNormalization" for name in node.input[3:5]}


def _is_zero(array: Array) -> bool:
    return not bool(literal(array).any())


def _as_numpy(name: str, data: Any) -> Any:
    return np.asarray(data, dtype=np.int64 if name.startswith("value_int") else np.float32)
