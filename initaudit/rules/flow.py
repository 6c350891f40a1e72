"""How much signal and gradient each part of a network is left with, as the probe measured it, told apart from what is meant.

Zero gates and LayerScale change the size of a signal on purpose, averaging over positions does so by necessity, and a
normalization takes away what came before it. What counts as loss here is what linear operators and activations make of a
signal: between two nodes the measured change of its second moment, along whichever way keeps most of it. Growth is measured
as it is, because nothing is meant to grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from initaudit.graph.graph import Graph
    from initaudit.probe.trace import Signal, Trace

# Shares of a second moment below this are float32 rounding of numbers that are equal: (2**-24)² times some summands.
ROUNDING = 1e-13
_PRODUCTS = ("mul", "multiply", "div", "true_divide")
_SUMS = ("add", "add_", "sum", "sub")
# A branch that adds less than this share to the power of its stream is closed: what it will do begins with its last layer.
_CLOSED = 1e-2
_FAR = 64  # nodes between the last linear operator and the output at most


@dataclass(frozen=True)
class Flow:
    """By node name; ratios of second moments that begin at 1.

    `size` is what is left of the signal's second moment since the input or the last normalization, `contrast` of the share of
    it that differs between examples, `gradient` of the squared norm of the gradient since the layer before the output (of a
    branch: since the stream that it leaves). `growth` and `gradient_growth` are the same as measured, gates and sums included.
    `last` names what the output's layers read, or the outputs themselves where no layer makes them.
    """

    size: Mapping[str, float]
    contrast: Mapping[str, float]
    gradient: Mapping[str, float]
    growth: Mapping[str, float]
    gradient_growth: Mapping[str, float]
    last: tuple[str, ...]


def flow_of(graph: Graph, trace: Trace) -> Flow:
    """Follows signal and gradient through the data nodes that the probe measured."""
    return _Follow(graph, trace).flow()


class _Follow:
    def __init__(self, graph: Graph, trace: Trace) -> None:
        self.graph, self.trace, self.signals = graph, trace, trace.signals
        from initaudit.graph.constness import constant_nodes

        self.constant = constant_nodes(graph.fx)
        self.written: dict[fx.Node, fx.Node] = {}
        self.inside: set[fx.Node] = set()
        self._written_norms()
        self.nodes = [n for n in graph.fx.nodes if n.name in self.signals and n not in self.inside]
        self.sources = {n: self._sources(n) for n in self.nodes}
        self.users: dict[fx.Node, list[fx.Node]] = {n: [] for n in self.nodes}
        for node, sources in self.sources.items():
            for source in sources:
                self.users[source].append(node)
        self.heads, self.ends = self._heads()

    def flow(self) -> Flow:
        size, contrast, growth = self._forward()
        last = tuple(dict.fromkeys(n.name for n in self.ends))
        return Flow(size, contrast, self._backward(), growth, self._gradient_growth(), last)

    def _written_norms(self) -> None:
        """Normalizations that are spelled out in primitive operators count as one node, their last."""
        from initaudit.graph.calls import role_of
        from initaudit.pair.cluster import written_normalization
        from initaudit.pair.evaluate import ConstantReader

        reductions = any(role_of(n).kind == "reduction" for n in self.graph.fx.nodes if n.op == "call_function")
        if not reductions:
            return
        reader = ConstantReader(self.graph)
        for node in self.graph.fx.nodes:
            if node.name in self.signals and node not in self.inside and len(node.users) > 1:
                norm = written_normalization(node, self.constant, reader)
                if norm is not None:
                    self.written[norm.node] = node
                    self.inside |= norm.inside - {norm.node, node}

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        from initaudit.graph.calls import signal_inputs

        if node in self.written:
            return [self.written[node]]
        if node.op != "call_function":
            return []
        found = (n for n in signal_inputs(node) if n.name in self.signals and n not in self.inside and n is not node)
        return list(dict.fromkeys(found))

    def _step(self, node: fx.Node) -> str:
        """ "computes" where weights or an activation decide what becomes of the signal, "normalizes", or "passes"."""
        from initaudit.graph.calls import role_of
        from initaudit.graph.constness import completed

        kind = role_of(node).kind
        sources = self.sources[node]
        if kind == "normalization" or node in self.written:
            return "normalizes"
        if len(sources) != 1:
            return "passes"  # sums keep what any part has, products are gates, attention averages
        if kind in ("contraction", "recurrent") or role_of(node).name == "dropped":
            return "computes"
        if kind == "pointwise" and completed(sources[0], self.constant) is node:
            return "computes"  # the bias of the layer before it
        # A pointwise operator with a parameter is a gate, a LayerScale or a position table; a number written into the graph is
        # part of the activation.
        others = [a for a in node.all_input_nodes if a is not sources[0]]
        return "computes" if kind == "pointwise" and all(self._number(a) for a in others) else "passes"

    def _enlarged(self, node: fx.Node) -> bool:
        """Whether one number multiplies the signal, a parameter for all that a file tells: what it makes larger is not lost.

        A network of sines is drawn for the 30 in front of them (Sitzmann et al. 2020); a gate is there to make smaller.
        """
        from initaudit.graph.calls import role_of
        from initaudit.graph.graph import shape_of

        name = (role_of(node).name or getattr(node.target, "__name__", "")).lower()
        if role_of(node).kind != "pointwise" or name not in _PRODUCTS or len(self.sources[node]) != 1:
            return False
        shapes = [shape_of(a) for a in node.all_input_nodes if a is not self.sources[node][0]]
        return all(shape is not None and math.prod(shape) == 1 for shape in shapes)

    def _number(self, node: fx.Node) -> bool:
        constant = self.graph.constants.get(str(node.target)) if node.op == "get_attr" else None
        return constant is not None and constant.kind == "literal" and math.prod(constant.shape) == 1

    def _forward(self) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
        size: dict[str, float] = {}
        contrast: dict[str, float] = {}
        growth: dict[str, float] = {}
        base: dict[str, float | None] = {}
        spread: dict[str, float | None] = {}
        varied = self._varied()
        for node in self.nodes:
            sources, here = self.sources[node], self.signals[node.name]
            spread[node.name] = here.spread
            if not sources:
                size[node.name] = growth[node.name] = 1.0
                contrast[node.name] = 1.0 if node in varied else 0.0
                base[node.name] = here.moment2
                continue
            step = self._step(node)
            source = max(sources, key=lambda n: size[n.name] * contrast[n.name])
            size[node.name], contrast[node.name] = max(size[s.name] for s in sources), max(contrast[s.name] for s in sources)
            base[node.name] = base[source.name]
            before = self.signals[source.name]
            if here.spread is None:
                spread[node.name] = spread[source.name]  # what moves elements is not measured, and changes nothing
            if step == "computes" and here.moment2 == 0:
                contrast[node.name] = 0.0
            elif step != "passes":
                contrast[node.name] = contrast[source.name] * min(1.0, _ratio(here.spread, spread[source.name]))
            # What is seen to differ here was not lost on the way: a norm over the batch takes what examples share away again.
            contrast[node.name] = max(contrast[node.name], here.spread or 0.0)
            if step == "normalizes":
                size[node.name], base[node.name] = 1.0, here.moment2
            elif step == "computes":
                size[node.name] = size[source.name] * _ratio(here.moment2, before.moment2)
            elif self._enlarged(node):
                size[node.name] *= max(1.0, _ratio(here.moment2, before.moment2))
            # A mask of the lowest float is no growth: only what an operator computes from data is looked at.
            growth[node.name] = _ratio(here.moment2, _at_least_one(base[node.name]))
        return size, contrast, growth

    def _varied(self) -> set[fx.Node]:
        """The nodes that inputs or chance have a part in: a class token and a table of positions are the same for all."""
        from initaudit.graph.constness import is_random

        found: set[fx.Node] = set()
        for node in self.graph.fx.nodes:
            if node.op == "placeholder" or is_random(node) or any(a in found for a in node.all_input_nodes):
                found.add(node)
        return found

    def _backward(self) -> dict[str, float]:
        left = self._along_the_best_way()
        measured = self._gradient_growth()
        for node in self.nodes:
            # What arrives has not vanished, whatever the steps seem to keep: a layer's growth and the norm behind it undo each
            # other, and where a value has several readers the growth is not counted.
            left[node.name] = max(left[node.name], measured.get(node.name, 0.0))
            # A branch beside a skip gets what its weights let through; nothing is lost while the stream keeps its gradient.
            left[node.name] = max(left[node.name], *(left[s.name] for s in self.sources[node]), 0.0)
        return left

    def _along_the_best_way(self) -> dict[str, float]:
        from initaudit.graph.calls import role_of

        left: dict[str, float] = {}
        for node in reversed(self.nodes):
            best = 1.0 if node in self.ends else None
            users = [u for u in self.users[node] if u.name in left]
            for user in users:
                kept = 1.0
                if user.name not in self.heads and self._step(user) != "passes":
                    kept = _ratio(_norm2(self.signals[node.name]), _norm2(self.signals[user.name]))
                    if len(users) > 1:
                        kept = min(1.0, kept)  # what the other users send back is not this one's doing
                if len(users) > 1:
                    kept = self._beside_others(node, user, kept)
                if kept < 1 and self._closes(user):
                    kept = 1.0
                if role_of(user).name == "dropped":
                    kept = 0.0
                value = left[user.name] * kept
                best = value if best is None else max(best, value)
            left[node.name] = 1.0 if best is None else best
        return left

    def _closes(self, layer: fx.Node) -> bool:
        """Whether this is the last layer of a branch that adds next to nothing to its stream.

        So drawn on purpose (EGNN's coordinates, gain 0.001), as others draw it zero: the layer itself gets the whole gradient
        of the stream, one step of Adam is as large as its weights are, and what stands before it learns from then on.
        """
        from initaudit.graph.calls import role_of

        node = layer
        for _ in range(_FAR if role_of(layer).kind == "contraction" else 0):
            user = next(iter(node.users), None)
            if user is None or len(node.users) != 1:
                return False
            role = role_of(user)
            name = (role.name or getattr(user.target, "__name__", "")).lower()
            if name in _SUMS and len(self.sources.get(user, ())) > 1:
                stream = [self.signals[s.name].moment2 for s in self.sources[user] if s is not node]
                here = self.signals[node.name].moment2 if node.name in self.signals else None
                return here is not None and any(m is not None and here < _CLOSED * m for m in stream)
            if role.kind not in ("pointwise", "passthrough", "merge", "reduction"):
                return False
            node = user
        return False

    def _beside_others(self, node: fx.Node, user: fx.Node, kept: float) -> float:
        """What a node gets back beside one of its users that is a sum or a factor: the measured whole.

        A sum sends all of its gradient back and a factor its square; whatever the node gets beyond is the other users' doing,
        and belongs to the stream, whose gradient a norm behind the sum has divided by the size of all that was summed.
        """
        from initaudit.graph.calls import role_of

        role, here, there = role_of(user), self.signals[node.name], self.signals[user.name]
        if role.kind != "pointwise" or here.shape != there.shape or user in self.written:
            return kept
        name = (role.name or getattr(user.target, "__name__", "")).lower()
        others = [a for a in user.all_input_nodes if a is not node]
        factor = name in _PRODUCTS and all(self._number(a) for a in others)
        if factor or (name in _SUMS and len(self.sources[user]) > 1):
            return max(kept, _ratio(_norm2(here), _norm2(there)))
        return kept

    def _gradient_growth(self) -> dict[str, float]:
        at_end = [g for n in self.ends if (g := _norm2(self.signals[n.name])) is not None and g > 0]
        if not at_end:
            return {}
        return {n.name: g / max(at_end) for n in self.nodes if (g := _norm2(self.signals[n.name])) is not None}

    def _heads(self) -> tuple[frozenset[str], list[fx.Node]]:
        """The last linear operator before each output, found upwards through what has one source, and what these read.

        An output that a sum or a normalization makes has no such operator: it is an end itself. What makes one number of a
        whole batch is a loss, whose terms are no signal: there it is the last operators before any of them.
        """
        from initaudit.graph.calls import role_of

        by_name = {n.name: n for n in self.nodes}
        heads: set[str] = set()
        ends: dict[fx.Node, None] = {}
        for name in self.trace.outputs:
            output = node = by_name.get(name)
            if output is not None and self._is_loss(output) and (terms := self._before_loss(output)):
                for above in terms:
                    norm = role_of(above).kind == "normalization"
                    heads.update(() if norm else (above.name,))
                    ends.update(dict.fromkeys([above] if norm else self.sources[above]))
                continue
            for _ in range(_FAR):
                if node is None or role_of(node).kind in ("contraction", "recurrent", "normalization"):
                    break
                sources = self.sources[node]
                node = sources[0] if len(sources) == 1 else None
            if node is not None and role_of(node).kind != "normalization" and self.sources[node]:
                heads.add(node.name)
                ends.update(dict.fromkeys(self.sources[node]))
            elif output is not None:
                ends[output] = None
        return frozenset(heads), list(ends)

    def _is_loss(self, output: fx.Node) -> bool:
        """Whether a batch of several examples has become one number."""
        given = [shape for n in self.nodes if n.op == "placeholder" and (shape := self.signals[n.name].shape)]
        return math.prod(self.signals[output.name].shape) == 1 and any(shape[0] > 1 for shape in given)

    def _before_loss(self, output: fx.Node) -> list[fx.Node]:
        from initaudit.graph.calls import role_of

        found: list[fx.Node] = []
        waiting, seen = [output], {output}
        while waiting:
            node = waiting.pop()
            if role_of(node).kind in ("contraction", "recurrent", "normalization") and self.sources[node]:
                found.append(node)
                continue
            waiting += [s for s in self.sources[node] if s not in seen]
            seen.update(self.sources[node])
        return found


def _norm2(signal: Signal) -> float | None:
    return None if signal.gradient_moment2 is None else signal.gradient_moment2 * math.prod(signal.shape)


def _at_least_one(value: float | None) -> float:
    return 1.0 if value is None else max(1.0, value)


def _ratio(here: float | None, before: float | None) -> float:
    """After / before; 1 where either was not measured or there was nothing before: what is already lost is not lost again."""
    if here is None or before is None or before <= 0:
        return 1.0
    return here / before
