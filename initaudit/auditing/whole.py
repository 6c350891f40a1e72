"""What the probe says of a network as a whole, as the report's plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from initaudit.graph.graph import location_of
from initaudit.probe.measures import Measures
from initaudit.probe.tangents import ForwardGains
from initaudit.probe.trace import Kernel, TimeRecord, Trace
from initaudit.rules.evidence import Evidence


def probe_report(evidence: Evidence) -> dict[str, Any]:
    """The keys of `probe` in the JSON schema; empty where nothing was probed or predicted."""
    trace = evidence.trace
    if trace is None:
        prediction = evidence.prediction
        if prediction is None:
            return {}
        approximate = sum(f.approximate for f in prediction.fields.values())
        unknown = dict(sorted(prediction.unknown.items()))
        return {"predicted": True, "nodes": len(prediction.fields), "approximate": approximate, "unknown": unknown}
    sites = {n.name: location_of(n).site or n.name for n in evidence.graph.fx.nodes} if evidence.graph is not None else {}
    gram = trace.gram
    return {
        "predicted": False,
        "batch": trace.batch,
        "seeds": evidence.config.probe_seeds,
        "risk_spread": dict(evidence.risk_spread),
        "first_non_finite": _site(sites, trace.first_non_finite),
        "first_non_finite_gradient": _site(sites, trace.first_non_finite_gradient),
        "gram": {} if gram is None else {"examples": gram.examples, "sgd": _kernel(gram.sgd), "adam": _kernel(gram.adam)},
        **(_measures(trace.measures, sites) if trace.measures is not None else {}),
        **_forward(trace, sites),
        "entropy": [
            {"site": sites.get(s.node, s.node), "entropy": s.entropy}
            for s in sorted(trace.signals.values(), key=lambda s: s.order)
            if s.entropy is not None
        ],
        "time": [_time(t, sites) for t in trace.time],
        "rehearsal": _rehearsal(evidence),
    }


def _site(sites: Mapping[str, str], node: str | None) -> str | None:
    return None if node is None else sites.get(node, node)


def _kernel(kernel: Kernel) -> dict[str, float]:
    return {"trace": kernel.trace, "centred_share": kernel.centred_share, "effective_rank": kernel.effective_rank}


def _measures(measures: Measures, sites: Mapping[str, str]) -> dict[str, Any]:
    blocks = [{"start": sites.get(b.start, b.start), "end": sites.get(b.end, b.end), "gain": b.gain} for b in measures.blocks]
    return {
        "jacobian_gain": measures.jacobian_gain,
        "blocks": blocks,
        "depth_scale": measures.depth_scale,
        "beta": measures.beta,
        "heads": [
            {"site": sites.get(h.node, h.node), "classes": h.classes, "std": h.std, "loss": h.loss, "chance": h.chance}
            for h in measures.heads
        ],
        "headroom": {
            name: {"weight": room.weight, "signal": room.signal, "gradient": room.gradient}
            for name, room in measures.headroom.items()
        },
    }


def _forward(trace: Trace, sites: Mapping[str, str]) -> dict[str, Any]:
    """The gains in forward mode beside those of the backward pass; empty where they were not asked for."""
    seen = trace.forward
    if seen is None:
        return {}
    blocks = trace.measures.blocks if trace.measures is not None else ()
    gains = [
        {"start": sites.get(b.start, b.start), "end": sites.get(b.end, b.end), "gain": gain}
        for b, gain in zip(blocks, seen.blocks, strict=True)
    ]
    missing = {sites.get(name, name): why for name, why in seen.missing.items()}
    return {"jvp": {"gain": seen.gain, "blocks": gains, "edges": _edges(trace, seen, sites), "missing": missing}}


def _edges(trace: Trace, seen: ForwardGains, sites: Mapping[str, str]) -> list[dict[str, Any]]:
    ordered = sorted((s for s in trace.signals.values() if s.node in seen.moment2), key=lambda s: s.order)
    return [{"site": sites.get(s.node, s.node), "moment2": seen.moment2[s.node]} for s in ordered]


def _time(record: TimeRecord, sites: Mapping[str, str]) -> dict[str, Any]:
    return {
        "site": sites.get(record.node, record.node),
        "steps": record.steps,
        "signal": list(record.signal),
        "gradient": list(record.gradient),
        "gradient_rate": record.gradient_rate,
    }


def _rehearsal(evidence: Evidence) -> dict[str, Any] | None:
    rehearsal = evidence.trace.rehearsal if evidence.trace is not None else None
    if rehearsal is None:
        return None
    names = ("optimizer", "rate", "first_loss", "last_loss", "remembered", "broke_at", "broke_in", "learned")
    runs = [{name: getattr(run, name) for name in names} for run in rehearsal.runs]
    return {"steps": rehearsal.steps, "examples": rehearsal.examples, "why_not": rehearsal.why_not, "runs": runs}
