"""Exported programs (torch.export.save, .pt2): weights, constants and the graph; torch.export.load is not called.

Since PyTorch 2.8 an archive keeps each tensor as a raw member that a JSON file describes; before, two torch.save archives
stood inside it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.exported_graph import SCALAR_TYPES, read_graph
from initaudit.load.pickle_arrays import as_array, code_problems, leaves
from initaudit.load.pickle_values import Recorder, Storage, Tensor
from initaudit.load.spans import Span, show
from initaudit.load.torch_zip import hidden_notes, main_pickles, read_archive, read_hidden
from initaudit.load.zip_entries import Entry, is_zip, member_names, read_entries

FORMAT = "exported_program"
MAX_JSON = 64 << 20
MAX_GRAPH = 256 << 20
_GRAPH = re.compile(r"(^|/)(models/[^/]+\.json|serialized_exported_program\.json)$")
Entries = dict[str, list[Entry]]


def recognise(path: Path, head: bytes) -> bool:
    """True for an archive that describes an exported program."""
    return is_zip(head) and not main_pickles(path, head) and any(_is_mark(name) for name in member_names(path) or ())


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json")


def load(path: Path) -> Checkpoint:
    """Reads the archive at `path`; raises `UnreadableModel` where it is broken or holds no tensor."""
    where = show(path, 200)
    entries = read_entries(Span.of_file(path))
    arrays: dict[str, Array] = {}
    problems: list[Problem] = []
    recorder = Recorder()
    for name, found in entries.items():
        if name.endswith(("_weights_config.json", "_constants_config.json")):
            for array in _described(entries, name, where, problems, recorder):
                arrays.setdefault(array.name, array)
        elif found and is_zip(found[0].front):
            value = read_archive(found[0].data(), f"{where}: {show(name)}", recorder)
            if "state_dict" in name or name.endswith("serialized_constants.pt"):
                arrays.update(_leaves_of(value, where, problems))
    notes = (*hidden_notes(entries), *read_hidden(entries, where, recorder))
    problems += code_problems(recorder)
    if not arrays and not problems:
        raise UnreadableModel(where, "an exported program without weights")
    learned = {name: a if "float" in a.dtype else replace(a, trainable=False) for name, a in arrays.items()}
    metadata = _graph(entries, where)
    return Checkpoint(str(path), FORMAT, learned, problems=tuple(problems), notes=notes, metadata=metadata)


def _graph(entries: Entries, where: str) -> dict[str, Any]:
    """The graph of the archive's one program as metadata: "graph", or "no_program" with why there is none."""
    names = [name for name in entries if _GRAPH.search(name)]
    if len(names) != 1:
        return {"no_program": f"the archive holds {len(names)} graphs"}
    entry = entries[names[0]][0]
    try:
        if len(entries[names[0]]) > 1 or entry.size > MAX_GRAPH:
            raise UnreadableModel(where, f"{show(names[0])} of {entry.size} bytes", f"one of at most {MAX_GRAPH}")
        return {"graph": read_graph(entry.data().read(), where)}
    except UnreadableModel as error:
        return {"no_program": str(error)}


def _leaves_of(value: Any, where: str, problems: list[Problem]) -> dict[str, Array]:
    arrays = {}
    for path, leaf, trainable in leaves(value):
        name = ".".join(path)
        try:
            arrays[name] = as_array(leaf, name, where, trainable)
        except UnreadableModel as error:
            problems.append(Problem("IA001", name, str(error)))
    return arrays


def _described(entries: Entries, name: str, where: str, problems: list[Problem], recorder: Recorder) -> Iterator[Array]:
    """The tensors that one JSON file describes; each names a member beside that file."""
    entry = entries[name][0]
    if entry.size > MAX_JSON:
        raise UnreadableModel(where, f"{show(name)} of {entry.size} bytes", f"at most {MAX_JSON}")
    folder = name.rpartition("/")[0]
    try:
        config = json.loads(entry.data().read())["config"]
        tensors = list(config.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UnreadableModel(where, f"{show(name)} is not the table it should be", advice="the file is damaged") from error
    for tensor, meta in tensors:
        try:
            yield _one(entries, folder, str(tensor), meta, where, recorder)
        except UnreadableModel as error:
            problems.append(Problem("IA001", str(tensor), str(error)))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            problems.append(Problem("IA001", str(tensor), f"{where}: {show(tensor)} is described wrongly ({show(error)})"))


def _one(entries: Entries, folder: str, name: str, meta: dict[str, Any], where: str, recorder: Recorder) -> Array:
    label = f"{where}: {show(name)}"
    member = f"{folder}/{meta['path_name']}"
    if member not in entries:
        raise UnreadableModel(label, f"its member {show(member)} is missing from the archive")
    span = entries[member][0].data()
    if meta.get("use_pickle"):
        for _, leaf, _ in leaves(read_archive(span, label, recorder)):
            return as_array(leaf, name, where, bool(meta.get("is_param")))
        raise UnreadableModel(label, f"no tensor in {show(member)}")
    about = meta["tensor_meta"]
    dtype = SCALAR_TYPES.get(about["dtype"])
    if dtype is None:
        raise UnreadableModel(label, f"the scalar type {show(about['dtype'])}, which is not read")
    shape, stride = (tuple(int(size["as_int"]) for size in about[key]) for key in ("sizes", "strides"))
    item = Span.of_bytes(span.path, b"").array(dtype, (0,)).itemsize
    if span.length % item == 0:
        recorder.raw[id(entries[member][0])] = entries[member][0]
    storage = Storage(member, dtype, span.length // item, span)
    tensor = Tensor(storage, int(about["storage_offset"]["as_int"]), shape, stride, dtype)
    return as_array(tensor, name, where, bool(meta.get("is_param")))
