"""The report: its records, and one file for each format it is written in (`as_*.py`), found by their folder."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType

from initaudit.errors import UsageError
from initaudit.report.report import Report
from initaudit.report.style import Style
from initaudit.suggest import did_you_mean


@dataclass(frozen=True)
class Format:
    """A format: `render` makes the whole text of a report."""

    name: str
    summary: str
    render: Callable[[Report, Style], str]


@functools.cache
def formats() -> Mapping[str, Format]:
    """Every format by name. Raises TypeError where a file is malformed: that is a fault of ours, not of the user."""
    names = sorted(m.name for m in pkgutil.iter_modules(__path__) if m.name.startswith("as_"))
    return register(format_of(importlib.import_module(f"{__name__}.{name}")) for name in names)


def format_named(name: str) -> Format:
    """The format with this name; raises `UsageError` with the nearest one."""
    try:
        return formats()[name]
    except KeyError:
        advice = did_you_mean(name, formats())
        raise UsageError(f"--format {name}", "no such format", f"one of {', '.join(formats())}", advice) from None


def format_of(module: ModuleType) -> Format:
    """The format that a file defines by NAME, SUMMARY and render; raises TypeError where one is missing."""
    for name in ("NAME", "SUMMARY", "render"):
        if not hasattr(module, name):
            raise TypeError(f"{module.__name__} has no {name}")
    return Format(module.NAME, module.SUMMARY, module.render)


def register(found: Iterable[Format]) -> Mapping[str, Format]:
    """The formats by name; raises TypeError where two share one."""
    by_name: dict[str, Format] = {}
    for each in found:
        if each.name in by_name:
            raise TypeError(f"two report formats are named {each.name!r}")
        by_name[each.name] = each
    return by_name
