"""Annotations for GitHub Actions: workflow commands that the runner turns into marks on the changed lines.

https://docs.github.com/en/actions/reference/workflow-commands-for-github-actions
"""

from __future__ import annotations

from initaudit.report.report import Report
from initaudit.report.style import Style, escape
from initaudit.report.summary import relative
from initaudit.rules.rule import SEVERITIES

NAME = "github"
SUMMARY = "annotations for GitHub Actions"
_LEVELS = {"error": "error", "warning": "warning", "info": "notice"}


def render(report: Report, style: Style) -> str:
    """One command a finding, worst first over all models: GitHub shows ten of a kind in each step."""
    lines = [f"::error title=initaudit::{_data(model.error)}" for model in report.models if model.error is not None]
    found = [(finding, model) for model in report.models for finding in model.findings]
    for finding, model in sorted(found, key=lambda pair: SEVERITIES.index(pair[0].severity)):
        place = {"file": relative(model.source if finding.location.file is None else finding.location.file)}
        if finding.location.file is not None and finding.location.line is not None:
            place["line"] = str(max(1, finding.location.line))
        place["title"] = f"{finding.code} {finding.name}"
        settings = ",".join(f"{name}={_property(value)}" for name, value in place.items())
        tensor = f"{finding.tensor}: " if finding.tensor else ""
        advice = f"\nhelp: {escape(finding.help)}" if finding.help else ""
        text = escape(f"{tensor}{finding.message}") + advice
        lines.append(f"::{_LEVELS[finding.severity]} {settings}::{_percent(text)}")
    return "".join(line + "\n" for line in lines)


def _percent(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _data(text: str) -> str:
    return _percent(escape(text))


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
