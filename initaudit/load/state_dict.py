"""Which of the tensors in a training checkpoint are the model's: nested state dicts, optimizer states, averaged copies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from initaudit.errors import NoWeights, UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.finish import finish
from initaudit.load.pickle_arrays import Leaf, as_array, code_problems, leaves
from initaudit.load.pickle_values import Call, NdArray, Recorder, Tensor
from initaudit.load.spans import show


@dataclass
class Sorted:
    """The leaves of a checkpoint by what they are for; `groups` are the nested dicts that hold weights, by their path."""

    groups: dict[tuple[str, ...], list[Leaf]] = field(default_factory=dict)
    optimizer: list[Leaf] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def checkpoint_of(root: Any, source: str, format: str, where: str, recorder: Recorder, **fields: Any) -> Checkpoint:
    """The checkpoint that the value of a pickle stands for.

    The weights keep their names in the state dict that holds them; where only one does, its own path is left off (noted).
    Raises `UnreadableModel` where there is no tensor at all.
    """
    found = sort_leaves(root, recorder.broken)
    problems = code_problems(recorder)
    prefix = next(iter(found.groups)) if len(found.groups) == 1 else ()
    if prefix:
        found.notes.append(f"weights taken from {show('.'.join(prefix))!r}")
    weights = [
        (path[len(prefix) :] or path, leaf, trainable) for group in found.groups.values() for path, leaf, trainable in group
    ]
    arrays = named_arrays(weights, where, problems)
    optimizer = named_arrays(found.optimizer, where, problems)
    if not arrays and not optimizer and not problems:
        raise NoWeights(where, "no tensors in it", "a checkpoint with weights")
    if optimizer and not arrays:
        found.notes.append("the file holds the state of an optimizer and no weights")
    metadata = {**_scalars(root), **fields.pop("metadata", {})}
    if optimizer:
        metadata["optimizers"] = {".".join(path): settings_of(root, path) for path in _optimizer_paths(root)}
    notes = (*fields.pop("notes", ()), *found.notes)
    made = Checkpoint(
        source, format, arrays, problems=tuple(problems), optimizer=optimizer, metadata=metadata, notes=notes, **fields
    )  # fmt: skip
    return finish(made)


def named_arrays(found: list[Leaf], where: str, problems: list[Problem]) -> dict[str, Array]:
    """The arrays of `found` by their dotted paths; what cannot be read goes to `problems` as IA001."""
    arrays: dict[str, Array] = {}
    for path, leaf, trainable in found:
        name = ".".join(path) or "tensor"
        try:
            array = as_array(leaf, name, where, trainable)
        except UnreadableModel as error:
            problems.append(Problem("IA001", name, str(error)))
            continue
        arrays.setdefault(name, array)
    return arrays


def sort_leaves(root: Any, broken: list[str]) -> Sorted:
    """Groups what is below `root`; an averaged copy (the same names and shapes once more) is left out and noted."""
    result = Sorted()
    optimizers = tuple(_optimizer_paths(root))
    groups: dict[tuple[str, ...], list[Leaf]] = {}
    loose: list[Leaf] = []
    nested = isinstance(root, dict) and not any(
        isinstance(value, (Tensor, NdArray)) and _is_float(value) for value in _values(root)
    )
    for path, leaf, trainable in leaves(root, broken):
        if any(path[: len(prefix)] == prefix for prefix in optimizers):
            result.optimizer.append((path, leaf, trainable))
        elif nested and len(path) > 1:
            groups.setdefault(path[:1], []).append((path, leaf, trainable))
        else:
            loose.append((path, leaf, trainable))
    # Beside a state dict stand random states, counters and scores: integers and single numbers that no layer owns
    weighty = {
        key: group
        for key, group in groups.items()
        if any(_is_float(leaf) and math.prod(leaf.shape) > 1 for _, leaf, _ in group)
    }
    for key, group in (weighty or groups).items():
        twin = next((other for other, kept in result.groups.items() if _signature(kept) == _signature(group)), None)
        if twin is not None:
            result.notes.append(
                f"{show('.'.join(key))!r} holds the same names as {show('.'.join(twin))!r} once more and is not audited"
            )
        else:
            result.groups[key] = group
    result.groups = {key: _without_averages(group, result.notes) for key, group in result.groups.items()}
    if loose and (not result.groups or any(_is_float(leaf) for _, leaf, _ in loose)):
        result.groups[()] = loose
    return _descend(result)


def _values(root: dict[Any, Any]) -> Iterator[Any]:
    return (value for key, value in root.items() if isinstance(key, (str, int)))


def _descend(result: Sorted) -> Sorted:
    """Where one group is left, its prefix is as long as every path shares and more than one name remains below."""
    if len(result.groups) != 1 or () in result.groups:
        return result
    ((key, group),) = result.groups.items()
    while True:
        nexts = {path[: len(key) + 1] for path, _, _ in group}
        if len(nexts) != 1 or any(len(path) <= len(key) + 1 for path, _, _ in group):
            break
        ((longer),) = nexts
        if not longer[-1].isidentifier():
            break
        # `module` inside `model` is a container; the one layer of a one-layer model is not
        if all(len(path) == len(longer) + 1 and "." not in path[-1] for path, _, _ in group):
            break
        key = longer
    result.groups = {key: group}
    return result


_AVERAGE = re.compile(r"(.*_)?ema(_.*)?", re.IGNORECASE)  # the field's word: exponential moving average


def _without_averages(group: list[Leaf], notes: list[str]) -> list[Leaf]:
    """`group` without the averaged copy that stands in the same dict under a word of its own.

    Trainers take the dots out of names: `model_ema.blocks0weight` is the average of `model.blocks.0.weight`.
    """
    parts = [path[-1].partition(".") for path, _, _ in group]
    kept = {
        rest.replace(".", ""): leaf.shape
        for (head, _, rest), (_, leaf, _) in zip(parts, group, strict=True)
        if not _average(head)
    }
    left: dict[str, list[Leaf]] = {}
    for (head, _, rest), leaf in zip(parts, group, strict=True):
        if _average(head) and (kept.get(rest.replace(".", "")) == leaf[1].shape or math.prod(leaf[1].shape) == 1):
            left.setdefault(head, []).append(leaf)
    for head, leaves_of in left.items():
        if len(leaves_of) == sum(1 for first, _, _ in parts if first == head):
            notes.append(f"{show(head)!r} holds an average of the same weights and is not audited")
            group = [leaf for leaf in group if not any(leaf is other for other in leaves_of)]
    return group


def _average(word: str) -> bool:
    return _AVERAGE.fullmatch(word) is not None


def _signature(group: list[Leaf]) -> frozenset[tuple[tuple[str, ...], tuple[int, ...]]]:
    return frozenset((path[1:], leaf.shape) for path, leaf, _ in group)


def _is_float(leaf: Tensor | NdArray) -> bool:
    if isinstance(leaf, Tensor):
        return "float" in leaf.dtype or leaf.quantizer is not None
    return leaf.dtype is not None and leaf.dtype.code[:1] == "f"


def _optimizer_paths(root: Any, path: tuple[str, ...] = (), depth: int = 0) -> Iterator[tuple[str, ...]]:
    """Paths of what torch.optim.Optimizer.state_dict() made: a dict with `state` and a list `param_groups`."""
    if depth > 4:
        return
    if isinstance(root, Call):
        root = root.state
    if isinstance(root, dict):
        if isinstance(root.get("param_groups"), list) and isinstance(root.get("state"), dict):
            yield path
            return
        items = [(str(key), value) for key, value in root.items() if isinstance(key, (str, int))]
    elif isinstance(root, (list, tuple)) and len(root) <= 64:
        items = [(str(index), value) for index, value in enumerate(root)]
    else:
        return
    for key, value in items:
        if isinstance(value, (dict, list, tuple)):
            yield from _optimizer_paths(value, (*path, key), depth + 1)


def settings_of(root: Any, path: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Of an optimizer's state dict, by the key of each parameter: the decay `rates` of its averages, `steps`, and `names`."""
    for key in path:
        root = root.state if isinstance(root, Call) else root
        root = (
            {str(k): v for k, v in root.items() if isinstance(k, (str, int))}[key] if isinstance(root, dict) else root[int(key)]
        )
    found: dict[str, dict[str, Any]] = {"rates": {}, "steps": {}, "names": {}}
    for group in root["param_groups"]:
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            continue
        keys = [str(key) for key in group["params"] if isinstance(key, (str, int))]
        betas = group.get("betas")
        rate = betas[1] if isinstance(betas, (tuple, list)) and len(betas) > 1 else group.get("alpha", group.get("rho"))
        if isinstance(rate, (int, float)):
            found["rates"].update(dict.fromkeys(keys, float(rate)))
        names = group.get("param_names")
        if isinstance(names, list) and len(names) == len(keys):
            found["names"].update({key: name for key, name in zip(keys, names, strict=True) if isinstance(name, str)})
    for key, state in root["state"].items():
        steps = state.get("step") if isinstance(state, dict) else None
        if isinstance(key, (str, int)) and isinstance(steps, (int, float)):
            found["steps"][str(key)] = float(steps)
    return found


def _scalars(root: Any) -> dict[str, Any]:
    """Plain values at the top of a checkpoint: the epoch, the step, the version that wrote it."""
    if not isinstance(root, dict):
        return {}
    plain = ((key, value) for key, value in root.items() if isinstance(key, str) and isinstance(value, (bool, int, float, str)))
    return {show(key): show(value, 200) if isinstance(value, str) else value for key, value in plain if _small(value)}


def _small(value: Any) -> bool:
    return not isinstance(value, int) or value.bit_length() < 64
