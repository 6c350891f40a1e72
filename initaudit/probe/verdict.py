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

from initaudit.graph.graph import Graph
from initaudit.probe.cause import cause_of
from initaudit.probe.features import OPTIMIZERS, changes, doubted, duplicate_share, features
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
def coefficients() -> Mapping[str, Mapping[str, Mapping[str, float]]]:
    """The fitted coefficients by optimizer, "stepped" (virtual steps were taken) or "still", and feature."""
    text = files(__package__).joinpath("coefficients.json").read_text(encoding="utf-8")
    found: dict[str, Mapping[str, Mapping[str, float]]] = json.loads(text)
    return {name: found[name] for name in OPTIMIZERS}


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
    broken = trace.broken
    kinds = {name: "stepped" if f"unlearnt_{name}" in values else "still" for name in OPTIMIZERS}
    sgd, adam = (1.0 if broken else probability(values, coefficients()[name][kinds[name]]) for name in OPTIMIZERS)
    # What steps of plain gradient descent have got over was absorbed: by norms, by skips, by the step itself.
    left = doubted(trace, "sgd")
    vanishing = left * max(_decades(moved["signal_loss"]), _decades(moved["gradient_loss"]))
    exploding = 1.0 if broken else left * max(_decades(moved["signal_growth"]), _decades(moved["gradient_growth"]))
    symmetry, cause = duplicate_share(trace), ""
    if max(vanishing, exploding, symmetry, min(sgd, adam)) >= _LIKELY:
        best = "adam" if adam <= sgd else "sgd"
        better = coefficients()[best][kinds[best]]
        weighed = {name: w * values[name] for name, w in better.items() if name in values}
        cause = cause_of(graph, trace, symmetry, weighed, _HALF)
    return Risk(symmetry, vanishing, exploding, sgd, adam, cause, {**values, **moved})


def seems_untrainable(trace: Trace, risk: Risk) -> bool:
    """Whether the virtual steps say that the network does not learn, and further ones could tell otherwise.

    Where neighbouring inputs become unrelated, to remember them is easy and proves nothing: such networks do not generalise.
    """
    asked = any(r.losses and r.optimizer == "adam" for r in trace.response) and not trace.broken
    return asked and min(risk.untrainable_sgd, risk.untrainable_adam) >= _LIKELY and not risk.features["chaos"] > 0


def may_follow(risk: Risk) -> bool:
    """Whether to learn what the network is with other weights says that it learns (`persistence.py`).

    Where the signal grows by decades on its way, the scale of the outputs is the fault and not what was meant; and copies of
    one unit follow together what each would have to learn by itself.
    """
    return max(risk.exploding, risk.symmetry) < _LIKELY


def _decades(lost: float) -> float:
    return _logistic((lost - _HALF) / _WIDTH)
