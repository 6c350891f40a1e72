"""What several rules ask of the evidence, each question answered once."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from initaudit.rules.evidence import Evidence, LayerEvidence

if TYPE_CHECKING:
    from torch import fx

    from initaudit.probe.trace import Trace
    from initaudit.rules.flow import Flow

# Standard errors beyond which a difference is not sampling: one in 2 million under a normal law, so that a network of ten
# thousand tensors gives no false one.
SIGMAS = 5.0
# Words for the layers of a task, which fine-tuning draws anew on purpose; asked only where no graph says what makes the output.
_WORDS = "head|heads|lm_head|classifier|cls|score|logits|fc|output|predictions?|pooler|decoder"
HEAD = re.compile(rf"(^|[._])({_WORDS})([._](weight|bias|[0-9]+))*$", re.IGNORECASE)
NORMS = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "normalization")


@dataclass(frozen=True)
class View:
    """Evidence with what follows from it; one for each `Evidence`, made by `view`."""

    evidence: Evidence
    flow: Flow | None

    @property
    def trace(self) -> Trace | None:
        """What the probe saw."""
        return self.evidence.trace

    @functools.cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """The nodes of the graph by name."""
        return {n.name: n for n in self.evidence.graph.fx.nodes} if self.evidence.graph is not None else {}

    @functools.cached_property
    def constant(self) -> Set[fx.Node]:
        """The nodes that depend on no input."""
        from initaudit.graph.constness import constant_nodes

        return constant_nodes(self.evidence.graph.fx) if self.evidence.graph is not None else frozenset()

    @functools.cached_property
    def last(self) -> frozenset[str]:
        """The tensors of layers with no other layer behind them; none without a graph."""
        before: set[fx.Node] = set()
        found = set()
        for node in reversed(list(self.nodes.values())):
            if any(u in before for u in node.users):
                before.add(node)
            elif node.name in self.layer_at:
                found.add(self.layer_at[node.name].tensor)
                before.add(node)
        return frozenset(found)

    @functools.cached_property
    def layer_at(self) -> Mapping[str, LayerEvidence]:
        """The layer at the node of this name; of several at one node the last."""
        return {p.node: layer for layer in self.evidence.layers for p in layer.pairs}


@functools.lru_cache(maxsize=4)
def _view(key: _ById) -> View:
    evidence = key.evidence
    if evidence.graph is None or evidence.trace is None:
        return View(evidence, None)
    from initaudit.rules.flow import flow_of

    return View(evidence, flow_of(evidence.graph, evidence.trace))


class _ById:
    """Evidence by identity: comparing its arrays would cost more than what is kept."""

    def __init__(self, evidence: Evidence) -> None:
        self.evidence = evidence

    def __hash__(self) -> int:
        return id(self.evidence)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.evidence is self.evidence


def view(evidence: Evidence) -> View:
    """The evidence with its flow, computed once for all rules."""
    return _view(_ById(evidence))


def rate(evidence: Evidence, change: str, ratio: float) -> str:
    """Where and how fast, where that explains half of the `ratio` in decades: "; the gradient loses a factor 3.1 per block"."""
    if evidence.graph is None or evidence.trace is None or not 0 < ratio < math.inf:
        return ""
    from initaudit.probe.cause import moving

    text = moving(evidence.graph, evidence.trace, change, abs(math.log10(ratio)) / 2)
    return f"; {text}" if text else ""


def is_fresh(evidence: Evidence, layer: LayerEvidence) -> bool:
    """Whether an initialization rule may judge this weight: no trained tensor is ever judged by how it was drawn."""
    if evidence.phase == "trained":
        return False
    if evidence.phase == "init":
        return True
    return layer.recognition is None or layer.recognition.verdict != "trained"


def fresh_layers(evidence: Evidence, *kinds: str) -> Iterator[LayerEvidence]:
    """The layers that initialization rules judge: linear, convolutional and recurrent ones where no kind is given."""
    for layer in evidence.layers:
        if layer.pair.role in (kinds or ("contraction", "recurrent")) and is_fresh(evidence, layer):
            yield layer


def initial(evidence: Evidence) -> bool:
    """Whether the network as a whole has not been trained, so that its signal is what initialization made it."""
    return evidence.phase in ("init", "unknown")


def path_of(layer: LayerEvidence) -> tuple[str, ...]:
    """What lies between a weight and the activation it is judged by."""
    return layer.feed.path if layer.feed is not None else ()


def activation_of(layer: LayerEvidence) -> str:
    """The name of the activation that a weight is judged by, with its parameters."""
    feed = layer.feed
    if feed is None:
        return "unknown"
    parameters = ", ".join(f"{v:g}" for v in feed.activation.parameters.values())
    return f"{feed.activation.name}({parameters})" if parameters else feed.activation.name


def normalised(layer: LayerEvidence) -> bool:
    """Whether every activation that the weight feeds lies behind a normalization, which takes its scale away."""
    return bool(layer.feeds) and all(any(name in NORMS for name in feed.path) for feed in layer.feeds)


def plain(layer: LayerEvidence) -> bool:
    """Whether the weight's scale reaches its activation as it is: no norm, no sum with a skip, no gate in between."""
    kept = ("concat", "pool", "max_pool", "sum", "attention", "multiply", "output", "mask")
    return all(all(name in kept or name.endswith(" gate") for name in feed.path) for feed in layer.feeds[:1])


def to_output(layer: LayerEvidence) -> bool:
    """Whether the weight makes the model's output: a head, whose scale is a choice of its own."""
    return any("output" in feed.path for feed in layer.feeds)


def is_head(evidence: Evidence, layer: LayerEvidence) -> bool:
    """Whether the weight makes an output and nothing else: the mean of a variational autoencoder is read by its decoder too."""
    return to_output(layer) and (evidence.graph is None or layer.tensor in view(evidence).last)


def error_of(layer: LayerEvidence) -> float:
    """The standard error of the observed variance relative to it; infinite where there are too few values."""
    variance, error = layer.moments.variance, layer.expectation.standard_error
    return error / variance if variance > 0 and math.isfinite(error) and error > 0 else math.inf


def ratio_of(layer: LayerEvidence) -> float | None:
    """Observed variance over that which keeps the signal's size through the activation; None where either is unknown."""
    exact = layer.expectation.exact
    if exact is None or not exact > 0 or not math.isfinite(layer.moments.variance):
        return None
    return layer.moments.variance / exact


def off_scale(layers: Sequence[LayerEvidence], *, large: bool) -> list[LayerEvidence]:
    """The layers whose variance is above (or below) that which keeps a signal, each weight once: what a remedy draws again."""
    found = {x.tensor: x for x in layers if (ratio := ratio_of(x)) is not None and (ratio > 1.5 if large else ratio < 1 / 1.5)}
    return list(found.values())


def sigmas(layer: LayerEvidence, expected: float) -> float:
    """Standard errors between the observed variance and `expected`, signed; the error is that of the larger of the two.

    A standard error is a share of its variance: that of the smaller one would make any distance a million errors.
    """
    return apart(layer.moments.variance, expected, error_of(layer))


def apart(observed: float, expected: float, relative: float) -> float:
    """The signed distance of two variances in standard errors, each a share `relative` of its variance: of the larger one's."""
    larger = max(observed, expected)
    return (observed - expected) / (relative * larger) if larger > 0 and 0 < relative < math.inf else 0.0


def chain(evidence: Evidence) -> list[LayerEvidence]:
    """The linear, convolutional and recurrent layers that the probe reached, in forward order, without the output's."""
    return [
        x for x in evidence.layers if x.records and x.pair.role in ("contraction", "recurrent") and not is_head(evidence, x)
    ]


def power(value: float) -> str:
    """A ratio of second moments for a message: short, and readable when it is very small or large."""
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.0e}"


def fields(layer: LayerEvidence) -> dict[str, Any]:
    """Where a finding about this layer is."""
    return {"tensor": layer.tensor, "site": layer.pair.site, "location": layer.pair.location}


def names(layers: list[LayerEvidence] | list[str], most: int = 4) -> str:
    """A few names for a message: the first ones and how many more."""
    plain_names = [x if isinstance(x, str) else x.tensor for x in layers]
    unique = list(dict.fromkeys(plain_names))
    more = f" and {len(unique) - most} more" if len(unique) > most else ""
    return ", ".join(unique[:most]) + more


BOUNDED = ("tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign", "erf", "atan", "relu6", "sin", "cos")


def bounded(evidence: Evidence, layers: tuple[LayerEvidence, ...]) -> bool:
    """Whether any of the layers feeds a bounded activation, or is a recurrence, whose signal cannot grow."""
    return any(x.pair.role == "recurrent" or any(f.activation.name in BOUNDED for f in x.feeds) for x in layers)
