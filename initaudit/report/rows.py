"""The table of weights, as every format with a table shows it: one row a weight, what is wrong with it, and what to fold."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from initaudit.report.report import Layer, ModelReport
from initaudit.report.style import escape
from initaudit.rules.rule import SEVERITIES

RATIOS = ("xavier", "he", "lecun", "exact")
SHOWN_ALIKE = 2  # rows shown of those that look alike, before the rest is folded
FOLD_FROM = 4  # a shorter run is not worth folding


@dataclass(frozen=True)
class Row:
    """One weight. `mark` is the worst severity of the findings about it, "ok", or "unknown" where nothing could be judged.

    `foldable`: no error or warning is about this weight first of all; one found elsewhere may touch it too. Text is escaped.
    `ratio` is observed / expected variance in the order of `RATIOS`.
    """

    mark: str
    codes: tuple[str, ...]
    tensor: str
    site: str
    operator: str
    shape: str
    activation: str
    std: float | int | None
    ratio: tuple[float | None, ...]
    layer: Layer
    foldable: bool


@dataclass(frozen=True)
class Fold:
    """So many rows that look like rows shown above; `mark` is theirs."""

    count: int
    mark: str


def rows(model: ModelReport) -> tuple[Row, ...]:
    """A row for every weight, in the report's order."""
    about: dict[str, list[tuple[str, str, str, bool]]] = {}
    for finding in model.findings:
        for tensor in dict.fromkeys((finding.tensor, *finding.related)):
            root = tensor == finding.tensor
            about.setdefault(tensor, []).append((finding.severity, finding.code, finding.site if root else "", root))
    return tuple(_row(layer, about.get(layer.tensor, ())) for layer in model.layers)


def _row(layer: Layer, findings: Sequence[tuple[str, str, str, bool]]) -> Row:
    mine = [(severity, code, root) for severity, code, site, root in findings if site in ("", layer.site)]
    ratio = tuple(layer.ratio.get(name) for name in RATIOS)
    mark = min((s for s, _, _ in mine), key=SEVERITIES.index) if mine else "unknown" if ratio[-1] is None else "ok"
    return Row(
        mark=mark,
        foldable=not any(root and severity != "info" for severity, _, root in mine),
        codes=tuple(dict.fromkeys(code for _, code, _ in mine)),
        tensor=escape(layer.tensor),
        site=escape(layer.site),
        operator=escape(layer.operator),
        shape="×".join(map(str, layer.shape)) if layer.shape else "scalar",
        activation=escape("+".join(dict.fromkeys(a.name for a in layer.activations))) or "–",
        std=layer.observed.get("std"),
        ratio=ratio,
        layer=layer,
    )


def folded(every: Sequence[Row], *, show_all: bool) -> Iterator[Row | Fold]:
    """The rows in order, with runs of at least `FOLD_FROM` foldable ones replaced that look like two shown before.

    Rows look alike when operator, shape, activation and mark are equal and the names differ in their numbers only.
    """
    seen: dict[tuple[object, ...], int] = {}
    run: list[Row] = []
    for row in every:
        key = (re.sub(r"[0-9]+", "#", row.tensor), row.operator, row.shape, row.activation, row.mark, row.codes)
        seen[key] = seen.get(key, 0) + 1
        if not show_all and row.foldable and seen[key] > SHOWN_ALIKE:
            if run and run[-1].mark != row.mark:
                yield from _settle(run)
                run = []
            run.append(row)
            continue
        yield from _settle(run)
        run = []
        yield row
    yield from _settle(run)


def _settle(run: Sequence[Row]) -> Sequence[Row | Fold]:
    return run if len(run) < FOLD_FROM else (Fold(len(run), run[0].mark),)
