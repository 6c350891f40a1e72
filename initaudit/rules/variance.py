"""What the rules about variances share: which layers deviate, whether it harms, and one finding for all that deviate alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from initaudit.config import Config
from initaudit.rules.culprit import culprit
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.health import Health, Level, below, health
from initaudit.rules.structure import dropping
from initaudit.rules.support import (
    SIGMAS,
    activation_of,
    error_of,
    fresh_layers,
    initial,
    is_head,
    normalised,
    path_of,
    plain,
    power,
    ratio_of,
    view,
)

# A deviation smaller than this compounds to less than a factor of 10 over ten layers.
LEAST = 0.8
# Root mean square slope of a bounded activation, as a share of its steepest slope, below which it passes little; a tanh fed
# with N(0, 1) has 0.68, a sigmoid 0.83. At 0.55 seven tenths of the gradient's power are lost in each layer.
FLAT = 0.55
# So many saturated layers in series are an error. Of networks that were trained, 4 layers of tanh under N(0, 1) learn with the
# right step size, 6 learn half, 10 learn nothing; sigmoid layers learn less with each from 10 on under SGD.
DEEP = 6
# Both optimizers are more likely to fail than not: whatever deviates then is no mere deviation.
LIKELY = 0.5
# The activation's own gain may be doubted by a factor of two in either direction.
TIMES = 4.0
_BOUNDED = ("tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign", "erf", "atan", "relu6")

Side = Literal["small", "large"]


@dataclass(frozen=True)
class Deviation:
    """Layers whose variance is off on one side, in forward order, and the harm that the probe saw."""

    layers: tuple[LayerEvidence, ...]
    level: Level
    consequence: str
    health: Health

    @property
    def ratio(self) -> float:
        """The geometric mean of observed / expected."""
        ratios = [r for x in self.layers if (r := ratio_of(x)) is not None and r > 0]
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan

    @property
    def product(self) -> float:
        """What these layers together leave of the signal's second moment, by their ratios."""
        logs = sum(math.log(r) for x in self.layers if (r := ratio_of(x)) is not None and r > 0)
        return math.exp(max(-700.0, min(700.0, logs)))


@dataclass(frozen=True)
class Bounds:
    """What decides about one side: the thresholds that IA101 (small) and IA102 (large) declare, for IA103 too.

    `ratio` is observed / expected variance, `untrainable` the risk from which every deviation that harms is an error; the
    others are about saturation: `slope` of the steepest, `times` the variance needed, in `layers` that make an error.
    """

    ratio: float
    untrainable: float
    slope: float
    times: float
    layers: float


def bounds(config: Config, side: Side) -> Bounds:
    """The bounds in force."""
    given = config.thresholds
    if side == "small":
        return Bounds(given.get("IA101.ratio", LEAST), given.get("IA101.untrainable", LIKELY), FLAT, TIMES, DEEP)
    return Bounds(
        given.get("IA102.ratio", 1 / LEAST),
        given.get("IA102.untrainable", LIKELY),
        given.get("IA102.slope", FLAT),
        given.get("IA102.times", TIMES),
        given.get("IA102.layers", DEEP),
    )


def deviates(layer: LayerEvidence, side: Side, limit: float) -> bool:
    """Whether the variance is off on this side beyond sampling error, at a place where its scale reaches the activation."""
    ratio, error = ratio_of(layer), error_of(layer)
    if ratio is None or not ratio > 0 or not math.isfinite(error) or not layer.pair.trainable:
        return False
    if normalised(layer) or not plain(layer) or "attention" in path_of(layer) or activation_of(layer) == "softmax":
        return False
    if side == "small":
        return ratio < limit and ratio * (1 + SIGMAS * error) < 1
    return ratio > limit and ratio * (1 - SIGMAS * error) > 1


def deviation(evidence: Evidence, side: Side) -> Deviation | None:
    """The layers whose deviation harms, by what the probe saw; None where nothing does."""
    if not initial(evidence):
        return None
    if evidence.graph is not None and dropping(evidence.graph):
        return None  # what is dropped always is missing everywhere behind, and its gradient before
    limits = bounds(evidence.config, side)
    off = [x for x in fresh_layers(evidence) if deviates(x, side, limits.ratio) and not is_head(evidence, x)]
    if not off:
        return None
    state = health(evidence)
    if side == "small":
        level, text = state.vanishing, vanishing_text(state)
    else:
        level, text = state.exploding, exploding_text(state)
        if not level and (flat := [x for x in off if saturates(evidence, x, limits)]):
            slope = slope_of(evidence, flat[0]) or 0.0
            off, level = flat, "error" if len(flat) >= limits.layers else "warning"
            text = f"their activations are in the flat part for most inputs (slope {slope:.2g} of the steepest)"
    if not level:
        return None
    if side == "small" and (alone := _alone(evidence, state)) is not None:
        if alone.tensor not in {x.tensor for x in off}:
            return None  # a rule about the symptom names it
        off = [alone]
    risk = evidence.risk
    if risk is not None and min(risk.untrainable_sgd, risk.untrainable_adam) > limits.untrainable:
        level = "error"
    # Of layers that are off, those matter that carry the harm: what compounds most.
    strongest = max(abs(math.log(ratio_of(x) or 1)) for x in off)
    off = [x for x in off if abs(math.log(ratio_of(x) or 1)) > strongest / 4]
    return Deviation(tuple(off), level, text, state)


def _alone(evidence: Evidence, state: Health) -> LayerEvidence | None:
    """The one layer that does what vanishes, where it is one."""
    flow, limits = view(evidence).flow, state.limits
    if flow is None:
        return None
    both = {n: flow.size[n] * flow.contrast[n] for n in flow.size}
    measures = (
        (flow.contrast, state.contrast, limits.contrast),
        (both, state.signal, limits.signal),
        (flow.gradient, state.gradient, limits.gradient),
    )
    found = (culprit(evidence, state, values, total) for values, total, limit in measures if below(total, limit))
    return next((x for x in found if x is not None), None)


def vanishing_text(state: Health) -> str:
    """What is left at the ends, in words."""
    parts = []
    if state.gradient < 1e-2:
        where = state.worst_gradient.tensor if state.worst_gradient is not None else "the first layer"
        parts.append(f"{power(state.gradient)} of the gradient's power reaches {where}")
    if state.contrast < 1e-2:
        parts.append(f"inputs differ in {power(state.contrast)} of what they did at the input")
    if not parts or state.signal < 1e-5:
        parts.append(f"{power(state.signal)} of the signal's power that tells inputs apart reaches the output layer")
    return " and ".join(parts[:2])


def exploding_text(state: Health) -> str:
    """How far signal and gradient grow, in words."""
    parts = []
    if state.growth > 1e2:
        where = state.worst_growth.tensor if state.worst_growth is not None else "the last layer"
        parts.append(f"the signal's power grows {power(state.growth)}-fold up to {where}")
    if state.gradient_growth > 1e2:
        parts.append(f"the gradient's power grows {power(state.gradient_growth)}-fold on its way back")
    return " and ".join(parts) or "nothing grows by much"


def slope_of(evidence: Evidence, layer: LayerEvidence) -> float | None:
    """The root mean square slope of the layer's activation as the probe saw it, relative to its steepest; None if unknown."""
    if evidence.trace is None:
        return None
    steepest = {"sigmoid": 0.25, "hardsigmoid": 1 / 6}
    for feed in layer.feeds:
        signal = evidence.trace.signals.get(feed.node)
        if feed.activation.name in _BOUNDED and signal is not None and signal.slope is not None:
            return signal.slope / (steepest.get(feed.activation.name, 1.0) * feed.activation.scale)
    return None


def saturates(evidence: Evidence, layer: LayerEvidence, limits: Bounds) -> bool:
    """Whether a bounded activation behind this layer passes little because the weights drive it into its flat part."""
    slope, ratio = slope_of(evidence, layer), ratio_of(layer)
    return slope is not None and slope < limits.slope and ratio is not None and ratio > limits.times


def similar(layers: Sequence[LayerEvidence], key: Callable[[LayerEvidence], object]) -> list[LayerEvidence]:
    """The largest group of layers with the same key, in order."""
    groups: dict[object, list[LayerEvidence]] = {}
    for layer in layers:
        groups.setdefault(key(layer), []).append(layer)
    return max(groups.values(), key=len, default=[])
