"""IA311: a trainable parameter without a gradient."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from initaudit.graph.reach import downstream
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, linear, mlp, residual
from initaudit.rules.gates import factors
from initaudit.rules.remedy import parameter
from initaudit.rules.rule import Example, Finding, Rule, Severity, Threshold
from initaudit.rules.structure import dropped_at, dropping, leads_to_unknown
from initaudit.rules.support import initial, names

if TYPE_CHECKING:
    from torch import fx

    from initaudit.graph.graph import Graph
    from initaudit.probe.trace import ParameterRecord

_CUT = 0.1  # share of the parameters
_DROPS = "a dropout that keeps nothing in training"


class NoGradient(Rule):
    """A trainable parameter receives no gradient at all.

    What it does: names parameters whose gradient is exactly zero in the probe and after two virtual steps of all others, also
    because training drops what they make always, those that forward never reaches, and those that the module's own autograd
    does not reach. A zero that another zero explains (the branch behind a zero gate) is healthy: it comes alive at the second
    step. Single tokens and vectors that only training modes use (mask tokens) are left to `info`; what a stack of equal blocks
    leaves over, as its last one may, is a warning at most.

    Why it is bad: such a parameter keeps its random values, and costs memory and an optimizer state.

    Example: a layer that is constructed and then forgotten in forward; a ReLU behind a norm whose scale is zero; an encoder
    whose codes are chosen by argmax, without a straight-through estimator; a dropout of probability 1.

    Instead: call the layer, or remove it; initialise what cuts it off.

    Source: `find_unused_parameters` of torch.nn.parallel.DistributedDataParallel, which stops at the same fault.
    """

    code = "IA311"
    name = "no-gradient"
    severity = "error"
    phase = "init"
    summary = "a trainable parameter receives no gradient at all"
    thresholds = (
        Threshold("error", _CUT, "of the parameters", "a network of which a tenth does not learn is another network"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for parameters that are never reached, one for those that are cut off."""
        graph, trace = evidence.graph, evidence.trace
        if graph is None or not initial(evidence):
            return
        if graph.own is not None and graph.own.frozen:
            yield from self._frozen(evidence)
        missed = _missed_in_forward(evidence)
        yield from self._unreached(evidence, [n for n in graph.unused if n not in missed])
        if missed:
            yield self._missed(evidence, missed)
        if trace is None or trace.broken:
            return
        beyond = leads_to_unknown(evidence)
        silent = {n: p for n, p in trace.parameters.items() if p.gradient_zero and p.revived is None and n not in beyond}
        silent = {n: p for n, p in silent.items() if p.name not in missed}
        if not silent:
            return
        reaching = _reaching(graph)
        stopped = {n: p for n, p in silent.items() if n not in reaching}
        # What a step without a derivative stops is one cause, and told as one where it is most of what gets no gradient.
        cut_off = 2 * len(stopped) > len(silent)
        first = _cut(evidence, list((stopped if cut_off else silent).values()))
        # A layer of one unit is a layer all the same.
        used = {c for x in evidence.layers if x.pair.role == "contraction" for c in x.pair.constants}
        matrices = any(_matrix(p.shape) or (p.name in used and len(p.shape) > 1) for p in silent.values())
        elements = {n: math.prod(p.shape) for n, p in trace.parameters.items()}
        share = sum(elements[n] for n in silent) / max(1, sum(elements.values()))
        others = [p.name for p in silent.values() if p is not first]
        scale = first.norm == 0 and len(first.shape) < 2
        step = "" if first.norm == 0 else _without_gradient(graph, set(stopped))
        gone = dropping(graph) if first.norm != 0 and (not step or _DROPS in step) else ""
        yield self.finding(
            f"{len(silent)} trainable parameters get a gradient of exactly zero, also after two steps of the others: "
            f"{names([first.name, *others])}"
            + (f"; {first.name} is a factor of zero and cuts the others off" if first.norm == 0 and others else "")
            + (f"; their only way to the output is {step}, which has no gradient" if step else "")
            + (f"; {_DROPS} ({gone}) stands before them" if gone and not step else "")
            + "; they keep their values for ever",
            f"torch.nn.init.ones_({parameter(evidence, first.name)})"
            if scale
            else f"drop with a probability below 1 at {gone}: 0.1 is usual"
            if gone
            else "train them by a loss of their own or a straight-through estimator, or freeze them with requires_grad_(False)"
            if step
            else "initialise what cuts them off, or remove them from the model",
            # Scales and shifts may cancel in what a small input shows of a network; a tenth of it is a cut.
            severity=("error" if share > self.limit(evidence, "error") or first.norm == 0 else "warning")
            if matrices
            else "info",
            measured=0.0,
            tensor=first.name,
            related=tuple(others),
        )

    def _frozen(self, evidence: Evidence) -> Iterator[Finding]:
        held = [x.tensor for x in evidence.layers]
        if held:
            yield self.finding(
                f"every parameter is frozen (requires_grad is False), and the weights are as drawn: {names(held)}; no "
                "optimizer can change any of them",
                "module.requires_grad_(True), or load trained weights before they are frozen",
                severity="warning",
                measured=0.0,
                tensor=held[0],
                related=tuple(held[1:]),
            )

    def _missed(self, evidence: Evidence, missed: frozenset[str]) -> Finding:
        """Parameters of layers that forward calls, and which the module's own backward pass does not reach."""
        shapes = {n: a.shape for n, a in evidence.checkpoint.arrays.items()}
        own = [n for n in shapes if n in missed] or sorted(missed)
        share = _values(evidence, own)
        first = next((n for n in own if _matrix(shapes.get(n, ()))), own[0])
        others = [n for n in own if n != first]
        small: Severity = "warning" if _matrix(shapes.get(first, ())) else "info"
        return self.finding(
            f"no gradient reaches {len(missed)} trainable parameters, although forward computes with them: "
            f"{names([first, *others])}; it does so under torch.no_grad() or inference_mode(), or goes on with .data, a "
            "copy or mere numbers; they keep their values for ever",
            "take that part of forward out of torch.no_grad(), or freeze its parameters with requires_grad_(False)",
            severity="error" if share > self.limit(evidence, "error") else small,
            measured=0.0,
            tensor=first,
            related=tuple(others),
        )

    def _unreached(self, evidence: Evidence, unused: list[str]) -> Iterator[Finding]:
        graph = evidence.graph
        assert graph is not None
        if not unused:
            return
        shapes = {n: a.shape for n, a in evidence.checkpoint.arrays.items()}
        layers = [n for n in unused if _matrix(shapes.get(n, ()))]
        # A path that one batch does not take (an expert without tokens), or an input that was not given, is no weight's fault.
        left_out = any("by running" in note for note in graph.notes) or _optional_inputs(evidence)
        values = _values(evidence, unused)
        # What is left over where a stack ends (the last skip of a WaveNet) is waste, not a network that cannot learn.
        harms = values > self.limit(evidence, "error") and not _ends_a_stack(evidence, layers)
        level: Severity = "info" if left_out or not layers else "error" if harms else "warning"
        yield self.finding(
            f"forward never reaches {len(unused)} trainable parameters: {names(unused)}"
            + (f" ({100 * values:.2g} % of all values)" if layers else "")
            + ("; an input that was left out may lead there" if left_out else "; they keep their random values"),
            "call the layer in forward, or delete it; or freeze it with requires_grad_(False)",
            severity=level,
            measured=0.0,
            tensor=(layers or unused)[0],
            related=tuple(n for n in unused if n != (layers or unused)[0]),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Zeros that come alive."""
        return (
            example("zero gates", lambda: residual(3, gate=0.0)),
            example("a zero head", lambda: mlp(32, 64, 5, change=lambda m: linear(m)[-1].weight.zero_())),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A layer that forward goes round, and a cut."""
        return (
            example("a forgotten layer", _forgotten),
            example("codes that are chosen by argmax", _chosen),
            example("an encoder under no_grad", _blocked),
            example("all frozen", _frozen),
            example("a dropout of probability 1", _dropped),
            example(
                "biases that switch all units off", lambda: mlp(32, 64, 64, 5, change=lambda m: linear(m)[1].bias.fill_(-99))
            ),
        )


def _missed_in_forward(evidence: Evidence) -> frozenset[str]:
    """The parameters that autograd misses, and of which the graph does not tell why.

    A layer that was called is reached, also where the trace lost sight of it, and of the inputs with it.
    """
    graph = evidence.graph
    if graph is None or graph.own is None:
        return frozenset()
    told = {p.name for p in evidence.trace.parameters.values() if p.gradient_zero} if evidence.trace is not None else set[str]()
    reads = any(n.op == "output" for n in downstream(n for n in graph.fx.nodes if n.op == "placeholder"))
    lost = set(graph.unused) if reads else set(graph.unused) - graph.own.called
    return graph.own.missed - told - lost


def _ends_a_stack(evidence: Evidence, unused: Sequence[str]) -> bool:
    """Whether of each of these weights there are more of the same shape that forward does reach: blocks of one stack."""
    assert evidence.graph is not None
    shapes = {n: tuple(a.shape) for n, a in evidence.checkpoint.arrays.items() if a.trainable}
    left = Counter(shapes[n] for n in unused if n in shapes)
    every = Counter(shapes.values())
    return all(count < every[shape] - count for shape, count in left.items())


def _values(evidence: Evidence, given: Collection[str]) -> float:
    """The share of these parameters in the values of all trainable ones, those that forward does not reach included."""
    assert evidence.graph is not None
    sizes = {n: math.prod(a.shape) for n, a in evidence.checkpoint.arrays.items()}
    trainable = {c.name for c in evidence.graph.constants.values() if c.kind == "parameter" and c.trainable}
    whole = sum(sizes.get(n, 0) for n in trainable | {*given, *evidence.graph.unused})
    return sum(sizes.get(n, 0) for n in given) / max(1, whole)


def _cut(evidence: Evidence, silent: list[ParameterRecord]) -> ParameterRecord:
    """The parameter at which the gradient is cut off: a zero factor, else the first matrix."""
    assert evidence.graph is not None
    multiply = {*factors(evidence.graph), *(c for x in evidence.layers for c in x.pair.constants)}
    return min(silent, key=lambda p: (not (p.norm == 0 and p.name in multiply), not _matrix(p.shape)))


def _stops(node: fx.Node) -> bool:
    """Whether a node hands no gradient on: whole numbers, a comparison, a size, detach, what training drops always."""
    from initaudit.graph.calls import role_of

    dtype = node.meta.get("dtype")
    whole = dtype is not None and not dtype.is_floating_point and not dtype.is_complex
    if whole or node.op != "call_function":
        return whole
    role = role_of(node)
    return role.kind == "shape" or role.name in ("detach", "dropped") or dropped_at(node) is not None


def _without_gradient(graph: Graph, keys: set[str]) -> str:
    """The first step without a derivative (argmin, a comparison, detach) that everything from these constants goes through."""
    from initaudit.graph.calls import role_of
    from initaudit.graph.graph import location_of

    stack = [n for n in graph.fx.nodes if n.op == "get_attr" and str(n.target) in keys]
    seen, ends = set(stack), []
    while stack:
        for user in stack.pop().users:
            if user.op == "output":
                return ""
            if role_of(user).kind == "shape":
                continue
            if _stops(user):
                ends.append(user)
            elif user not in seen:
                seen.add(user)
                stack.append(user)
    order = {n: i for i, n in enumerate(graph.fx.nodes)}
    first = min(ends, key=order.__getitem__, default=None)
    if first is not None and role_of(first).name == "getitem":
        first = first.all_input_nodes[0]  # one of several results: the places that a maximum was found at
    if first is None:
        return ""
    gone = dropped_at(first)
    what = _DROPS if gone is not None else role_of(first).name
    return f"{what} ({location_of(gone or first).site or first.name})"


def _reaching(graph: Graph) -> frozenset[str]:
    """The constants from which a way leads to the output on which every step has a derivative."""
    stack = [n for n in graph.fx.nodes if n.op == "output"]
    seen = set(stack)
    while stack:
        for given in stack.pop().all_input_nodes:
            if given not in seen and not _stops(given):
                seen.add(given)
                stack.append(given)
    return frozenset(str(n.target) for n in seen if n.op == "get_attr")


def _optional_inputs(evidence: Evidence) -> bool:
    """Whether forward takes tensors that were not given: a second modality, a decoder."""
    forward = getattr(evidence.checkpoint.program, "forward", None)
    if forward is None or evidence.graph is None:
        return False
    given = {i.name.partition(".")[0] for i in evidence.graph.inputs}
    free = (p for p in inspect.signature(forward).parameters.values() if p.default is None)
    return any(p.name not in given for p in free)


def _matrix(shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a layer's weight: two axes longer than one. A token or a scale is not."""
    return sum(n > 1 for n in shape) > 1


def _forgotten() -> Any:
    import torch
    from torch import nn

    class Skips(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(torch.relu(self.first(x)))
            return y

    return Skips(), (torch.randn(8, 16),)


def _frozen() -> Any:
    model, inputs = mlp(16, 32, 4)
    return model.requires_grad_(False), inputs


def _dropped() -> Any:
    import torch
    from torch import nn

    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(1.0), nn.Linear(32, 4)), (torch.randn(8, 16),)


def _blocked() -> Any:
    import torch
    from torch import nn

    class Blocked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head = nn.Linear(16, 32), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                x = torch.relu(self.encoder(x))
            y: torch.Tensor = self.head(x)
            return y

    return Blocked(), (torch.randn(64, 16),)


def _chosen() -> Any:
    import torch
    from torch import nn

    class Codes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.codes, self.head = nn.Linear(16, 32), nn.Embedding(32, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(torch.relu(self.codes(self.encoder(x).argmax(-1))))
            return y

    return Codes(), (torch.randn(64, 16),)
