"""The report for a terminal: a table of weights, the signal by depth, the findings, one line of summary."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from initaudit.report.depth import ends, in_short, sparkline
from initaudit.report.report import ModelReport, Report
from initaudit.report.rows import Fold, Row, folded, rows
from initaudit.report.style import Style, escape, number, shorten, wrap
from initaudit.report.summary import counts, place, plural, risk, statistics, weights
from initaudit.rules.rule import Finding

NAME = "text"
SUMMARY = "table of weights, signal by depth, findings (the default)"
VERDICT_COLOUR = {"pass": "ok", "warn": "warning", "fail": "error"}
RELATED_SHOWN = 4
HEADS = ("std", "xavier", "he", "lecun", "exact")


def render(report: Report, style: Style) -> str:
    """The whole report; every line fits `style.width` columns."""
    blocks = ["\n".join(model_lines(model, style)) for model in report.models if model.error is None]
    blocks.append("\n".join(closing(report, style)))
    text = "\n\n".join(block for block in blocks if block)
    return style.finish(f"{text}\n" if text else "")


def model_lines(model: ModelReport, style: Style) -> Iterator[str]:
    """One model: heading, table, depth, findings, summary. Quiet: only the findings."""
    if not style.quiet:
        yield heading(model, style)
        if model.layers:
            yield ""
            yield from table(model, style)
        if any(value is not None for pair in model.depth for value in pair):
            yield ""
            yield from depth_lines(model, style)
        notes = [*model.notes, *([model.cause] if model.cause else [])] if style.verbose else model.notes[:3]
        if notes:
            yield ""
            yield from (style.paint(wrap("note: " + escape(note), style.width), "dim") for note in notes)
    for index, finding in enumerate(model.findings):
        if index or not style.quiet:
            yield ""
        yield from finding_lines(finding, style)
    if not style.quiet:
        yield ""
        yield from summary_lines(model, style)


def heading(model: ModelReport, style: Style) -> str:
    """ "net.onnx  onnx, as initialised, 3 weights, 1,024 values"."""
    phase = {"init": "as initialised", "trained": "trained", "mixed": "partly trained"}.get(model.phase, "phase unknown")
    facts = f"{escape(model.format)}, {phase}, {weights(model)}"
    name = shorten(escape(model.source), max(20, style.width - len(facts) - 2))
    return f"{style.paint(name, 'bold')}  {shorten(facts, style.width - len(name) - 2)}"


def table(model: ModelReport, style: Style) -> list[str]:
    """The weights, one a line; what is too wide is shortened in the middle, below 90 columns the operator goes."""
    from tabulate import tabulate

    chosen = list(folded(rows(model), show_all=style.show_healthy or style.verbose))
    operator = style.width >= 90
    room = _widths([row for row in chosen if isinstance(row, Row)], style.width, operator)
    cells = [_cells(row, room, operator, style) for row in chosen]
    heads = ["", "weight", *(["operator"] if operator else []), "shape", "feeds", *HEADS]
    left = 5 if operator else 4
    # The heads are a row like the others: as headers tabulate would pad each of them by two blanks.
    align = ["left"] * left + ["right"] * (len(heads) - left)
    text = tabulate([heads, *cells], tablefmt="plain", disable_numparse=True, colalign=align)
    lines = [line.rstrip() for line in text.splitlines()]
    above = "variance observed / expected by"
    return [style.paint(above.rjust(len(lines[0])), "dim"), style.paint(lines[0], "dim"), *lines[1:]]


def _cells(row: Row | Fold, room: Sequence[int], operator: bool, style: Style) -> list[str]:
    if isinstance(row, Fold):
        return [style.mark(row.mark), f"… {row.count} more like these"]
    words = [row.tensor, *([row.operator] if operator else []), row.shape, row.activation]
    numbers = [number(row.std), *(number(value) for value in row.ratio)]
    if row.mark in VERDICT_COLOUR.values() and row.mark != "ok":
        numbers = [style.paint(text, row.mark) for text in numbers]
    return [style.mark(row.mark), *(shorten(text, w) for text, w in zip(words, room, strict=True)), *numbers]


def _widths(shown: Sequence[Row], width: int, operator: bool) -> list[int]:
    """Columns for the textual cells: the widest gives way first, none below its least."""
    columns = [[r.tensor for r in shown], *([[r.operator for r in shown]] if operator else [])]
    columns += [[r.shape for r in shown], [r.activation for r in shown]]
    heads = [6, *([8] if operator else []), 5, 5]
    wanted = [max([head, *map(len, column)]) for head, column in zip(heads, columns, strict=True)]
    least = [16, *([8] if operator else []), 9, 7]
    # A mark, std and four ratios, and two blanks between all of them.
    numbers = [[number(value) for value in (r.std, *r.ratio)] for r in shown]
    figures = [max([len(head), *(len(row[i]) for row in numbers)]) for i, head in enumerate(HEADS)]
    left = width - 1 - sum(figures) - 2 * (len(wanted) + len(figures))
    while sum(wanted) > left:
        spare = [w - minimum for w, minimum in zip(wanted, least, strict=True)]
        if max(spare) <= 0:
            break
        # Names can spare most: what stands in the other columns is short and says more.
        index = 0 if spare[0] > 8 else max(range(len(spare)), key=spare.__getitem__)
        wanted[index] -= 1
    return wanted


def depth_lines(model: ModelReport, style: Style) -> Iterator[str]:
    """Signal and gradient as small bars, first weight to the left, on a logarithmic scale, with the values at both ends."""
    for label, column in (("signal", 0), ("gradient", 1)):
        values = [pair[column] for pair in model.depth]
        both = ends(values)
        if both is None:
            continue
        text = f"{number(both[0])} → {number(both[1])}"
        bars = sparkline(values, max(10, style.width - 12 - len(text)))
        yield f"{label:<9} {bars}  {text}"
    yield style.paint("          second moment at each weight in forward order, logarithmic", "dim")


def finding_lines(finding: Finding, style: Style) -> Iterator[str]:
    """Code, name and tensor; where; what was found; what to do."""
    head = f"{finding.code} {finding.name}"
    room = max(16, style.width - len(head) - len(finding.severity) - 4)
    tensor = shorten(escape(finding.tensor), room)
    line = f"{style.paint(finding.severity, finding.severity)}  {style.paint(head, 'bold')}"
    yield f"{line}  {tensor}" if tensor else line
    where = place(finding)
    if where and where != tensor:
        yield "  " + style.paint(shorten("at " + where, style.width - 2), "dim")
    yield wrap(escape(finding.message), style.width, "  ")
    # What the message does not say in words: that there is no sampling error, or how far apart the numbers are.
    if finding.law and "standard error" not in finding.message:
        yield style.paint(wrap(escape(law_in_short(finding)), style.width, "  "), "dim")
    if finding.profile and (short := in_short(finding.profile)):
        yield style.paint(wrap(escape(short), style.width, "  "), "dim")
    if finding.help:
        yield wrap("help: " + escape(finding.help), style.width, "  ")
    if finding.related:
        shown = finding.related if style.verbose else finding.related[:RELATED_SHOWN]
        names = ", ".join(shorten(escape(name), 60) for name in shown)
        more = len(finding.related) - len(shown)
        yield wrap(f"also: {names}" + (f" and {more} more" if more else ""), style.width, "  ")


def law_in_short(finding: Finding) -> str:
    """What was expected, by which law, how many standard errors away."""
    away = "" if finding.standard_errors is None else f", {abs(finding.standard_errors):.0f} standard errors away"
    return f"expected {number(finding.expected)}{away}; {finding.law}"


def summary_lines(model: ModelReport, style: Style) -> Iterator[str]:
    """Verdict, counts and risk."""
    text = f"{counts(model.findings, model.accepted)}" + (f"; risk: {risk(model)}" if risk(model) else "")
    lines = wrap(f"{model.verdict}: {text}", style.width).splitlines()
    yield style.paint(model.verdict, VERDICT_COLOUR[model.verdict]) + lines[0][len(model.verdict) :]
    yield from lines[1:]


def closing(report: Report, style: Style) -> Iterator[str]:
    """After several models: how many there were and which could not be read; then the statistics that were asked for."""
    unread = [model for model in report.models if model.error is not None]
    if len(report.models) > 1 and not style.quiet:
        verdicts = [model.verdict for model in report.models if model.error is None]
        parts = [f"{verdicts.count(v)} {v}" for v in ("pass", "warn", "fail") if v in verdicts]
        parts += [f"{len(unread)} not read"] if unread else []
        yield wrap(f"{plural(len(report.models), 'model')}: {', '.join(parts)}", style.width)
        for model in unread:
            yield "  not read: " + shorten(escape(model.source), style.width - 12)
    if style.statistics:
        for count, code, name in statistics(report):
            yield f"{count:>5}  {code}  {name}"
