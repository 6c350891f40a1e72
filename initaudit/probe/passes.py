"""One forward pass and its backward passes over a graph, every node seen once on the way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.errors import InitauditError
from initaudit.graph.calls import Use, role_of, weight_uses
from initaudit.graph.execute import Executor
from initaudit.graph.graph import Graph
from initaudit.probe.axes import UNKNOWN, Axes, axes_of, first_tensor, main_of


class Missing:
    """Stands for a value that could not be computed; everything made of it is missing too."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


# What an operator raises on values that it cannot take; a failing node is recorded and what lies downstream is unknown.
FAILURES = (InitauditError, RuntimeError, ValueError, TypeError, IndexError, KeyError, NotImplementedError, AssertionError)


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

    `shift` maps parameters to a tensor that is added to their value (a virtual step). `observers` see every data node.
    """

    def __init__(
        self,
        graph: Graph,
        constant: frozenset[fx.Node],
        *,
        device: torch.device | None = None,
        shift: Mapping[str, Tensor] | None = None,
        observers: Sequence[Observer] = (),
    ) -> None:
        super().__init__(graph, device=device)
        self.constant, self.shift, self.observers = constant, {} if shift is None else shift, tuple(observers)
        self.leaves: dict[tuple[fx.Node, fx.Node], Tensor] = {}
        self.weights: dict[fx.Node, Any] = {}
        self.parameters: dict[str, Tensor] = {}
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

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The constant in float32; a trainable one as a leaf of its own."""
        constant, key = self.source.constants[str(target)], str(target)
        if key in self.parameters:
            return self.parameters[key]
        value: Tensor = single(super().get_attr(target, args, kwargs))
        if key in self.shift:
            value = value + self.shift[key]
        if constant.kind == "parameter" and constant.trainable and value.is_floating_point():
            value = self.parameters[key] = value.detach().requires_grad_(True)
        return value

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
        value = self.weights[source]
        if not isinstance(value, Tensor):
            return value
        if value.requires_grad:
            leaf = self.leaves.get((consumer, source))
            if leaf is None:
                leaf = self.leaves[consumer, source] = value.detach().requires_grad_(True)
            value = leaf
        # Writing in place to a weight would change it for its other consumers.
        return value * 1 if writes(consumer) and value.is_floating_point() else value.clone() if writes(consumer) else value

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node; what fails is missing from there on."""
        if n.op == "output":
            return self._finish(n)
        lost = next((a for a in n.all_input_nodes if a in self.missing), None)
        if lost is not None:
            # What was known just before the gap is where the gradient starts from, if no output is left.
            self.frontier += [v for a in n.all_input_nodes if (v := first_tensor(self.env.get(a))) is not None]
            self.missing[n] = f"downstream of {lost.name}"
            return None
        try:
            with torch.set_grad_enabled(True):
                value: Tensor = single(super().run_node(n))
        except FAILURES as error:
            text = " ".join(str(error).split())
            self.missing[n] = f"{type(error).__name__}: {text[:200]}"
            self.frontier += [v for a in n.all_input_nodes if (v := first_tensor(self.env.get(a))) is not None]
            return None
        if n in self.constant:
            self.weights[n] = value
        else:
            self._look(n, value)
        return value

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
                for observer in wanting:
                    observer.gradient(self, n, gradient)

            signal.register_hook(hook)  # type: ignore[no-untyped-call]

    def _note_root(self, n: fx.Node, signal: Tensor, value: Any) -> None:
        """Keeps the first values that trainable weights take part in: nothing upstream of them is trained."""
        if any(a in self.trained for a in n.all_input_nodes):
            self.trained.add(n)
        elif any((n, a) in self.leaves for a in n.all_input_nodes):
            self.trained.add(n)
            # The edge, not the tensor: an operator that writes in place would take the tensor along.
            self.roots[n] = torch.autograd.graph.get_gradient_edge(signal)
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

    def parameter_gradients(self, leaf_gradients: Mapping[tuple[fx.Node, fx.Node], Tensor]) -> dict[str, Tensor]:
        """The gradient of every parameter: that of its places of use, through whatever makes the weight out of it."""
        sums: dict[fx.Node, Tensor] = {}
        for (_, source), gradient in leaf_gradients.items():
            sums[source] = gradient if source not in sums else sums[source] + gradient
        found: dict[str, Tensor] = {}
        made = []
        for source, gradient in sums.items():
            if source.op == "get_attr":
                key = str(source.target)
                found[key] = gradient if key not in found else found[key] + gradient
            else:
                made.append((self.weights[source], gradient))
        if made:
            wanted = list(self.parameters.items())
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


def leading(ends: Sequence[Tensor], given: Sequence[Tensor]) -> Tensor:
    """One number whose gradient at each end is what is given for it.

    To compare the shape of a gradient that it is handed, torch imports sympy, a quarter of what it takes to import itself.
    """
    with torch.enable_grad():
        return torch.stack([(end * gradient).sum() for end, gradient in zip(ends, given, strict=True)]).sum()


def batch_of(inputs: Sequence[Tensor]) -> int:
    """The number of examples: the first size of the first input that has one."""
    return next((int(x.shape[0]) for x in inputs if x.dim() > 0), 1)


def backward(run: Pass, ends: list[Tensor], given: list[Tensor], *, keep: bool) -> dict[tuple[fx.Node, fx.Node], Tensor]:
    """The gradient at every leaf that the outputs depend on. With `keep`, another backward pass can follow.

    As in training, it ends at the first weights; `on_to_inputs` takes it from there to the inputs. Only where a way from the
    inputs to the outputs leads past all weights, all of it is gone at once.
    """
    for leaf in run.leaves.values():
        leaf.grad = None
    wanted = [leaf for leaf in run.leaves.values() if leaf.requires_grad]
    wanted += run.inputs if _lead_past_weights(run) else []
    if ends and wanted:
        torch.autograd.backward(leading(ends, given), retain_graph=keep, inputs=wanted)
    for leaf in run.inputs:
        leaf.grad = None
    found = {}
    for site, leaf in run.leaves.items():
        if leaf.grad is not None:
            found[site] = leaf.grad
            leaf.grad = None
    return found


def _lead_past_weights(run: Pass) -> bool:
    """Whether a way from the inputs does not lead through the one result of each first node that a weight takes part in."""
    return run.several or any(
        u.op == "output" or (u in run.trained and u not in run.roots) for n in run.upstream for u in n.users
    )


def on_to_inputs(run: Pass) -> None:
    """Takes the gradient of a `backward` that was kept on, from the first weights to the inputs: observers see it there."""
    starts = [n for n in run.copies if n in run.steep]
    if starts and not _lead_past_weights(run):
        start = leading([run.copies[n] for n in starts], [run.steep[n] for n in starts])
        torch.autograd.grad(start, run.inputs, retain_graph=True, allow_unused=True)
    run.steep.clear()
    run.copies.clear()


def through_signals(run: Pass, ends: list[Tensor], given: list[Tensor]) -> None:
    """A backward pass along the signals alone: every observer sees its gradients, no weight's gradient is computed.

    That is a third of the arithmetic of a forward and backward pass, where `backward` costs two thirds.
    """
    if ends and run.roots:
        torch.autograd.grad(leading(ends, given), list(run.roots.values()), allow_unused=True)


def pushed_by_reverse(
    results: Sequence[Tensor], leaves: Sequence[Tensor], directions: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """What a change of the leaves along `directions` does to each result, by reverse mode taken twice; None where nothing.

    Jᵀu is linear in u, so its derivative in u along v is J v. Raises what torch raises where an operator's backward pass has no
    derivative of its own. To be called with gradients enabled.
    """
    weights = [torch.zeros_like(r, requires_grad=True) for r in results]
    back = torch.autograd.grad(results, leaves, weights, create_graph=True, allow_unused=True)
    used = [(g, v) for g, v in zip(back, directions, strict=True) if g is not None]
    return torch.autograd.grad([g for g, _ in used], weights, [v for _, v in used], allow_unused=True)


def kind_of(node: fx.Node) -> str:
    """The role of a node in one word."""
    return "input" if node.op == "placeholder" else role_of(node).kind
