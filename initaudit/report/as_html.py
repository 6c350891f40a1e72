"""One page for a browser: self-contained, without scripts, the signal's path by depth as a picture."""

from __future__ import annotations

import html
from collections.abc import Iterator

from initaudit.report.report import ModelReport, Report
from initaudit.report.rows import RATIOS, Row, rows
from initaudit.report.style import Style, escape, number
from initaudit.report.summary import counts, place, risk, weights
from initaudit.report.svg import depth_picture
from initaudit.rules.rule import Finding

NAME = "html"
SUMMARY = "one self-contained page with the signal by depth as a picture"
LONG = 60  # weights beyond which the table is folded until it is opened
_MARKS = {"error": "✗", "warning": "!", "info": "i", "ok": "✓", "unknown": "·"}
_CSS = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--dim:#6a737d;--line:#d8dee4;--bad:#b3261e;--warn:#9a6700;
--info:#0b5cad;--ok:#1a7f37;--signal:#0b5cad;--gradient:#bc4c00}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e8ea;--dim:#9aa4ad;--line:#343a40;--bad:#ff7b72;--warn:#e3b341;
--info:#79c0ff;--ok:#56d364;--signal:#79c0ff;--gradient:#ffa657}}
body{background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:960px;padding:1.5rem}
h1{font-size:1.3rem}h2{font-size:1.1rem;overflow-wrap:anywhere;margin:2.5rem 0 .3rem}p{margin:.3rem 0}
code{font:13px ui-monospace,monospace;overflow-wrap:anywhere}.dim{color:var(--dim)}
.error,.fail{color:var(--bad)}.warning,.warn{color:var(--warn)}.info{color:var(--info)}.ok,.pass{color:var(--ok)}
.unknown{color:var(--dim)}
.finding{border-left:3px solid currentColor;padding:.1rem 0 .1rem .8rem;margin:.9rem 0}
.finding p{color:var(--fg);overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px}th,td{padding:.2rem .5rem;text-align:left;
border-bottom:1px solid var(--line)}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
svg{width:100%;height:auto;margin:.6rem 0}svg text{font-size:11px;fill:var(--dim)}.grid{stroke:var(--line)}
polyline{fill:none;stroke-width:1.6}polyline.signal{stroke:var(--signal)}polyline.gradient{stroke:var(--gradient)}
circle.signal{fill:var(--signal)}circle.gradient{fill:var(--gradient)}.key.signal{color:var(--signal)}.key.gradient{color:var(--gradient)}
"""


def render(report: Report, style: Style) -> str:
    """The page. Nothing is fetched and nothing is run: its own policy forbids both."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    body = "".join(part for model in report.models for part in _model(model))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>initaudit</title><style>{_CSS}</style></head>\n"
        f"<body><h1>initaudit {_text(report.version)}</h1>\n{body}</body></html>\n"
    )


def _model(model: ModelReport) -> Iterator[str]:
    yield f"<section><h2><code>{_text(model.source)}</code></h2>\n"
    if model.error is not None:
        yield f'<p class="error">Not read: {_text(model.error)}</p></section>\n'
        return
    yield f'<p><strong class="{model.verdict}">{model.verdict}</strong> · {counts(model.findings, model.accepted)} · '
    yield f"{_text(model.format)}, phase {_text(model.phase)}, {weights(model)}</p>\n"
    for sentence in (f"risk: {risk(model)}" if risk(model) else "", model.cause, *model.notes):
        if sentence:
            yield f'<p class="dim">{_text(sentence)}</p>\n'
    picture = depth_picture(model.depth, [escape(layer.tensor) for layer in model.layers])
    if picture:
        yield picture
        yield '\n<p class="dim">Second moment of the <span class="key signal">signal</span> and of its '
        yield '<span class="key gradient">gradient</span> at each weight, logarithmic.</p>\n'
    for finding in model.findings:
        yield _finding(finding)
    if model.layers:
        is_open = "" if len(model.layers) > LONG else " open"
        yield f"<details{is_open}><summary>{weights(model)}</summary>{_table(model)}</details>\n"
    yield "</section>\n"


def _finding(finding: Finding) -> str:
    where = place(finding)
    at = f' <span class="dim">at <code>{html.escape(where)}</code></span>' if where else ""
    advice = f'<p class="dim">help: {_text(finding.help)}</p>' if finding.help else ""
    related = ", ".join(_text(name) for name in finding.related)
    also = f'<details class="dim"><summary>also {len(finding.related)} more</summary>{related}</details>' if related else ""
    title = f"{finding.severity} {_text(finding.code)} {_text(finding.name)}"
    return (
        f'<div class="finding {finding.severity}"><strong>{title}</strong> '
        f"<code>{_text(finding.tensor)}</code>{at}<p>{_text(finding.message)}</p>{advice}{also}</div>\n"
    )


def _table(model: ModelReport) -> str:
    heads = "".join(f"<th>{name}</th>" for name in ("", "weight", "operator", "shape", "fans", "feeds", "phase"))
    heads += "".join(f'<th class="n">{name}</th>' for name in ("std", *RATIOS))
    lines = "".join(_row(row) for row in rows(model))
    title = "variance observed / expected by Xavier, He, LeCun and the exact gain"
    return f'<p class="dim">{title}</p><div class="scroll"><table><tr>{heads}</tr>\n{lines}</table></div>'


def _row(row: Row) -> str:
    layer = row.layer
    path = " → ".join(dict.fromkeys(step for activation in layer.activations for step in activation.path))
    fans = f"{number(layer.fan_in, 6)}→{number(layer.fan_out, 6)}"
    schemes = ", ".join(str(scheme.get("name", "")) for scheme in layer.schemes)
    words = [
        f'<span class="{row.mark}">{_MARKS[row.mark]}</span>',
        f'<code title="{html.escape(row.site)}">{html.escape(row.tensor)}</code>',
        html.escape(row.operator),
        row.shape,
        fans,
        html.escape(row.activation) + (f' <span class="dim">{_text(path)}</span>' if path else ""),
        f'<span title="{_text(schemes)}">{_text(layer.phase)}</span>',
    ]
    numbers = [number(row.std), *(number(value) for value in row.ratio)]
    return "<tr>" + "".join(f"<td>{w}</td>" for w in words) + "".join(f'<td class="n">{n}</td>' for n in numbers) + "</tr>\n"


def _text(text: str) -> str:
    return html.escape(escape(text))
