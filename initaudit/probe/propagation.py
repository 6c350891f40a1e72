"""The analytic counterpart of the probe: moments pushed through the graph from the weights' own moments, without running it.

For a model that is too large to run or whose inputs are not known. Inputs count as N(0, 1), ids as uniform. Each node gets a
`Field`, or a reason why no formula holds there; what lies downstream of such a node has the same reason, up to the next
normalization by place, which makes its output's size whatever came in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.errors import InitauditError
from initaudit.graph.calls import Use, arguments, role_of, signal_inputs, weight_uses
from initaudit.graph.constness import constant_nodes
from initaudit.graph.graph import Graph, shape_of
from initaudit.pair.cluster import written_normalization
from initaudit.pair.evaluate import ConstantReader, run
from initaudit.probe import fields, mixing
from initaudit.probe.activations import Activation, find_activations
from initaudit.probe.fields import NONE, Draws, Field, draws
from initaudit.probe.mixing import MASK, NoFormula

_EPS = 1e-5
_MAP = 1 << 22  # elements
_MIXING = {
    "softmax": mixing.softmax,
    "attention": mixing.attention,
    "pooling": mixing.pooling,
    "reduction": mixing.reduction,
}
_STATISTICS = ("running_mean", "running_var", "input_mean", "input_var", "mean", "var")  # as aten and ONNX call them


@dataclass(frozen=True)
class Prediction:
    """`fields` by node name; `unknown` maps the other data nodes to the reason why no formula holds there."""

    fields: Mapping[str, Field]
    unknown: Mapping[str, str]

    @property
    def share(self) -> float:
        """The share of data nodes with a prediction."""
        total = len(self.fields) + len(self.unknown)
        return len(self.fields) / total if total else 0.0


def propagate(graph: Graph) -> Prediction:
    """Predicts the field at every data node of `graph`; nothing but constants is evaluated."""
    return Walk(graph).prediction()


def _is_softmax(node: fx.Node) -> bool:
    """A softmax, or what only moves its elements."""
    while role_of(node).kind == "passthrough" and signal_inputs(node):
        node = signal_inputs(node)[0]
    return role_of(node).kind == "softmax"


# What evaluating a piece of a stranger's graph on a grid may raise.
_FAILURES = (
    InitauditError,
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    NotImplementedError,
    AssertionError,
    MemoryError,
)


class Walk:
    """The fields found so far, in graph order."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.constant = graph, constant_nodes(graph.fx)
        self.constants = ConstantReader(graph)
        self.found: dict[fx.Node, Field] = {}
        self.lost: dict[fx.Node, str] = {}
        self.moments: dict[fx.Node, Draws] = {}
        self.roots: dict[fx.Node, fx.Node] = {}
        self.parts: dict[fx.Node, tuple[fx.Node, ...]] = {}
        for activation in find_activations(graph.fx, self.constant, inner=True):
            self._note(activation)

    def _note(self, activation: Activation) -> None:
        self.roots[activation.exit], self.parts[activation.exit] = activation.root, activation.nodes

    def prediction(self) -> Prediction:
        written = {}
        if any(role_of(n).kind == "reduction" for n in self.graph.fx.nodes if n.op == "call_function"):
            written = self._written_norms()
        for node in self.graph.fx.nodes:
            if node in self.constant or node.op in ("output", "get_attr"):
                continue
            dtype = node.meta.get("dtype")
            if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
                continue
            try:
                self.found[node] = self._written(node, *written[node]) if node in written else self._field(node)
            except NoFormula as reason:
                self.lost[node] = str(reason)
            except _FAILURES as error:
                self.lost[node] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        # Scores with a mask added hold its lowest number, which is no signal; what reads them knows about the mask.
        masked = {n.name: "a mask has been added" for n, f in self.found.items() if f.keys is not None and not _is_softmax(n)}
        known = {n.name: f for n, f in self.found.items() if n.name not in masked}
        return Prediction(known, {**{n.name: r for n, r in self.lost.items()}, **masked})

    def _written_norms(self) -> dict[fx.Node, tuple[fx.Node, str]]:
        found = {}
        for node in self.graph.fx.nodes:
            if node not in self.constant and len(node.users) > 1 and node.op != "get_attr":
                norm = written_normalization(node, self.constant, self.constants)
                if norm is not None:
                    found[norm.node] = (node, norm.name)
        return found

    def of(self, node: Any) -> Field:
        """The field of a signal or of a constant that is added to one; raises NoFormula where there is none."""
        if isinstance(node, fx.Node) and node in self.found:
            return self.found[node]
        if isinstance(node, fx.Node) and node in self.constant:
            d = self._draws(node)
            return Field(d.mean, d.moment2, d.moment2, d.mean**2)
        name = node.name if isinstance(node, fx.Node) else str(node)
        reason = self.lost.get(node) if isinstance(node, fx.Node) else None
        raise NoFormula(reason if reason is not None and reason.startswith("downstream") else f"downstream of {name}")

    def _draws(self, node: fx.Node) -> Draws:
        if node not in self.moments:
            value = self.constants.value(node)
            if not isinstance(value, Tensor) or not value.is_floating_point():
                raise NoFormula(f"{node.name} is no tensor of numbers")
            self.moments[node] = draws(value)
        return self.moments[node]

    def _written(self, node: fx.Node, source: fx.Node, name: str) -> Field:
        return fields.per_place_norm(self.of(source), 0.0, centred=name == "layer_norm")

    def _field(self, node: fx.Node) -> Field:
        if node.op == "placeholder":
            return Field(0.0, 1.0, 0.0, 0.0)
        kind = role_of(node).kind
        if node in self.roots and kind == "pointwise":
            return self._activation(node)
        if kind in _MIXING:
            return _MIXING[kind](self, node)
        own = {
            "pointwise": self._pointwise,
            "passthrough": self._passthrough,
            "merge": self._merge,
            "contraction": self._contraction,
            "normalization": self._normalization,
            "embedding": self._embedding,
        }
        if kind not in own:
            raise NoFormula(f"no formula for {role_of(node).name or kind}")
        return own[kind](node)

    def single(self, node: fx.Node) -> fx.Node:
        """The one signal that `node` reads; raises NoFormula for several."""
        sources = [n for n in dict.fromkeys(signal_inputs(node)) if n not in self.constant]
        if len(sources) != 1:
            raise NoFormula(f"{role_of(node).name} of {len(sources)} signals has no formula")
        return sources[0]

    def _activation(self, node: fx.Node) -> Field:
        root, nodes = self.roots[node], self.parts[node]
        field = self.of(root)
        wide = [a for n in nodes for a in n.all_input_nodes if a in self.constant and (self.constants.size(a) or 0) > 1]
        if wide:
            return self._with_constant(node)

        def phi(z: Tensor) -> Tensor:
            return run(nodes, root, z, self.constants)[node]  # type: ignore[no-any-return]

        found = fields.pointwise(field, phi)
        if found is None:
            raise NoFormula(f"{role_of(node).name} is not finite over the law of its input")
        return replace(found, keys=field.keys)

    def _pointwise(self, node: fx.Node) -> Field:
        sources = [n for n in signal_inputs(node) if n not in self.constant]
        name = role_of(node).name.lower()
        if len(sources) == 2 and sources[0] is not sources[1]:
            a, b = self.of(sources[0]), self.of(sources[1])
            if name in ("add", "sum"):
                return fields.plus(a, b)
            if name in ("sub", "subtract"):
                return fields.plus(a, b, -1.0)
            if name in ("mul", "multiply"):
                return fields.times(a, b)
        raise NoFormula(f"no formula for {name} of {len(sources)} signals")

    def _with_constant(self, node: fx.Node) -> Field:
        """A sum, difference or product with a tensor of constants."""
        name = role_of(node).name.lower()
        operands = [a for a in node.all_input_nodes if a not in self.constant]
        others = [a for a in node.all_input_nodes if a in self.constant]
        if len(operands) != 1 or len(others) != 1 or name not in ("add", "sub", "mul", "multiply", "subtract", "div"):
            raise NoFormula(f"no formula for {name} with a tensor of constants")
        x, other = self.of(operands[0]), others[0]
        value = self.constants.value(other)
        if name in ("mul", "multiply", "div"):
            d = self._draws(other) if name != "div" else draws(1 / value.double())
            return x.scaled(d.mean, d.moment2)
        if float(value.double().min()) < MASK:
            # A mask: it opens as many entries a row as are not lowered.
            opened = (value > MASK).double().sum(-1).clamp_min(1)
            return replace(x, keys=float((1 / opened).mean()))
        return fields.plus(x, self._constant_field(value, node), 1.0 if name == "add" else -1.0)

    def _constant_field(self, value: Tensor, node: fx.Node) -> Field:
        """What a constant adds: the same to all examples; to all positions too where it varies along units alone."""
        d = draws(value)
        unit = self.unit_axis(node)
        shape = shape_of(node) or ()
        axes = [i + len(shape) - value.dim() for i, n in enumerate(value.shape) if n > 1]
        along = d.moment2 if all(a == unit for a in axes) else d.mean**2
        return Field(d.mean, d.moment2, d.moment2, along)

    def unit_axis(self, node: fx.Node) -> int:
        """Images carry their units on axis 1, everything else on the last one."""
        shape = shape_of(node) or ()
        return 1 if len(shape) in (4, 5) else len(shape) - 1

    def _passthrough(self, node: fx.Node) -> Field:
        sources = [n for n in signal_inputs(node) if n not in self.constant]
        if not sources:
            raise NoFormula("nothing but constants")
        x, name = self.of(sources[0]), role_of(node).name.lower()
        before, after = shape_of(sources[0]), shape_of(node)
        if "pad" in name and before and after and math.prod(after):
            kept = math.prod(before) / math.prod(after)
            return replace(x.scaled(kept, kept), approximate=True)
        if "resize" in name or "upsample" in name or "interpolat" in name:
            return replace(x, approximate=True)
        return x

    def _merge(self, node: fx.Node) -> Field:
        if role_of(node).name != "concat" and role_of(node).name:
            raise NoFormula(f"no formula for {role_of(node).name}")
        sources = signal_inputs(node)
        parts = [(self.of(s), math.prod(shape_of(s) or (1,))) for s in sources]
        total = sum(size for _, size in parts)
        if not total:
            raise NoFormula("nothing is joined")

        def mixed(name: str) -> float:
            return sum(float(getattr(f, name)) * size for f, size in parts) / total

        return Field(mixed("mean"), mixed("moment2"), mixed("across"), mixed("along"), any(f.approximate for f, _ in parts))

    def _contraction(self, node: fx.Node) -> Field:
        uses = weight_uses(node, self.constant)
        if len(uses) != 1:
            return mixing.product(self, node)
        use = uses[0]
        source = next(n for n in signal_inputs(node) if n is not use.weight)
        shape = self._shape(use.weight)
        if len(use.use.axes) != len(shape) or "n" in use.use.axes:
            raise NoFormula("a weight of another layout")
        bias = arguments(node).get(use.use.bias) if use.use.bias is not None else None
        offset = self._draws(bias) if isinstance(bias, fx.Node) else NONE
        fan_in = use.use.fans(shape)[0] * use.use.overlap
        share = self._share(node, source, use, shape)
        return fields.contraction(self.of(source), fan_in, self._draws(use.weight), offset, share)

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        known = shape_of(node)
        return known if known is not None else tuple(self.constants.value(node).shape)

    def _share(self, node: fx.Node, source: fx.Node, use: Use, shape: tuple[int, ...]) -> float:
        """The share of a convolution's taps that fall inside the signal: the operator itself is run on ones, a unit a group."""
        before = shape_of(source)
        if "k" not in use.use.axes or use.use.axes[0] != "o" or before is None or len(before) != len(shape):
            return 1.0
        groups, taps = use.use.groups, shape[2:]
        if groups * math.prod(before[2:]) > _MAP:
            return 1.0  # the border of so large a map is a small part of it
        values: dict[fx.Node, Any] = {
            source: torch.ones(1, groups, *before[2:]),
            use.weight: torch.ones(groups, 1, *taps) / math.prod(taps),
        }
        for other in node.all_input_nodes:
            if other not in values:
                value = self.constants.value(other)
                bias = isinstance(value, Tensor) and value.is_floating_point()
                values[other] = torch.zeros(groups) if bias else value
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        with torch.no_grad():
            return float(node.target(*args, **kwargs).mean())  # type: ignore[operator]

    def _normalization(self, node: fx.Node) -> Field:
        name, bound = role_of(node).name, arguments(node)
        eps = next((float(bound[k]) for k in ("eps", "epsilon") if isinstance(bound.get(k), (int, float))), _EPS)
        weight, bias = (self._parameter(bound, keys) for keys in (("weight", "scale", "gamma"), ("bias", "b", "beta")))
        if name in ("layer_norm", "rms_norm"):
            x = self._place(node, eps, centred=name == "layer_norm")
        elif name == "batch_norm":
            x = self._batch_norm(node, bound, eps)
        elif name in ("group_norm", "instance_norm"):
            source = self.single(node)
            shape = shape_of(source) or ()
            groups = bound.get("num_groups")
            units = shape[1] / groups if isinstance(groups, int) and len(shape) > 1 else 1.0
            x = fields.group_norm(self.of(source), eps, units if name == "group_norm" else 1.0)
        else:
            raise NoFormula(f"no formula for {name}")
        return fields.affine(x, weight, bias)

    def _place(self, node: fx.Node, eps: float, *, centred: bool) -> Field:
        source = self.single(node)
        if source not in self.found:
            # Whatever came in leaves with unit variance; how alike examples are is not known.
            return Field(0.0, 1.0, 0.0, 0.0, True)
        return fields.per_place_norm(self.of(source), eps, centred=centred)

    def _batch_norm(self, node: fx.Node, bound: Mapping[str, Any], eps: float) -> Field:
        x = self.of(self.single(node))
        held = [n for k in _STATISTICS if isinstance(n := bound.get(k), fx.Node)]
        flags = [bound.get(k) for k in ("training", "use_input_stats", "training_mode") if k in bound]
        if any(flags) or len(held) != 2:
            return fields.per_unit_norm(x, eps)
        mean, variance = (self.constants.value(h).double() for h in held)
        scale = draws((variance + eps).rsqrt())
        shift = draws(-mean * (variance + eps).rsqrt())
        # Weights and statistics of a trained norm belong together, which independent draws do not know.
        return replace(fields.affine(x, scale, shift), approximate=True)

    def _parameter(self, bound: Mapping[str, Any], names: tuple[str, ...]) -> Draws | None:
        node = next((bound[k] for k in names if isinstance(bound.get(k), fx.Node)), None)
        return self._draws(node) if node is not None else None

    def _embedding(self, node: fx.Node) -> Field:
        uses = weight_uses(node, self.constant)
        if len(uses) != 1:
            raise NoFormula("an embedding without a table")
        table, rows = self._draws(uses[0].weight), self._shape(uses[0].weight)[0]
        index = [n for n in node.all_input_nodes if n is not uses[0].weight]
        same = table.moment2 / rows + table.mean**2 * (1 - 1 / rows)
        if index and all(n in self.constant for n in index):
            value = self.constants.value(index[0])
            picked = self.constants.value(uses[0].weight)[value.reshape(-1)[:65536]]
            d = draws(picked)
            one = bool((value == value.reshape(-1)[0]).all())
            return Field(d.mean, d.moment2, d.moment2, d.moment2 if one else d.mean**2)
        return Field(table.mean, table.moment2, same, same)
