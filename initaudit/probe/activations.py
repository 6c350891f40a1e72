"""Dead and saturated units: the local derivative of each activation at the values that reach it.

An activation is found by structure: every node that is a pointwise function of one signal (x * sigmoid(x) and an Erf-GELU in
five nodes included) belongs to that signal's cluster, and each node through which a value leaves the cluster is a function
phi of it. phi is evaluated by running its nodes again on a sample, so nothing hangs on names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import arguments, nodes_in, role_of
from initaudit.probe.statistics import power

# A unit whose slope is below a twentieth of the steepest is in the flat part: tanh beyond |x| = 2.2, the sigmoid beyond 4.4. It
# passes 1/400 of the gradient's power, so that two such layers in a row end what an optimizer without rescaling can use.
SATURATED = 0.05
# A slope that varies by less than this over the usual range is a linear map and cannot saturate.
_LINEAR = 1e-3
_SAMPLE = 1 << 16
_POINTS = 512
_GRID = 33


@dataclass(frozen=True)
class Activation:
    """A pointwise function of `root`: `nodes` in order compute it, the last of them is its value."""

    root: fx.Node
    nodes: tuple[fx.Node, ...]

    @property
    def exit(self) -> fx.Node:
        """The node whose value is phi(root)."""
        return self.nodes[-1]


def find_activations(graph: fx.Graph, constant: frozenset[fx.Node], *, inner: bool = False) -> tuple[Activation, ...]:
    """Every pointwise function of a single signal, in order of execution; with `inner` those that only serve another too."""
    root: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and role_of(node).kind == "pointwise" and role_of(node).name != "glu":
            sources = {root.get(a, a) for a in nodes_in(list(arguments(node).values())) if a not in constant}
            if len(sources) == 1:
                root[node] = sources.pop()
    members: dict[fx.Node, list[fx.Node]] = {}
    for node, source in root.items():
        members.setdefault(source, []).append(node)
    found = []
    for source, nodes in members.items():
        for i, node in enumerate(nodes):
            if inner or any(root.get(user) is not source for user in node.users):
                found.append(Activation(source, _needed(node, nodes[: i + 1])))
    return tuple(found)


def _needed(last: fx.Node, candidates: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    inside, needed, stack = set(candidates), {last}, [last]
    while stack:
        for a in stack.pop().all_input_nodes:
            if a in inside and a not in needed:
                needed.add(a)
                stack.append(a)
    return tuple(n for n in candidates if n in needed)


def sample(x: Tensor, unit: int | None, batch: int | None) -> Tensor:
    """A copy of at most 512 places by all units (65,536 numbers at most), of the same rank.

    Examples come before positions, and positions are taken along the last axis, where neighbours in memory are read together;
    of an axis that keeps one place it is the middle one: at the border a padded convolution sees less.
    """
    if unit is None:
        unit = x.dim() - 1
    places = max(1, min(_POINTS, _SAMPLE // max(1, x.shape[unit])))
    kept = dict.fromkeys(range(x.dim()), 0)
    for axis in sorted((a for a in kept if a != unit), key=lambda a: (a != batch, -a)):
        kept[axis] = min(x.shape[axis], places)
        places = max(1, places // kept[axis])
    x = x.detach()
    # The axis that shrinks most goes first: the others then have less to copy.
    for axis in sorted((a for a in kept if 0 < kept[a] < x.shape[a]), key=lambda a: kept[a] / x.shape[a]):
        last = x.shape[axis] - 1
        chosen = torch.linspace(0, last, kept[axis], device=x.device) if kept[axis] > 1 else torch.tensor([last / 2])
        x = x.index_select(axis, chosen.round().long().to(x.device))
    return x.clone()


def flat_units(
    activation: Activation,
    drawn: Tensor,
    unit: int | None,
    value_of: Callable[[fx.Node], Any],
    seen: dict[Any, Tensor | None] | None = None,
) -> tuple[float, float, float] | None:
    """(dead share, saturated share, root mean square slope) of the units; None for a linear or a non-differentiable function.

    `drawn` is a sample of the root's values and `value_of` gives the value of a constant. `seen` remembers the slopes over the
    usual range of functions without constants: a network repeats its activation.
    """
    axis = drawn.dim() - 1 if unit is None else unit
    line = torch.linspace(-4.0, 4.0, _GRID, device=drawn.device)
    shape = [-1 if i == (0 if axis != 0 else drawn.dim() - 1) else 1 for i in range(drawn.dim())]
    grid = line.view(shape).expand([_GRID if s == -1 else (drawn.shape[i] if i == axis else 1) for i, s in enumerate(shape)])
    try:
        slopes = _slope(activation, drawn, value_of)
        key = _function(activation)
        if seen is not None and key is not None:
            if key not in seen:
                seen[key] = _slope(activation, line.clone(), value_of)
            reference = seen[key]
        else:
            reference = _slope(activation, grid.clone(), value_of)
    except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
        # A constant as large as the whole signal (a mask, a scale a position) does not fit the sample.
        return None
    if slopes is None or reference is None:
        return None
    # One row a place: the largest over axes that stand around the units is several times slower to find.
    most = slopes.abs().movedim(axis, -1).reshape(-1, drawn.shape[axis]).amax(0)
    steepest = max(reference.abs().max().item(), most.max().item())
    spread = reference.max().item() - reference.min().item()
    if not spread > _LINEAR * steepest:
        return None
    dead = (most == 0).double().mean().item()
    saturated = (most < SATURATED * steepest).double().mean().item()
    return float(dead), float(saturated), math.sqrt(power(slopes) / slopes.numel())


def _function(activation: Activation) -> Any:
    """What decides the values of an activation that reads no constant; None for others."""
    inside = {activation.root, *activation.nodes}
    if any(a not in inside for n in activation.nodes for a in n.all_input_nodes):
        return None
    place = {activation.root: 0} | {n: i + 1 for i, n in enumerate(activation.nodes)}
    calls = [(n.target, fx.node.map_arg((n.args, n.kwargs), lambda a: f"%{place[a]}")) for n in activation.nodes]
    return tuple((str(target), repr(given)) for target, given in calls)


def _slope(activation: Activation, x: Tensor, value_of: Callable[[fx.Node], Any]) -> Tensor | None:
    """phi'(x), element by element."""
    with torch.enable_grad():
        x = x.requires_grad_(True)
        # A function written in place must not write to the leaf.
        values: dict[fx.Node, Any] = {activation.root: x * 1 if any(_writes(n) for n in activation.nodes) else x}

        def load(node: fx.Node) -> Any:
            return values[node] if node in values else value_of(node)

        for node in activation.nodes:
            args = fx.node.map_arg(node.args, load)
            kwargs = fx.node.map_arg(node.kwargs, load)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        result = values[activation.exit]
        if not (isinstance(result, Tensor) and result.shape == x.shape and result.requires_grad):
            return None
        (slope,) = torch.autograd.grad(result.sum(), x)
    return slope


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def by_exit(activations: Sequence[Activation]) -> Mapping[fx.Node, Activation]:
    """The activations by the node that computes their value."""
    return {a.exit: a for a in activations}
