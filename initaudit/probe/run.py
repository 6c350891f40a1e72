"""The probe: one forward pass, one backward pass, and what follows from them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from initaudit.graph.calls import Use, arguments, role_of
from initaudit.graph.constness import completed, constant_nodes
from initaudit.graph.graph import Graph, location_of
from initaudit.graph.reach import upstream
from initaudit.meter import Meter, Say, silent
from initaudit.probe.gradients import GradientSketch
from initaudit.probe.measures import measures
from initaudit.probe.observe import SignalObserver
from initaudit.probe.passes import Observer, Pass, backward, batch_of, cotangents, on_to_inputs
from initaudit.probe.recurrence import TimeObserver
from initaudit.probe.response import persist, respond
from initaudit.probe.statistics import peak, power
from initaudit.probe.targets import numbers_of
from initaudit.probe.trace import ParameterRecord, Response, Trace, Units, WeightRecord
from initaudit.probe.units import compare_units
from initaudit.probe.virtual import revived

# Products of equal rows may be summed in different orders.
_ROUNDING = 1e-5

Sites = Mapping[tuple[fx.Node, fx.Node], Tensor]


def probe(
    graph: Graph, inputs: Sequence[Tensor], *, seed: int = 0, device: torch.device | str | None = None, say: Say = silent
) -> Trace:
    """Runs `graph` forward and backward on `inputs` and records what it sees.

    Everything is computed in float32, whatever the dtype of the weights. The random state, the weights and the buffers of the
    caller are left as they were; the result is the same for the same seed. Nodes that cannot be run are named in
    `Trace.unknown`, nodes whose value is not finite in `Trace.first_non_finite`; neither raises. `say` is told
    where the passes are.
    """
    place = None if device is None else torch.device(device)
    with undisturbed(seed, graph):
        constant = constant_nodes(graph.fx)
        observer = SignalObserver(graph.fx, constant)
        sketch = GradientSketch(seed)
        along = TimeObserver(seed)
        run = Pass(graph, constant, device=place, observers=(_Told(observer, say, len(graph.fx.nodes)), sketch, along))
        given = floated(inputs, place)
        run.run(*given)
        ends, batch = run.ends(), batch_of(given)
        drawn = cotangents(ends, batch, torch.Generator().manual_seed(seed))
        sites = backward(run, ends, drawn, keep=True)
        on_to_inputs(run)
        observer.close()
        gram = sketch.measure(run, ends, batch, seed, say)
        norm_of, gradients = _Norms(), run.parameter_gradients(sites)
        parameters = _parameters(graph, run, gradients, norm_of)
        silent = [name for name, p in parameters.items() if p.gradient_zero]
        steps = 0
        finite = bool(ends) and all(bool(torch.isfinite(v).all()) for v in ends)
        if silent and finite:
            steps = 2
            after = revived(graph, constant, given, gradients, silent, seed, place)
            parameters = {n: _with_revival(p, n, after) for n, p in parameters.items()}
        weights = tuple(_weight_records(run, sites, observer, norm_of))
        say("probing: virtual steps")
        response = respond(graph, constant, given, run, seed, place, say) if finite else ()
        return Trace(
            batch=batch,
            signals=observer.signals,
            weights=weights,
            parameters=parameters,
            outputs=tuple(n.name for n, _ in run.outputs),
            first_non_finite=observer.first_non_finite,
            first_non_finite_gradient=observer.first_non_finite_gradient,
            unknown={n.name: reason for n, reason in run.missing.items()},
            gram=gram,
            virtual_steps=steps,
            time=tuple(along.records),
            measures=measures(graph, observer.signals, weights, run.outputs),
            response=response,
            numbers=numbers_of(given, batch),
            alike=_alike(given, ends, batch),
        )


def persisted(
    graph: Graph, inputs: Sequence[Tensor], *, seed: int = 0, device: torch.device | str | None = None, say: Say = silent
) -> Response | None:
    """What many more virtual steps do (`response.persist`), under the conditions of `probe`."""
    place = None if device is None else torch.device(device)
    with undisturbed(seed, graph):
        return persist(graph, floated(inputs, place), seed, place, say)


def _alike(given: Sequence[Tensor], ends: Sequence[Tensor], batch: int) -> bool:
    def differ(x: Tensor, least: float = 0.0) -> bool:
        return bool(((x - x[:1]).abs() > least * x.abs().max()).any()) if x.is_floating_point() else bool((x != x[:1]).any())

    told = [x for x in given if x.dim() and x.shape[0] == batch and x.numel()]
    made = [x.detach() for x in ends if x.dim() and x.shape[0] == batch and x.numel()]
    return bool(made) and any(map(differ, told)) and not any(differ(x, _ROUNDING) for x in made)


class _Told(Observer):
    """An observer that also says at which edge the passes are."""

    def __init__(self, inner: Observer, say: Say, edges: int) -> None:
        self.inner = inner
        self.forward = Meter(say, "probing: forward at", "edges", edges)
        self.say, self.edges = say, edges
        self.backward: Meter | None = None

    def signal(self, run: Pass, node: fx.Node, value: Tensor) -> None:
        self.forward(location_of(node).site or node.name)
        self.inner.signal(run, node, value)

    def wants_gradient(self, run: Pass, node: fx.Node) -> bool:
        return self.inner.wants_gradient(run, node)

    def gradient(self, run: Pass, node: fx.Node, gradient: Tensor) -> None:
        if self.backward is None:  # its clock starts with the way back
            self.backward = Meter(self.say, "probing: backward at", "edges", self.edges)
        self.backward(location_of(node).site or node.name)
        self.inner.gradient(run, node, gradient)


@contextlib.contextmanager
def undisturbed(seed: int, graph: Graph) -> Iterator[None]:
    """The caller's random state, warnings and modes stay; inside, an accelerator runs `graph` in full precision, repeatably."""
    # cuDNN's recurrent layers have no second derivative, and outside training no first one.
    recurrent = any(role_of(n).kind == "recurrent" for n in graph.fx.nodes if n.op == "call_function")
    exact = torch.backends.cudnn.flags(enabled=not recurrent, benchmark=False, deterministic=True, allow_tf32=False)
    precision = torch.get_float32_matmul_precision()
    strict, only_warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(), warnings.catch_warnings(), torch.enable_grad(), exact:
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            torch.set_float32_matmul_precision("highest")
            if torch.cuda.is_available():  # on the host they are anyway, and it imports torch's compiler
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            if torch.cuda.is_available():
                torch.use_deterministic_algorithms(strict, warn_only=only_warns)
            torch.set_float32_matmul_precision(precision)


def floated(inputs: Sequence[Tensor], device: torch.device | None) -> list[Tensor]:
    """The inputs on the device, floating-point ones in float32."""
    moved = [x.detach() if device is None else x.detach().to(device) for x in inputs]
    return [x.float() if x.is_floating_point() else x for x in moved]


class _Norms:
    """Frobenius norms, each taken once: a weight used in one place is its parameter, and so is its gradient."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[Tensor, float]] = {}

    def __call__(self, x: Tensor) -> float:
        known = self.held.get(id(x))
        if known is None:
            # The tensor is kept, so that no other one can take its id.
            known = self.held[id(x)] = (x, power(x) ** 0.5)
        return known[1]


def _parameters(graph: Graph, run: Pass, gradients: Mapping[str, Tensor], norm_of: _Norms) -> dict[str, ParameterRecord]:
    hidden = _hidden(run)
    found = {}
    for key, value in run.parameters.items():
        constant = graph.constants[key]
        gradient = gradients.get(key)
        norm = None if gradient is None else norm_of(gradient)
        # A norm of zero may be an underflow; what is not zero needs no second look.
        zero = gradient is None or (norm == 0 and not bool(gradient.any()))
        if key in hidden and zero:
            continue  # its way to the output was not run: nothing can be said of its gradient
        found[key] = ParameterRecord(
            constant.name, constant.shape, norm_of(value), norm, zero, None if zero else 0, gradient is not None
        )
    return found


def _hidden(run: Pass) -> frozenset[str]:
    """The keys of the constants that lead to a node that could not be run."""
    return frozenset(str(n.target) for n in upstream(run.missing) if n.op == "get_attr")


def _with_revival(record: ParameterRecord, key: str, after: Mapping[str, int | None]) -> ParameterRecord:
    if key not in after:
        return record
    return replace(record, gradient_zero=True, revived=after[key])


def _weight_records(run: Pass, sites: Sites, observer: SignalObserver, norm_of: _Norms) -> Iterator[WeightRecord]:
    for node, uses in run.uses.items():
        for use in uses:
            value = run.weights.get(use.weight)
            if not isinstance(value, Tensor) or not value.is_floating_point() or value.numel() == 0:
                continue
            gradient = sites.get((node, use.weight))
            norm = norm_of(value)
            steep = None if gradient is None else norm_of(gradient)
            source = next((a for a in node.all_input_nodes if a.name in observer.signals), None)
            whole = completed(node, run.constant)
            whole = whole if whole.name in observer.signals else node
            seen, into = observer.signals.get(whole.name), observer.signals.get(source.name) if source is not None else None
            yield WeightRecord(
                node=node.name,
                weight=use.weight.name,
                argument=use.use.argument,
                index=use.use.index,
                constants=_names(use.weight),
                elements=value.numel(),
                weight_norm=norm,
                gradient_norm=steep,
                trust_ratio=norm / steep if steep is not None and steep > 0 else None,
                input_moment2=None if into is None else into.moment2,
                output_moment2=None if seen is None else seen.moment2,
                output_gradient_moment2=None if seen is None else seen.gradient_moment2,
                units=_units(run, use, value, gradient),
                weight_peak=peak(value),
                output=whole.name,
                fan_in=use.use.fans(tuple(value.shape))[0] if len(use.use.axes) == value.dim() else None,
            )


def _units(run: Pass, use: Use, value: Tensor, gradient: Tensor | None) -> Units | None:
    bound = arguments(use.node)
    bias = bound.get(use.use.bias) if use.use.bias is not None else None
    held = run.weights.get(bias) if isinstance(bias, fx.Node) else None
    return None if gradient is None else compare_units(value, gradient, held if isinstance(held, Tensor) else None, use.use)


def _names(weight: fx.Node) -> tuple[str, ...]:
    """The keys of the constants that a weight is made of."""
    found, stack, seen = [], [weight], {weight}
    while stack:
        node = stack.pop()
        if node.op == "get_attr":
            found.append(str(node.target))
        for a in node.all_input_nodes:
            if a not in seen:
                seen.add(a)
                stack.append(a)
    return tuple(sorted(found))
