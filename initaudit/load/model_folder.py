"""Folders: a Hugging Face model, shards with or without an index, what a training run left behind.

The weights come from the safest format that is there; every pickle is read as well, for what it would run and for the
optimizer's state. config.json is kept as metadata; code that it points to is noted and never imported.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.deepspeed_folder import MODEL
from initaudit.load.finish import finish, strip_names
from initaudit.load.guarded import guarded
from initaudit.load.registry import format_of
from initaudit.load.spans import reason, show

FORMAT = "folder"
PREFERENCE = ("safetensors", "torch_zip", "pickle", "torch_tar", "onnx", "gguf", "exported_program", "torchscript")
PICKLED = ("torch_zip", "pickle", "torch_tar")
# Formats that may have a pickle in them: each such file is read for what it would run, chosen or not
INSPECTED = (*PICKLED, "torchscript", "exported_program", "numpy", "archive")
MAX_JSON = 64 << 20
MAX_FILES = 10_000
_SHARD = re.compile(r"(.*?)[-_.](\d+)[-_]of[-_](\d+)(.*)")


@dataclass
class Found:
    """What lies in a folder: the model files by format, and the weight maps of the indexes."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    indexes: dict[Path, dict[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def recognise(path: Path, head: bytes) -> bool:
    """True for a folder with an index or at least one file of a known format."""
    if not path.is_dir() or any(path.glob(MODEL)) or (path / ".metadata").is_file():
        return False
    if any(_is_index(file) or format_of(file) is not None for file in _files(path)):
        return True
    return any(_leaves(path, file) for file in path.iterdir())


def load(path: Path) -> Checkpoint:
    """Reads the folder at `path`; raises `UnreadableModel` where several models lie in it or none can be read."""
    where = show(path, 200)
    found = _look(path, where)
    pickles = {file: _read(file) for form in INSPECTED for file in found.files.get(form, [])}
    index = next(iter(sorted(found.indexes, key=lambda file: "safetensors" not in file.name)), None)
    if index is not None:
        made = _from_index(path, index, found, pickles, where)
    else:
        made = _from_files(found, pickles, where)
    extra, optimizer = _beside(made, pickles)
    metadata = {**made.metadata, **_config(path, found)}
    merged = replace(
        made,
        source=str(path),
        problems=(*made.problems, *found.problems, *extra),
        optimizer={**made.optimizer, **optimizer},
        metadata=metadata,
        notes=tuple(dict.fromkeys((*made.notes, *found.notes))),
    )
    return finish(merged)


def _files(path: Path) -> list[Path]:
    files = sorted(file for file in path.iterdir() if file.is_file() and not _leaves(path, file))
    if len(files) > MAX_FILES:
        raise UnreadableModel(show(path, 200), f"a folder of {len(files)} files", f"at most {MAX_FILES}")
    return files


def _leaves(folder: Path, file: Path) -> bool:
    """Whether a file is a symbolic link out of the folder: a model from a stranger must not make us read any other file.

    The cache of the Hugging Face hub is made of links from snapshots/REVISION into blobs/ beside it; these may be followed.
    """
    if not file.is_symlink():
        return False
    root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(file))
    blobs = root.parent.parent / "blobs"
    return not target.is_relative_to(root) and not (root.parent.name == "snapshots" and target.is_relative_to(blobs))


def is_shard(file: Path) -> bool:
    """Whether the name of a file says that it is one of several."""
    return _SHARD.fullmatch(file.name) is not None


def _is_index(file: Path) -> bool:
    return file.name.endswith(".index.json")


def _look(path: Path, where: str) -> Found:
    found = Found()
    for file in sorted(path.iterdir()):
        if _leaves(path, file):
            text = f"{where}: {show(file.name)} is a symbolic link out of the folder, which was not followed; copy the file"
            found.problems.append(Problem("IA001", "", text))
    for file in _files(path):
        if _is_index(file):
            found.indexes[file] = _weight_map(file, where)
        elif file.suffix == ".py":
            found.notes.append(f"{show(file.name)} is code; it was not run")
        elif file.suffix != ".json":
            form = format_of(file)
            if form is not None:
                found.files.setdefault(form.name, []).append(file)
    return found


def _json(file: Path, where: str) -> Any:
    try:
        if file.stat().st_size > MAX_JSON:
            raise UnreadableModel(where, f"{show(file.name)} of {file.stat().st_size} bytes", f"at most {MAX_JSON}")
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UnreadableModel(where, f"{show(file.name)} is not JSON ({reason(error)})", advice="copy it again") from error


def _weight_map(file: Path, where: str) -> dict[str, str]:
    table = _json(file, where)
    weights = table.get("weight_map") if isinstance(table, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(shard, str) for shard in weights.values()):
        raise UnreadableModel(where, f"{show(file.name)} has no weight_map", "a table of tensor names and shards")
    return weights


def _read(file: Path) -> Checkpoint | UnreadableModel:
    form = format_of(file)
    if form is None:
        return UnreadableModel(show(file, 200), "of no known format, or damaged at its start")
    try:
        return guarded(file, form.load)
    except UnreadableModel as error:
        return error


def _from_index(
    folder: Path, index: Path, found: Found, pickles: dict[Path, Checkpoint | UnreadableModel], where: str
) -> Checkpoint:
    """The shards that an index names, and IA502 for what it promises and no shard keeps, or the other way round."""
    names, _ = strip_names(found.indexes[index])  # as the loaders of the shards do
    weights = {names[name]: shard for name, shard in found.indexes[index].items()}
    arrays: dict[str, Array] = {}
    problems: list[Problem] = []
    forms = []
    for shard in sorted(set(weights.values())):
        promised = [name for name, file in weights.items() if file == shard]
        path = folder / shard
        if Path(shard).name != shard or not path.is_file() or _leaves(folder, path):
            found_text = "lies outside the folder" if Path(shard).name != shard or path.is_symlink() else "is missing"
            example = f"{len(promised)} tensors with it, such as {show(promised[0])}"
            text = f"{where}: the shard {show(shard)} {found_text}: {example}"
            problems.append(Problem("IA502", promised[0], text, related=tuple(promised[1:])))
            continue
        made = pickles.get(path) or _read(path)
        if isinstance(made, UnreadableModel):
            text = f"{made}; {len(promised)} tensors are lost with it"
            problems.append(Problem("IA502", promised[0], text, related=tuple(promised[1:])))
            continue
        forms.append(made.format)
        arrays.update(made.arrays)
        problems += [problem for problem in made.problems if path not in pickles]
        known = {*made.arrays, *(problem.tensor for problem in made.problems)}
        lost = [name for name in promised if name not in known]
        if lost:
            text = f"{where}: {show(shard)} lacks {_some(lost)}, which the index puts there"
            problems.append(Problem("IA502", lost[0], text, related=tuple(lost[1:])))
    unexpected = [name for name in arrays if name not in weights]
    if unexpected:
        problems.append(Problem("IA502", unexpected[0], f"{where}: {_some(unexpected)} is in a shard and not in the index"))
    if not arrays and not problems:
        raise UnreadableModel(where, f"{show(index.name)} names no tensor")
    return Checkpoint(str(folder), forms[0] if forms else FORMAT, arrays, problems=tuple(problems))


def _some(names: list[str]) -> str:
    return show(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _from_files(found: Found, pickles: dict[Path, Checkpoint | UnreadableModel], where: str) -> Checkpoint:
    """The one model among the files, by preference of format; shards with numbered names are put together."""
    refused: list[UnreadableModel] = []
    for form in PREFERENCE:
        candidates: dict[Path, Checkpoint] = {}
        for file in found.files.get(form, []):
            made = pickles.get(file) or _read(file)
            if isinstance(made, UnreadableModel):
                refused.append(made)
            elif form not in PICKLED or any("float" in array.dtype for array in made.arrays.values()):
                candidates[file] = made
        if not candidates:
            continue
        names = {_SHARD.sub(r"\1\4", file.name) for file in candidates}
        if len(names) > 1:
            listed = ", ".join(show(file.name) for file in candidates)
            raise UnreadableModel(where, f"several models ({show(listed, 200)})", "one", "name the file")
        if len(candidates) > 1 or any(_SHARD.fullmatch(file.name) for file in candidates):
            return _joined(candidates, where)
        return next(iter(candidates.values()))
    if refused:
        raise refused[0]
    found.problems.append(Problem("IA502", "", f"{where}: no file in it holds weights"))
    return Checkpoint(where, FORMAT, {})


def _joined(candidates: dict[Path, Checkpoint], where: str) -> Checkpoint:
    arrays: dict[str, Array] = {}
    problems: list[Problem] = []
    first = next(iter(candidates.values()))
    numbers, total = set(), 0
    for file, made in candidates.items():
        twice = [name for name in made.arrays if name in arrays]
        if twice:
            problems.append(Problem("IA502", twice[0], f"{where}: {_some(twice)} is in more than one shard"))
        arrays.update({name: array for name, array in made.arrays.items() if name not in arrays})
        problems += [problem for problem in made.problems if made.format not in PICKLED]
        match = _SHARD.fullmatch(file.name)
        if match is not None:
            numbers.add(int(match[2]))
            total = int(match[3])
    if numbers and len(numbers) < total:
        found = f"{where}: {len(numbers)} of {total} shards are there"
        problems.append(Problem("IA502", "", f"{found}, and no index says which tensors are lost"))
    return replace(first, arrays=arrays, problems=tuple(problems))


def _beside(made: Checkpoint, pickles: dict[Path, Checkpoint | UnreadableModel]) -> tuple[list[Problem], dict[str, Array]]:
    """What the pickles of a folder would run, and the optimizer's state that one of them keeps."""
    problems: list[Problem] = []
    optimizer: dict[str, Array] = {}
    known = {(problem.code, problem.message) for problem in made.problems}
    for file, read in pickles.items():
        if isinstance(read, UnreadableModel):
            continue
        optimizer.update(read.optimizer)
        for problem in read.problems:
            own = problem.code == "IA505" or set(read.arrays) <= set(made.arrays)
            if own and (problem.code, problem.message) not in known:
                problems.append(replace(problem, message=f"{show(file.name)}: {problem.message}"))
    return problems, optimizer


def _config(path: Path, found: Found) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        config = _json(file, show(path, 200))
    except UnreadableModel as error:
        found.problems.append(Problem("IA001", "", str(error)))
        return {}
    if not isinstance(config, dict):
        return {}
    if isinstance(config.get("auto_map"), dict):
        asked = ", ".join(show(value) for value in config["auto_map"].values())
        found.notes.append(f"config.json asks for code of its own ({show(asked, 200)}); it was not run")
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict):
        found.notes.append(f"quantised with {show(quantization.get('quant_method', 'an unnamed method'))}")
    return {"config": config}
