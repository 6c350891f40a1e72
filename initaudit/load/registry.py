"""Finds the checkpoint formats by folder: a module of this package that defines `FORMAT` reads one format.

A format module offers

    FORMAT: str                                      the name that `Checkpoint.format` carries
    recognise(path: Path, head: bytes) -> bool       by content, never by the name's ending; `head` is empty for a folder
    load(path: Path) -> Checkpoint

and is complete or refused at discovery, so that a new file in this folder is all that a new format needs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

from initaudit.load.checkpoint import Checkpoint

HEAD_BYTES = 4096  # what `recognise` is handed: a tar's magic is at 257, everything else stands at the front


@dataclass(frozen=True)
class Format:
    """One way in which weights are stored."""

    name: str
    recognise: Callable[[Path, bytes], bool]
    load: Callable[[Path], Checkpoint]


def as_format(module: ModuleType) -> Format | None:
    """The format that `module` reads, None for a helper; raises TypeError where one of the three parts is missing."""
    parts = {name: getattr(module, name, None) for name in ("FORMAT", "recognise", "load")}
    if parts["FORMAT"] is None and parts["recognise"] is None:
        return None
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise TypeError(f"{module.__name__} lacks {', '.join(missing)}: a format has FORMAT, recognise and load")
    return Format(parts["FORMAT"], parts["recognise"], parts["load"])  # type: ignore[arg-type]


def collect(modules: list[ModuleType]) -> dict[str, Format]:
    """The formats of `modules` by name; raises TypeError for a name that two of them claim."""
    found: dict[str, Format] = {}
    for module in modules:
        form = as_format(module)
        if form is None:
            continue
        if form.name in found:
            raise TypeError(f"{module.__name__}: the format {form.name!r} is registered already")
        found[form.name] = form
    return found


@cache
def formats() -> dict[str, Format]:
    """Every format of this package, by name in the order of their file names."""
    package = __name__.rpartition(".")[0]
    folder = importlib.import_module(package).__path__
    names = sorted(info.name for info in pkgutil.iter_modules(folder))
    return collect([importlib.import_module(f"{package}.{name}") for name in names])
