"""From ONNX nodes to calls of one torch.fx graph: one call for each node, its target our function for that operator."""

from __future__ import annotations

import dataclasses
import re
from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, helper, numpy_helper
from torch import fx

from initaudit.errors import LimitExceeded, UnreadableModel
from initaudit.graph.graph import Constant
from initaudit.graph.noise import drops
from initaudit.graph.onnx_bodies import ControlCall, Hoister, SchemaCall, outer_names, resolved
from initaudit.graph.onnx_values import literal, torch_dtype, untrained_norm
from initaudit.graph.steps import dropped, getitem, restored_norm
from initaudit.graph.unknown import Unknown
from initaudit.load.checkpoint import Array
from initaudit.location import Location
from initaudit.onnx_ops import registry
from initaudit.onnx_ops.convert import from_proto
from initaudit.onnx_ops.run import Functions, normal_domain
from initaudit.onnx_ops.run import Scope as RunScope

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_MOST_NODES = 200_000  # expanded functions included; the largest exported language models have some ten thousand
_IGNORED = ("consumed_inputs",)  # a hint about memory that old opsets carry; it never had a meaning for the result
_DEEPEST = 32  # functions within one another
_MOVABLE = ("passthrough", "pointwise", "merge", "normalization", "contraction", "reduction", "shape")


@dataclass
class Names:
    """Names of values within one graph or function body.

    `where` is what the loader puts before the names of constants that are written there, `prefix` keeps the nodes of two
    expansions of one function apart.
    """

    values: MutableMapping[str, Any]
    opsets: Mapping[str, int]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = ""
    where: str = ""
    depth: int = 0


class Builder:
    """Adds calls to `out` and the constants that they read to `constants`."""

    def __init__(self, functions: Functions, arrays: Mapping[str, Array], restored: frozenset[str] = frozenset()) -> None:
        self.functions, self.arrays = functions, arrays
        self.restored = restored  # values of the main graph behind which a folded batch norm belongs
        self.out = fx.Graph()
        self.constants: dict[str, Constant] = {}
        self.shared: dict[tuple[str, tuple[int, ...], torch.dtype], str] = {}
        self.notes: list[str] = []
        self.count = 0
        self.fixed: dict[fx.Node, bool] = {}
        self.hoisted: list[fx.Node] = []
        self.written: set[str] = set()  # constants that a Constant node holds

    # ------------------------------------------------------------------ constants

    def stored(self, name: str, names: Names) -> fx.Node:
        """A constant of the file; whoever uses one that could not be read, which the loader reported, is unknown."""
        array = self._array(name, names.where)
        return self.constant(array) if array is not None else self._unknown("", "unreadable tensor", (), Location(name), 1)[0]

    def _array(self, name: str, where: str) -> Array | None:
        """The loader prefixes names inside functions always, those inside bodies where another constant has the same."""
        found = self.arrays.get(f"{where}/{name}") if where else None
        return found if found is not None or "::" in where else self.arrays.get(name)

    def constant(self, array: Array, written: bool = False) -> fx.Node:
        """A node that reads `array`; `written` where a Constant node holds it, as exporters write the numbers of a program."""
        dtype = torch_dtype(array.dtype)
        floating = dtype.is_floating_point
        single = array.size == 1 and len(array.shape) < 2
        kind: Any = "parameter" if floating and not single else "literal"
        if kind == "literal" and floating and not written and not bool(literal(array).any()):
            kind = "parameter"  # a factor of zero that nobody folded away is a gate that training opens
        if written:
            self.written.add(array.name)
        # What is stored several times is one weight, under the first of its names.
        key = self.shared.setdefault((array.storage, array.shape, dtype), array.name) if array.storage else array.name
        if key not in self.constants:
            self.constants[key] = Constant(key, kind, array.shape, dtype, lambda: literal(array), trainable=kind == "parameter")
        elif key != array.name and array.name not in self.constants[key].tied:
            constant = self.constants[key]
            self.constants[key] = dataclasses.replace(constant, tied=(*constant.tied, array.name))
        node = self.out.create_node("get_attr", key, name=identifier(array.name))
        node.meta.update(shape=array.shape, dtype=dtype, location=Location(array.name))
        return node

    def is_fixed(self, value: Any) -> bool:
        """Whether a value depends on no input of the model."""
        if not isinstance(value, fx.Node):
            return value is None
        if value not in self.fixed:
            calls = value.op == "call_function" and not value.meta.get("tainted") and bool(value.all_input_nodes)
            control = isinstance(value.target, (ControlCall, Unknown))
            self.fixed[value] = value.op == "get_attr" or (
                calls and not control and all(self.is_fixed(a) for a in value.all_input_nodes)
            )
        return self.fixed[value]

    def known_value(self, value: Any) -> torch.Tensor | None:
        """The value of a constant seen through changes of layout; None for anything else."""
        steps: list[fx.Node] = []
        while isinstance(value, fx.Node) and value.op == "call_function" and not value.meta.get("tainted"):
            known = registry.lookup(value.meta.get("onnx", ""))
            if (
                known is None
                or known.role.kind != "passthrough"
                or not all(self.is_fixed(a) for a in value.all_input_nodes[1:])
            ):
                return None
            steps.append(value)
            value = value.args[0] if value.args else None
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        result: Any = self.constants[str(value.target)].value()
        for step in reversed(steps):
            rest = [self.known_value(a) if isinstance(a, fx.Node) else a for a in step.args[1:]]
            result = step.target(result, *rest, **step.kwargs)  # type: ignore[operator]
        return result if isinstance(result, torch.Tensor) else None

    # ------------------------------------------------------------------ nodes

    def nodes(self, nodes: Sequence[NodeProto], names: Names) -> None:
        """Adds the nodes of a graph or of a function's body in order."""
        for index, node in enumerate(nodes):
            self.count += 1
            if self.count > _MOST_NODES:
                raise LimitExceeded("graph", f"more than {_MOST_NODES} nodes once its functions are expanded", "fewer")
            self._node(node, index, names)

    def _node(self, node: NodeProto, index: int, names: Names) -> None:
        location = _location(node, names)
        given = [self.read(name, names, f"node {node.name or node.op_type}") for name in node.input]
        while given and given[-1] is None:
            given.pop()
        domain = normal_domain(node.domain)
        function = self.functions.get((domain, node.op_type, node.overload))
        known = registry.lookup(node.op_type, domain)
        if node.op_type == "Constant" and not domain:
            self._constant_node(node, names)
        elif function is not None:
            self._expand(function, node, given, names)
        elif known is not None:
            self._known(known, node, index, given, names, location)
        elif self._defined(node, names):
            target = SchemaCall(resolved(node, names.attributes), self.run_scope(names))
            self.emit(target, given, {}, node, names, location)
        else:
            self._not_known(node, given, names, location)

    def _not_known(self, node: NodeProto, given: list[Any], names: Names, location: Location) -> None:
        made = self._unknown(normal_domain(node.domain), node.op_type, given, location, len(node.output))
        names.values.update(zip(node.output, made, strict=True))

    def _constant_node(self, node: NodeProto, names: Names) -> None:
        array = self._array(node.output[0], names.where)
        if array is None:
            value = next((a for a in resolved(node, names.attributes).attribute if a.name != "sparse_value"), None)
            if value is None:
                raise UnreadableModel(f"node {node.name or node.output[0]}", "a Constant without a value")
            data = helper.get_attribute_value(value)
            if value.name in ("value_string", "value_strings"):
                names.values[node.output[0]] = self._unknown("", "Constant", (), _location(node, names), 1)[0]
                return
            held = numpy_helper.to_array(data) if value.name == "value" else _as_numpy(value.name, data)
            array = Array(names.prefix + node.output[0], tuple(held.shape), str(held.dtype), lambda: held)
        names.values[node.output[0]] = self.constant(array, written=True)

    def _known(
        self, known: registry.Operator, node: NodeProto, index: int, given: list[Any], names: Names, location: Location
    ) -> None:
        attributes = self._attributes(node, names)
        bodies = {k: v for k, v in attributes.items() if isinstance(v, onnx.GraphProto)}
        if bodies:
            where = f"{names.where}/" if names.where else ""
            label = f"{where}{node.name or f'{node.op_type}_{index}'}"
            bare = {k: self._hoisted(b, f"{label}.{k}", names) for k, b in bodies.items()}
            keywords = {k: v for k, v in attributes.items() if k not in bodies}
            self.control(known, resolved(node, names.attributes), given, keywords, bare, names, location)
            return
        stray = set(attributes) - known.attributes
        if stray:
            self.notes.append(f"{location.site}: attribute {', '.join(sorted(stray))} of {node.op_type} is not understood")
            self._not_known(node, given, names, location)
            return
        if node.op_type == "CastLike" and self._floating_constant(given[0]):
            names.values[node.output[0]] = given[0]  # of another precision at most; what is probed is probed in one
            return
        if node.op_type == "Dropout" and drops(*map(self.known_value, given[1:])):
            self.emit(dropped, given[:1], {}, node, names, location)
            return
        if node.op_type == "Dropout":
            given, attributes = given[:1], {}  # as in evaluation: what is measured is the signal, not the noise
        if node.op_type == "BatchNormalization" and untrained_norm([self.known_value(v) for v in given[1:5]]):
            attributes = {**attributes, "training_mode": 1}
        self.emit(known.function, given, attributes, node, names, location, known)
        if node.output[0] in self.restored and not names.prefix:
            norm = self.out.call_function(restored_norm, (names.values[node.output[0]],))
            norm.meta["location"] = location
            self._taint(norm)
            names.values[node.output[0]] = norm

    def _hoisted(self, body: onnx.GraphProto, where: str, names: Names) -> onnx.GraphProto:
        def leaf(name: str, place: str) -> str:
            key = f"{place}/{name}"
            names.values[key] = self.stored(name, Names({}, names.opsets, where=place))
            self.hoisted.append(names.values[key])
            return key

        def emit(node: NodeProto) -> None:
            self._node(node, 0, Names(names.values, names.opsets, names.attributes, names.prefix, where, names.depth))

        def movable(node: NodeProto) -> bool:
            known = registry.lookup(node.op_type, normal_domain(node.domain))
            return known is not None and known.role.kind in _MOVABLE

        def fixed(name: str) -> bool:
            return name in names.values and self.is_fixed(names.values[name])

        return Hoister(leaf, emit, fixed, movable, names.attributes).body(body, where, {})

    def control(
        self,
        known: registry.Operator,
        node: NodeProto,
        given: list[Any],
        keywords: Mapping[str, Any],
        bodies: Mapping[str, onnx.GraphProto],
        names: Names,
        location: Location,
    ) -> None:
        """If, Loop or Scan: what their bodies read becomes an argument. Of an If whose condition is known, the branch taken."""
        condition = self.known_value(given[0]) if known.name == "If" else None
        if condition is not None:
            taken = bodies["then_branch" if bool(condition.all()) else "else_branch"]
            names.values.update(zip(node.output, self.branch(taken, names, {}), strict=False))
            return
        captured = [n for n in outer_names(list(bodies.values())) if n in names.values]
        target = ControlCall(known, node, self.run_scope(names), len(given), tuple(captured), keywords, bodies, self.arrays)
        self.emit(target, [*given, *(names.values[n] for n in captured)], {}, node, names, location)

    def branch(self, body: onnx.GraphProto, names: Names, given: Mapping[str, Any]) -> list[Any]:
        """Adds the nodes of a body, which sees the values around it and `given`, and returns its outputs."""
        values = ChainMap(dict(given), names.values)
        inner = Names(values, names.opsets, names.attributes, names.prefix, names.where, names.depth)
        self.nodes(body.node, inner)
        return [self.read(o.name, inner, f"graph {body.name}") for o in body.output]

    def run_scope(self, names: Names) -> RunScope:
        """What operators that run whole bodies need to know."""
        return RunScope({normal_domain(d): v for d, v in names.opsets.items()}, self.functions, depth=names.depth)

    def _defined(self, node: NodeProto, names: Names) -> bool:
        """Whether the standard defines the operator by others."""
        domain = normal_domain(node.domain)
        version = names.opsets.get(domain, 1 if domain else registry.NEWEST_OPSET)
        if not onnx.defs.has(node.op_type, version, domain):
            return False
        schema = onnx.defs.get_schema(node.op_type, version, domain)
        return bool(schema.has_function or schema.has_context_dependent_function)  # type: ignore[attr-defined]

    def _floating_constant(self, value: Any) -> bool:
        """Whether a value is a floating-point constant, seen through changes of layout."""
        while isinstance(value, fx.Node) and value.op == "call_function" and not value.meta.get("tainted"):
            known = registry.lookup(value.meta.get("onnx", ""))
            if known is None or known.role.kind != "passthrough" or known.name == "Cast":
                return False
            value = value.args[0] if value.args else None
        return isinstance(value, fx.Node) and value.op == "get_attr" and bool(value.meta["dtype"].is_floating_point)

    def emit(
        self,
        target: Any,
        given: Sequence[Any],
        attributes: Mapping[str, Any],
        node: NodeProto,
        names: Names,
        location: Location,
        known: registry.Operator | None = None,
    ) -> None:
        """One call, and one getitem for each of its outputs where there are several."""
        keywords = dict(attributes)
        last = max((i for i, name in enumerate(node.output) if name), default=0) + 1
        if node.op_type in ("BatchNormalization", "Dropout") and not node.domain:
            last = 1  # running statistics and masks are not signals
        if known is not None and known.wants_opset:
            keywords["opset"] = names.opsets.get("", registry.NEWEST_OPSET)
        if known is not None and known.wants_outputs:
            keywords["outputs"] = last
        call = self.out.create_node(
            "call_function", target, tuple(given), keywords, name=identifier(node.name or node.output[0])
        )
        call.meta.update(location=location, onnx=node.op_type)
        self._taint(call)
        self.is_fixed(call)  # known for what it is made of, so that no chain of constants is too deep to be asked for
        if last == 1:
            names.values[node.output[0]] = call
            return
        for i, name in enumerate(node.output[:last]):
            if name:
                item = self.out.call_function(getitem, (call, i))
                item.meta["location"] = location
                self._taint(item)
                names.values[name] = item

    def _expand(self, function: onnx.FunctionProto, node: NodeProto, given: list[Any], names: Names) -> None:
        """A model-local function, node by node, so that the weights handed to it are found at their places of use."""
        if names.depth >= _DEEPEST:
            raise LimitExceeded(f"function {function.name}", f"calls nested deeper than {_DEEPEST}", "fewer")
        formal = [*function.input]
        values = {"": None, **dict(zip(formal, given, strict=False)), **dict.fromkeys(formal[len(given) :])}
        attributes = {a.name: helper.get_attribute_value(a) for a in function.attribute_proto}
        attributes.update(self._attributes(node, names))
        opsets = {**names.opsets, **{normal_domain(o.domain): o.version for o in function.opset_import}}
        where = f"{function.domain}::{function.name}" + (f":{function.overload}" if function.overload else "")
        prefix = f"{names.prefix}{node.name or node.output[0]}/"
        inner = Names(values, opsets, attributes, prefix, where, names.depth + 1)
        self.nodes(function.node, inner)
        for outer, name in zip(node.output, function.output, strict=False):
            names.values[outer] = self.read(name, inner, f"function {function.name}")

    def _attributes(self, node: NodeProto, names: Names) -> dict[str, Any]:
        """Attributes as Python values; those of a function's caller are put in where a body refers to them."""
        found: dict[str, Any] = {}
        for attribute in node.attribute:
            if attribute.ref_attr_name:
                if attribute.ref_attr_name in names.attributes:
                    found[attribute.name] = names.attributes[attribute.ref_attr_name]
            elif attribute.name not in _IGNORED:
                found[attribute.name] = _plain(helper.get_attribute_value(attribute))
        return found

    # ------------------------------------------------------------------ the unknown

    def _unknown(self, domain: str, op_type: str, given: Sequence[Any], location: Location, outputs: int) -> list[fx.Node]:
        target = Unknown(domain, op_type)
        made = []
        for i in range(max(1, outputs)):
            node = self.out.create_node("call_function", target, tuple(given), {"output": i} if i else {})
            node.meta.update(location=location, onnx=op_type, tainted=True)
            made.append(node)
        return made

    def _taint(self, node: fx.Node) -> None:
        if any(a.meta.get("tainted") for a in node.all_input_nodes):
            node.meta["tainted"] = True

    def read(self, name: str, names: Names, where: str) -> Any:
        """What a name stands for; raises UnreadableModel where nothing makes it."""
        if name not in names.values:
            raise UnreadableModel(
                where, f"uses the value {name!r}", "one that an input, an initializer or an earlier node makes"
            )
        return names.values[name]


def identifier(name: str) -> str:
    """A name that torch.fx accepts; the true one is in the node's location."""
    return re.sub(r"\W", "_", name)[:80] or "value"


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, onnx.TensorProto):
        return from_proto(value)
    if isinstance(value, (str, int, float, onnx.GraphProto, onnx.TypeProto, onnx.SparseTensorProto)):
        return value
    return [v.decode("utf-8", "replace") if isinstance(v, bytes) else v for v in value]


def _location(node: NodeProto, names: Names) -> Location:
    """The node's name, and the source line that exporters leave in its metadata."""
    name = names.prefix + (node.name or (node.output[0] if node.output else node.op_type))
    trace = next((p.value for p in node.metadata_props if p.key.endswith("stack_trace")), "")
    frames = [f for f in _FRAME.findall(trace) if "/torch/" not in f[0]]
    return Location(name, frames[-1][0], int(frames[-1][1])) if frames else Location(name)


def _as_numpy(name: str, data: Any) -> Any:
    return np.asarray(data, dtype=np.int64 if name.startswith("value_int") else np.float32)
