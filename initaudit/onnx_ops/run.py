"""Runs the nodes of an ONNX graph over an environment of tensors, as far as a budget allows.

An operator without a function of ours is replaced by its body: a function of the model, else the one that the standard
itself gives, chosen with the types that really arrive (shape inference beforehand may never end on a hostile file).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import onnx
from onnx import defs
from torch import Tensor

from initaudit.errors import InitauditError, UnsupportedOperator
from initaudit.onnx_ops.budget import Budget, current_meter, metered
from initaudit.onnx_ops.control_flow import Body
from initaudit.onnx_ops.convert import from_proto, from_sparse, onnx_type
from initaudit.onnx_ops.registry import NEWEST_OPSET, Operator, lookup

Environment = MutableMapping[str, Tensor | None]
Functions = Mapping[tuple[str, str, str], onnx.FunctionProto]

# What torch and our functions raise when a file asks for nonsense: it becomes one error that names the node.
_FAILURES = (RuntimeError, ValueError, IndexError, KeyError, TypeError, ArithmeticError, AssertionError)

# A hint about memory that opsets before 6 carry; it never had a meaning for the result.
_IGNORED_ATTRIBUTES = frozenset({"consumed_inputs"})


@dataclass(frozen=True)
class Scope:
    """What the nodes of one graph or function may refer to besides values.

    `opsets` maps domains to versions; `functions` holds the model's own by (domain, name, overload); `attributes` those of the
    call whose body this is; `depth` counts the calls around it.
    """

    opsets: Mapping[str, int]
    functions: Functions = field(default_factory=dict)
    attributes: Mapping[str, onnx.AttributeProto] | None = None
    depth: int = 0


def normal_domain(domain: str) -> str:
    """ "ai.onnx" is the default domain ""."""
    return "" if domain == "ai.onnx" else domain


def scope_of(model: onnx.ModelProto) -> Scope:
    """The scope of a model's main graph."""
    opsets = {normal_domain(o.domain): o.version for o in model.opset_import}
    functions = {(normal_domain(f.domain), f.name, f.overload): f for f in model.functions}
    return Scope(opsets, functions)


def describe(node: onnx.NodeProto) -> str:
    """How an error names a node: domain, operator and name."""
    name = node.name or (node.output[0] if node.output else "")
    return f"{node.domain or 'ai.onnx'}::{node.op_type} {name!r}"


def run_model(model: onnx.ModelProto, inputs: Mapping[str, Tensor], budget: Budget | None = None) -> list[Tensor]:
    """The outputs of the model for these inputs, in order.

    Raises LimitExceeded, UnsupportedOperator, or InitauditError naming the node that failed.
    """
    with metered(Budget() if budget is None else budget):
        environment: Environment = dict(inputs)
        return run_graph(model.graph, environment, scope_of(model))


def run_graph(graph: onnx.GraphProto, environment: Environment, scope: Scope) -> list[Tensor]:
    """The outputs of a graph whose inputs are in the environment, to which its values are added."""
    load_initializers(graph, environment)
    evaluate(graph.node, environment, scope)
    results = []
    for output in graph.output:
        value = environment.get(output.name)
        if value is None:
            raise InitauditError(f"output {output.name!r}", "no node computes it")
        results.append(value)
    return results


def load_initializers(graph: onnx.GraphProto, environment: Environment) -> None:
    """Put the graph's initialisers into the environment; an input of the same name that is already there wins."""
    inputs = {i.name for i in graph.input}
    for proto in graph.initializer:
        if proto.name not in inputs or proto.name not in environment:
            environment[proto.name] = from_proto(proto)
    for sparse in graph.sparse_initializer:
        environment[sparse.values.name] = from_sparse(sparse)


def evaluate(nodes: Sequence[onnx.NodeProto], environment: Environment, scope: Scope) -> None:
    """Run the nodes in order; their outputs are added to the environment."""
    meter = current_meter()
    for node in nodes:
        inputs = []
        for name in node.input:
            if name and name not in environment:
                raise InitauditError(describe(node), f"its input {name!r} is not computed before it")
            inputs.append(environment[name] if name else None)
        for name, value in zip(node.output, call_node(node, inputs, scope, environment), strict=False):
            if name:
                environment[name] = value
                # A sequence (a list of tensors) was accounted for when its members were made.
                if isinstance(value, Tensor):
                    meter.produced(value.numel(), describe(node))


def call_node(
    node: onnx.NodeProto, inputs: Sequence[Tensor | None], scope: Scope, environment: Environment
) -> Sequence[Tensor | None]:
    """The outputs of one node. The model's own functions come before ours, ours before the standard's bodies."""
    domain = normal_domain(node.domain)
    own = scope.functions.get((domain, node.op_type, node.overload))
    if own is not None:
        return call_function(own, node, inputs, scope)
    known = lookup(node.op_type, domain)
    if known is None:
        body = schema_body(node, inputs, scope)
        if body is None:
            raise UnsupportedOperator(describe(node), "no such operator is known here")
        return call_function(body, node, inputs, scope)
    arguments = keyword_arguments(node, known, scope, environment)
    try:
        result = known.function(*_trimmed(inputs), **arguments)
    except InitauditError:
        raise
    except _FAILURES as error:
        first = str(error).partition("\n")[0]
        raise InitauditError(describe(node), f"failed: {type(error).__name__}: {first}") from error
    return result if isinstance(result, tuple) else (result,)


def _trimmed(inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The inputs without the omitted ones at the end."""
    count = len(inputs)
    while count and inputs[count - 1] is None:
        count -= 1
    return list(inputs[:count])


def output_count(node: onnx.NodeProto) -> int:
    """How many outputs are wanted: up to the last one that has a name."""
    return max((place + 1 for place, name in enumerate(node.output) if name), default=1)


def keyword_arguments(node: onnx.NodeProto, operator: Operator, scope: Scope, environment: Environment) -> dict[str, Any]:
    """The attributes of a node, and `opset` and `outputs` where the function asks for them.

    Raises UnsupportedOperator for an attribute that the function does not know: ignoring it would change the meaning.
    """
    arguments: dict[str, Any] = {}
    for attribute in node.attribute:
        value = attribute_value(attribute, scope, environment)
        if value is None or attribute.name in _IGNORED_ATTRIBUTES:
            continue
        if attribute.name not in operator.attributes:
            raise UnsupportedOperator(describe(node), f"the attribute {attribute.name!r} is not known here")
        arguments[attribute.name] = value
    if operator.wants_opset:
        arguments["opset"] = scope.opsets.get(operator.domain, NEWEST_OPSET)
    if operator.wants_outputs:
        arguments["outputs"] = output_count(node)
    return arguments


def attribute_value(attribute: onnx.AttributeProto, scope: Scope, environment: Environment) -> Any:
    """The attribute as our functions take it; None where it refers to one that the enclosing call leaves out."""
    if attribute.ref_attr_name:
        given = (scope.attributes or {}).get(attribute.ref_attr_name)
        return None if given is None else attribute_value(given, replace(scope, attributes=None), environment)
    kinds = onnx.AttributeProto
    match attribute.type:
        case kinds.FLOAT:
            return attribute.f
        case kinds.INT:
            return attribute.i
        case kinds.STRING:
            return attribute.s.decode("utf-8", "replace")
        case kinds.FLOATS:
            return list(attribute.floats)
        case kinds.INTS:
            return list(attribute.ints)
        case kinds.STRINGS:
            return [s.decode("utf-8", "replace") for s in attribute.strings]
        case kinds.TENSOR:
            return from_proto(attribute.t)
        case kinds.SPARSE_TENSOR:
            return from_sparse(attribute.sparse_tensor)
        case kinds.GRAPH:
            return body_of(attribute.g, scope, environment)
    raise UnsupportedOperator(f"attribute {attribute.name!r}", f"a value of kind {attribute.type}")


def body_of(graph: onnx.GraphProto, scope: Scope, environment: Environment) -> Body:
    """A subgraph as a callable; it sees the values around it."""

    def body(*inputs: Tensor) -> tuple[Tensor, ...]:
        inner: Environment = ChainMap({}, environment)
        inner.update(zip((i.name for i in graph.input), inputs, strict=True))
        return tuple(run_graph(graph, inner, scope))

    return body


def _type_proto(value: Tensor | None) -> bytes:
    if value is None:
        return onnx.TypeProto().SerializeToString()  # type: ignore[no-any-return]
    proto = onnx.helper.make_tensor_type_proto(onnx_type(value.dtype), tuple(value.shape))
    return proto.SerializeToString()  # type: ignore[no-any-return]


def schema_body(node: onnx.NodeProto, inputs: Sequence[Tensor | None], scope: Scope) -> onnx.FunctionProto | None:
    """The standard's own definition of a node in terms of other operators, for inputs of these types; None without one."""
    domain = normal_domain(node.domain)
    version = scope.opsets.get(domain, 1 if domain else NEWEST_OPSET)
    if not defs.has(node.op_type, version, domain):
        return None
    schema: Any = defs.get_schema(node.op_type, version, domain)
    usable = [v for v in schema.function_opset_versions if v <= scope.opsets.get("", NEWEST_OPSET)]
    if usable:
        return _parsed(schema.get_function_with_opset_version(max(usable)))
    usable = [v for v in schema.context_dependent_function_opset_versions if v <= scope.opsets.get("", NEWEST_OPSET)]
    if not usable:
        return None
    resolved = _resolved(node, scope)
    types = [_type_proto(value) for value in inputs]
    text = schema.get_context_dependent_function_with_opset_version(max(usable), resolved.SerializeToString(), types)
    return _parsed(text)


def _parsed(text: bytes) -> onnx.FunctionProto:
    function = onnx.FunctionProto()
    function.ParseFromString(text)
    return function


def _resolved(node: onnx.NodeProto, scope: Scope) -> onnx.NodeProto:
    """The node with references to attributes of the enclosing call replaced by their values."""
    result = onnx.NodeProto()
    result.CopyFrom(node)
    del result.attribute[:]
    for attribute in node.attribute:
        given = attribute
        if attribute.ref_attr_name:
            found = (scope.attributes or {}).get(attribute.ref_attr_name)
            if found is None:
                continue
            given = onnx.AttributeProto()
            given.CopyFrom(found)
            given.name = attribute.name
        result.attribute.append(given)
    return result


def call_function(
    function: onnx.FunctionProto, node: onnx.NodeProto, inputs: Sequence[Tensor | None], scope: Scope
) -> Sequence[Tensor | None]:
    """The outputs of a function's body for the inputs and attributes of the node that calls it."""
    current_meter().expansion(describe(node), scope.depth + 1)
    attributes = {a.name: a for a in function.attribute_proto}
    domain = normal_domain(node.domain)
    version = scope.opsets.get(domain, 1)
    if defs.has(node.op_type, version, domain):
        defaults = defs.get_schema(node.op_type, version, domain).attributes.items()
        attributes = {n: d.default_value for n, d in defaults if d.default_value.name or d.default_value.type} | attributes
    attributes |= {a.name: a for a in _resolved(node, scope).attribute}
    opsets = dict(scope.opsets) | {normal_domain(o.domain): o.version for o in function.opset_import}
    environment: Environment = dict.fromkeys(function.input)
    environment.update(zip(function.input, inputs, strict=False))
    evaluate(function.node, environment, Scope(opsets, scope.functions, attributes, scope.depth + 1))
    return [environment.get(name) for name in function.output]
