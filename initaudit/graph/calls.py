"""One call of the graph, whichever door it came through: its role, its arguments by name, and the weights it uses."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import fx

from initaudit.graph.aten import aten_role
from initaudit.graph.graph import shape_of
from initaudit.graph.onnx_bodies import ControlCall, SchemaCall
from initaudit.graph.steps import ROLES as STEPS
from initaudit.graph.unknown import Unknown
from initaudit.onnx_ops import registry
from initaudit.roles import Operand, Role, WeightUse

_GETITEM = Role("passthrough", "getitem", ("a",))
_OPAQUE = Role("opaque")


@dataclass(frozen=True)
class Use:
    """A weight at one place of use: `node` consumes the value of `weight` as `use` says."""

    node: fx.Node
    weight: fx.Node
    use: WeightUse


@lru_cache(maxsize=4096)
def role_for(target: Any) -> Role:
    """The role of what a call calls."""
    if isinstance(target, torch._ops.OpOverload):
        return aten_role(target)
    if target is operator.getitem:
        return _GETITEM
    if isinstance(target, (Unknown, SchemaCall, torch._ops.HigherOrderOperator)) or not callable(target):
        return _OPAQUE  # torch.cond and its kind: which branch runs is not known here
    if isinstance(target, ControlCall):
        return target.operator.role
    if target in STEPS:
        return STEPS[target]
    try:
        return registry.role_of(target)
    except KeyError:  # a function that torch put into its trace
        return _OPAQUE


def role_of(node: fx.Node) -> Role:
    """The role of a call; a placeholder or a constant generates its value."""
    return role_for(node.target) if node.op == "call_function" else Role("generator")


@lru_cache(maxsize=4096)
def _parameters(target: Callable[..., Any]) -> tuple[tuple[str, ...], str | None]:
    """The names of a target's parameters in order, and that of its variadic one."""
    if isinstance(target, torch._ops.OpOverload):
        return tuple(a.name for a in target._schema.arguments), None
    if target is operator.getitem:
        return ("a", "b"), None
    if isinstance(target, (Unknown, SchemaCall, ControlCall)):
        return (), "inputs"
    names, variadic = [], None
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            variadic = parameter.name
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            names.append(parameter.name)
    return tuple(names), variadic


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by parameter name; those left to their default are absent."""
    return bind(node.target, node.args, node.kwargs)


def bind(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """These arguments of a target by parameter name."""
    names, variadic = _parameters(target)
    bound: dict[str, Any] = dict(zip(names, args, strict=False))
    if variadic is not None:
        bound[variadic] = list(args[len(names) :])
    bound.update(kwargs)
    return bound


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """The nodes inside an argument, in order."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)


def signal_inputs(node: fx.Node) -> tuple[fx.Node, ...]:
    """The arguments through which the signal flows into `node`, constants included, in order and with repetition."""
    if node.op != "call_function":
        return tuple(nodes_in(node.args))
    data = role_of(node).data
    bound = arguments(node)
    values = [bound.get(name) for name in data] if data else list(bound.values())
    return tuple(n for value in values for n in nodes_in(value))


def weight_uses(node: fx.Node, constant: Set[fx.Node]) -> tuple[Use, ...]:
    """The weights that `node` uses, where `constant` is the set of nodes whose value does not depend on the input."""
    weights = role_of(node).weights if node.op == "call_function" else None
    if weights is None:
        return ()
    bound = arguments(node)
    seen = {name: _operand(value, constant) for name, value in bound.items()}
    found = []
    for use in weights(seen):
        value = bound[use.argument]
        weight = value if use.index is None else value[use.index]
        if isinstance(weight, fx.Node) and weight in constant:
            found.append(Use(node, weight, use))
    return tuple(found)


def _operand(value: Any, constant: Set[fx.Node]) -> Any:
    if isinstance(value, fx.Node):
        return Operand(shape_of(value), value in constant)
    if isinstance(value, (list, tuple)):
        return [_operand(item, constant) for item in value]
    return value
