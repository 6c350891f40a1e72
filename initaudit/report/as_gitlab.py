"""GitLab's Code Quality report, the subset of the Code Climate format that merge requests show.

https://docs.gitlab.com/ci/testing/code_quality/#code-quality-report-format
"""

from __future__ import annotations

from typing import Any

from initaudit.report.as_json import dump
from initaudit.report.report import Report
from initaudit.report.style import Style, escape
from initaudit.report.summary import fingerprints, relative, unread_fingerprint

NAME = "gitlab"
SUMMARY = "GitLab Code Quality"
_SEVERITIES = {"error": "critical", "warning": "minor", "info": "info"}


def render(report: Report, style: Style) -> str:
    """An array of issues; one for each model that could not be read, too."""
    issues = []
    for model in report.models:
        if model.error is not None:
            mark = unread_fingerprint(model.source)
            issues.append(_issue("unreadable-model", escape(model.error), "blocker", mark, model.source, None))
        for finding, mark in fingerprints(model):
            text = escape(f"{finding.tensor}: {finding.message}" if finding.tensor else finding.message)
            where = finding.location
            path, line = (model.source, None) if where.file is None else (where.file, where.line)
            issues.append(_issue(f"{finding.code} {finding.name}", text, _SEVERITIES[finding.severity], mark, path, line))
    return dump(issues, indent=2) + "\n"


def _issue(check: str, text: str, severity: str, mark: str, path: str, line: int | None) -> dict[str, Any]:
    return {
        "description": text,
        "check_name": check,
        "fingerprint": mark,
        "severity": severity,
        # GitLab wants a line; what has none (a file of weights) is marked at its beginning.
        "location": {"path": escape(relative(path)), "lines": {"begin": max(1, line) if line is not None else 1}},
    }
