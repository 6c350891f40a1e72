"""Finds the checkpoint formats by folder: a module of this package that defines `FORMAT` reads one format.

A format module offers

    FORMAT: str                                      the name that `Checkpoint.format` carries
    recognise(path: Path, head: bytes) -> bool       by content, never by the name's ending; `head` is empty for a folder
    load(path: Path) -> Checkpoint

and is complete or refused at discovery, so that a new file in this folder is all that a new format needs. A format without a
magic number says so with

    GUESS: int                                       1 where the structure was checked, 2 where first bytes can be an accident

and gives way to what is surer: the length that opens a safetensors header may be a pickle's first opcodes.
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
    guess: int = 0


def as_format(module: ModuleType) -> Format | None:
    """The format that `module` reads, None for a helper; raises TypeError where one of the three parts is missing."""
    parts = {name: getattr(module, name, None) for name in ("FORMAT", "recognise", "load")}
    if parts["FORMAT"] is None and parts["recognise"] is None:
        return None
    missing = [name for name, part in parts.items() if part is None]
    if missing:
        raise TypeError(f"{module.__name__} lacks {', '.join(missing)}: a format has FORMAT, recognise and load")
    guess = getattr(module, "GUESS", 0)
    return Format(parts["FORMAT"], parts["recognise"], parts["load"], guess)  # type: ignore[arg-type]


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


def claims(path: Path, head: bytes) -> list[Format]:
    """The formats whose content `path` has, the surest alone; more than one is a contradiction, none a foreign file.

    What the file would run for a loader that takes it for a pickle is asked of every file (`guarded`), whatever it is.
    """
    found = [form for form in formats().values() if form.recognise(path, head)]
    surest = min((form.guess for form in found), default=0)
    return [form for form in found if form.guess == surest]


def format_of(file: Path) -> Format | None:
    """The format of a file by its content; None for texts, empty files, contradictions and everything else."""
    try:
        with open(file, "rb") as opened:
            head = opened.read(HEAD_BYTES)
    except OSError:
        return None
    found = claims(file, head) if head else []
    return found[0] if len(found) == 1 else None
