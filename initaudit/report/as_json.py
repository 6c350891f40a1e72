"""The report for other programs: one JSON document, described by docs/report.schema.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from initaudit.report.report import Activation, Layer, ModelReport, Report
from initaudit.report.style import Style
from initaudit.rules.rule import Finding

NAME = "json"
SUMMARY = "one document for programs; docs/report.schema.json describes it"
SCHEMA = "initaudit/1"


def render(report: Report, style: Style) -> str:
    """Indented JSON in ASCII; the same report gives the same bytes."""
    return dump(report_dict(report), indent=2) + "\n"


def dump(value: Any, indent: int | None = None) -> str:
    """JSON in ASCII: every control character inside a string is escaped, and numbers are finite or null."""
    text = json.dumps(finite(value), indent=indent, ensure_ascii=True, allow_nan=False)
    # json leaves DEL as it is, which some terminals obey, and a CI runner obeys "##[command]" wherever it stands in its log.
    return text.replace("\x7f", "\\u007f").replace("##", "#\\u0023")


def finite(value: Any) -> Any:
    """The value with null for numbers that JSON cannot hold, and arrays and tuples as lists."""
    if isinstance(value, str):
        # An unpaired surrogate is no Unicode, and other languages' parsers refuse the whole document.
        return value if value.isprintable() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [finite(part) for part in value]
    if hasattr(value, "item") and not isinstance(value, int | float):
        return finite(value.item())
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a report holds numbers, text and collections of them, not {type(value).__name__}")


def report_dict(report: Report) -> dict[str, Any]:
    """The document as plain Python."""
    models = [model_dict(model) for model in report.models]
    return {"schema": SCHEMA, "version": report.version, "models": models}


def model_dict(model: ModelReport) -> dict[str, Any]:
    """One audited model."""
    untrainable = model.risk.get("untrainable") or {}
    scores: dict[str, Any] = {name: model.risk.get(name) for name in ("symmetry", "vanishing", "exploding")}
    scores["untrainable"] = {name: untrainable.get(name) for name in ("sgd", "adam")}
    result = {
        "source": model.source,
        "format": model.format,
        "phase": model.phase,
        "verdict": model.verdict if model.error is None else None,
        "risk": scores,
        "cause": model.cause,
        "notes": list(model.notes),
        "error": model.error,
        "depth": [{"signal_moment2": signal, "gradient_moment2": gradient} for signal, gradient in model.depth],
        "probe": model.probe,
        "layers": [layer_dict(layer) for layer in model.layers],
        "findings": [finding_dict(finding) for finding in model.findings],
    }
    plain: dict[str, Any] = finite(result)
    return plain


def layer_dict(layer: Layer) -> dict[str, Any]:
    """One weight at one place of use."""
    return {
        "tensor": layer.tensor,
        "site": layer.site,
        "operator": layer.operator,
        "role": layer.role,
        "shape": list(layer.shape),
        "fan_in": layer.fan_in,
        "fan_out": layer.fan_out,
        "groups": layer.groups,
        "activations": [_activation(activation) for activation in layer.activations],
        "observed": layer.observed,
        "expected": layer.expected,
        "ratio": layer.ratio,
        "schemes": list(layer.schemes),
        "phase": layer.phase,
        "probe": layer.probe,
        "provenance": list(layer.provenance),
        "location": {"file": layer.location.get("file"), "line": layer.location.get("line")},
    }


def finding_dict(finding: Finding) -> dict[str, Any]:
    """One finding."""
    return {
        "code": finding.code,
        "name": finding.name,
        "severity": finding.severity,
        "tensor": finding.tensor,
        "site": finding.site or finding.location.site,
        "location": {"file": finding.location.file, "line": finding.location.line},
        "message": finding.message,
        "help": finding.help,
        "measured": finding.measured,
        "expected": finding.expected,
        "law": finding.law,
        "standard_errors": finding.standard_errors,
        "related": list(finding.related),
        "profile": [
            {"start": b.start, "end": b.end, "signal_moment2": b.signal, "gradient_moment2": b.gradient, "gain": b.gain}
            for b in finding.profile
        ],
    }


def _activation(activation: Activation) -> dict[str, Any]:
    return {
        "name": activation.name,
        "gain": activation.gain,
        "path": list(activation.path),
        "parameters": activation.parameters,
    }
