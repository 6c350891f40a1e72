"""torch.distributed.checkpoint folders: `.metadata` (a pickle of tables) and shards of one torch.save archive a chunk."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem, numpy_dtype
from initaudit.load.finish import finish
from initaudit.load.hidden import look_into
from initaudit.load.onnx_tensors import resolve_external
from initaudit.load.pickle_arrays import as_array, code_problems
from initaudit.load.pickle_globals import KNOWN, sizes, torch_dtype
from initaudit.load.pickle_machine import Machine
from initaudit.load.pickle_reader import BrokenPickle, read
from initaudit.load.pickle_values import Call, Recorder, Tensor
from initaudit.load.spans import Span, byte_count, reason, show
from initaudit.load.torch_zip import read_archive

FORMAT = "distributed_checkpoint"
MAX_METADATA = 256 << 20
# torch/distributed/checkpoint/metadata.py and filesystem.py: dataclasses and an enumeration, no code of their own
TABLES = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint._traverse": (),
}  # fmt: skip


@dataclass(frozen=True)
class Chunk:
    """A block of a tensor: where it starts in it, and its own array."""

    offset: tuple[int, ...]
    array: Array


def recognise(path: Path, head: bytes) -> bool:
    """True for a folder with a `.metadata` beside shards."""
    return path.is_dir() and (path / ".metadata").is_file()


def load(path: Path) -> Checkpoint:
    """Reads the folder at `path`; raises `UnreadableModel` where its metadata is broken.

    A tensor whose shard is missing or too short becomes IA502; one that belongs to an optimizer is kept aside.
    """
    where = show(path, 200)
    recorder = Recorder()
    tensors, places, paths = _metadata(path / ".metadata", where, recorder)
    arrays: dict[str, Array] = {}
    optimizer: dict[str, Array] = {}
    problems: list[Problem] = []
    chunks: dict[str, list[Chunk]] = {}
    for (name, offset), (file, start, length) in places.items():
        if name not in tensors:
            # What is no tensor was saved as a pickle, and torch.distributed.checkpoint unpickles it
            _look_into(path, file, start, length, f"{where}: {show(name)}", recorder)
            continue
        try:
            chunks.setdefault(name, []).append(Chunk(offset, _chunk(path, file, start, length, name, where, recorder)))
        except UnreadableModel as error:
            problems.append(Problem("IA502", name, str(error)))
    states = _optimizer_prefixes(tensors)
    for name, (shape, dtype) in tensors.items():
        try:
            array = _assemble(name, shape, dtype, chunks.get(name, []), f"{where}: {show(name)}")
        except UnreadableModel as error:
            problems.append(Problem("IA502", name, str(error)))
            continue
        (optimizer if name.startswith(states) else arrays)[name] = array
    problems += code_problems(recorder)
    arrays, notes = _without_container(arrays, paths)
    made = Checkpoint(str(path), FORMAT, arrays, problems=tuple(problems), optimizer=optimizer, notes=notes)
    return finish(made)


def _without_container(arrays: dict[str, Array], paths: dict[str, tuple[Any, ...]]) -> tuple[dict[str, Array], tuple[str, ...]]:
    """The names inside the state dict that was saved, where one dict (`model`) holds all of them; `paths` tells where."""
    tops = {paths.get(name, ())[:1] for name in arrays}
    if len(tops) != 1 or tops == {()} or any(len(paths[name]) < 2 for name in arrays):
        return arrays, ()
    names = {name: ".".join(str(part) for part in paths[name][1:]) for name in arrays}
    ((top,),) = tops
    renamed = {names[name]: replace(array, name=names[name]) for name, array in arrays.items()}
    return renamed, (f"weights taken from {show(top)!r}",)


Tables = tuple[
    dict[str, tuple[tuple[int, ...], str]],
    dict[tuple[str, tuple[int, ...]], tuple[str, int, int]],
    dict[str, tuple[Any, ...]],
]


def _metadata(file: Path, where: str, recorder: Recorder) -> Tables:
    """(shape and dtype of each tensor, file and bytes of each chunk, path of each name in what was saved)."""
    span = Span.of_file(file)
    if span.length > MAX_METADATA:
        raise UnreadableModel(where, f"metadata of {span.length} bytes", f"at most {MAX_METADATA}")
    known = {**KNOWN, **{(module, name): None for module, names in TABLES.items() for name in names}}
    try:
        root = _state(read(Machine(span.read(), known, recorder)))
        tensors = {}
        for name, value in root["state_dict_metadata"].items():
            table = _state(value)
            if "properties" in table:
                properties = table["properties"]
                state = properties.state if isinstance(properties, Call) else None
                dtype = state["dtype"] if isinstance(state, dict) else state[0]  # type: ignore[index]
                tensors[str(name)] = (sizes(table["size"]), torch_dtype(dtype))
        planned = root.get("planner_data")
        planned = planned if isinstance(planned, dict) else {}
        paths = {str(name): path for name, path in planned.items() if isinstance(path, tuple)}
        places = {}
        for index, value in root["storage_data"].items():
            key, info = _state(index), _state(value)
            if info.get("transform_descriptors"):
                raise UnreadableModel(where, "shards that are compressed or transformed", advice="save them as they are")
            offset = () if key.get("offset") is None else sizes(key["offset"])
            places[str(key["fqn"]), offset] = (str(info["relative_path"]), int(info["offset"]), int(info["length"]))
    except (BrokenPickle, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UnreadableModel(where, f"broken metadata ({reason(error)})", advice="save the checkpoint again") from error
    return tensors, places, paths


def _state(value: Any) -> dict[str, Any]:
    if isinstance(value, Call) and isinstance(value.state, dict):
        return value.state
    if isinstance(value, Call) and value.state is None:
        return {}
    raise TypeError("a table is not what it should be")


def _look_into(folder: Path, file: str, start: int, length: int, label: str, recorder: Recorder) -> None:
    try:
        path, size = resolve_external(folder, file, label)
        if start >= 0 and length >= 0 and start + length <= size:
            look_into(Span(path, start, length), label, recorder)
    except UnreadableModel as error:
        recorder.broken.append(str(error))


def _chunk(folder: Path, file: str, start: int, length: int, name: str, where: str, recorder: Recorder) -> Array:
    label = f"{where}: {show(name)}"
    path, size = resolve_external(folder, file, label)
    if start < 0 or length < 0 or start + length > size:
        raise UnreadableModel(
            label, f"bytes {start} to {start + length} of {show(file)}, which has {size}", advice="a shard is truncated"
        )
    value = read_archive(Span(path, start, length), label, recorder)
    if not isinstance(value, Tensor):
        raise UnreadableModel(label, f"no tensor at {start} of {show(file)}")
    return as_array(value, name, f"{where} ({show(file)} at {start})", True)


def _assemble(name: str, shape: tuple[int, ...], dtype: str, chunks: list[Chunk], label: str) -> Array:
    """One array out of its chunks, which must lie inside the shape and fill it."""
    try:
        byte_count(dtype, shape)
    except ValueError as error:
        raise UnreadableModel(label, str(error)) from error
    for chunk in chunks:
        ends = [start + size for start, size in zip(chunk.offset, chunk.array.shape, strict=False)]
        fits = len(ends) == len(shape) == len(chunk.offset) == len(chunk.array.shape) and chunk.array.dtype == dtype
        if (
            not fits
            or any(start < 0 for start in chunk.offset)
            or any(end > size for end, size in zip(ends, shape, strict=True))
        ):
            raise UnreadableModel(
                label, f"a chunk of shape {list(chunk.array.shape)} at {list(chunk.offset)}", f"one inside {list(shape)}"
            )
    if len(chunks) == 1 and chunks[0].array.shape == shape:
        return chunks[0].array
    if sum(chunk.array.size for chunk in chunks) != math.prod(shape):
        held = sum(chunk.array.size for chunk in chunks)
        raise UnreadableModel(label, f"{held} of its {math.prod(shape)} elements are there", advice="a shard is missing")
    return Array(name, shape, dtype, _joined(chunks, shape, dtype))


def _joined(chunks: list[Chunk], shape: tuple[int, ...], dtype: str) -> Callable[[], np.ndarray[Any, Any]]:
    def open_all() -> np.ndarray[Any, Any]:
        whole = np.empty(shape, numpy_dtype(dtype))
        for chunk in chunks:
            where = tuple(slice(start, start + size) for start, size in zip(chunk.offset, chunk.array.shape, strict=True))
            whole[where] = chunk.array.read()
        return whole

    return open_all


def _optimizer_prefixes(tensors: dict[str, Any]) -> tuple[str, ...]:
    """Names below `x.state.` whose siblings lie in `x.param_groups` were flattened out of an optimizer's state dict."""
    tops = {name.partition(".")[0] for name in tensors}
    return tuple(f"{top}.state." for top in tops if any(name.startswith(f"{top}.state.") for name in tensors))
