"""Accepted findings: a file that says which findings are known, so that only new ones fail.

An entry is found again by its fingerprint; failing that, by its rule and a tensor whose name only gained or lost a prefix
("module.", "model.") that every other renamed entry gained or lost as well.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from initaudit.errors import UsageError
from initaudit.report.as_json import dump
from initaudit.report.report import ModelReport, Report
from initaudit.report.style import escape
from initaudit.report.summary import fingerprints, relative
from initaudit.report.write import write_whole
from initaudit.rules.rule import Finding

DEFAULT_FILE = "initaudit-baseline.json"
SCHEMA = "initaudit-baseline/1"


@dataclass(frozen=True)
class Entry:
    """One accepted finding; `date` is ISO 8601, the day on which it was accepted."""

    fingerprint: str
    source: str
    code: str
    tensor: str
    site: str
    reason: str
    date: str

    @property
    def line(self) -> str:
        """For a list in the terminal."""
        return escape(f"{self.code} {self.tensor} in {self.source}" + (f" (accepted: {self.reason})" if self.reason else ""))


@dataclass(frozen=True)
class Baseline:
    """The accepted findings."""

    entries: tuple[Entry, ...] = ()

    def without_accepted(self, report: Report) -> Report:
        """The report with new findings only. The verdict stays what it is: what is accepted is not thereby healthy."""
        models = []
        for model in report.models:
            known = self._matched(model)
            new = tuple(f for i, f in enumerate(model.findings) if i not in known)
            models.append(dataclasses.replace(model, findings=new, accepted=model.accepted + len(known)))
        return dataclasses.replace(report, models=tuple(models))

    def vanished(self, report: Report) -> tuple[Entry, ...]:
        """Entries about the audited models that no finding matches any more; those of models not read stay."""
        audited = {relative(model.source) for model in report.models if model.error is None}
        matched = {entry for model in report.models for entry in self._matched(model).values()}
        return tuple(entry for entry in self.entries if entry.source in audited and entry not in matched)

    def accept(self, report: Report, reason: str, today: datetime.date | None = None) -> Baseline:
        """With every finding of the report; entries that match keep their reason and date, vanished ones stay until pruned."""
        date = (today if today is not None else datetime.date.today()).isoformat()
        entries = {entry.fingerprint: entry for entry in self.entries}
        for model in report.models:
            matched = self._matched(model)
            for index, (finding, mark) in enumerate(fingerprints(model)):
                old = matched.get(index)
                if old is not None:
                    entries.pop(old.fingerprint)
                kept = (old.reason, old.date) if old is not None else (reason, date)
                entries[mark] = Entry(mark, relative(model.source), finding.code, finding.tensor, finding.site, *kept)
        return Baseline(tuple(entries.values()))

    def without(self, gone: Iterable[Entry]) -> Baseline:
        """Without these entries."""
        dropped = set(gone)
        return Baseline(tuple(entry for entry in self.entries if entry not in dropped))

    def write(self, file: Path) -> None:
        """Writes the file, sorted so that a diff shows what changed."""
        entries = sorted(self.entries, key=lambda e: (e.source, e.code, e.tensor, e.site, e.fingerprint))
        write_whole(
            file, dump({"schema": SCHEMA, "findings": [dataclasses.asdict(entry) for entry in entries]}, indent=2) + "\n"
        )

    def _matched(self, model: ModelReport) -> dict[int, Entry]:
        """The entry of each finding that has one, by the finding's index."""
        entries = {entry.fingerprint: entry for entry in self.entries}
        marks = fingerprints(model)
        pairs = {index: entries[mark] for index, (_, mark) in enumerate(marks) if mark in entries}
        taken = {entry.fingerprint for entry in pairs.values()}
        source = relative(model.source)
        left = [entry for entry in self.entries if entry.source == source and entry.fingerprint not in taken]
        return pairs | _renamed({i: f for i, (f, _) in enumerate(marks) if i not in pairs}, left)


def read_baseline(file: Path, *, must_exist: bool = True) -> Baseline:
    """The baseline in a file; raises `UsageError` where it is none, or is absent and must not be."""
    if not file.exists() and not must_exist:
        return Baseline()
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["schema"] != SCHEMA:
            raise UsageError(str(file), f"schema {found['schema']!r}", SCHEMA)
        return Baseline(tuple(Entry(**entry) for entry in found["findings"]))
    except OSError as error:
        advice = "`initaudit baseline write` makes it"
        raise UsageError(f"baseline {file}", error.strerror or type(error).__name__, advice=advice) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"baseline {file}", "not a baseline", "a file made by `initaudit baseline write`") from error


def _renamed(findings: Mapping[int, Finding], entries: Sequence[Entry]) -> dict[int, Entry]:
    """Pairs of the same rule whose tensors differ by the one prefix that explains most of them."""
    by_entry: dict[tuple[str, str], list[Entry]] = {}
    by_finding: dict[tuple[str, str], list[int]] = {}
    for entry in entries:
        by_entry.setdefault((entry.code, entry.tensor), []).append(entry)
    for index, finding in findings.items():
        by_finding.setdefault((finding.code, finding.tensor), []).append(index)
    found: list[tuple[int, Entry, tuple[str, str]]] = []
    for index, finding in findings.items():
        for head, rest in _splits(finding.tensor):
            found += [(index, entry, ("+", head)) for entry in by_entry.get((finding.code, rest), ())]
    for entry in entries:
        for head, rest in _splits(entry.tensor):
            found += [(index, entry, ("-", head)) for index in by_finding.get((entry.code, rest), ())]
    votes = Counter(prefix for _, _, prefix in found)
    if not votes:
        return {}
    best = min(votes, key=lambda prefix: (-votes[prefix], prefix))
    pairs: dict[int, Entry] = {}
    used: set[str] = set()
    for index, entry, prefix in found:
        if prefix == best and index not in pairs and entry.fingerprint not in used:
            pairs[index] = entry
            used.add(entry.fingerprint)
    return pairs


def _splits(name: str) -> Iterator[tuple[str, str]]:
    """Every (whole leading parts, rest) of a dotted or slashed name."""
    for place, sign in enumerate(name[:-1], start=1):
        if sign in "./":
            yield name[:place], name[place:]
