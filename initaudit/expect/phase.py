"""Is a model as it was made, trained, or both? From what is known of each of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from initaudit.expect.recognise import Recognition
from initaudit.measure.moments import Moments

Kind = Literal["weight", "bias", "scale", "running_mean", "running_var", "other"]
TensorPhase = Literal["init", "trained", "unknown"]
Phase = Literal["init", "trained", "mixed", "unknown"]

# Laws that biases are given; a bias that follows none of them and is no constant has been moved.
BIAS_LAWS = ("pytorch_default", "normal(1e-06)")
# A fresh model may hold tables that no law drew: sine positions, filters, step sizes. Up to this share of the weights.
TABLES = 0.25


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as evidence: its `kind` by its use ("scale" of a normalization, "bias" of anything), its moments, what it was
    recognised as (None where that was not tried) and, for a bias, the name of its weight."""

    name: str
    kind: Kind
    moments: Moments
    recognition: Recognition | None = None
    bias_of: str | None = None


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
    weights = {r.name: _weight_phase(r) for r in records if r.kind in ("weight", "other")}
    untouched = sum(v == "init" for v in vectors.values())
    moved = sum(v == "trained" for v in vectors.values())
    fresh, trained = sum(w == "init" for w in weights.values()), sum(w == "trained" for w in weights.values())
    surroundings = _surroundings(untouched, moved, fresh, trained)
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


def _surroundings(untouched: int, moved: int, fresh: int, trained: int) -> TensorPhase:
    """What most of the model says: "init", "trained" or "unknown"."""
    if untouched + moved >= 2:
        if moved == 0:
            return "init" if fresh or not trained else "unknown"
        if moved >= untouched or trained > fresh:
            return "trained"
        return "init" if trained <= TABLES * (fresh + trained) else "trained"
    if fresh + trained == 0:
        return "unknown" if untouched == moved else "init" if untouched > moved else "trained"
    return "init" if trained <= TABLES * (fresh + trained) else "trained"


def _vector_phase(record: TensorRecord) -> TensorPhase:
    m = record.moments
    if m.count == 0 or m.nan or m.inf:
        return "unknown"
    if m.m2 == 0:
        # One value is a constant whatever happened to it, unless it is the constant that it was given.
        return "init" if m.mean in (0.0, 1.0) or m.count > 1 else "trained"
    if record.kind == "bias" and record.recognition is not None:
        names = {fit.name for fit in record.recognition.schemes}
        if names.intersection(BIAS_LAWS):
            # A few small values stay inside the bound whatever happens to them.
            return "init" if m.count >= 256 else "unknown"
    return "trained"


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
