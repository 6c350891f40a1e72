"""From a weight's output downstream to the activations it feeds, with the path in between.

The walk passes normalization, residual additions, products with other signals, pooling, concatenation and changes of layout,
and ends at the first function that is not linear, at the next weight ("linear"), at a softmax, or at the model's output.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from torch import fx

from initaudit.graph.calls import role_of, signal_inputs, weight_uses
from initaudit.graph.graph import Graph
from initaudit.pair.activation import CATALOGUE, LINEAR, Activation, recognise
from initaudit.pair.cluster import compares, pointwise_cluster, written_normalization
from initaudit.pair.evaluate import ConstantReader
from initaudit.pair.records import Feeds

_SOFTMAX = Activation("softmax")
_REDUCED = {"mean": "pool", "amax": "max", "max": "max", "amin": "min", "min": "min"}
_NEAR = 8  # scale, mask, casts and changes of layout between a product and its softmax
_MOST_VISITS = 4000  # values on one weight's ways; a network whose every layer is concatenated into every later one stays below


@dataclass(frozen=True)
class _Step:
    """What follows directly on one value: activations found, and values to walk on from (with what was passed on the way)."""

    found: tuple[Feeds, ...]
    onward: tuple[tuple[fx.Node, str], ...]


class Walker:
    """Walks one graph; what follows on each value is worked out once."""

    def __init__(self, graph: Graph, constant: Set[fx.Node], constants: ConstantReader) -> None:
        self.graph, self.constant, self.constants = graph, constant, constants
        self._steps: dict[fx.Node, _Step] = {}

    def feeds(self, start: fx.Node) -> tuple[Feeds, ...]:
        """The activations that the value of `start` reaches, the nearest first, each kind and path once."""
        found: dict[tuple[str, tuple[str, ...]], Feeds] = {}
        queue: list[tuple[fx.Node, tuple[str, ...]]] = [(start, ())]
        seen = {start}
        for node, path in queue:
            step = self._step(node)
            for feed in step.found:
                whole = _joined(path, *feed.path)
                found.setdefault((feed.activation.name, whole), Feeds(feed.activation, whole, feed.node))
            # Behind a merge only the nearest consumers count: the residual stream itself leads to every later layer.
            consumed = bool(step.found) or any(passed not in ("add", "concat") for _, passed in step.onward)
            merged = "add" in path or "concat" in path
            for onward, passed in step.onward:
                if onward in seen or len(seen) > _MOST_VISITS or (merged and consumed and passed in ("add", "concat")):
                    continue
                seen.add(onward)
                queue.append((onward, _joined(path, passed)))
        return tuple(found.values())

    def _step(self, node: fx.Node) -> _Step:
        if node not in self._steps:
            self._steps[node] = self._look(node)
        return self._steps[node]

    def _look(self, node: fx.Node) -> _Step:
        cluster = pointwise_cluster(node, self.constant, self.constants)
        found: list[Feeds] = []
        onward: list[tuple[fx.Node, str]] = []
        norm = written_normalization(node, self.constant, self.constants)
        inside = norm.inside if norm is not None else frozenset[fx.Node]()
        if norm is not None:
            onward.append((norm.node, norm.name))
        for member in (node, *cluster.nodes):
            outside = [u for u in member.users if u not in cluster.members and u not in inside and self._carries(member, u)]
            if not outside or compares(member):
                continue
            activation = cluster.activation(member)
            if activation.name not in ("linear", "constant"):
                found.append(Feeds(activation, (), member.name))
            elif activation.name == "linear":
                for user in outside:
                    self._follow(member, user, found, onward)
        return _Step(tuple(found), tuple(onward))

    def _carries(self, node: fx.Node, user: fx.Node) -> bool:
        return user.op == "output" or node in signal_inputs(user)

    def _follow(self, node: fx.Node, user: fx.Node, found: list[Feeds], onward: list[tuple[fx.Node, str]]) -> None:
        """Where `user` takes the value of `node`."""
        if user.op == "output":
            found.append(Feeds(LINEAR, ("output",), ""))
            return
        role = role_of(user)
        if role.kind in ("contraction", "attention", "recurrent"):
            attends = role.kind == "attention" or (role.kind == "contraction" and self._attends(user))
            found.append(Feeds(LINEAR, ("attention",) if attends else (), node.name))
        elif role.kind == "softmax":
            found.append(Feeds(_SOFTMAX, (), user.name))
        elif role.kind == "normalization" or role.kind in ("pooling", "merge"):
            onward.append((user, role.name))
        elif role.kind == "reduction":
            onward.append((user, _REDUCED.get(role.name.lower().removeprefix("reduce").removeprefix("_"), "sum")))
        elif role.kind in ("passthrough", "embedding"):
            onward.append((user, ""))  # an index into a signal selects some of it
        elif role.kind == "pointwise":
            self._pointwise(node, user, found, onward)

    def _attends(self, user: fx.Node) -> bool:
        """Whether a product of two signals belongs to an attention: a softmax stands a few nodes before or behind it."""
        if weight_uses(user, self.constant) or sum(n not in self.constant for n in signal_inputs(user)) < 2:
            return False
        for backwards in (False, True):
            front = [user]
            for _ in range(_NEAR):
                near = {m for n in front for m in (n.all_input_nodes if backwards else n.users)}
                front = [m for m in near if m.op == "call_function"]
                if any(role_of(n).kind == "softmax" for n in front):
                    return True
                front = [n for n in front if role_of(n).kind in ("pointwise", "passthrough", "embedding")]
        return False

    def _pointwise(self, node: fx.Node, user: fx.Node, found: list[Feeds], onward: list[tuple[fx.Node, str]]) -> None:
        """A pointwise operator that is no scalar function of `node`: a second signal or one constant a channel comes in."""
        role = role_of(user)
        name = (role.name or getattr(user.target, "__name__", "")).lower()
        others = [i for i in user.all_input_nodes if i is not node]
        fixed = all(i in self.constant for i in others)
        if name in ("glu", "swiglu"):
            gate = recognise(CATALOGUE["sigmoid" if name == "glu" else "silu"])
            found.append(Feeds(gate, ("glu",), user.name))
            onward.append((user, "glu"))
        elif name == "prelu" and fixed:
            found.append(Feeds(self._prelu(user, others[0]), (), user.name))
        elif name in ("add", "sub", "rsub", "sum"):
            onward.append((user, "" if fixed else "add"))
        elif name in ("mul", "div", "multiply", "divide"):
            onward.append((user, "scale" if fixed else "multiply"))
        elif name in ("where", "masked_fill"):
            onward.append((user, "mask"))
        elif name in ("max", "maximum", "min", "minimum", "lerp", "addcmul", "mean"):
            onward.append((user, name))

    def _prelu(self, user: fx.Node, slopes: fx.Node) -> Activation:
        """One slope a channel: named by their mean."""
        slope = float(self.constants.value(slopes).double().mean())
        cluster = recognise(lambda z: z * (z > 0) + slope * z * (z <= 0))
        return Activation("prelu", {"negative_slope": round(slope, 6)}, cluster.scale, cluster.function)


def _joined(path: tuple[str, ...], *more: str) -> tuple[str, ...]:
    """A path with more on it; the same thing twice in a row is said once, changes of layout are not said."""
    for name in more:
        if name and (not path or path[-1] != name):
            path = (*path, name)
    return path
