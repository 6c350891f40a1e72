"""Folders that hold several models: which they are, where no index, config.json or numbered shards bind the files into one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from initaudit.errors import InitauditError, NoWeights
from initaudit.load.model_folder import FORMAT as FOLDER
from initaudit.load.model_folder import INSPECTED, PREFERENCE, is_shard
from initaudit.load.registry import claims, format_of

MAX_DEPTH = 4  # folders below the one that was named
MAX_FOLDERS = 2000


def models_in(source: str) -> tuple[str, ...]:
    """The models that a folder holds, in the order of their names; `source` itself where it is one model, or anything else.

    A folder is one model where an index, a config.json, numbered shards or a checkpoint's own files say so; else every file
    with weights in it is a model of its own. A folder without files of weights stands for the folders below it.
    """
    path = Path(source)
    try:
        if not path.is_dir():
            return (source,)
        found = tuple(_below(path, MAX_DEPTH, [MAX_FOLDERS]))
    except OSError:
        return (source,)  # reading it will say what is wrong
    return found if found else (source,)


def _below(folder: Path, depth: int, left: list[int]) -> Iterator[str]:
    left[0] -= 1
    forms = [form.name for form in claims(folder, b"")]
    if forms and forms != [FOLDER]:
        yield str(folder)
        return
    models = _files(folder) if forms else ()
    if models:
        yield from models
        return
    for entry in sorted(folder.iterdir()) if depth > 0 else ():
        # Hidden folders and environments hold what others wrote.
        plain = entry.is_dir() and not entry.is_symlink() and not entry.name.startswith(".")
        if plain and left[0] > 0 and not (entry / "pyvenv.cfg").exists():
            yield from _below(entry, depth - 1, left)


def _files(folder: Path) -> tuple[str, ...]:
    """The models among the files of a folder; the folder itself where they are one, nothing where none has weights."""
    files = [folder / name for name in sorted(os.listdir(folder)) if (folder / name).is_file()]
    if any(f.name == "config.json" or f.name.endswith(".index.json") or is_shard(f) for f in files):
        return (str(folder),)
    models = [str(file) for file in files if _is_model(file)]
    return tuple(models) if len(models) > 1 else (str(folder),) * len(models)


def _is_model(file: Path) -> bool:
    """Whether a file holds weights; of those that may hold anything else (an optimizer's state) only what has floats."""
    try:
        form = format_of(file)
        if form is None or form.name not in PREFERENCE:
            return False
        return form.name not in INSPECTED or any("float" in a.dtype for a in form.load(file).arrays.values())
    except NoWeights:
        return False
    except (InitauditError, OSError):
        return True  # it was one: its audit says what is wrong with it
