"""From evidence and findings to the record that every report format is fed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from initaudit.auditing.gains import Gains
from initaudit.measure.against import KINDS
from initaudit.measure.moments import Moments
from initaudit.probe.trace import Units
from initaudit.report.report import Activation, Layer, ModelReport, Verdict
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.rule import Finding


def model_report(evidence: Evidence, findings: Sequence[Finding]) -> ModelReport:
    """The report on one model. The verdict is that of its worst finding."""
    risk = evidence.risk
    graph_notes = evidence.graph.notes if evidence.graph is not None else ()
    return ModelReport(
        source=evidence.checkpoint.source,
        format=evidence.checkpoint.format,
        phase=evidence.phase,
        verdict=verdict_of(findings),
        risk={}
        if risk is None
        else {
            "symmetry": risk.symmetry,
            "vanishing": risk.vanishing,
            "exploding": risk.exploding,
            "untrainable": {"sgd": risk.untrainable_sgd, "adam": risk.untrainable_adam},
        },
        layers=tuple(_layer(evidence, layer) for layer in evidence.layers),
        findings=tuple(findings),
        depth=_depths(evidence),
        notes=(*_against(evidence), *_probe_notes(evidence), *evidence.checkpoint.notes, *graph_notes),
        changes=_changes(evidence),
        cause=risk.cause if risk is not None else "",
        probe=_network(evidence),
    )


def _changes(evidence: Evidence) -> dict[str, tuple[str, ...]]:
    if evidence.base is None:
        return {}
    found = {kind: tuple(c.tensor for c in evidence.base.of(kind)) for kind in KINDS}
    return {kind: tensors for kind, tensors in found.items() if tensors}


def _network(evidence: Evidence) -> dict[str, Any]:
    if evidence.trace is None and evidence.prediction is None:
        return {}
    from initaudit.auditing.whole import probe_report  # it imports torch, which audits of weights alone do without

    return probe_report(evidence)


def _against(evidence: Evidence) -> tuple[str, ...]:
    if evidence.base is None:
        return ()
    counts = ", ".join(f"{len(tensors)} {kind}" for kind, tensors in _changes(evidence).items())
    prefix = f"; prefix '{evidence.base.prefix}' matched" if evidence.base.prefix else ""
    return (f"against {evidence.base.source}: {counts or 'no tensor in common'}{prefix}",)


def _probe_notes(evidence: Evidence) -> Iterator[str]:
    """What was asked of the probe beyond one run, in words."""
    if evidence.trace is not None and (evidence.trace.rehearsal is not None or evidence.trace.persisted is not None):
        from initaudit.auditing.probing import summary  # it imports torch, which audits of weights alone do without

        yield from summary(evidence.trace)
    if evidence.risk_spread:
        wide, most = max(evidence.risk_spread.items(), key=lambda item: item[1])
        yield (
            f"over {evidence.config.probe_seeds} seeds the risks scatter with a standard deviation of at most {most:.2g} "
            f"({wide.replace('_', ' with ')})"
        )


def verdict_of(findings: Sequence[Finding]) -> Verdict:
    """fail with an error, warn with a warning, else pass."""
    worst = {f.severity for f in findings}
    return "fail" if "error" in worst else "warn" if "warning" in worst else "pass"


def _depths(evidence: Evidence) -> tuple[tuple[float | None, float | None], ...]:
    """Measured, or else predicted, at each weight."""
    if evidence.trace is not None:
        return tuple(_depth(layer) for layer in evidence.layers)
    if evidence.prediction is None:
        return ()
    held = evidence.prediction.fields
    return tuple((held[x.pair.node].moment2 if x.pair.node in held else None, None) for x in evidence.layers)


def _depth(layer: LayerEvidence) -> tuple[float | None, float | None]:
    record = layer.records[0] if layer.records else None
    return (record.output_moment2, record.output_gradient_moment2) if record is not None else (None, None)


def observed(moments: Moments) -> dict[str, float | int | None]:
    """The statistics of a tensor under the report's keys; None for what does not exist."""
    values: dict[str, float | int | None] = {
        "mean": moments.mean,
        "variance": moments.variance,
        "std": moments.std,
        "skewness": moments.skewness,
        "kurtosis": moments.kurtosis,
        "min": moments.min,
        "max": moments.max,
        "zeros": moments.zeros,
        "nan": moments.nan,
        "inf": moments.inf,
    }
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in values.items()}


def _layer(evidence: Evidence, layer: LayerEvidence) -> Layer:
    pair, law = layer.pair, layer.expectation
    laws = {"xavier": law.xavier, "he": law.he, "lecun": law.lecun, "exact": law.exact}
    variance = layer.moments.variance
    known = math.isfinite(variance)
    return Layer(
        tensor=pair.tensor,
        site=pair.site,
        operator=pair.operator,
        role=pair.role,
        shape=pair.shape,
        fan_in=pair.fan_in,
        fan_out=pair.fan_out,
        groups=pair.groups,
        activations=tuple(_activations(layer)),
        observed={**observed(layer.moments), **_history(evidence, pair.tensor)},
        expected={**laws, "standard_error": law.standard_error},
        ratio={name: variance / value if known and value else None for name, value in laws.items()},
        schemes=tuple({"name": fit.name, "p_value": fit.p_value} for fit in layer.recognition.schemes)
        if layer.recognition
        else (),
        phase=layer.recognition.verdict if layer.recognition else "unknown",
        probe=_probe(evidence, layer),
        provenance=(*_packing(evidence, layer), *pair.provenance),
        location={"file": pair.location.file, "line": pair.location.line},
    )


def _history(evidence: Evidence, tensor: str) -> dict[str, float | None]:
    """The root mean square of the gradient that the checkpoint's optimizer remembers; nothing where it has no state."""
    values = [h.rms for h in evidence.histories if h.tensor == tensor]
    return {"gradient_rms": values[0] if math.isfinite(values[0]) else None} if values else {}


def _packing(evidence: Evidence, layer: LayerEvidence) -> tuple[str, ...]:
    """How a weight is packed that is stored as integers and was dequantised to be looked at."""
    array = evidence.checkpoint.arrays.get(layer.pair.tensor)
    return (f"dequantized from {array.quantized}",) if array is not None and array.quantized else ()


def _activations(layer: LayerEvidence) -> list[Activation]:
    gains = Gains()
    found = []
    for feed in layer.feeds:
        gain = gains.of(feed)
        name = feed.activation.name
        found.append(Activation(name, gain.gain if gain is not None else None, feed.path, dict(feed.activation.parameters)))
    return found


def _probe(evidence: Evidence, layer: LayerEvidence) -> dict[str, Any]:
    if not layer.records or evidence.trace is None:
        return {}
    record = layer.records[0]
    output = evidence.trace.signals.get(record.output)
    signals = [evidence.trace.signals[f.node] for f in layer.feeds if f.node in evidence.trace.signals]
    dead = [s.dead for s in signals if s.dead is not None]
    saturated = [s.saturated for s in signals if s.saturated is not None]
    gradients = [r.gradient_norm for r in layer.records if r.gradient_norm is not None]
    return {
        "forward_moment2": record.output_moment2,
        "gradient_moment2": record.output_gradient_moment2,
        "weight_gradient_norm": math.sqrt(sum(g * g for g in gradients)) if gradients else None,
        "trust_ratio": record.trust_ratio,
        "sgd_update": record.sgd_update,
        "adam_update": record.adam_update,
        "dead": max(dead, default=None),
        "saturated": max(saturated, default=None),
        **{name: getattr(output, name) if output is not None else None for name in _OF_SIGNAL},
        **_of_units(record.units),
    }


# What is said of the signal that a weight's operator puts out.
_OF_SIGNAL = ("mean", "peak", "cosine", "spread", "rank", "token_cosine", "token_rank")


def _of_units(units: Units | None) -> dict[str, float | None]:
    names = ("count", "distinct_values", "distinct_gradients", "distinct")
    return {f"units_{name}": getattr(units, name) if units is not None else None for name in names}
