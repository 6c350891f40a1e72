"""A graph without control flow, for reading only: every body of an If, Loop or Scan written out where it is called.

Both branches of an If are written, a Loop and a Scan make two trips, so that what one trip leaves to the next is seen. The
result has the shapes of the original but not its values: it serves to follow weights to what they feed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch
from torch import fx

from initaudit.graph.execute import specialise
from initaudit.graph.graph import Constant, Graph
from initaudit.graph.onnx_bodies import ControlCall
from initaudit.graph.onnx_build import Builder, Names
from initaudit.graph.steps import either, entry, getitem, stacked
from initaudit.location import Location
from initaudit.onnx_ops import registry

_DEEPEST = 3  # loops in one another that are written twice; deeper ones are written once


@dataclasses.dataclass(frozen=True)
class Inlined:
    """The graph written out. `origin` gives the node of the original graph for the name of each of its nodes."""

    graph: Graph
    origin: Mapping[str, fx.Node]
    repeated: frozenset[str]


def has_bodies(graph: Graph) -> bool:
    """Whether some call of the graph runs a body of its own."""
    return any(isinstance(node.target, ControlCall) for node in graph.fx.nodes)


def inlined(graph: Graph) -> Inlined:
    """`graph` with its bodies written out; `repeated` names the nodes of second trips."""
    writer = _Writer(graph)
    for node in graph.fx.nodes:
        writer.copy(node)
    flat = dataclasses.replace(graph, fx=writer.out, constants={**graph.constants, **writer.constants})
    if graph.examples is not None:
        flat = dataclasses.replace(specialise(flat, graph.examples), notes=graph.notes)
    return Inlined(flat, writer.origin, frozenset(n.name for n in writer.out.nodes if n.meta.get("repeated")))


class _Writer(Builder):
    """Copies a graph node by node; a call to If, Loop or Scan becomes its bodies."""

    def __init__(self, graph: Graph) -> None:
        calls = [n.target for n in graph.fx.nodes if isinstance(n.target, ControlCall)]
        super().__init__(calls[0].scope.functions if calls else {}, calls[0].arrays if calls else {})
        self.constants = dict(graph.constants)
        self.made: dict[fx.Node, Any] = {}
        self.origin: dict[str, fx.Node] = {}
        self.depth = 0

    def copy(self, node: fx.Node) -> None:
        """Adds a node of the original."""
        before = len(self.out.nodes)
        if isinstance(node.target, ControlCall) and not node.meta.get("tainted"):
            self.made[node] = self._call(node.target, [self.made[a] if isinstance(a, fx.Node) else a for a in node.args])
        elif node.target is getitem and isinstance(self.made[node.args[0]], tuple):  # type: ignore[index]
            self.made[node] = self.made[node.args[0]][node.args[1]]  # type: ignore[index]
        else:
            self.made[node] = self.out.node_copy(node, lambda n: self.made[n])
            self.is_fixed(self.made[node])
        for new in list(self.out.nodes)[before:]:
            self.origin[new.name] = node

    def _call(self, call: ControlCall, values: Sequence[Any]) -> Any:
        given, captured = list(values[: call.inputs]), dict(zip(call.names, values[call.inputs :], strict=True))
        names = Names({"": None, **captured}, call.scope.opsets, depth=call.scope.depth)
        results = self._written(call.operator.name, call, given, call.keywords, call.bodies, names)
        return tuple(results) if len(results) > 1 else results[0]

    def control(
        self,
        known: registry.Operator,
        node: onnx.NodeProto,
        given: list[Any],
        keywords: Mapping[str, Any],
        bodies: Mapping[str, onnx.GraphProto],
        names: Names,
        location: Location,
    ) -> None:
        """A body inside a body."""
        captured = ControlCall(known, node, self.run_scope(names), len(given), (), keywords, bodies, self.arrays)
        results = self._written(known.name, captured, given, keywords, bodies, names)
        names.values.update(zip(node.output, results, strict=False))

    def _written(
        self,
        kind: str,
        call: ControlCall,
        given: list[Any],
        keywords: Mapping[str, Any],
        bodies: Mapping[str, onnx.GraphProto],
        names: Names,
    ) -> list[Any]:
        if kind == "If":
            first, second = (self.branch(bodies[b], names, {}) for b in ("then_branch", "else_branch"))
            return [self.out.call_function(either, pair) for pair in zip(first, second, strict=True)]
        if kind == "Loop":
            return self._loop(bodies["body"], given[2:], names)
        return self._scan(bodies["body"], given, keywords, names)

    def _trips(self) -> int:
        return 2 if self.depth <= _DEEPEST else 1

    def _trip(self, body: onnx.GraphProto, names: Names, formal: Sequence[Any], trip: int) -> list[Any]:
        before = len(self.out.nodes)
        self.depth += 1
        results = self.branch(body, names, dict(zip((i.name for i in body.input), formal, strict=False)))
        self.depth -= 1
        if trip:
            for node in list(self.out.nodes)[before:]:
                node.meta["repeated"] = True
        return results

    def _loop(self, body: onnx.GraphProto, state: list[Any], names: Names) -> list[Any]:
        scans: list[list[Any]] = []
        for trip in range(self._trips()):
            start = [self._number(torch.tensor(trip)), self._number(torch.tensor(True))]
            _, *results = self._trip(body, names, [*start, *state], trip)
            count = len(state)
            state = results[:count]
            scans.append(results[count:])
        return [*state, *self._stacks(scans, {})]

    def _scan(self, body: onnx.GraphProto, given: list[Any], keywords: Mapping[str, Any], names: Names) -> list[Any]:
        count = int(keywords["num_scan_inputs"])
        batched = names.opsets.get("", registry.NEWEST_OPSET) < 9  # opset 8: lengths first, a batch axis before everything
        values = given[1:] if batched else given
        state, scanned = values[: len(values) - count], values[len(values) - count :]
        axes = list(keywords.get("scan_input_axes") or [0] * count)
        backwards = list(keywords.get("scan_input_directions") or [0] * count)
        if batched:
            state = [self.out.call_function(entry, (s, 0, 0)) for s in state]
            scanned = [self.out.call_function(entry, (s, 0, 0)) for s in scanned]
        scans: list[list[Any]] = []
        for trip in range(self._trips()):
            places = [-1 - trip if back else trip for back in backwards]
            parts = [self.out.call_function(entry, (v, a, p)) for v, a, p in zip(scanned, axes, places, strict=True)]
            results = self._trip(body, names, [*state, *parts], trip)
            state, rest = results[: len(state)], results[len(state) :]
            scans.append(rest)
        return [*state, *self._stacks(scans, dict(enumerate(keywords.get("scan_output_axes") or ())))]

    def _stacks(self, scans: list[list[Any]], axes: Mapping[int, int]) -> list[Any]:
        return [self.out.call_function(stacked, (axes.get(i, 0), *parts)) for i, parts in enumerate(zip(*scans, strict=True))]

    def _number(self, value: torch.Tensor) -> fx.Node:
        key = f"trip {value.item()}"
        self.constants[key] = Constant(key, "literal", (), value.dtype, value.clone, trainable=False)
        node = self.out.create_node("get_attr", key)
        node.meta.update(shape=(), dtype=value.dtype)
        return node
