"""Reports on files that have been audited before, kept by what the files hold.

An entry's name is a hash over the content of the model and of every file that the configuration names, the configuration itself
and this program; a change of any of them makes another name. Entries are written whole and renamed, so that runs side by side
read a whole one or none; what cannot be read is no entry. `INITAUDIT_CACHE_DIR` moves the folder, or, empty, switches it off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

from initaudit import __version__
from initaudit.config import Config
from initaudit.errors import UsageError
from initaudit.location import Location
from initaudit.report.report import Activation, Layer, ModelReport
from initaudit.report.write import write_whole
from initaudit.rules.rule import Block, Finding

VARIABLE = "INITAUDIT_CACHE_DIR"
MOST_ENTRIES = 500
MOST_BYTES = 64 << 20
# Reading more than this again costs as much as auditing it: such a file is known by its size, its times and its inode. No
# program can set a change time, so that a file which was written to is another one.
WHOLE = 512 << 20
NEIGHBOURS = 5000  # files beside a model that points to others
_BLOCK = 1 << 20
_RECORDS = {cls.__name__: cls for cls in (ModelReport, Layer, Activation, Finding, Block, Location)}
# What has no influence on a report about one model, or is applied to it afterwards.
_APART = ("jobs", "models", "baseline", "strict", "fail_on", "cache", "origin")


def folder() -> Path | None:
    """Where entries are; None where the cache is switched off."""
    given = os.environ.get(VARIABLE)
    if given is not None:
        return Path(given) if given else None
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "initaudit"


def entry_of(source: str, config: Config) -> Path | None:
    """The file that holds, or would hold, the report; None for what is not cached: code, addresses, devices, a cache off."""
    place = folder() if config.cache else None
    named = [text for text in (config.data, config.base, config.arch) if text is not None]
    if place is None or config.trust or config.rehearse or not all(os.path.exists(path) for path in (source, *named)):
        return None
    digest = hashlib.blake2b(digest_size=24)
    kept = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _APART}
    # Some stages ask whether a value was asked for, not what it is.
    digest.update(repr((_program(), source, sorted(kept.items()), sorted(set(config.origin) - set(_APART)))).encode())
    try:
        for path in (source, *named):
            for part in _parts(Path(path)):
                digest.update(part)
    except (OSError, _TooMany):
        return None
    return place / f"{digest.hexdigest()}.json"


def read(entry: Path) -> ModelReport | None:
    """The report of an entry; None where there is none that can be read."""
    try:
        found = _record(json.loads(entry.read_text("utf-8")))
        os.utime(entry)  # what is used stays
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return found if isinstance(found, ModelReport) else None


def write(entry: Path, report: ModelReport) -> None:
    """Keeps a report, and drops the entries that were not used for longest. A disk that refuses is no reason to fail."""
    with contextlib.suppress(OSError, UsageError, TypeError, ValueError):
        text = json.dumps(_plain(report))
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_whole(entry, text)
        _prune(entry.parent)


def _prune(place: Path) -> None:
    entries = []
    for path in place.glob("*.json"):
        with contextlib.suppress(OSError):
            state = path.stat()
            entries.append((state.st_mtime_ns, state.st_size, path))
    kept, size = 0, 0
    for _, length, path in sorted(entries, reverse=True):
        kept, size = kept + 1, size + length
        if kept > MOST_ENTRIES or size > MOST_BYTES:
            path.unlink(missing_ok=True)  # another run may have been faster


class _TooMany(Exception):
    """More files beside a model than are worth looking at."""


def _parts(path: Path) -> Iterator[bytes]:
    """What is hashed of a file or folder."""
    if path.is_dir():
        yield from _stats(path, content=True)
        return
    yield path.name.encode("utf-8", "surrogateescape")
    points_elsewhere = yield from _content(path)
    if points_elsewhere:
        yield from _stats(path.parent, content=False)


def _stats(place: Path, *, content: bool) -> Iterator[bytes]:
    files = 0
    for root, folders, names in os.walk(place):
        folders.sort()
        for name in sorted(names):
            files += 1
            if files > NEIGHBOURS:
                raise _TooMany
            file = Path(root, name)
            yield str(file.relative_to(place)).encode("utf-8", "surrogateescape")
            if content:
                yield from _content(file)
            else:
                yield _state(file)


def _state(file: Path) -> bytes:
    state = file.stat()
    return repr((state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino)).encode()


def _content(file: Path) -> Generator[bytes, None, bool]:
    """The bytes of a file; returns whether it may name others (ONNX external data, the shards of an index)."""
    points = False
    if not file.is_file() or file.stat().st_size > WHOLE:
        yield _state(file)
        return True
    tail = b""
    with open(file, "rb") as opened:
        while block := opened.read(_BLOCK):
            points = points or any(word in tail + block for word in (b"location", b"weight_map"))
            tail = block[-16:]
            yield block
    return points


@functools.cache
def _program() -> str:
    """This program, down to its files, and the libraries that its numbers come from; nothing is imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    found = [__version__]
    for name in ("torch", "numpy", "onnx", "transformers"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    for file in sorted(Path(__file__).parent.rglob("*.py")):
        state = file.stat()
        found.append(f"{file} {state.st_size} {state.st_mtime_ns}")
    return "\n".join(found)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"$": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, list):
        return {"$": "list", "parts": [_plain(part) for part in value]}
    if hasattr(value, "items"):
        if not all(isinstance(key, str) and key != "$" for key in value):
            raise TypeError("keys that JSON does not have")
        return {key: _plain(part) for key, part in value.items()}
    return value


def _record(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_record(part) for part in value)
    if isinstance(value, dict):
        if value.get("$") == "list":
            return [_record(part) for part in value["parts"]]
        fields = {key: _record(part) for key, part in value.items() if key != "$"}
        return _RECORDS[value["$"]](**fields) if "$" in value else fields
    return value
