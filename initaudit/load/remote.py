"""Models that are not files here: addresses and standard input, copied into a folder that is deleted after the audit."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from initaudit.errors import UnreadableModel
from initaudit.load.spans import reason, show
from initaudit.meter import Meter

TIMEOUT = 30.0  # seconds without a byte
BLOCK = 1 << 20
SPARE = 256 << 20  # bytes of the disk that are left to others
# What a model on the hub is made of; the rest of a repository (pictures, other frameworks' weights) is not fetched.
HUB_FILES = ("*.safetensors", "*.json", "*.onnx", "*.onnx_data", "*.onnx.data", "*.gguf", "*.bin", "*.pt", "*.pth", "*.ckpt")

Progress = Callable[[str], None]


def is_remote(source: str) -> bool:
    """Whether a source has to be fetched: "-" (standard input) or an address with a scheme."""
    return source == "-" or "://" in source


@contextmanager
def fetched(source: str, progress: Progress) -> Iterator[str]:
    """The path of a local copy of a remote source, or of a local one itself; raises `UnreadableModel`.

    http and https are read by Python itself, hf://owner/name[@revision] through huggingface_hub, everything else
    (s3://bucket/key, gs://..., memory://...) through fsspec. Nothing of what is fetched is run.
    """
    if not is_remote(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="initaudit-") as folder:
        try:
            yield str(_fetch(source, Path(folder), progress))
        except OSError as error:
            raise UnreadableModel(show(source, 200), reason(error)) from error


def _fetch(source: str, folder: Path, progress: Progress) -> Path:
    if source == "-":
        return _standard_input(folder)
    scheme = source.partition("://")[0].lower()
    if scheme in ("http", "https"):
        return _http(source, folder, progress)
    if scheme == "hf":
        return _hub(source, folder)
    return _fsspec(source, folder, progress)


def _standard_input(folder: Path) -> Path:
    if sys.stdin.isatty():
        raise UnreadableModel("-", "standard input is a terminal", "a model", "cat model.onnx | initaudit -")
    target = folder / "stdin"
    _copy(sys.stdin.buffer, target, "-", None, lambda _: None)
    return target


def _http(source: str, folder: Path, progress: Progress) -> Path:
    target = folder / _file_name(source)
    _get(source, target, progress)
    if target.name.endswith(".onnx"):
        # Exporters keep large weights in a file beside the graph, under one of these names.
        for ending in (".data", "_data"):
            _get(_beside(source, target.name + ending), folder / (target.name + ending), progress, optional=True)
    if target.name.endswith(".index.json"):
        for shard in _shards(target, source):
            _get(_beside(source, shard), folder / shard, progress)
        return folder
    return target


def _file_name(source: str) -> str:
    name = PurePosixPath(urllib.parse.unquote(urllib.parse.urlsplit(source).path)).name
    return name.replace("\0", "") or "model"


def _beside(source: str, name: str) -> str:
    parts = urllib.parse.urlsplit(source)
    path = str(PurePosixPath(parts.path).parent / urllib.parse.quote(name))
    return urllib.parse.urlunsplit(parts._replace(path=path))


def _shards(index: Path, source: str) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UnreadableModel(show(source, 200), "an index without a weight_map") from error
    if any(not isinstance(name, str) or PurePosixPath(name).name != name or name in ("", "..") for name in names):
        raise UnreadableModel(show(source, 200), "its shards lie outside its folder")
    return names


def _get(source: str, target: Path, progress: Progress, *, optional: bool = False) -> None:
    # Only here: with it comes all of http and ssl, which a local file has no use for.
    import urllib.error
    import urllib.request

    request = urllib.request.Request(source, headers={"User-Agent": "initaudit"})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
            size = answer.headers.get("Content-Length")
            _copy(answer, target, source, int(size) if size and size.isdigit() else None, progress)
    except urllib.error.HTTPError as error:
        if optional and error.code in (403, 404, 410):
            return
        raise UnreadableModel(show(source, 200), f"the server answers {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise UnreadableModel(show(source, 200), f"cannot be fetched ({error.reason})") from error
    except ValueError as error:
        raise UnreadableModel(show(source, 200), f"no address ({reason(error)})") from error


def _copy(stream: IO[bytes] | Any, target: Path, source: str, size: int | None, progress: Progress) -> None:
    room = shutil.disk_usage(target.parent).free - SPARE
    done = 0
    meter = Meter(progress, "fetching", "MB", size or 0)
    with open(target, "wb") as file:
        while block := stream.read(BLOCK):
            done += len(block)
            if max(done, size if size is not None else 0) > room:
                raise UnreadableModel(show(source, 200), f"more than the {room / 1e9:.1f} GB that the disk has room for")
            file.write(block)
            meter("", len(block))
    if size is not None and done < size:
        raise UnreadableModel(show(source, 200), f"the connection ended after {done:,} of {size:,} bytes")


def _hub(source: str, folder: Path) -> Path:
    name, _, revision = source.removeprefix("hf://").partition("@")
    parts = name.split("/")
    if len(parts) < 2 or not all(parts):
        raise UnreadableModel(show(source, 200), "no repository", "hf://owner/name or hf://owner/name/file")
    try:
        from huggingface_hub import hf_hub_download, snapshot_download
    except ImportError as error:
        raise UnreadableModel(show(source, 200), "huggingface_hub is not installed", advice="install initaudit[hub]") from error
    repository, file = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        if file:
            return Path(hf_hub_download(repository, file, revision=revision or None, local_dir=folder))
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(HUB_FILES), local_dir=folder))
    except Exception as error:
        raise UnreadableModel(show(source, 200), f"cannot be fetched ({reason(error)})") from error


def _fsspec(source: str, folder: Path, progress: Progress) -> Path:
    try:
        import fsspec
    except ImportError as error:
        raise UnreadableModel(show(source, 200), "fsspec is not installed", advice="install initaudit[hub]") from error
    try:
        system, path = fsspec.url_to_fs(source)
        progress("fetching")
        target = folder / (PurePosixPath(path).name or "model")
        system.get(path, str(target), recursive=system.isdir(path))
    except Exception as error:
        raise UnreadableModel(show(source, 200), f"cannot be fetched ({reason(error)})") from error
    return target
