"""Is a model as it was made, trained, or both? From what is known of each of its tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from initaudit.expect.laws import chi_square
from initaudit.expect.recognise import Recognition
from initaudit.measure.moments import Moments

Kind = Literal["weight", "bias", "scale", "running_mean", "running_var", "other"]
TensorPhase = Literal["init", "trained", "unknown"]
Phase = Literal["init", "trained", "mixed", "unknown"]

# Laws that biases are given; a bias that follows none of them and is no constant has been moved.
BIAS_LAWS = ("pytorch_default", "normal(1e-06)")
# A fresh model may hold tables that no law drew: sine positions, filters, step sizes. Up to this share of the weights.
TABLES = 0.25
# A vector of so few different values, each as often as this, was written and not trained.
_LEVELS, _MANY = 4, 8
# What it takes to say that one law drew the vectors of all layers: so many vectors and values, and a p-value above this. Nets
# that were trained for as little as one epoch come to 1e-10 and less.
_LEAST_VECTORS, _LEAST_VALUES, _ONE_LAW = 3, 400, 1e-2
_FAR = 4.0  # standard errors


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as evidence: its `kind` by its use ("scale" of a normalization, its shift too; "bias" of anything), its moments,
    what it was recognised as (None where that was not tried), for a bias the name of its weight, and for a vector how many
    different values it has (None where nobody counted)."""

    name: str
    kind: Kind
    moments: Moments
    recognition: Recognition | None = None
    bias_of: str | None = None
    levels: int | None = None


@dataclass(frozen=True)
class PhaseEvidence:
    """The phase of a model, that of each tensor in its company, and the counts that decided.

    `untouched` and `moved` count biases and scales; `fresh` and `trained` weights of enough values to tell.
    """

    phase: Phase
    tensors: dict[str, TensorPhase] = field(default_factory=dict)
    untouched: int = 0
    moved: int = 0
    fresh: int = 0
    trained: int = 0

    def __str__(self) -> str:
        vectors = f"{self.untouched} of {self.untouched + self.moved} biases and scales as they were made"
        return f"{vectors}, {self.fresh} of {self.fresh + self.trained} weights explained by a fresh draw"


def phase_of(records: Sequence[TensorRecord]) -> PhaseEvidence:
    """The phase of the model that consists of these tensors.

    Biases and scales at exactly the constant they were given do not survive a step of training, so they outweigh the weights;
    a weight's normal law may survive it, so in a trained model a weight that looks fresh is believed only where its bias is
    untouched or its law would have been broken. Running statistics tell that data has passed, not that weights were moved.
    """
    vectors = {r.name: _vector_phase(r) for r in records if r.kind in ("bias", "scale")}
    vectors.update(_drawn_alike([r for r in records if vectors.get(r.name) == "trained"]))
    weights = {r.name: _weight_phase(r) for r in records if r.kind in ("weight", "other")}
    untouched = sum(v == "init" for v in vectors.values())
    moved = sum(v == "trained" for v in vectors.values())
    fresh, trained = sum(w == "init" for w in weights.values()), sum(w == "trained" for w in weights.values())
    sure = sum(weights.get(r.name) == "init" and r.recognition is not None and r.recognition.decisive for r in records)
    surroundings = _surroundings(untouched, moved, fresh, trained, sure)
    tensors: dict[str, TensorPhase] = {**vectors, **weights}
    biases = {r.bias_of: vectors[r.name] for r in records if r.kind == "bias" and r.bias_of is not None}
    for r in records:
        if r.name in weights:
            tensors[r.name] = _in_company(weights[r.name], r.recognition, biases.get(r.name), surroundings)
    remain = sum(tensors[name] == "init" for name in weights)
    phase: Phase = surroundings
    if surroundings == "trained" and remain:
        phase = "mixed"
    return PhaseEvidence(phase, tensors, untouched, moved, fresh, trained)


def _surroundings(untouched: int, moved: int, fresh: int, trained: int, sure: int) -> TensorPhase:
    """What most of the model says: "init", "trained" or "unknown". `sure` fresh weights would show any step of training."""
    if untouched + moved >= 2:
        if moved == 0:
            return "init" if fresh or not trained else "unknown"
        if trained == 0 and moved <= sure:
            return "unknown"  # biases that a law of somebody's own drew look as moved ones do
        if moved >= untouched or trained > fresh:
            return "trained"
        return "init" if trained <= TABLES * (fresh + trained) else "trained"
    if fresh + trained == 0:
        return "unknown" if untouched == moved else "init" if untouched > moved else "trained"
    if trained <= TABLES * (fresh + trained):
        return "init"
    # Without vectors a law that nobody knows (splines fitted to noise) is all that speaks for training: it takes the most.
    return "trained" if trained > sure or moved > untouched else "unknown"


def _vector_phase(record: TensorRecord) -> TensorPhase:
    m = record.moments
    if m.count == 0 or m.nan or m.inf:
        return "unknown"
    if m.m2 == 0:
        if m.mean in (0.0, 1.0) or m.count > 1:
            return "init"
        # One value is a constant whatever happened to it: a scale was given 1, but a bias may have been drawn.
        return "unknown" if record.kind == "bias" else "trained"
    if record.levels is not None and record.levels <= _LEVELS and m.count >= _MANY * record.levels:
        return "init"  # blocks of constants, as of a gate that starts open: no step leaves so many values equal
    if record.kind == "bias" and record.recognition is not None:
        names = {fit.name for fit in record.recognition.schemes}
        if names.intersection(BIAS_LAWS):
            # A few small values stay inside the bound whatever happens to them, if not on the grid of their generator.
            return "init" if m.count >= 256 or record.recognition.decisive else "unknown"
    return "trained"


def _drawn_alike(moved: Sequence[TensorRecord]) -> dict[str, TensorPhase]:
    """Scales (or shifts) that one law explains in every layer of the model: drawn, because training moves each layer elsewhere.
    Where they are too few to be sure, they say nothing.

    DCGAN draws scales from N(1, 0.02), others from N(0.1, 0.1). Means are compared by analysis of variance, variances by
    Bartlett's test (1937).
    """
    found: dict[str, TensorPhase] = {}
    vectors = [r for r in moved if r.kind == "scale" and r.moments.count > 1 and math.isfinite(r.moments.kurtosis)]
    centred = [r for r in vectors if abs(r.moments.mean) * math.sqrt(r.moments.count) < _FAR * r.moments.std]
    for group in (centred, [r for r in vectors if r not in centred]):
        if len(group) > 1 and _one_law(group):
            sure = len(group) >= _LEAST_VECTORS and sum(r.moments.count for r in group) >= _LEAST_VALUES
            found.update(dict.fromkeys((r.name for r in group), "init" if sure else "unknown"))
    return found


def _one_law(group: Sequence[TensorRecord]) -> bool:
    counts = [r.moments.count for r in group]
    total, groups = sum(counts), len(group)
    means, variances = [r.moments.mean for r in group], [r.moments.m2 / (r.moments.count - 1) for r in group]
    within = sum(r.moments.m2 for r in group) / (total - groups)
    centre = sum(n * m for n, m in zip(counts, means, strict=True)) / total
    between = sum(n * (m - centre) ** 2 for n, m in zip(counts, means, strict=True)) / within
    spread = (total - groups) * math.log(within) - sum((n - 1) * math.log(v) for n, v in zip(counts, variances, strict=True))
    bartlett = spread / (1 + (sum(1 / (n - 1) for n in counts) - 1 / (total - groups)) / (3 * (groups - 1)))
    kurtosis = sum(n * r.moments.kurtosis for n, r in zip(counts, group, strict=True)) / total
    normal = abs(kurtosis - 3) < _FAR * math.sqrt(24 / total) + 6 * groups / total  # a short sample's kurtosis is too low
    return normal and min(chi_square(max(0.0, t), groups - 1, 1) for t in (between, bartlett)) > _ONE_LAW


def _weight_phase(record: TensorRecord) -> TensorPhase:
    if record.recognition is None or (record.kind == "other" and record.recognition.verdict == "trained"):
        return "unknown"
    return record.recognition.verdict


def _in_company(
    alone: TensorPhase, recognition: Recognition | None, bias: TensorPhase | None, surroundings: TensorPhase
) -> TensorPhase:
    """What a weight's own values say, corrected by its bias and by the rest of the model."""
    if alone == "unknown" or recognition is None:
        return alone if bias is None or alone != "unknown" else bias if bias == surroundings else "unknown"
    if alone == "init" and surroundings == "trained" and not recognition.decisive:
        if bias == "init":
            return "init"
        return "trained" if bias == "trained" else "unknown"
    return alone
