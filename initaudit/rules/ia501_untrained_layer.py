"""IA501: a layer of a trained checkpoint that was not trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from initaudit.load.checkpoint import Checkpoint
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, trained
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Severity, Threshold
from initaudit.rules.support import fields, names, sigmas, to_output

# Trained layers that make a checkpoint a trained one, and the share that may be fresh before the checkpoint is a new model.
_TRAINED = 2
_FRESH = 0.5


class UntrainedLayer(Rule):
    """A layer of a trained checkpoint still has the distribution of a fresh initialization.

    What it does: tests every weight for being an independent draw from a known law (moments, extremes, rows and columns,
    largest singular value), and reports those that are, where most of the others are not. Weights that are frozen, and those
    that cannot have learnt because a zero behind them stops their gradient (LoRA's A before its B), are left out. A matrix of
    zeros is an error where it cuts trained weights off from the gradient, and a warning where it may belong to a branch that
    was never trained. Where only layers that make the output are fresh, or zero, it is a remark: a new head belongs to every
    fine-tuning; a head of zeros in an ONNX file is a warning. A matrix of one other number is an error, and a warning where it
    makes the output. Without a graph a head is a matrix of whose outputs no other weight takes as many.

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
        emptied = list(self._emptied(evidence))
        yield from emptied
        yield from self._zeros(evidence, {name for finding in emptied for name in (finding.tensor, *finding.related)})
        yield from self._filled(evidence)
        judged = {x.tensor: x for x in evidence.layers if x.recognition is not None and x.pair.role != "embedding"}
        left_out = {name for pair in _adapters(evidence) for name in pair} | lost(evidence.checkpoint)
        fresh = [x for x in judged.values() if _is_draw(x) and not _stopped(x) and x.tensor not in left_out]
        trained = [x for x in judged.values() if x.recognition is not None and x.recognition.verdict == "trained"]
        most = self.limit(evidence, "fresh") * (len(fresh) + len(trained))
        if not fresh or len(trained) < self.limit(evidence, "trained") or len(fresh) > most:
            return
        head = all(_makes_output(evidence, x) for x in fresh)
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
        trained = _trained(evidence)
        cut = [x.tensor for x in trained if x.pair.trainable and silent.issuperset(x.pair.constants)]
        empty = [x for x in evidence.layers if x.moments.count and x.moments.min == x.moments.max == 0 and x.pair.fan_in > 1]
        if not cut or not empty or len(trained) < self.limit(evidence, "trained"):
            return
        # A new head of zeros lets the gradient through after its own first step.
        head = all(to_output(x) for x in empty)
        reason = "right for a new head, else it was not loaded" if head else "as of a tensor that was not loaded"
        says = (
            f"and no gradient reaches {names(cut)} any more, which {'was' if len(cut) == 1 else 'were'} trained: the zeros "
            f"came later, {reason}"
        )
        law = "gain²/fan_in is a spread, and zeros have none"
        yield self._of_zeros(empty, says, "info" if head else "error", law, cut)

    def _zeros(self, evidence: Evidence, named: set[str]) -> Iterator[Finding]:
        """Matrices of zeros round which the signal finds a way, or of which no graph tells: never trained, or wiped."""
        trained = {x.tensor for x in _trained(evidence)}
        adapters = {zero for _, zero in _adapters(evidence)}
        empty = {x.tensor: x for x in evidence.layers if _is_empty(x) and x.tensor not in named | adapters}
        found = list(empty.values())
        head = all(_makes_output(evidence, x) for x in found)
        if not found or len(trained) < (1 if head else self.limit(evidence, "trained")):
            return
        reason = "right for a new head, else it was not loaded" if head else "never trained, or wiped when the file was written"
        says = f"while {len(trained)} others are trained: {reason}"
        # Before a fine-tuning there is a module with a new head; what is exported answers.
        remark = head and evidence.checkpoint.format != "onnx"
        yield self._of_zeros(
            found, says, "info" if remark else "warning", "a step moves every value whose gradient is not zero"
        )

    def _filled(self, evidence: Evidence) -> Iterator[Finding]:
        """Matrices of one number that is not zero: nothing that was trained ends so, nor does a new layer begin so."""
        trained = {x.tensor for x in _trained(evidence)}
        for layer in {x.tensor: x for x in evidence.layers if _is_filled(x)}.values() if trained else ():
            head, m = _makes_output(evidence, layer), layer.moments
            yield self.finding(
                f"all {m.count:,} values of {layer.tensor} are {m.mean:.6g}, while {len(trained)} others are trained: training "
                "leaves no matrix so; it was overwritten, or not loaded, and its units compute one number",
                _again(layer),
                severity="warning" if head else "error",
                measured=0.0,
                expected=layer.expectation.exact or layer.expectation.lecun or 1 / max(1, layer.pair.fan_in),
                law=EXACT + "a step moves every value by its own gradient",
                **fields(layer),
            )

    def _of_zeros(
        self, layers: list[LayerEvidence], says: str, severity: Severity, law: str, further: Sequence[str] = ()
    ) -> Finding:
        first = layers[0]
        return self.finding(
            f"all {first.moments.count:,} values of {names(layers)} are zero, {says}",
            _again(*layers),
            severity=severity,
            measured=0.0,
            expected=first.expectation.exact or first.expectation.lecun or 1 / max(1, first.pair.fan_in),
            law=EXACT + law,
            tensor=first.tensor,
            site=first.pair.site,
            location=first.pair.location,
            related=(*(x.tensor for x in layers[1:]), *further),
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
            example("a branch of zeros", lambda: trained(_silent_branch)),
            example("a layer of one number", lambda: trained(lambda m: linear(m)[2].weight.fill_(0.05))),
            example("a head made again", lambda: trained(lambda m: m.append(_head(m.pop(-1))))),
        )


def lost(checkpoint: Checkpoint) -> set[str]:
    """The tensors that the file lacks: what a module has in their place was drawn, and IA502 says why."""
    return {name for p in checkpoint.problems if p.code == "IA502" for name in (p.tensor, *p.related)}


def _trained(evidence: Evidence) -> list[LayerEvidence]:
    return [x for x in evidence.layers if x.recognition is not None and x.recognition.verdict == "trained"]


def _again(*layers: LayerEvidence) -> str:
    """Loading says what is missing; the draw is for a layer that is meant to be new, and must not come first."""
    return f"model.load_state_dict(state, strict=True)  # names what is missing; a new layer: {init_line(*layers)}"


def _head(old: Any) -> Any:
    from torch import nn

    return nn.Linear(old.in_features, old.out_features * 8)


def _silent_branch(model: Any) -> None:
    from torch import nn

    class Beside(nn.Module):
        def __init__(self, base: Any) -> None:
            super().__init__()
            self.base, self.branch = base, nn.Linear(64, 64)
            nn.init.zeros_(self.branch.weight)

        def forward(self, x: Any) -> Any:
            return self.base(x) + self.branch(x)

    model[4] = Beside(model[4])


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


def _is_empty(layer: LayerEvidence) -> bool:
    """Whether a matrix is zero as a whole; vectors of zeros (shifts, tokens) are what many networks keep."""
    return layer.moments.count > 0 and layer.moments.zeros == layer.moments.size and sum(n > 1 for n in layer.pair.shape) > 1


def _is_filled(layer: LayerEvidence) -> bool:
    """Whether a matrix holds one number, and is no fixed sum or average: of ones, of 1/n, or of a channel's own places."""
    pair, m = layer.pair, layer.moments
    if not m.count or m.min != m.max or m.zeros or not pair.trainable or pair.role == "embedding":
        return False
    fixed = m.mean == 1 or any(math.isclose(m.mean * n, 1, rel_tol=1e-2) for n in (pair.fan_in, pair.fan_out))
    units = math.prod(size for size, axis in zip(pair.shape, pair.axes, strict=True) if axis == "o")
    return not fixed and units > 1 and pair.fan_in > _taps(layer)


def _adapters(evidence: Evidence) -> list[tuple[str, str]]:
    """(drawn factor, zero factor) of products as they are added to trained weights before they learn.

    The zero one takes what the other gives, fewer values than go in or come out, and both stand side by side in the model.
    """
    zeros = [x for x in evidence.layers if _is_empty(x)]
    drawn = [x for x in evidence.layers if _is_draw(x)] if zeros else []
    return [
        (a.tensor, b.tensor)
        for b in zeros
        for a in drawn
        if a.pair.fan_out == b.pair.fan_in < min(a.pair.fan_in, b.pair.fan_out) and _together(a.tensor, b.tensor)
    ]


def _together(first: str, second: str) -> bool:
    """Whether names differ in one part only: `q.lora_A.weight` and `q.lora_B.weight`."""
    a, b = first.split("."), second.split(".")
    return len(a) == len(b) and sum(x != y for x, y in zip(a, b, strict=True)) <= 1


# The outputs of a convolution are flattened over places; those of a matrix are split or concatenated over a few parts (three
# of attention, two of a gated unit). Below this many outputs every width is a multiple of them.
_PARTS, _PLACES, _MANY = 4, 1024, 16


def _makes_output(evidence: Evidence, layer: LayerEvidence) -> bool:
    """Whether a weight makes the output: by the graph, else because no other weight takes what it gives."""
    if evidence.graph is not None:
        return to_output(layer)
    out = layer.pair.fan_out if layer.pair.gates else layer.moments.size // max(1, layer.pair.fan_in)
    if layer.pair.role != "contraction":
        return False
    most = _PLACES if layer.pair.operator.startswith("conv") else _PARTS
    for other in evidence.layers:
        taken = other.pair.fan_in * other.pair.groups // max(1, _taps(other))
        if other.tensor == layer.tensor or other.pair.role == "embedding" or not taken:
            continue
        split = out % taken == 0 and out // taken <= _PARTS
        joined = taken % out == 0 and (taken == out or (out >= _MANY and taken // out <= most))
        if split or joined:
            return False
    return True


def _taps(layer: LayerEvidence) -> int:
    return math.prod(size for size, axis in zip(layer.pair.shape, layer.pair.axes, strict=True) if axis == "k")


def _stopped(layer: LayerEvidence) -> bool:
    """Whether the probe's gradient of this weight is exactly zero wherever it is used."""
    return bool(layer.records) and all(r.gradient_norm == 0 for r in layer.records)


def _is_draw(layer: LayerEvidence) -> bool:
    recognition = layer.recognition
    if recognition is None or recognition.verdict != "init" or not recognition.schemes or not layer.pair.trainable:
        return False
    return layer.moments.m2 > 0
