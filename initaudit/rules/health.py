"""How the signal and the gradient of an untrained network fare as a whole: the consequences that init rules wait for.

Each threshold stands between what healthy networks show and where training was seen to fail. Healthy: default torchvision,
timm and transformers models, GPT-2 and Llama of up to 12 blocks, 20 layers of ReLU under He. Failing: 276 small networks that
were trained under five learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.flow import ROUNDING
from initaudit.rules.rule import Threshold
from initaudit.rules.structure import reading_inputs
from initaudit.rules.support import chain, normalised, view

if TYPE_CHECKING:
    from initaudit.config import Config
    from initaudit.probe.trace import Signal

Level = Literal["", "warning", "error"]

# (warning, error). Healthy networks keep 1e-2 of the signal that tells examples apart on its way to the output; AlexNet as it
# is shipped, which barely trains under SGD, 6e-7. Below 1e-9 nearly all failed under SGD and half under Adam.
SIGNAL = (1e-7, 1e-9)
# Of the share that differs between examples healthy ones keep 2e-2.
CONTRAST = (1e-4, 1e-9)
# Of the gradient's squared norm healthy ones keep 1e-3 down to the first layer, AlexNet 4e-6.
GRADIENT = (1e-6, 1e-11)
# Healthy signals grow 10-fold in power; a growth that a norm ends is at most a warning.
GROWTH = (1e3, 1e7)
# Healthy gradients grow 100-fold. Norms without skips add some 20 % a layer (Yang et al. 2019, theorem 3.9), 2e4 over the 94
# layers of Inception, and train: a growth of less than RATE a layer has to be that much larger to be a fault.
GRADIENT_GROWTH = (1e4, 1e8)
RATE, SLOWLY = 2.0, 1e4
_MEASURED = "between healthy networks and those that failed to train (initaudit/rules/health.py)"


def pair_of(limits: tuple[float, float], what: str) -> tuple[Threshold, Threshold]:
    """The two thresholds of a rule about the network as a whole."""
    return Threshold("warning", limits[0], what, _MEASURED), Threshold("error", limits[1], what, _MEASURED)


@dataclass(frozen=True)
class Limits:
    """(warning, error) of each ratio; the rules of these codes declare them."""

    signal: tuple[float, float] = SIGNAL
    contrast: tuple[float, float] = CONTRAST
    gradient: tuple[float, float] = GRADIENT
    growth: tuple[float, float] = GROWTH
    gradient_growth: tuple[float, float] = GRADIENT_GROWTH


def limits_of(config: Config) -> Limits:
    """The limits in force."""

    def of(code: str, default: tuple[float, float]) -> tuple[float, float]:
        given = config.thresholds
        return given.get(f"{code}.warning", default[0]), given.get(f"{code}.error", default[1])

    return Limits(
        of("IA301", SIGNAL), of("IA307", CONTRAST), of("IA303", GRADIENT), of("IA302", GROWTH), of("IA304", GRADIENT_GROWTH)
    )


@dataclass(frozen=True)
class Health:
    """Ratios of second moments at their worst, and the level of harm of each; `layers` are what they were measured over.

    `growth` is the largest of any layer, `reaching` that of the signal which the output's layer reads.
    """

    layers: tuple[LayerEvidence, ...]
    signal: float = 1.0
    contrast: float = 1.0
    gradient: float = 1.0
    growth: float = 1.0
    gradient_growth: float = 1.0
    reaching: float = 1.0
    worst_gradient: LayerEvidence | None = None
    worst_growth: LayerEvidence | None = None
    worst_gradient_growth: LayerEvidence | None = None
    limits: Limits = Limits()

    @property
    def vanishing(self) -> Level:
        """How badly signal, contrast or gradient vanish."""
        found = (
            below(self.signal, self.limits.signal),
            below(self.contrast, self.limits.contrast),
            below(self.gradient, self.limits.gradient),
        )
        return worst(*found)

    @property
    def exploding(self) -> Level:
        """How badly signal or gradient grow."""
        return worst(self.growing, self.gradient_growing)

    @property
    def gradient_growing(self) -> Level:
        """How badly the gradient grows on its way back, by its size and by its rate."""
        slow = self.gradient_growth < RATE ** len(self.layers)
        return above(self.gradient_growth / (SLOWLY if slow else 1.0), self.limits.gradient_growth)

    @property
    def growing(self) -> Level:
        """How badly the signal grows: an error only where the growth reaches the output's layer."""
        level = above(self.growth, self.limits.growth)
        return level if above(self.reaching, self.limits.growth) else "warning" if level else ""


def below(value: float, limits: tuple[float, float]) -> Level:
    """The level of a value that must not be small; exact zeros are no vanishing but a cut, and have rules of their own."""
    return "" if value >= limits[0] or value == 0 else "warning" if value >= limits[1] else "error"


def above(value: float, limits: tuple[float, float]) -> Level:
    """The level of a value that must not be large."""
    return "" if not value > limits[0] else "warning" if value <= limits[1] else "error"


def worst(*levels: Level) -> Level:
    """The worst of some levels."""
    return "error" if "error" in levels else "warning" if "warning" in levels else ""


def is_constant(signal: Signal | None, contrast: Mapping[str, float]) -> bool:
    """Whether a layer's output is the same for all inputs, but for rounding."""
    return signal is not None and (signal.moment2 == 0 or contrast.get(signal.node, 1.0) <= ROUNDING)


def _ended(layer: LayerEvidence) -> bool:
    """Whether what stands behind a layer takes its growth away: a norm, or only periodic functions, which have no flat part."""
    return normalised(layer) or (bool(layer.feeds) and all(f.activation.name in ("sin", "cos") for f in layer.feeds))


def health(evidence: Evidence) -> Health:
    """The health of the network as the probe saw it; all ones where there was none, or its signal was not finite."""
    flow, trace = view(evidence).flow, evidence.trace
    layers, limits = chain(evidence), limits_of(evidence.config)
    if flow is None or trace is None or evidence.graph is None or not layers or trace.broken:
        return Health(tuple(layers), limits=limits)
    signal = min((flow.size[n] * flow.contrast[n] for n in flow.last if n in flow.size), default=1.0)
    contrast = min((flow.contrast[n] for n in flow.last if n in flow.contrast), default=1.0)
    inputs = {n.name: [a.name for a in n.all_input_nodes] for n in evidence.graph.fx.nodes}

    def at(layer: LayerEvidence, values: Mapping[str, float]) -> list[float]:
        return [values[name] for name in inputs.get(layer.pair.node, ()) if name in values]

    # A layer's own weights decide what goes on below it, and below the first there is nothing to train: it learns by what
    # arrives at its output. BLIP's image tower begins with weights of 1e-10, and learns as fast as one of 0.02.
    first = reading_inputs(evidence)

    def learns_by(layer: LayerEvidence) -> list[float]:
        if layer.tensor not in first:
            return at(layer, flow.gradient)
        return [flow.gradient[r.output] for r in layer.records if r.output in flow.gradient]

    gradients = [(min(found), x) for x in layers if (found := learns_by(x))]
    grown = [(max(found), x) for x in layers if (found := at(x, flow.gradient_growth))]
    # A norm right behind a layer undoes its growth, as a sine does; one that comes later leaves the layers between to suffer.
    whole = {x.pair.node: r.output for x in layers for r in x.records if r.node == x.pair.node}
    sizes = [(flow.growth[whole[x.pair.node]], x) for x in layers if whole.get(x.pair.node) in flow.growth and not _ended(x)]
    low = min((g for g in gradients if g[0] > 0), key=lambda g: g[0], default=(1.0, None))
    high = max(grown, key=lambda g: g[0], default=(1.0, None))
    size = max(sizes, key=lambda g: g[0], default=(1.0, None))
    reaches = max((flow.growth[n] for n in flow.last if n in flow.growth), default=1.0)
    # Behind a layer of zeros a norm divides by its epsilon alone: what gradients make of that says nothing of the weights.
    cut = contrast <= ROUNDING or any(is_constant(trace.signals.get(n), flow.contrast) for n in flow.last)
    backwards = (1.0, None) if cut else high
    return Health(
        tuple(layers),
        signal,
        contrast,
        low[0],
        size[0],
        backwards[0],
        reaches,
        low[1],
        size[1],
        backwards[1],
        limits,
    )
