"""IA501: a layer of a trained checkpoint that was not trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, trained
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.support import names, sigmas, to_output

# Trained layers that make a checkpoint a trained one, and the share that may be fresh before the checkpoint is a new model.
_TRAINED = 2
_FRESH = 0.5


class UntrainedLayer(Rule):
    """A layer of a trained checkpoint still has the distribution of a fresh initialization.

    What it does: tests every weight for being an independent draw from a known law (moments, extremes, rows and columns,
    largest singular value), and reports those that are, where most of the others are not. Weights that are frozen, and those
    that cannot have learnt because a zero behind them stops their gradient (LoRA's A before its B), are left out. Where only
    layers that make the output are fresh, or zero, it is a remark: a new head belongs to every fine-tuning.

    Why it is bad: a key did not match when the checkpoint was loaded, so that this layer is random. The model answers, badly.

    Example: `model.load_state_dict(state, strict=False)` with renamed layers.

    Instead: `strict=True`, and look at the keys that are missing.

    Source: https://github.com/huggingface/transformers/issues/46620; Martin & Mahoney 2021 for spectra of trained layers.
    """

    code = "IA501"
    name = "untrained-layer"
    severity = "error"
    phase = "trained"
    summary = "a layer of a trained checkpoint still has the distribution of a fresh initialization"
    thresholds = (
        Threshold("fresh", _FRESH, "of the layers", "with more fresh layers it is a new model"),
        Threshold("trained", _TRAINED, "trained layers, at least", "one alone may be mistaken for one, two are a training"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers of this kind."""
        if evidence.phase not in ("trained", "mixed"):
            return
        yield from self._emptied(evidence)
        judged = {x.tensor: x for x in evidence.layers if x.recognition is not None and x.pair.role != "embedding"}
        fresh = [x for x in judged.values() if _is_draw(x) and not _stopped(x)]
        trained = [x for x in judged.values() if x.recognition is not None and x.recognition.verdict == "trained"]
        most = self.limit(evidence, "fresh") * (len(fresh) + len(trained))
        if not fresh or len(trained) < self.limit(evidence, "trained") or len(fresh) > most:
            return
        head = all(to_output(x) for x in fresh)
        first = fresh[0]
        assert first.recognition is not None
        fit = first.recognition.schemes[0]
        errors = sigmas(first, fit.variance)
        yield self.finding(
            f"{names(fresh)} still {'has' if len(fresh) == 1 else 'have'} the distribution of a fresh draw: {fit.name} fits "
            f"{first.tensor} (p = {fit.p_value:.2g}, {abs(errors):.1f} standard errors away), while {len(trained)} others are "
            "trained: " + ("right for a new head, else it was not loaded" if head else "it was probably not loaded"),
            _again(*fresh),
            severity="info" if head else "error",
            measured=first.moments.variance,
            expected=fit.variance,
            law=fit.name,
            standard_errors=errors,
            tensor=first.tensor,
            site=first.pair.site,
            location=first.pair.location,
            related=tuple(x.tensor for x in fresh[1:]),
        )

    def _emptied(self, evidence: Evidence) -> Iterator[Finding]:
        """Weights of zeros that cut trained weights off from the gradient: what was trained was not silent then."""
        trace = evidence.trace
        if trace is None:
            return
        silent = {n for n, p in trace.parameters.items() if p.gradient_zero}
        trained = [x for x in evidence.layers if x.recognition is not None and x.recognition.verdict == "trained"]
        cut = [x.tensor for x in trained if x.pair.trainable and silent.issuperset(x.pair.constants)]
        empty = [x for x in evidence.layers if x.moments.count and x.moments.min == x.moments.max == 0 and x.pair.fan_in > 1]
        if not cut or not empty or len(trained) < self.limit(evidence, "trained"):
            return
        # A new head of zeros lets the gradient through after its own first step.
        head = all(to_output(x) for x in empty)
        reason = "right for a new head, else it was not loaded" if head else "as of a tensor that was not loaded"
        yield self.finding(
            f"all {empty[0].moments.count:,} values of {names(empty)} are zero, and no gradient reaches {names(cut)} any more, "
            f"which {'was' if len(cut) == 1 else 'were'} trained: the zeros came later, {reason}",
            _again(*empty),
            severity="info" if head else "error",
            measured=0.0,
            expected=empty[0].expectation.exact or empty[0].expectation.lecun or 1 / max(1, empty[0].pair.fan_in),
            law=EXACT + "gain²/fan_in is a spread, and zeros have none",
            tensor=empty[0].tensor,
            site=empty[0].pair.site,
            location=empty[0].pair.location,
            related=(*(x.tensor for x in empty[1:]), *cut),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """All layers trained."""
        return (example("trained", trained), example("an adapter whose second matrix is zero", _adapted))

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """One layer as it was made."""
        return (
            example("one layer made again", lambda: trained(lambda m: linear(m)[2].reset_parameters())),
            example("a layer of zeros", lambda: trained(lambda m: linear(m)[2].weight.zero_())),
            example("a head made again", lambda: trained(lambda m: m.append(_head(m.pop(-1))))),
        )


def _again(*layers: LayerEvidence) -> str:
    """Loading says what is missing; the draw is for a layer that is meant to be new, and must not come first."""
    return f"model.load_state_dict(state, strict=True)  # names what is missing; a new layer: {init_line(*layers)}"


def _head(old: Any) -> Any:
    from torch import nn

    return nn.Linear(old.in_features, old.out_features * 8)


def _adapted() -> Any:
    from torch import nn

    model, inputs = trained()

    class Adapted(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.first, self.second = base, nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False)
            nn.init.zeros_(self.second.weight)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.second(self.first(x))

    model[4] = Adapted(model[4])
    return model, inputs


def _stopped(layer: LayerEvidence) -> bool:
    """Whether the probe's gradient of this weight is exactly zero wherever it is used."""
    return bool(layer.records) and all(r.gradient_norm == 0 for r in layer.records)


def _is_draw(layer: LayerEvidence) -> bool:
    recognition = layer.recognition
    if recognition is None or recognition.verdict != "init" or not recognition.schemes or not layer.pair.trainable:
        return False
    return layer.moments.m2 > 0
