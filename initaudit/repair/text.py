"""What `initaudit fix` says it did."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.repair.rounds import Applied, Repair
from initaudit.report.as_text import finding_lines, summary_lines
from initaudit.report.style import Style, escape, number, shorten, wrap
from initaudit.report.summary import plural
from initaudit.rules.rule import Finding

SHOWN = 6  # tensors of one line


def repair_text(source: str, out: str, result: Repair, style: Style) -> str:
    """The lines that were run and what they drew, what is left to do, and the verdict on the new file."""
    lines: list[str] = []
    for applied in result.applied:
        lines += [*_applied(applied, style), ""]
    if result.report is None:
        what = f"{escape(source)}: nothing to fix" if not result.left else f"{escape(source)}: nothing that a line can fix"
        lines.append(wrap(f"{what}; {escape(out)} is not written", style.width))
        lines += _left(result.left, style)
    else:
        count = plural(len({drawn.tensor for applied in result.applied for drawn in applied.tensors}), "tensor")
        lines += [wrap(f"{escape(source)} with {count} drawn again is now {escape(out)}", style.width), ""]
        for finding in result.report.findings:
            lines += [*finding_lines(finding, style), ""]
        lines += summary_lines(result.report, style)
    return style.finish("\n".join(lines))


def _applied(applied: Applied, style: Style) -> Iterator[str]:
    finding = applied.finding
    head = f"{finding.code} {finding.name}"
    name = shorten(escape(finding.tensor), style.width - len(head) - 9)
    yield f"{style.paint('fixed', 'ok')}  {style.paint(head, 'bold')}  {name}"
    yield wrap(escape(finding.help), style.width, "  ")
    shown = applied.tensors if style.verbose else applied.tensors[:SHOWN]
    for drawn in shown:
        change = f"std {number(drawn.before)} → {number(drawn.after)}"
        yield f"  {shorten(escape(drawn.tensor), style.width - len(change) - 4)}  {change}"
    if len(applied.tensors) > len(shown):
        yield f"  ... and {len(applied.tensors) - len(shown)} more"


def _left(left: tuple[tuple[Finding, str], ...], style: Style) -> Iterator[str]:
    for finding, why in left:
        yield ""
        yield from finding_lines(finding, style)
        yield wrap(f"not fixed: {escape(why)}", style.width, "  ")
