"""Writing a report into a file: whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from initaudit.errors import UsageError

# What a slip of the hand must not replace: nobody writes a report into a file of weights.
_WEIGHTS = (
    *(".onnx", ".pt", ".pth", ".pt2", ".pkl", ".ckpt", ".bin", ".safetensors", ".gguf", ".npz", ".npy", ".h5", ".msgpack"),
    *(".data", ".index", ".tar", ".zip", ".py"),
)


def check_target(target: Path, read: Iterable[str] = ()) -> None:
    """Raises `UsageError` where writing `target` would destroy what was to be audited (`read`), or weights, or cannot work."""
    where = f"output {target}"
    if target.is_dir():
        raise UsageError(where, "a folder", "a file")
    if not target.parent.is_dir():
        raise UsageError(where, f"no folder {target.parent}", advice="make it first")
    if not os.access(target if target.exists() else target.parent, os.W_OK):
        raise UsageError(where, "may not be written", advice="choose a place of your own")
    if not target.exists():
        return
    for source in read:
        if os.path.exists(source) and os.path.samefile(source, target):
            raise UsageError(where, "is what is to be audited", "another file")
    if target.suffix.lower() in _WEIGHTS:
        raise UsageError(where, f"an existing {target.suffix} file", "a file for a report", "delete it first if it may go")


def check_new(target: Path, source: str, *, force: bool) -> None:
    """Raises `UsageError` where a model cannot be written to `target`: it exists (unless `force`), or is the source itself."""
    where = f"output {target}"
    if target.is_dir():
        raise UsageError(where, "a folder", "a file")
    if not target.parent.is_dir():
        raise UsageError(where, f"no folder {target.parent}", advice="make it first")
    if target.exists() and os.path.exists(source) and os.path.samefile(source, target):
        raise UsageError(where, "is the model itself", "another file")
    if os.path.lexists(target) and not force:
        raise UsageError(where, "exists already", "a new file", "or --force")
    if not os.access(target.parent, os.W_OK):
        raise UsageError(where, "may not be written", advice="choose a place of your own")


def write_whole(target: Path, text: str) -> None:
    """Writes UTF-8 text into a temporary file beside `target` and renames it, so that a reader sees the old or the new one.

    An existing file keeps its mode, a link is followed, and what is no plain file (/dev/stdout, a pipe) is written directly.
    Raises `UsageError` where the file system refuses.
    """
    data = text.encode("utf-8", "backslashreplace")
    try:
        real = target.resolve()
        if real.exists() and not real.is_file():
            with real.open("wb") as stream:
                stream.write(data)
            return
        mode = real.stat().st_mode & 0o7777 if real.exists() else 0o666 & ~_umask()
        handle, name = tempfile.mkstemp(prefix=f".{real.name[:50]}.", suffix=".tmp", dir=real.parent)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(name, mode)
            os.replace(name, real)
        except BaseException:
            # Ctrl-C included: no half-written file stays behind.
            os.unlink(name)
            raise
    except OSError as error:
        raise UsageError(f"output {target}", error.strerror or type(error).__name__) from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
