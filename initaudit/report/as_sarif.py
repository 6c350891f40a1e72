"""SARIF 2.1.0, the format of code scanning services (OASIS Standard, 27 March 2020)."""

from __future__ import annotations

import inspect
from typing import Any
from urllib.parse import quote

from initaudit.report.as_json import dump
from initaudit.report.report import ModelReport, Report
from initaudit.report.style import Style, escape
from initaudit.report.summary import fingerprints, relative
from initaudit.rules import all_rules
from initaudit.rules.rule import Finding

NAME = "sarif"
SUMMARY = "SARIF 2.1.0 for code scanning"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"


def render(report: Report, style: Style) -> str:
    """One run: every rule declared, a result a finding, a notification for each model that could not be read."""
    rules = _rules(report)
    index = {rule["id"]: place for place, rule in enumerate(rules)}
    results = [
        _result(model, finding, mark, index[finding.code]) for model in report.models for finding, mark in fingerprints(model)
    ]
    unread = [model for model in report.models if model.error is not None]
    notifications = [{"level": "error", "message": {"text": _plain(model.error or "")}} for model in unread]
    run = {
        "tool": {"driver": {"name": "initaudit", "version": report.version, "rules": rules}},
        "invocations": [{"executionSuccessful": not unread, "toolExecutionNotifications": notifications}],
        "columnKind": "unicodeCodePoints",
        "results": results,
    }
    return dump({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rules(report: Report) -> list[dict[str, Any]]:
    declared = {}
    for rule in all_rules():
        page = inspect.cleandoc(type(rule).__doc__ or "")
        declared[rule.code] = {
            "id": rule.code,
            "name": rule.name,
            "shortDescription": {"text": _plain(rule.summary)},
            "fullDescription": {"text": page.partition("\n\n")[0].replace("\n", " ")},
            "help": {"text": page, "markdown": page},
            "defaultConfiguration": {"level": _LEVELS[rule.severity]},
            "properties": {"phase": rule.phase},
        }
    # A finding may come from a report made by another version, with rules that this one does not know.
    for model in report.models:
        for finding in model.findings:
            declared.setdefault(finding.code, {"id": finding.code, "name": finding.name})
    return [declared[code] for code in sorted(declared)]


def _result(model: ModelReport, finding: Finding, mark: str, index: int) -> dict[str, Any]:
    text = _plain(f"{finding.tensor}: {finding.message}" if finding.tensor else finding.message)
    if finding.help:
        text += f"\nhelp: {_plain(finding.help)}"
    return {
        "ruleId": finding.code,
        "ruleIndex": index,
        "level": _LEVELS[finding.severity],
        "message": {"text": text},
        "locations": [_location(model, finding)],
        "partialFingerprints": {"initaudit/v1": mark},
        "properties": {
            "measured": finding.measured,
            "expected": finding.expected,
            "law": finding.law,
            "standardErrors": finding.standard_errors,
            "related": list(finding.related),
        },
    }


def _location(model: ModelReport, finding: Finding) -> dict[str, Any]:
    """The source line of a module; for a file the file itself; and always the names of operator and tensor."""
    where = finding.location
    physical: dict[str, Any] = {"artifactLocation": _artifact(model.source if where.file is None else where.file)}
    if where.file is not None and where.line is not None:
        physical["region"] = {"startLine": max(1, where.line)}
    logical = []
    site = where.site or finding.site
    if site:
        logical.append({"fullyQualifiedName": escape(site), "kind": "operator"})
    if finding.tensor:
        logical.append({"fullyQualifiedName": escape(finding.tensor), "kind": "tensor"})
    # `package.module:callable` is no file: its findings without a source line have names only.
    found: dict[str, Any] = {"logicalLocations": logical} if logical else {}
    if where.file is not None or model.format != "module":
        found["physicalLocation"] = physical
    return found


def _artifact(path: str) -> dict[str, str]:
    short = relative(path)
    if "://" in short:
        return {"uri": quote(short.encode("utf-8", "surrogatepass"), safe=":/?&=#%")}
    uri = quote(short.encode("utf-8", "surrogatepass"), safe="/")
    if short.startswith("/"):
        return {"uri": "file://" + uri}
    return {"uri": uri, "uriBaseId": "%SRCROOT%"}


def _plain(text: str) -> str:
    # "[text](link)" in a message is a link (3.11.6): a name in a file must not become one.
    return escape(text).replace("](", "] (")
