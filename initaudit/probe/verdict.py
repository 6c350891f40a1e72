"""The risk of an untrained network: probabilities from a small monotone model over features with a physical meaning.

Each feature is 0 where nothing is wrong and grows with the harm; each coefficient is at least 0, so more harm never lowers the
risk. The coefficients stand in coefficients.json and were fitted by benchmarks/trainability.py to networks that were trained.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files

from initaudit.graph.graph import Graph, location_of
from initaudit.probe.features import changes, duplicate_share, features, gradient_powers, signal_powers
from initaudit.probe.trace import Trace

# Decades of second moment at which vanishing or exploding is as likely as not to matter: healthy default networks lose and gain
# up to three, and of those that were trained most failed from seven on.
_HALF, _WIDTH = 5.0, 0.8
_LIKELY = 0.5


@dataclass(frozen=True)
class Risk:
    """Probabilities that the network is too symmetric, that signal or gradient vanish or explode, that it does not learn.

    `cause` is a sentence that names the cause and the place, empty where no risk is likely. `features` are what was judged.
    """

    symmetry: float
    vanishing: float
    exploding: float
    untrainable_sgd: float
    untrainable_adam: float
    cause: str = ""
    features: Mapping[str, float] = field(default_factory=dict)


@functools.cache
def coefficients() -> Mapping[str, Mapping[str, float]]:
    """The fitted coefficients by optimizer and feature."""
    text = files(__package__).joinpath("coefficients.json").read_text(encoding="utf-8")
    found: dict[str, Mapping[str, float]] = json.loads(text)
    return {name: found[name] for name in ("sgd", "adam")}


def probability(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The logistic function of the weighted features."""
    score = weights["intercept"] + sum(w * values[name] for name, w in weights.items() if name != "intercept")
    return _logistic(score)


def _logistic(score: float) -> float:
    return 1 / (1 + math.exp(-min(max(score, -60.0), 60.0)))


def judge(graph: Graph, trace: Trace) -> Risk:
    """The risk that `trace` shows; a signal that is not finite is certain to explode."""
    values = features(trace)
    moved = changes(trace)
    broken = trace.first_non_finite is not None or trace.first_non_finite_gradient is not None
    sgd, adam = (1.0 if broken else probability(values, weights) for weights in coefficients().values())
    vanishing = max(_decades(moved["signal_loss"]), _decades(moved["gradient_loss"]))
    exploding = 1.0 if broken else max(_decades(moved["signal_growth"]), _decades(moved["gradient_growth"]))
    risk = Risk(duplicate_share(trace), vanishing, exploding, sgd, adam, "", {**values, **moved})
    return Risk(**{**risk.__dict__, "cause": _cause(graph, trace, risk)})


def _decades(lost: float) -> float:
    return _logistic((lost - _HALF) / _WIDTH)


def _cause(graph: Graph, trace: Trace, risk: Risk) -> str:
    """One sentence on the likeliest cause; empty where nothing is likely."""
    sites = {n.name: location_of(n).site or n.name for n in graph.fx.nodes}
    if trace.first_non_finite is not None:
        return f"the signal is not finite from {sites.get(trace.first_non_finite, trace.first_non_finite)} on"
    if max(risk.vanishing, risk.exploding, risk.symmetry, min(risk.untrainable_sgd, risk.untrainable_adam)) < _LIKELY:
        return ""
    f = risk.features
    names = {"signal_loss": "signal", "gradient_loss": "gradient", "signal_growth": "signal", "gradient_growth": "gradient"}
    worst = max(names, key=lambda name: f[name])
    if f[worst] >= _HALF:
        return _per_layer(trace, worst, names[worst], sites)
    if f["dead"] >= _LIKELY:
        return f"{f['dead']:.0%} of the weights have no gradient, now and after two steps"
    if risk.symmetry >= _LIKELY:
        return f"{risk.symmetry:.0%} of the units of a layer are copies of each other"
    if f["collapse_sgd"] >= 1 or f["rank_loss_sgd"] >= 1:
        share = 10 ** -f["collapse_sgd"]
        return f"all inputs ask for the same change: examples differ in {share:.2g} of the gradient's squared norm"
    return ""


def _per_layer(trace: Trace, change: str, what: str, sites: Mapping[str, str]) -> str:
    """ "the gradient loses a factor 3.1 per layer from 9 back to 0"."""
    held = signal_powers(trace) if what == "signal" else gradient_powers(trace)
    first, last = (sites.get(node, node) for node in (held[0][0], held[-1][0]))
    total = abs(math.log10(held[-1][1]) - math.log10(held[0][1]))
    factor = 10 ** (total / (2 * max(len(held) - 1, 1)))
    verb = "loses" if change.endswith("loss") else "gains"
    way = f"from {first} to {last}" if what == "signal" else f"from {last} back to {first}"
    return f"the {what} {verb} a factor {factor:.3g} per layer {way}, {total:.1f} decades of power in all"
