"""One forward pass and its backward passes over a graph, every node seen once on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd.graph import GradientEdge, get_gradient_edge

from initaudit.errors import InitauditError
from initaudit.graph.calls import Use, role_of, weight_uses
from initaudit.graph.execute import Executor
from initaudit.graph.graph import Graph
from initaudit.probe.axes import UNKNOWN, Axes, axes_of, first_tensor, main_of
from initaudit.probe.backward import leading
from initaudit.probe.lending import Lending, Values, comes_and_goes, is_trimmed


class Missing:
    """Stands for a value that could not be computed; everything made of it is missing too."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


# What an operator raises on values that it cannot take; a failing node is recorded and what lies downstream is unknown.
FAILURES = (InitauditError, RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AssertionError)


# A consumer and the constant that it reads: a weight at one place of use.
Site = tuple[fx.Node, fx.Node]


class Observer:
    """What looks on while a pass runs."""

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        """Called with the floating-point value of a data node, before anything consumes it."""

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        """Whether `gradient` is to be called for this node; asked once, after `signal`."""
        return True

    def gradient(self, run: Pass, node: fx.Node, gradient: Tensor) -> None:
        """Called with the whole gradient at a data node's value."""


class Pass(Executor):
    """Runs `graph` in float32 with a separate leaf for every (consumer, weight) pair, and differentiates it.

    `shift` maps parameters to a tensor that is added to their value (a virtual step). `observers` see every data node. With
    `lend`, constants that are not float32 as they stand, or moved, are made anew for each consumer and none is held; what
    `shift` hands out is then written to.
    """

    def __init__(
        self,
        graph: Graph,
        constant: frozenset[fx.Node],
        *,
        device: torch.device | None = None,
        shift: Mapping[str, Tensor] | None = None,
        observers: Sequence[Observer] = (),
        lend: bool = False,
    ) -> None:
        super().__init__(graph, device=device)
        self.constant, self.shift, self.observers = constant, {} if shift is None else shift, tuple(observers)
        self.leaves: dict[Site, Tensor] = {}
        self.handed: dict[Site, Tensor] = {}  # to the node that runs
        self.inlets: dict[Site, Tensor | GradientEdge] = {}
        self.layouts: dict[Site, tuple[torch.Size, tuple[int, ...]]] = {}
        self.lending, self.trims = Lending() if lend else None, lend and is_trimmed(graph)
        self.weights: Values[fx.Node] = Values()
        self.parameters: Values[str] = Values()
        self.axes: dict[fx.Node, Axes] = {}
        self.moves: dict[Any, Axes] = {}
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self.missing: dict[fx.Node, str] = {}
        self.frontier: list[Tensor] = []
        self.uses: dict[fx.Node, tuple[Use, ...]] = {}
        self.order: dict[fx.Node, int] = {}
        self.outputs: list[tuple[fx.Node, Tensor]] = []
        self.trained: set[fx.Node] = set()
        self.roots: dict[fx.Node, Any] = {}
        self.copies: dict[fx.Node, Tensor] = {}
        self.steep: dict[fx.Node, Tensor] = {}
        self.inputs: list[Tensor] = []
        self.upstream: set[fx.Node] = set()
        self.several = False
        self.deaf = False  # while a gradient that observers have seen is passed on once more

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the graph on its inputs."""
        with contextlib.nullcontext() if self.lending is None else self.lending.saving():
            return super().run(*args, **kwargs)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The constant in float32; a trainable one as a leaf of its own."""
        key = str(target)
        if key in self.parameters:
            return self.parameters[key]  # type: ignore[no-any-return]
        value = self._made(key)
        if self._trained(key):
            value = self.parameters[key] = value.detach().requires_grad_(True)
        return value

    def _made(self, key: str) -> Tensor:
        if self.trims:
            comes_and_goes(4 * math.prod(self.source.constants[key].shape))
        if key in self.shift and self.lending is not None:
            moved = self.shift[key]  # before the weight itself takes room
            value: Tensor = super().get_attr(key, (), {})
            return moved.add_(value if value.itemsize <= moved.itemsize else single(value))
        value = single(super().get_attr(key, (), {}))
        return value + self.shift[key] if key in self.shift else value

    def weight_shape(self, weight: fx.Node) -> tuple[int, ...] | None:
        """The shape of a weight of floating-point numbers; None for what is none."""
        if weight in self.weights.lent:
            return self.source.constants[str(weight.target)].shape
        value = self.weights.get(weight)
        return tuple(value.shape) if isinstance(value, Tensor) and value.is_floating_point() else None

    @contextlib.contextmanager
    def apart(self, *, unread: bool) -> Iterator[None]:
        """Inside, a part of the backward pass is run once more, and observers do not see it; `unread` as in `Lending`."""
        before = self.lending.unread if self.lending is not None else False
        self.deaf = True
        try:
            if self.lending is not None:
                self.lending.unread = unread
            yield
        finally:
            self.deaf = False
            if self.lending is not None:
                self.lending.unread = before

    def release(self) -> None:
        """Lets go of autograd's graph, which through its hooks holds this pass where Python cannot see it."""
        for held in (self.inlets, self.leaves, self.roots, self.copies, self.steep, self.inputs):
            held.clear()
        self.outputs = [(n, v.detach().requires_grad_(v.requires_grad)) for n, v in self.outputs]
        self.frontier = [v.detach().requires_grad_(v.requires_grad) for v in self.frontier]

    def _trained(self, key: str) -> bool:
        constant = self.source.constants[key]
        return constant.kind == "parameter" and constant.trainable and constant.dtype.is_floating_point

    def _is_lent(self, n: fx.Node) -> bool:
        """Whether a constant takes memory in float32 and only data nodes read it."""
        if self.lending is None or n.op != "get_attr" or self.device is not None:
            return False
        constant = self.source.constants[str(n.target)]
        made = constant.dtype.is_floating_point and (constant.dtype != torch.float32 or str(n.target) in self.shift)
        return made and constant.kind != "buffer" and not any(u in self.constant or u.op == "output" for u in n.users)

    def map_nodes_to_values(self, args: Any, n: fx.Node) -> Any:
        """The arguments of `n`: a weight that a data node consumes becomes a leaf of that data node."""

        def load(node: fx.Node) -> Any:
            if node in self.constant and n not in self.constant:
                return self._leaf(n, node)
            value = self.env[node]
            # A weight that is rescaled in place on its way (without gradient, in the original) is a leaf here.
            return value * 1 if isinstance(value, Tensor) and value.is_leaf and value.requires_grad and writes(n) else value

        return fx.node.map_arg(args, load)

    def _leaf(self, consumer: fx.Node, source: fx.Node) -> Any:
        site = consumer, source
        if source in self.weights.lent:
            value = self.handed[site] if site in self.handed else self._lent(site)
        else:
            value = self.weights[source]
            if not isinstance(value, Tensor):
                return value
            if value.requires_grad:
                if site not in self.leaves:
                    self.leaves[site] = self.inlets[site] = value.detach().requires_grad_(True)
                value = self.leaves[site]
        # Writing in place to a weight would change it for its other consumers.
        return value * 1 if writes(consumer) and value.is_floating_point() else value.clone() if writes(consumer) else value

    def _lent(self, site: Site) -> Tensor:
        assert self.lending is not None
        trained = self._trained(str(site[1].target))
        value = self.lending.lend(site, self.weights.lent[site[1]], trained=trained)
        self.handed[site] = value
        if trained:
            # In the leaf's place stands its shape: one number takes no memory.
            self.leaves[site] = value.new_zeros(()).expand(value.shape)
            self.layouts[site] = value.size(), value.stride()
            self.inlets[site] = get_gradient_edge(value)
        return value

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; what fails is missing from there on."""
        if n.op == "output":
            return self._finish(n)
        lost = next((a for a in n.all_input_nodes if a in self.missing), None)
        if lost is not None:
            # What was known just before the gap is where the gradient starts from, if no output is left.
            self.frontier += self._before(n)
            self.missing[n] = f"downstream of {lost.name}"
            return None
        if self._is_lent(n):
            key = str(n.target)
            self.weights.lend(n, partial(self._made, key))
            if self._trained(key):
                self.parameters.lend(key, partial(self._made, key))
            return None
        try:
            with torch.set_grad_enabled(True):
                value: Tensor = single(super().run_node(n))
        except FAILURES as error:
            text = " ".join(str(error).split())
            self.missing[n] = f"{type(error).__name__}: {text[:200]}"
            self.frontier += self._before(n)
            return None
        finally:
            if self.handed:
                self.handed.clear()
                self.lending.returned()  # type: ignore[union-attr]
        if n in self.constant:
            self.weights[n] = value
        else:
            self._look(n, value)
        return value

    def _before(self, n: fx.Node) -> list[Tensor]:
        lent = {a: self.weights[a].requires_grad_(True) for a in n.all_input_nodes if a in self.weights.lent}
        return [v for a in n.all_input_nodes if (v := first_tensor(lent.get(a, self.env.get(a)))) is not None]

    def placeholder(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An input; a floating-point one can be differentiated as well."""
        value = super().placeholder(target, args, kwargs)
        if isinstance(value, Tensor) and value.is_floating_point():
            leaf = value.detach().requires_grad_(True)
            self.inputs.append(leaf)
            # A copy, because the graph may write to its input.
            return leaf * 1
        return value

    def again(self, node: fx.Node, replace: Mapping[fx.Node, Any]) -> Any:
        """The value of `node` with other values for some of its arguments."""

        def load(a: fx.Node) -> Any:
            if a in replace:
                return replace[a]
            return self.weights[a] if a in self.constant else self.env[a]

        with torch.no_grad():
            args, kwargs = fx.node.map_arg(node.args, load), fx.node.map_arg(node.kwargs, load)
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def _like(self, source: fx.Node, stand_in: Tensor) -> Any:
        """A stand-in for every element, where the source's value is a tuple."""
        value = self.env[source]
        return (stand_in,) * len(value) if isinstance(value, (tuple, list)) else stand_in

    def _look(self, n: fx.Node, value: Any) -> None:
        head = main_of(n, value)
        if not isinstance(head, Tensor):
            return
        if not self.observers:
            return
        self.uses[n] = weight_uses(n, self.constant)
        plain = tuple(u.use for u in self.uses[n])
        if writes(n):
            # Running it once more would write once more.
            source = next((a for a in n.all_input_nodes if a in self.axes), None)
            same = source is not None and self.shapes[source] == tuple(head.shape)
            self.axes[n] = self.axes[source] if source is not None and same else UNKNOWN
        else:
            self.axes[n] = axes_of(
                n, value, self.axes, self.shapes, plain, lambda s, x: self.again(n, {s: self._like(s, x)}), self.moves
            )
        self.shapes[n] = tuple(head.shape)
        self.order[n] = len(self.order)
        signal = first_tensor(head)
        if signal is None or signal.numel() == 0:
            return
        for observer in self.observers:
            observer.signal(self, n, signal)
        if not signal.requires_grad:
            return
        self._note_root(n, signal, value)
        wanting = [o for o in self.observers if o.wants_gradient(self, n)]
        if wanting:

            def hook(gradient: Tensor) -> None:
                for observer in () if self.deaf else wanting:
                    observer.gradient(self, n, gradient)

            signal.register_hook(hook)  # type: ignore[no-untyped-call]

    def _note_root(self, n: fx.Node, signal: Tensor, value: Any) -> None:
        """Keeps the first values that trainable weights take part in: nothing upstream of them is trained."""
        if any(a in self.trained for a in n.all_input_nodes):
            self.trained.add(n)
        elif any((n, a) in self.leaves for a in n.all_input_nodes):
            self.trained.add(n)
            # The edge, not the tensor: an operator that writes in place would take the tensor along.
            self.roots[n] = get_gradient_edge(signal)
            # A gradient comes back to each of several results (a recurrent layer's states), and one is seen.
            self.several |= isinstance(value, (tuple, list)) and len(value) > 1
            if self.inputs:
                self.copies[n] = signal * 1
                signal.register_hook(lambda gradient: self.steep.__setitem__(n, gradient))  # type: ignore[no-untyped-call]
        else:
            self.upstream.add(n)

    def _finish(self, n: fx.Node) -> tuple[Tensor, ...]:
        for node in n.all_input_nodes:
            value = first_tensor(self.env.get(node))
            if value is not None and node not in self.missing:
                self.outputs.append((node, value))
        return tuple(v for _, v in self.outputs)

    def ends(self) -> list[Tensor]:
        """Where the gradient starts: the outputs, or what was last known where none could be computed."""
        values = [v for _, v in self.outputs] or self.frontier
        return [v for v in values if v.requires_grad and v.numel() > 0]

    def parameter_gradients(self, leaf_gradients: Mapping[Site, Tensor]) -> dict[str, Tensor]:
        """The gradient of every parameter: that of its places of use, through whatever makes the weight out of it."""
        return self.summed(leaf_gradients.items(), self.parameters.keys())

    def summed(self, leaf_gradients: Iterable[tuple[Site, Tensor]], keys: Collection[str]) -> dict[str, Tensor]:
        """The same of some places of use, whose weights are made of the parameters `keys` and no others."""
        sums: dict[fx.Node, Tensor] = {}
        own = set[fx.Node]()  # whose sum is nobody's gradient
        for (_, source), gradient in leaf_gradients:
            if source not in sums:
                sums[source] = gradient
            elif source in own:
                sums[source].add_(gradient)
            else:
                sums[source] = sums[source] + gradient
                own.add(source)
        found: dict[str, Tensor] = {}
        made = []
        for source, gradient in sums.items():
            if source.op == "get_attr":
                key = str(source.target)
                found[key] = gradient if key not in found else found[key] + gradient
            else:
                made.append((self.weights[source], gradient))
        if made:
            wanted = [(key, self.parameters[key]) for key in keys]
            start = leading([v for v, _ in made], [g for _, g in made])
            grads = torch.autograd.grad(start, [p for _, p in wanted], allow_unused=True, retain_graph=True)
            for (key, _), gradient in zip(wanted, grads, strict=True):
                if gradient is not None:
                    found[key] = gradient if key not in found else found[key] + gradient
        return found


def writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def single(value: Any) -> Any:
    """float16, bfloat16 and float64 become float32: the probe is about the mathematics, not about rounding."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() and value.dtype != torch.float32 else value
    if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
        return tuple(single(v) for v in value)
    return value


def cotangents(ends: Sequence[Tensor], batch: int, generator: torch.Generator, *, shared: bool = False) -> list[Tensor]:
    """N(0, 1) numbers over sqrt(elements per example): an example's cotangent has norm 1 in expectation.

    With `shared`, every example of an output whose first axis counts examples gets the same cotangent.
    """
    drawn = []
    for value in ends:
        whole = shared and value.dim() > 0 and value.shape[0] % batch == 0
        shape = (value.shape[0] // batch, *value.shape[1:]) if whole else tuple(value.shape)
        c = torch.randn(shape, generator=generator).to(value.device)
        if whole:
            c = c.repeat(batch, *[1] * (value.dim() - 1))
        drawn.append(c / math.sqrt(value.numel() / batch))
    return drawn


def batch_of(inputs: Sequence[Tensor]) -> int:
    """The number of examples: the first size of the first input that has one."""
    return next((int(x.shape[0]) for x in inputs if x.dim() > 0), 1)


def kind_of(node: fx.Node) -> str:
    """The role of a node in one word."""
    return "input" if node.op == "placeholder" else role_of(node).kind
