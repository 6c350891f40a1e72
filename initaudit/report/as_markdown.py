"""Markdown for a comment on a pull request: verdicts first, findings next, the table of weights folded away."""

from __future__ import annotations

import re
from collections.abc import Iterator

from initaudit.report.report import ModelReport, Report
from initaudit.report.rows import RATIOS, Fold, folded, rows
from initaudit.report.style import Style, escape, number, shorten
from initaudit.report.summary import counts, place, risk
from initaudit.rules.rule import Finding

NAME = "markdown"
SUMMARY = "for a comment on a pull request"
LIMIT = 60_000  # GitHub refuses a comment of more than 65,536 characters
_MARKS = {"error": "❌", "warning": "⚠️", "info": "ℹ️", "ok": "✅", "unknown": "❔"}
_VERDICTS = {"pass": "✅ pass", "warn": "⚠️ warn", "fail": "❌ fail"}


def render(report: Report, style: Style) -> str:
    """At most `LIMIT` characters: what does not fit is counted, never cut in the middle."""
    lines = ["### initaudit", "", "| model | verdict | findings | risk |", "|---|---|---|---|"]
    for model in report.models:
        if model.error is not None:
            lines.append(f"| {_code(model.source, 80)} | ❌ not read | {_prose(model.error, 300)} | |")
        else:
            lines.append(
                f"| {_code(model.source, 80)} | {_VERDICTS[model.verdict]} | {counts(model.findings, model.accepted)} "
                f"| {_prose(risk(model))} |"
            )
    text = "\n".join(lines) + "\n"
    left_out = 0
    for block in (block for model in report.models for block in _blocks(model)):
        if len(text) + len(block) > LIMIT:
            left_out += 1
        else:
            text += block
    if left_out:
        text += f"\n*{left_out} parts more are left out here; the other report formats hold them all.*\n"
    return text


def _blocks(model: ModelReport) -> Iterator[str]:
    if model.findings or model.layers:
        yield f"\n#### {_code(model.source, 80)}\n\n"
    for finding in model.findings:
        yield _finding(finding)
    if model.layers:
        yield _table(model)


def _finding(finding: Finding) -> str:
    head = f"- {_MARKS[finding.severity]} **{finding.code} {_prose(finding.name)}**"
    tensor = f" {_code(finding.tensor, 120)}" if finding.tensor else ""
    where = place(finding)
    at = f" at {_code(where, 160)}" if where and where != finding.tensor else ""
    advice = f"  \n  *help:* {_prose(finding.help, 800)}" if finding.help else ""
    return f"{head}{tensor}{at}  \n  {_prose(finding.message, 800)}{advice}\n"


def _table(model: ModelReport) -> str:
    heads = ["", "weight", "operator", "shape", "feeds", "std", *RATIOS]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|---|---|" + "--:|" * 5]
    for row in folded(rows(model), show_all=False):
        if isinstance(row, Fold):
            lines.append(f"| {_MARKS[row.mark]} | … {row.count} more like these" + " |" * 9)
            continue
        words = [_code(row.tensor, 60), _prose(row.operator, 30), row.shape, _prose(row.activation, 30)]
        numbers = [number(row.std), *(number(value) for value in row.ratio)]
        lines.append("| " + " | ".join([_MARKS[row.mark], *words, *numbers]) + " |")
    title = "Weights: variance observed / expected by Xavier, He, LeCun and the exact gain"
    return f"\n<details><summary>{title}</summary>\n\n" + "\n".join(lines) + "\n\n</details>\n"


def _code(text: str, width: int) -> str:
    """A code span; a pipe would end the cell even there, and a backtick the span."""
    plain = shorten(escape(text), width).replace("`", "'").replace("|", "¦")
    return f"`{plain}`" if plain.strip() else "``` ```"


def _prose(text: str, width: int = 2000) -> str:
    """Prose in which nothing of a name becomes markup, a link, a mention of somebody or a reference to an issue."""
    plain = re.sub(r"([\\`*_{}\[\]()<>|~&!])", r"\\\1", shorten(escape(text), width))
    plain = plain.replace("://", ":<!-- -->//").replace("www.", "www<!-- -->.")
    return re.sub(r"([@#])(?=\w)", r"\1<!-- -->", plain)
