"""Reads what a reviewer is handed, and runs none of it: files, folders and `package.module:callable`.

Only the last of these executes code: the user's own module, which was named on the command line.
"""

from __future__ import annotations

import difflib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from initaudit.errors import InitauditError, UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.foreign import describe_foreign
from initaudit.load.guarded import guarded
from initaudit.load.module import from_module, is_module_spec, load_spec
from initaudit.load.onnx_file import load_proto
from initaudit.load.registry import HEAD_BYTES, claims
from initaudit.load.spans import reason, show

if TYPE_CHECKING:
    from initaudit.load.registry import Format

__all__ = ["Array", "Checkpoint", "Problem", "from_module", "is_module_spec", "load", "load_proto"]


def load(source: str | os.PathLike[str]) -> Checkpoint:
    """Reads a file, a folder or `package.module:callable`; weights stay in the file until they are asked for.

    Raises `UnreadableModel` with one line that says what was found and what to do. A single bad tensor does not raise: it is
    a `Problem` of the checkpoint.
    """
    text = os.fspath(source)
    if "\0" in text or not text:
        raise UnreadableModel(show(text) or "(empty)", "not a path")
    path = Path(text)
    if not os.path.lexists(path):
        if is_module_spec(text):
            return load_spec(text)
        raise UnreadableModel(show(text, 200), *_missing(text, path))
    if path.suffix == ".py" and path.is_file():
        advice = f"name the class or function that builds the model: {_spec(text, 'Net')}"
        raise UnreadableModel(show(text, 200), "Python code, which is not read as a model", advice=advice)
    try:
        return guarded(path, lambda found: recognise(found).load(found))
    except InitauditError:
        raise
    except RecursionError as error:
        raise UnreadableModel(show(text, 200), "nested too deeply", advice="the file is damaged or hostile") from error
    except MemoryError as error:
        raise UnreadableModel(show(text, 200), "does not fit into memory") from error
    except OSError as error:
        raise UnreadableModel(show(text, 200), reason(error)) from error


def recognise(path: Path) -> Format:
    """The one format whose content `path` has; raises `UnreadableModel` where none or several claim it."""
    where = show(path, 200)
    head = _head(path)
    found = claims(path, head)
    if len(found) == 1:
        return found[0]
    if found:
        raise UnreadableModel(where, f"could be {' or '.join(form.name for form in found)}", "one format")
    foreign, advice = describe_foreign(path, head)
    raise UnreadableModel(where, foreign, advice=advice)


def _head(path: Path) -> bytes:
    """The first bytes of a regular file, none of a folder; raises `UnreadableModel` for anything else."""
    where = show(path, 200)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return b""
        if not stat.S_ISREG(mode):
            raise UnreadableModel(where, "neither a file nor a folder", "a model")
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as error:
        raise UnreadableModel(where, reason(error)) from error
    if not head:
        raise UnreadableModel(where, "the file is empty", "a model", "copy or download it again")
    return head


def _spec(file: str, name: str) -> str:
    """How something in a Python file is named on the command line, from the folder where its import begins."""
    path = Path(os.path.relpath(file))
    outside = any(not part.isidentifier() for part in path.with_suffix("").parts)
    spec = f"{show(path.stem if outside else '.'.join(path.with_suffix('').parts))}:{show(name)}"
    return f"{spec} in the folder {show(path.parent, 200)}" if outside else spec


def _missing(text: str, path: Path) -> tuple[str, str, str]:
    """What was found, expected and advised for a path that does not exist."""
    if "://" in text:
        return "an address", "a file, a folder or package.module:callable", "download it first"
    if ".py:" in text:
        file, _, name = text.rpartition(":")
        if os.path.isfile(file):
            return (
                "a Python file, which is imported by its module's name",
                "package.module:callable",
                f"write {_spec(file, name)}",
            )
        text, path = file, Path(file)
    try:
        near = difflib.get_close_matches(path.name, os.listdir(path.parent), n=1)
    except OSError:
        return "no such file or folder", "", f"{show(path.parent)} does not exist either"
    return "no such file or folder", "", f"did you mean {show(path.parent / near[0], 200)}?" if near else ""
