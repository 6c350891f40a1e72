"""The tables of benchmarks/README.md, from rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

Row = dict[str, Any]


def loud(row: Row) -> list[Any]:
    """Warnings and errors of a row."""
    return [f for f in row["findings"] if f["severity"] != "info"]


def _markdown(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    return tabulate(rows, headers=headers, tablefmt="pipe") + "\n"


def silence(rows: Sequence[Row]) -> str:
    """By family: models, those with a warning and with an error, seconds of an audit; then each that was not silent."""
    done = [r for r in rows if "failed" not in r]
    lines = []
    for family in dict.fromkeys(r["family"] for r in done):
        here = [r for r in done if r["family"] == family]
        lines.append([family, len(here), *_counts(here), f"{statistics.median(r['audit_seconds'] for r in here):.1f}"])
    lines.append(["all", len(done), *_counts(done), f"{statistics.median([r['audit_seconds'] for r in done] or [0]):.1f}"])
    text = _markdown(lines, ("family", "models", "warned", "failed", "median s"))
    for r in done:
        text += "".join(f"{r['task']}: {f['code']} {f['severity']} {f['tensor']}: {f['message']}\n" for f in loud(r))
    return text + _failures(rows)


def _counts(rows: Sequence[Row]) -> tuple[int, int]:
    errors = sum(any(f["severity"] == "error" for f in r["findings"]) for r in rows)
    return sum(bool(loud(r)) for r in rows) - errors, errors


def _failures(rows: Sequence[Row]) -> str:
    failed = [r for r in rows if "failed" in r]
    return "".join(f"not audited: {r['task']}: {r['failed'][:160]}\n" for r in failed)


def trained(rows: Sequence[Row]) -> str:
    """Networks trained here: silent as they are; found with a layer made again."""
    done = [r for r in rows if "failed" not in r]
    whole, broken = [r for r in done if not r["fault"]], [r for r in done if r["fault"]]
    text = f"{len(whole)} trained networks, {sum(bool(loud(r)) for r in whole)} with a warning or an error\n"
    hit = [found(r) for r in broken]
    text += (
        f"an untrained layer: {sum(f for f, _ in hit)} of {len(hit)} found, {sum(n for _, n in hit)} with the tensor first\n"
    )
    return text + _misses(broken) + _failures(rows)


def found(row: Row) -> tuple[bool, bool]:
    """(found with a right code at warning or error, and the first such finding names a changed tensor)."""
    right = [f for f in loud(row) if f["code"] in row["codes"]]
    return bool(right), bool(right) and right[0]["tensor"] in row["changed"]


def detection(rows: Sequence[Row]) -> str:
    """By fault and by family: how many were found and named; then the peers; then every miss."""
    done = [r for r in rows if "failed" not in r and "skipped" not in r]
    broken, whole = [r for r in done if r["fault"]], [r for r in done if not r["fault"]]
    text = ""
    for key in ("fault", "family"):
        lines = []
        for value in [*dict.fromkeys(r[key] for r in broken), "all"]:
            hit = [found(r) for r in broken if value in (r[key], "all")]
            lines.append([value, len(hit), sum(f for f, _ in hit), sum(n for _, n in hit)])
        text += _markdown(lines, (key, "injected", "found", "tensor named first")) + "\n"
    return text + _peers(broken, whole) + _misses(broken) + _failures(rows)


def _peers(broken: Sequence[Row], whole: Sequence[Row]) -> str:
    broken, whole = [r for r in broken if r["peers"]], [r for r in whole if r["peers"]]
    ours = [found(r) for r in broken]
    seconds = [r["audit_seconds"] for r in (*broken, *whole)]
    share = f"{sum(f for f, _ in ours)} of {len(ours)}"
    lines = [["initaudit", share, f"{sum(bool(loud(r)) for r in whole)} of {len(whole)}", _mean(seconds)]]
    for peer in dict.fromkeys(p for r in (*broken, *whole) for p in r["peers"]):
        hit = [bool(set(r["peers"][peer][0]) & set(r["changed"])) for r in broken if peer in r["peers"]]
        alarms = [bool(r["peers"][peer][0]) for r in whole if peer in r["peers"]]
        cost = [r["peers"][peer][1] for r in (*broken, *whole) if peer in r["peers"]]
        lines.append([peer, f"{sum(hit)} of {len(hit)}", f"{sum(alarms)} of {len(alarms)}", _mean(cost)])
    return _markdown(lines, ("tool", "names a faulty tensor", "healthy models alarmed", "s a model")) + "\n"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f}" if values else "-"


def _misses(rows: Sequence[Row]) -> str:
    text = ""
    for r in rows:
        hit, named = found(r)
        if not named:
            said = ", ".join(f"{f['code']} {f['tensor']}" for f in loud(r)[:3]) or "nothing"
            text += f"{'named another' if hit else 'missed'}: {r['task']} in {r['changed'][0]}: said {said}\n"
    return text
