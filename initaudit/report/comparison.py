"""What differs between two audited models: findings that came or went, and weights whose spread changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from initaudit.report.as_json import finding_dict
from initaudit.report.report import ModelReport
from initaudit.report.style import Style, escape, number, shorten, wrap
from initaudit.report.summary import counts, risk
from initaudit.rules.rule import Finding

SHOWN = 6  # tensors of a kind that are named
PAGE = 12  # findings, changes and names of one kind that are listed
NOTABLE = 0.1  # a change of a standard deviation by less than a tenth is not shown


@dataclass(frozen=True)
class Comparison:
    """`changed` holds (tensor, std in the first, std in the second); `only_first` and `only_second` name tensors."""

    first: ModelReport
    second: ModelReport
    appeared: tuple[Finding, ...]
    gone: tuple[Finding, ...]
    changed: tuple[tuple[str, float, float], ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def compare_models(first: ModelReport, second: ModelReport) -> Comparison:
    """The comparison; findings are the same where rule and tensor are, weights where their names are."""
    before = {layer.tensor: layer.observed.get("std") for layer in first.layers}
    after = {layer.tensor: layer.observed.get("std") for layer in second.layers}
    changed = []
    for tensor in before.keys() & after.keys():
        a, b = before[tensor], after[tensor]
        if a is not None and b is not None and abs(a - b) > NOTABLE * max(abs(a), abs(b)):
            changed.append((tensor, float(a), float(b)))
    order = {tensor: index for index, tensor in enumerate(after)}
    return Comparison(
        first,
        second,
        appeared=_surplus(second.findings, first.findings),
        gone=_surplus(first.findings, second.findings),
        changed=tuple(sorted(changed, key=lambda row: order[row[0]])),
        only_first=tuple(tensor for tensor in before if tensor not in after),
        only_second=tuple(tensor for tensor in after if tensor not in before),
    )


def _surplus(mine: tuple[Finding, ...], others: tuple[Finding, ...]) -> tuple[Finding, ...]:
    left = Counter((f.code, f.tensor) for f in others)
    surplus = []
    for finding in mine:
        if left[finding.code, finding.tensor]:
            left[finding.code, finding.tensor] -= 1
        else:
            surplus.append(finding)
    return tuple(surplus)


def comparison_dict(result: Comparison) -> dict[str, Any]:
    """As plain Python."""
    return {
        "schema": "initaudit-comparison/1",
        "first": {"source": result.first.source, "verdict": result.first.verdict},
        "second": {"source": result.second.source, "verdict": result.second.verdict},
        "appeared": [finding_dict(finding) for finding in result.appeared],
        "gone": [finding_dict(finding) for finding in result.gone],
        "tensors": {kind: list(tensors) for kind, tensors in result.second.changes.items()},
        "changed": [{"tensor": tensor, "first_std": a, "second_std": b} for tensor, a, b in result.changed],
        "only_first": list(result.only_first),
        "only_second": list(result.only_second),
    }


def _tensors(model: ModelReport, style: Style) -> Iterator[str]:
    """How many tensors are identical, trained on and so on; those by name that are neither of these two."""
    for kind, tensors in model.changes.items():
        yield shorten(f"{len(tensors):>7} {'tensor' if len(tensors) == 1 else 'tensors'} {kind}", style.width)
        if kind not in ("identical", "trained on"):
            shown = [escape(tensor) for tensor in (tensors if style.verbose else tensors[:SHOWN])]
            more = f" and {len(tensors) - len(shown)} more" if len(tensors) > len(shown) else ""
            yield wrap(", ".join(shown) + more, style.width, "          ")


def _page(lines: list[str], style: Style) -> list[str]:
    """As many lines of one kind as a reader looks at, and how many more there are."""
    if style.verbose or len(lines) <= PAGE:
        return lines
    return [*lines[:PAGE], f"  ... and {len(lines) - PAGE} more (--verbose shows all)"]


def comparison_text(result: Comparison, style: Style) -> str:
    """For a terminal: "+" came with the second, "-" went with the first."""
    lines = []
    for label, model in (("first", result.first), ("second", result.second)):
        facts = f"{model.verdict}, {counts(model.findings, model.accepted)}" + (f"; risk: {risk(model)}" if risk(model) else "")
        lines.append(shorten(f"{label:<7} {shorten(escape(model.source), 40)}  {facts}", style.width))
    lines += list(_tensors(result.second, style))
    for sign, findings in (("+", result.appeared), ("-", result.gone)):
        found = []
        for finding in findings:
            text = shorten(f"{finding.code} {finding.name}  {escape(finding.tensor)}", style.width - 12)
            found.append(f"{sign} {style.paint(f'{finding.severity:<8}', finding.severity)}  {text}")
        lines += _page(found, style)
    spreads = []
    for tensor, a, b in result.changed:
        ratio = f"{number(a)} → {number(b)}"
        spreads.append(f"  {shorten(escape(tensor), style.width - len(ratio) - 10)}  std {ratio}")
    lines += _page(spreads, style)
    for label, names in (("only in the first", result.only_first), ("only in the second", result.only_second)):
        lines += _page([shorten(f"  {label}: {escape(name)}", style.width) for name in names], style)
    if not (result.appeared or result.gone or result.changed or result.only_first or result.only_second):
        lines.append("no finding came or went, and no weight changed its spread by a tenth")
    return "\n".join(lines)
