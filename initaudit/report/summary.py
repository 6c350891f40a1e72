"""What a report says in one line, and where a finding stands."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping

from initaudit.report.report import ModelReport, Report
from initaudit.report.style import escape
from initaudit.rules.rule import SEVERITIES, Finding


def counts(findings: Iterable[Finding], accepted: int = 0) -> str:
    """ "3 errors, 1 warning", or "no findings"; those that a baseline accepts are counted apart."""
    by_severity = Counter(finding.severity for finding in findings)
    parts = [plural(by_severity[s], s if s != "info" else "note") for s in SEVERITIES if by_severity[s]]
    found = ", ".join(parts) if parts else "no new findings" if accepted else "no findings"
    return f"{found}, {accepted} accepted in the baseline" if accepted else found


def plural(count: int, noun: str) -> str:
    """ "1 error", "2 errors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def risk(model: ModelReport) -> str:
    """ "symmetry 0.00, vanishing 0.98, ..., untrainable 0.95 with sgd, 0.40 with adam", or "" where none is known."""
    parts = [f"{name} {value:.2f}" for name, value in model.risk.items() if isinstance(value, int | float)]
    untrainable = model.risk.get("untrainable")
    if isinstance(untrainable, Mapping):
        by = [f"{value:.2f} with {escape(str(name))}" for name, value in untrainable.items() if value is not None]
        if by:
            parts.append("untrainable " + ", ".join(by))
    return ", ".join(parts)


def weights(model: ModelReport) -> str:
    """ "12 weights, 1,234 values"."""
    sizes: dict[str, int] = {}
    for layer in model.layers:
        size = 1
        for extent in layer.shape:
            size *= extent
        sizes[layer.tensor] = size
    return f"{plural(len(sizes), 'weight')}, {sum(sizes.values()):,} values" if sizes else "no weights"


def statistics(report: Report) -> list[tuple[int, str, str]]:
    """(count, code, name) of every rule that fired, most frequent first."""
    total = Counter((f.code, f.name) for model in report.models for f in model.findings)
    return sorted(((n, code, name) for (code, name), n in total.items()), key=lambda row: (-row[0], row[1]))


def relative(path: str) -> str:
    """The path from the working directory where it lies below it, with forward slashes; a URL or a module name as it is."""
    if "://" in path or not os.path.isabs(path):
        return path.replace(os.sep, "/")
    short = os.path.relpath(path)
    return path if short.startswith("..") else short.replace(os.sep, "/")


def place(finding: Finding) -> str:
    """ "src/net.py:12 (layers.fc1)", the operator alone where no source line is known, or ""; escaped."""
    site = escape(finding.location.site or finding.site)
    if finding.location.file is None:
        return site
    line = f":{finding.location.line}" if finding.location.line is not None else ""
    return f"{escape(relative(finding.location.file))}{line}" + (f" ({site})" if site else "")


def fingerprint(source: str, finding: Finding, ordinal: int = 0) -> str:
    """32 hexadecimal digits that stay the same while the same rule reports the same tensor at the same operator.

    Numbers, wording, severity and line numbers do not enter; `ordinal` tells several such findings apart.
    """
    parts = (relative(source), finding.code, finding.tensor, finding.site, str(ordinal))
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fingerprints(model: ModelReport) -> list[tuple[Finding, str]]:
    """Every finding of a model with its fingerprint; no two are equal."""
    seen: Counter[tuple[str, str, str]] = Counter()
    result = []
    for finding in model.findings:
        key = (finding.code, finding.tensor, finding.site)
        result.append((finding, fingerprint(model.source, finding, seen[key])))
        seen[key] += 1
    return result


def unread_fingerprint(source: str) -> str:
    """The fingerprint of "this model could not be read"."""
    return hashlib.sha256(f"unread\0{relative(source)}".encode("utf-8", "surrogatepass")).hexdigest()[:32]
