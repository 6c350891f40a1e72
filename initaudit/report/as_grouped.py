"""The findings by rule: for a model in which one cause shows at many weights."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.report.as_text import heading, summary_lines
from initaudit.report.report import ModelReport, Report
from initaudit.report.style import Style, escape, shorten, wrap
from initaudit.report.summary import place, statistics
from initaudit.rules.rule import Finding

NAME = "grouped"
SUMMARY = "findings by rule"


def render(report: Report, style: Style) -> str:
    """Model after model, rule after rule, each with its tensors."""
    blocks = ["\n".join(_model(model, style)) for model in report.models if model.error is None]
    if style.statistics:
        blocks.append("\n".join(f"{count:>5}  {code}  {name}" for count, code, name in statistics(report)))
    text = "\n\n".join(block for block in blocks if block)
    return style.finish(f"{text}\n" if text else "")


def _model(model: ModelReport, style: Style) -> Iterator[str]:
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in model.findings:
        groups.setdefault((finding.code, finding.name), []).append(finding)
    if not style.quiet or groups:
        yield heading(model, style)
    for (code, name), findings in groups.items():
        yield ""
        worst = findings[0].severity
        yield f"{style.paint(worst, worst)}  {style.paint(f'{code} {name}', 'bold')}  {len(findings)}×"
        for finding in findings:
            where = place(finding)
            tensor = escape(finding.tensor)
            text = f"{tensor}  at {where}" if where and where != tensor else tensor or where
            yield "  " + shorten(text, style.width - 2)
            yield wrap(escape(finding.message), style.width, "    ")
        for advice in dict.fromkeys(finding.help for finding in findings if finding.help):
            yield wrap("help: " + escape(advice), style.width, "  ")
    if not style.quiet:
        yield ""
        yield from summary_lines(model, style)
