"""One line a finding, in the form that editors and compilers have made usual: place, code, severity, tensor, message."""

from __future__ import annotations

from initaudit.report.report import ModelReport, Report
from initaudit.report.style import Style, escape
from initaudit.report.summary import counts, plural, relative, statistics
from initaudit.rules.rule import Finding

NAME = "concise"
SUMMARY = "one line a finding"


def render(report: Report, style: Style) -> str:
    """The findings of all models; then, unless quiet, their number."""
    lines = [line(model, finding, style) for model in report.models for finding in model.findings]
    if style.statistics:
        lines += [f"{count:>5}  {code}  {name}" for count, code, name in statistics(report)]
    if not style.quiet:
        total = counts(f for model in report.models for f in model.findings)
        read = sum(model.error is None for model in report.models)
        rest = f", {len(report.models) - read} not read" if read < len(report.models) else ""
        lines.append(f"{total} in {plural(read, 'model')}{rest}")
    return style.finish("".join(text + "\n" for text in lines))


def line(model: ModelReport, finding: Finding, style: Style) -> str:
    """ "src/net.py:12: IA101 error fc1.weight: the variance ..."; the model's own path where no source line is known."""
    where = finding.location
    place = relative(model.source) if where.file is None else relative(where.file)
    number = f":{where.line}" if where.file is not None and where.line is not None else ""
    severity = style.paint(finding.severity, finding.severity)
    tensor = f" {escape(finding.tensor)}" if finding.tensor else ""
    return f"{escape(place)}{number}: {finding.code} {severity}{tensor}: {escape(finding.message)}"
