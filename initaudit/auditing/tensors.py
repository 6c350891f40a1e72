"""The pass over the tensors of a checkpoint: each is read once, several side by side where the user asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from initaudit.errors import InitauditError
from initaudit.load.checkpoint import Array, Checkpoint, Problem, numpy_dtype
from initaudit.load.stretches import Stretch, stretches
from initaudit.measure.moments import Moments, measure
from initaudit.measure.together import measure_together
from initaudit.meter import Meter
from initaudit.rules.evidence import LayerEvidence

if TYPE_CHECKING:
    from initaudit.auditing.recognition import Known

_Look = tuple[Moments | InitauditError, LayerEvidence | None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass
class Tensors:
    """The moments of every tensor of real or complex numbers, what cannot be read as problems (IA001), and the layers seen."""

    moments: dict[str, Moments] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    layers: list[LayerEvidence] = field(default_factory=list)


def side_by_side(function: Callable[[_Item], _Result], items: Iterable[_Item], jobs: int) -> Iterator[_Result]:
    """`function` of every item, in their order, in `jobs` threads: what takes time is numpy, which lets others run."""
    if jobs == 1:
        yield from map(function, items)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def measure_all(arrays: Mapping[str, Array], progress: Callable[[str], None], jobs: int = 1) -> Tensors:
    """The moments of every array of real or complex numbers, shared bytes once; integers are left out."""
    names: dict[object, list[str]] = {}
    for name, array in arrays.items():
        if _measured(array):
            names.setdefault((array.storage, array.shape) if array.storage else name, []).append(name)
    groups = list(names.values())
    meter = Meter(progress, "measuring", "MB", sum(_bytes(arrays[group[0]]) for group in groups))
    found = Tensors()
    for group, result in zip(groups, side_by_side(lambda group: _moments(arrays[group[0]]), groups, jobs), strict=True):
        meter(group[0], _bytes(arrays[group[0]]))
        if isinstance(result, Moments):
            found.moments.update(dict.fromkeys(group, result))
        else:
            found.problems += [Problem("IA001", name, str(result)) for name in group]
    return _in_order(found, arrays)


def survey_all(checkpoint: Checkpoint, progress: Callable[[str], None], jobs: int = 1) -> Tensors:
    """The same, and the layers of a checkpoint without a program as shapes and names tell, with the schemes that fit.

    Small tensors that lie near each other in a file are read and measured together, the others side by side.
    """
    from initaudit.auditing.recognition import surveyed
    from initaudit.auditing.static import named_layer
    from initaudit.graph.from_names import infer

    arrays = checkpoint.arrays
    weights = {weight.name: weight for weight in infer(arrays)}

    def look(name: str, known: Known | None = None) -> _Look:
        array, weight = arrays[name], weights.get(name)
        if weight is None:
            return known[1] if known is not None else _moments(array), None
        try:
            return surveyed(array, arrays, lambda moments: named_layer(weight, array, moments), known)
        except InitauditError as error:
            return error, None

    names = [name for name, array in arrays.items() if _measured(array)]
    near = list(stretches({name: arrays[name] for name in names}))
    together = {name for stretch in near for name in stretch.names}
    apart = [name for name in names if name not in together]
    meter = Meter(progress, "measuring", "MB", sum(_bytes(arrays[name]) for name in names))
    seen: dict[str, _Look] = {}
    for name, result in zip(apart, side_by_side(look, apart, jobs), strict=True):
        meter(name, _bytes(arrays[name]))
        seen[name] = result
    for stretch in near:
        for name, known in zip(stretch.names, _measured_together(stretch), strict=True):
            meter(name, _bytes(arrays[name]))
            seen[name] = look(name, known)
    return _found(seen, names)


def _measured_together(stretch: Stretch) -> Iterator[Known | None]:
    """What is known of each tensor of a stretch; None where its bytes cannot be read, which each then says for itself."""
    try:
        data = stretch.read()
    except InitauditError:
        yield from (None for _ in stretch.names)
        return
    found = measure_together(data, numpy_dtype(stretch.dtype), stretch.places)
    for i in range(len(stretch.names)):
        yield stretch.values(data, i), found.moments(i), found.unit_sums(i)


def _found(seen: Mapping[str, _Look], names: Iterable[str]) -> Tensors:
    found = Tensors()
    for name in names:
        moments, layer = seen[name]
        if isinstance(moments, Moments):
            found.moments[name] = moments
        else:
            found.problems.append(Problem("IA001", name, str(moments)))
        found.layers += [layer] if layer is not None else []
    return found


def _bytes(array: Array) -> int:
    return array.size * numpy_dtype(array.dtype).itemsize


def _measured(array: Array) -> bool:
    return array.dtype.startswith(("float", "bfloat", "complex"))


def _moments(array: Array) -> Moments | InitauditError:
    try:
        return measure(array.read())
    except InitauditError as error:
        return error


def _in_order(found: Tensors, arrays: Mapping[str, Array]) -> Tensors:
    found.moments = {name: found.moments[name] for name in arrays if name in found.moments}
    place = {name: i for i, name in enumerate(arrays)}
    found.problems.sort(key=lambda problem: place[problem.tensor])
    return found
