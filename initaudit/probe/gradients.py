"""The Gram matrix of per-example gradients, without a backward pass per example.

Per-example gradients decide what one step can tell apart: where all point the same way, every example asks for the same change
and the network learns an average and nothing else (Xiao et al. 2020, section 3, in the language of the neural tangent kernel).

One backward pass with the same cotangent for every example gives d, the gradient at the output of each place where a weight is
used. With a weight W whose rows are units, example i's gradient is G_i[o] = sum over positions of d_i[o] a_i, and for a random
R of W's shape <G_i[o], R[o]> = sum over positions of d_i[o] (R a_i)[o]: running the operator once more with R for W yields one
random projection of every unit's gradient. Projections with independent N(0, 1) directions preserve inner products in
expectation, and exactly where gradients are equal or zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import arguments, role_of
from initaudit.graph.graph import location_of
from initaudit.meter import Meter, Say, silent
from initaudit.probe.axes import Axes, first_tensor, main_of
from initaudit.probe.backward import pushed_by_reverse, through_signals
from initaudit.probe.passes import Observer, Pass, cotangents
from initaudit.probe.statistics import by_example
from initaudit.probe.trace import GramRecord, Kernel

# Kinds whose value is linear in all of their trainable constants together.
_LINEAR = ("contraction", "embedding", "normalization")
_EXAMPLES = 64
# So many projections at least are taken of a weight's gradient (a squared norm errs by sqrt(2 / projections)), by running a
# layer of few units several times. A recurrent layer's units share its weights: all of it is one projection.
_PROJECTIONS, _RUNS = 64, 16
# Of a linear layer with more units than this, so many stand for all: their share of a squared norm errs by sqrt(2 / 256) = 9 %.
_UNITS = 256
# Normal numbers drawn once; each weight's direction is a stretch of them that begins elsewhere.
_POOL = 1 << 21


class GradientSketch(Observer):
    """Keeps what is needed to run each weight's consumer again, and sketches the gradients when the pass with the shared
    cotangent reaches it. `parts` maps a consumer to its (examples, projections) sketch."""

    def __init__(self, seed: int) -> None:
        self.held: dict[fx.Node, dict[fx.Node, Any]] = {}
        self.parts: dict[fx.Node, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.pool = torch.empty(0)
        self.meter: Meter | None = None  # there while sketches are taken

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        """Holds the arguments of a consumer of trainable weights until the gradient comes back to it."""
        trained = any((node, a) in run.leaves for a in node.all_input_nodes)
        known = run.axes[node].batch is not None
        if trained and known and role_of(node).kind in (*_LINEAR, "recurrent", "pointwise") and not _writes(node):
            held = {a: run.env[a] for a in node.all_input_nodes if a not in run.constant}
            self.held[node] = {a: v.detach() if isinstance(v, Tensor) else v for a, v in held.items()}

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        """Where a weight is used."""
        return node in self.held

    def gradient(self, run: Pass, node: fx.Node, gradient: Tensor) -> None:
        """Sketches the gradients of the weights that `node` uses."""
        if self.meter is None or node not in self.held:
            return
        self.meter(location_of(node).site or node.name)
        axes, kind = run.axes[node], role_of(node).kind
        apart = kind != "recurrent" and axes.unit is not None
        units = gradient.shape[axes.unit] if apart and axes.unit is not None else 1
        runs, held = min(_RUNS, -(-_PROJECTIONS // units)), self.held.pop(node)
        with torch.no_grad():
            some = self._some_units(run, node, held, axes, units) if apart else None
            if some is not None and axes.unit is not None:
                moved, picked = some
                rows = _by_unit(gradient.index_select(axes.unit, picked) * moved, axes)
                part = rows * math.sqrt(units / picked.numel())
            else:
                sketches = []
                for _ in range(runs):
                    again = self._moved(run, node, held)
                    if again is None or again.shape != gradient.shape:
                        return
                    sketches.append(_by_unit(gradient * again, axes if apart else replace(axes, unit=None)) / math.sqrt(runs))
                part = torch.cat(sketches, 1)
        if bool(torch.isfinite(part).all()):
            self.parts[node] = part

    def _some_units(
        self, run: Pass, node: fx.Node, held: Mapping[fx.Node, Any], axes: Axes, units: int
    ) -> tuple[Tensor, Tensor] | None:
        """The change of some units for a random change of their weights, and which; None where all have to be run.

        The units are picked at random among equal stretches of all of them, so that packed projections are all seen.
        """
        uses, leaves = run.uses[node], [a for a in node.all_input_nodes if (node, a) in run.leaves]
        if units < 2 * _UNITS or len(uses) != 1:
            return None
        use, weight = uses[0].use, uses[0].weight
        bias = arguments(node).get(use.bias) if use.bias is not None else None
        plain = use.groups == 1 and not use.gates and use.axes.count("o") == 1 and "v" not in use.axes and "n" not in use.axes
        if not plain or any(a not in (weight, bias) for a in leaves) or (node, weight) not in run.leaves:
            return None
        along = use.axes.index("o")
        if run.leaves[node, weight].shape[along] != units:
            return None
        step = units // _UNITS
        picked = torch.arange(_UNITS) * step + torch.randint(step, (_UNITS,), generator=self.generator)
        shape = list(run.leaves[node, weight].shape)
        shape[along] = _UNITS
        values: dict[fx.Node, Any] = {**held, weight: self._draw(torch.Size(shape), run.leaves[node, weight].device)}
        if isinstance(bias, fx.Node):
            trained = (node, bias) in run.leaves
            value = run.weights.get(bias)
            if not isinstance(value, Tensor) or value.shape != (units,):
                return None
            values[bias] = self._draw(torch.Size([_UNITS]), value.device) if trained else value.new_zeros(_UNITS)
        values |= {a: run.weights[a] for a in node.all_input_nodes if a in run.constant and a not in values}
        result = first_tensor(main_of(node, _call(node, values)))
        expected = list(run.shapes[node])
        expected[axes.unit or 0] = _UNITS
        if result is None or list(result.shape) != expected:
            return None
        return result, picked.to(result.device)

    def _moved(self, run: Pass, node: fx.Node, held: Mapping[fx.Node, Any]) -> Tensor | None:
        """The change of the node's value for a random change of its weights."""
        leaves = [a for a in node.all_input_nodes if (node, a) in run.leaves]
        kind = role_of(node).kind
        others = {a: run.weights[a] for a in node.all_input_nodes if a in run.constant and a not in leaves}

        def call(values: Mapping[fx.Node, Any]) -> Tensor | None:
            return first_tensor(main_of(node, _call(node, values)))

        drawn = {a: self._draw(run.leaves[node, a].shape, run.leaves[node, a].device) for a in leaves}
        if kind == "recurrent":
            return _derivative(call, {**held, **others}, {a: run.weights[a].detach() for a in leaves}, drawn)
        value = call({**held, **others, **drawn})
        if value is None:
            return None
        frozen = any(isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 0 for v in others.values())
        if kind == "pointwise" or frozen:
            # What does not hang on the trained constants is taken away: a frozen bias, the other summand.
            still = call({**held, **others, **{a: torch.zeros_like(run.leaves[node, a]) for a in leaves}})
            value = value - still if still is not None else value
        return value

    def _draw(self, shape: torch.Size, device: torch.device) -> Tensor:
        count = math.prod(shape)
        if count > _POOL // 2:
            return torch.randn(shape, generator=self.generator).to(device)
        if count > self.pool.numel() // 2:
            # Small networks need few numbers; the pool grows with the weights.
            size = min(_POOL, max(4 * count, 1 << 14))
            self.pool = torch.cat([self.pool, torch.randn(size - self.pool.numel(), generator=self.generator)])
        start = int(torch.randint(self.pool.numel() - count + 1, (), generator=self.generator))
        return self.pool[start : start + count].view(shape).to(device)

    def measure(self, run: Pass, ends: list[Tensor], batch: int, seed: int, say: Say = silent) -> GramRecord | None:
        """The spectra of both Gram matrices; None where no weight could be followed or a gradient is not finite.

        `say` is told at whose gradients the pass is.
        """
        if not ends or batch < 2 or not self.held:
            return None
        given = cotangents(ends, batch, torch.Generator().manual_seed(seed), shared=True)
        self.meter = Meter(say, "probing: gradients of single examples at", "layers", len(self.held))
        through_signals(run, ends, given)
        self.meter = None
        self.held.clear()
        plain: Tensor | None = None
        scaled: Tensor | None = None
        for node, part in self.parts.items():
            rows = part[:_EXAMPLES].double().cpu()
            if rows.shape[0] < 2 or rows.shape[0] != min(batch, _EXAMPLES):
                continue
            gram = rows @ rows.T
            if not bool(torch.isfinite(gram).all()):
                return None
            # The sum over all examples of their sketches is the sketch of the batch's gradient.
            whole = float(part.double().sum(0).square().sum())
            elements = sum(leaf.numel() for (consumer, _), leaf in run.leaves.items() if consumer is node)
            rms = math.sqrt(whole / elements) / batch if elements else 0.0
            plain = gram if plain is None else plain + gram
            if rms > 0:
                scaled = gram / rms if scaled is None else scaled + gram / rms
        if plain is None:
            return None
        zero = torch.zeros_like(plain)
        return GramRecord(plain.shape[0], kernel(plain), kernel(scaled if scaled is not None else zero))


def _call(node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg(node.args, values.__getitem__), fx.node.map_arg(node.kwargs, values.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _derivative(
    call: Any, fixed: Mapping[fx.Node, Any], at: Mapping[fx.Node, Tensor], along: Mapping[fx.Node, Tensor]
) -> Tensor | None:
    """The derivative of `call` in its weights `at` along a direction, in forward mode."""

    def of(*weights: Tensor) -> Any:
        return call({**fixed, **dict(zip(at, weights, strict=True))})

    weights, directions = tuple(at.values()), tuple(along[a] for a in at)
    try:
        with torch.backends.mkldnn.flags(enabled=False):
            tangent: Tensor = torch.func.jvp(of, weights, directions)[1]
    except (RuntimeError, NotImplementedError):
        return _twice_backward(of, weights, directions)
    return tangent


def _twice_backward(of: Any, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor | None:
    """The same without a forward mode, which recurrent kernels of accelerators lack."""
    with torch.enable_grad():
        leaves = [w.detach().requires_grad_(True) for w in weights]
        value = of(*leaves)
        if value is None or not value.requires_grad:
            return None
        try:
            return pushed_by_reverse([value], leaves, directions)[0]
        except (RuntimeError, NotImplementedError):
            return None  # the kernel's backward pass has no derivative either


def kernel(gram: Tensor) -> Kernel:
    """The spectra of an (n, n) Gram matrix, over n."""
    n = gram.shape[0]
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    spectra = [torch.linalg.eigvalsh(m / n).flip(0).clamp_min(0).tolist() for m in (gram, centred)]
    return Kernel(tuple(spectra[0]), tuple(spectra[1]))


def _by_unit(x: Tensor, axes: Axes) -> Tensor:
    """(examples, units): summed over positions."""
    rows = by_example(x, axes)
    if axes.unit is None or axes.batch is None or axes.unit == axes.batch:
        # Without a unit axis all of the example is one projection, spread over as many numbers as there are.
        return rows.reshape(rows.shape[0], -1).sum(1, keepdim=True)
    others = [i for i in range(x.dim()) if i not in (axes.batch, axes.unit)]
    moved = x.permute(axes.batch, *others, axes.unit)
    if x.shape[axes.batch] == axes.examples:
        return moved.flatten(1, -2).sum(1) if moved.dim() > 2 else moved
    apart = moved.reshape(-1, axes.examples, axes.inner, *moved.shape[1:])
    return apart.movedim(1, 0).flatten(1, -2).sum(1)


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
