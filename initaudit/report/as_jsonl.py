"""The report for streaming programs: one JSON object a line, of type "model", "layer" or "finding"."""

from __future__ import annotations

from initaudit.report.as_json import SCHEMA, dump, finding_dict, layer_dict, model_dict
from initaudit.report.report import Report
from initaudit.report.style import Style

NAME = "jsonl"
SUMMARY = "one JSON object a line: models, layers, findings"


def render(report: Report, style: Style) -> str:
    """A line for each model, followed by those of its layers and findings, which name it in `source`."""
    lines = []
    for model in report.models:
        head = {key: value for key, value in model_dict(model).items() if key not in ("layers", "findings")}
        lines.append(dump({"type": "model", "schema": SCHEMA, "version": report.version, **head}))
        lines += [dump({"type": "layer", "source": model.source, **layer_dict(layer)}) for layer in model.layers]
        lines += [dump({"type": "finding", "source": model.source, **finding_dict(f)}) for f in model.findings]
    return "".join(line + "\n" for line in lines)
