"""JUnit's XML, which every CI system shows as tests: a suite for each model, a case for each weight."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from initaudit.report.report import ModelReport, Report
from initaudit.report.style import Style, escape
from initaudit.report.summary import place
from initaudit.rules.rule import Finding

NAME = "junit"
SUMMARY = "JUnit XML: a suite a model, a case a weight"


def render(report: Report, style: Style) -> str:
    """A case fails where a finding about its weight has a severity that fails the run; other findings are its output."""
    root = ET.Element("testsuites", name="initaudit")
    for model in report.models:
        root.append(_suite(model, style))
    for name in ("tests", "failures", "errors"):
        root.set(name, str(sum(int(suite.get(name, "0")) for suite in root)))
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(('<?xml version="1.0" encoding="UTF-8"?>\n', "\n"))


def _suite(model: ModelReport, style: Style) -> ET.Element:
    name = escape(model.source)
    suite = ET.Element("testsuite", name=name)
    if model.error is not None:
        case = ET.SubElement(suite, "testcase", classname=name, name="readable")
        ET.SubElement(case, "error", type="UnreadableModel", message=escape(model.error))
    cases: dict[tuple[str, str], list[Finding]] = {(layer.tensor, layer.site): [] for layer in model.layers}
    whole: list[Finding] = []
    for finding in model.findings:
        exact = cases.get((finding.tensor, finding.site))
        first = next((found for (tensor, _), found in cases.items() if tensor == finding.tensor), whole)
        (first if exact is None else exact).append(finding)
    for (tensor, site), findings in cases.items():
        suite.append(_case(name, escape(tensor if site in ("", tensor) else f"{tensor} at {site}"), findings, style))
    if model.error is None:
        suite.append(_case(name, "the model as a whole", whole, style))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in suite)))
    suite.set("errors", str(sum(case.find("error") is not None for case in suite)))
    return suite


def _case(classname: str, name: str, findings: list[Finding], style: Style) -> ET.Element:
    case = ET.Element("testcase", classname=classname, name=name)
    failing = [finding for finding in findings if finding.severity in style.failing]
    others = [finding for finding in findings if finding.severity not in style.failing]
    if failing:
        # Several failures in one case are outside the schema that most readers follow.
        failure = ET.SubElement(case, "failure", type=failing[0].code, message=escape(failing[0].message))
        failure.text = "\n".join(_text(finding) for finding in failing)
    if others:
        ET.SubElement(case, "system-out").text = "\n".join(_text(finding) for finding in others)
    return case


def _text(finding: Finding) -> str:
    where = place(finding)
    advice = f"\nhelp: {escape(finding.help)}" if finding.help else ""
    at = f" at {where}" if where else ""
    return f"{finding.code} {finding.name} ({finding.severity}){at}\n{escape(finding.message)}{advice}"
