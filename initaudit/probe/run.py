"""The probe: one forward pass, one backward pass, and what follows from them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from initaudit.graph.calls import role_of
from initaudit.graph.constness import completed, constant_nodes
from initaudit.graph.graph import Graph, location_of
from initaudit.graph.reach import upstream
from initaudit.meter import Meter, Say, silent
from initaudit.probe.backward import backward, on_to_inputs
from initaudit.probe.company import company
from initaudit.probe.gradients import GradientSketch
from initaudit.probe.lending import is_large
from initaudit.probe.measures import measures
from initaudit.probe.observe import SignalObserver
from initaudit.probe.passes import Observer, Pass, batch_of, cotangents
from initaudit.probe.persistence import persist
from initaudit.probe.recurrence import TimeObserver
from initaudit.probe.response import AFFORDED, respond, work
from initaudit.probe.slopes import Recall, Slopes, constants_of
from initaudit.probe.statistics import peak, power
from initaudit.probe.targets import numbers_of
from initaudit.probe.trace import GramRecord, ParameterRecord, Response, TimeRecord, Trace, WeightRecord
from initaudit.probe.virtual import revived

# Products of equal rows may be summed in different orders.
_ROUNDING = 1e-5


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
        large = is_large(graph)
        given = floated(inputs, place)
        batch = batch_of(given)
        seen = _passes(graph, given, seed, place, say, hold=not large)
        run, observer, slopes, ends = seen.run, seen.observer, seen.slopes, seen.run.ends()
        sizes = _Sizes(run)
        parameters = _parameters(graph, run, slopes, sizes)
        silent = [name for name, p in parameters.items() if p.gradient_zero]
        steps = 0
        finite = bool(ends) and all(bool(torch.isfinite(v).all()) for v in ends)
        if silent and finite:
            steps = 2
            after = revived(graph, run.constant, given, None if large else slopes.gradients, silent, seed, place)
            parameters = {n: _with_revival(p, n, after) for n, p in parameters.items()}
        slopes.gradients.clear()
        weights = tuple(_weight_records(run, slopes, observer, sizes))
        say("probing: virtual steps")
        response = respond(graph, run.constant, given, run, seed, place, say) if finite else ()
        return Trace(
            batch=batch,
            signals=observer.signals,
            weights=weights,
            parameters=parameters,
            outputs=tuple(n.name for n, _ in run.outputs),
            first_non_finite=observer.first_non_finite,
            first_non_finite_gradient=observer.first_non_finite_gradient,
            unknown={n.name: reason for n, reason in run.missing.items()},
            gram=seen.gram,
            virtual_steps=steps,
            time=seen.time,
            measures=measures(graph, observer.signals, weights, run.outputs),
            response=response,
            numbers=numbers_of(given, batch),
            alike=_alike(given, ends, batch),
            met=_met(graph, given, run, seed) if finite and not large else "",
        )


def _met(graph: Graph, given: Sequence[Tensor], run: Pass, seed: int) -> str:
    """Where examples meet (`company.py`), asked where a forward pass is as cheap as virtual steps would have it."""
    loops = any(n.op == "call_function" and role_of(n).kind == "control" for n in graph.fx.nodes)
    return "" if loops or run.missing or work(run) > AFFORDED else company(graph, run.constant, given, run, seed)


@dataclass(frozen=True)
class _Seen:
    """What is left of the passes over the network as it stands."""

    run: Pass
    observer: SignalObserver
    slopes: Slopes
    gram: GramRecord | None
    time: tuple[TimeRecord, ...]


def _passes(graph: Graph, given: Sequence[Tensor], seed: int, place: torch.device | None, say: Say, *, hold: bool) -> _Seen:
    """One pass forward and two backward; with `hold`, the gradients of all parameters are kept."""
    constant = constant_nodes(graph.fx)
    observer, sketch, along, recall = SignalObserver(graph.fx, constant), GradientSketch(seed), TimeObserver(seed), Recall()
    told = _Told(observer, say, len(graph.fx.nodes))
    run = Pass(graph, constant, device=place, observers=(told, sketch, along, recall), lend=not hold)
    run.run(*given)
    ends, batch = run.ends(), batch_of(given)
    drawn = cotangents(ends, batch, torch.Generator().manual_seed(seed))
    slopes = Slopes(run, recall, hold=hold)
    backward(run, ends, drawn, keep=True, take=slopes)
    slopes.close()
    recall.close()
    on_to_inputs(run)
    observer.close()
    gram = sketch.measure(run, ends, batch, seed, say)
    run.release()
    return _Seen(run, observer, slopes, gram, tuple(along.records))


def persisted(
    graph: Graph,
    inputs: Sequence[Tensor],
    *,
    seed: int = 0,
    device: torch.device | str | None = None,
    say: Say = silent,
    follow: bool = True,
) -> Response | None:
    """What many more virtual steps do (`persistence.py`), under the conditions of `probe`."""
    place = None if device is None else torch.device(device)
    with undisturbed(seed, graph):
        return persist(graph, floated(inputs, place), seed, place, say, follow=follow)


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
    """The caller's random state, warnings and modes stay; inside, an accelerator runs `graph` in full precision, repeatably.

    What is made without a type is float32 there, as all that is probed is, whatever the caller's default is.
    """
    # cuDNN's recurrent layers have no second derivative, and outside training no first one.
    recurrent = any(role_of(n).kind == "recurrent" for n in graph.fx.nodes if n.op == "call_function")
    exact = torch.backends.cudnn.flags(enabled=not recurrent, benchmark=False, deterministic=True, allow_tf32=False)
    precision, default = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    strict, only_warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(), warnings.catch_warnings(), torch.enable_grad(), exact:
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
            if torch.cuda.is_available():  # on the host they are anyway, and it imports torch's compiler
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            if torch.cuda.is_available():
                torch.use_deterministic_algorithms(strict, warn_only=only_warns)
            torch.set_float32_matmul_precision(precision)
            torch.set_default_dtype(default)


def floated(inputs: Sequence[Tensor], device: torch.device | None) -> list[Tensor]:
    """The inputs on the device, floating-point ones in float32."""
    moved = [x.detach() if device is None else x.detach().to(device) for x in inputs]
    return [x.float() if x.is_floating_point() else x for x in moved]


class _Sizes:
    """The norm and the largest absolute value of weights, each read once: one that is used as it stands is its parameter."""

    def __init__(self, run: Pass) -> None:
        self.run, self.known = run, dict[str | fx.Node, tuple[float, float]]()

    def __call__(self, of: str | fx.Node) -> tuple[float, float]:
        """Those of a parameter by its key, or of the weight that a node makes."""
        key = of
        if isinstance(of, fx.Node) and of.op == "get_attr" and str(of.target) in self.run.parameters:
            key = str(of.target)
        if key not in self.known:
            value = self.run.parameters[key] if isinstance(key, str) else self.run.weights[key]
            self.known[key] = power(value) ** 0.5, peak(value) if value.numel() else 0.0
        return self.known[key]


def _parameters(graph: Graph, run: Pass, slopes: Slopes, sizes: _Sizes) -> dict[str, ParameterRecord]:
    hidden = _hidden(run)
    found = {}
    for key in run.parameters:
        constant, slope = graph.constants[key], slopes.parameters.get(key)
        zero = slope is None or slope.zero
        if key in hidden and zero:
            continue  # its way to the output was not run: nothing can be said of its gradient
        norm = None if slope is None else slope.norm
        found[key] = ParameterRecord(
            constant.name, constant.shape, sizes(key)[0], norm, zero, None if zero else 0, slope is not None
        )
    return found


def _hidden(run: Pass) -> frozenset[str]:
    """The keys of the constants that lead to a node that could not be run."""
    return frozenset(str(n.target) for n in upstream(run.missing) if n.op == "get_attr")


def _with_revival(record: ParameterRecord, key: str, after: Mapping[str, int | None]) -> ParameterRecord:
    if key not in after:
        return record
    return replace(record, gradient_zero=True, revived=after[key])


def _weight_records(run: Pass, slopes: Slopes, observer: SignalObserver, sizes: _Sizes) -> Iterator[WeightRecord]:
    for node, uses in run.uses.items():
        for use in uses:
            shape = run.weight_shape(use.weight)
            if shape is None or math.prod(shape) == 0:
                continue
            slope = slopes.sites.get((node, use.weight))
            norm, largest = sizes(use.weight)
            steep = None if slope is None else slope.norm
            source = next((a for a in node.all_input_nodes if a.name in observer.signals), None)
            whole = completed(node, run.constant)
            whole = whole if whole.name in observer.signals else node
            seen, into = observer.signals.get(whole.name), observer.signals.get(source.name) if source is not None else None
            yield WeightRecord(
                node=node.name,
                weight=use.weight.name,
                argument=use.use.argument,
                index=use.use.index,
                constants=constants_of(use.weight),
                elements=math.prod(shape),
                weight_norm=norm,
                gradient_norm=steep,
                trust_ratio=norm / steep if steep is not None and steep > 0 else None,
                input_moment2=None if into is None else into.moment2,
                output_moment2=None if seen is None else seen.moment2,
                output_gradient_moment2=None if seen is None else seen.gradient_moment2,
                units=None if slope is None else slope.units.get(use),
                weight_peak=largest,
                output=whole.name,
                fan_in=use.use.fans(shape)[0] if len(use.use.axes) == len(shape) else None,
            )
