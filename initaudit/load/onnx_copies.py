"""Initializers that are one weight: an exporter folded its transposition at each place of use, and stored every result.

A layer that is called again at every step of a recurrence, or once for each block of a network that shares its weights, has
as many initializers then as it has calls. Equal bytes alone do not tell it from layers that were deep-copied. Two things do:
what the exporter notes of where it folded a value from, and, in a file without such notes, a program in which the equal
weights are the steps of one recurrence.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.errors import InitauditError
from initaudit.load.checkpoint import Array
from initaudit.load.onnx_rewrite import attribute_of, input_name

if TYPE_CHECKING:
    import onnx

# onnxscript writes into the value's metadata which constants it was folded from (onnxscript.optimizer, constant folding).
_FOLDED_FROM = "folded_from"
_HEAD = 64  # values that tell most draws apart before all are compared


def one_weight(model: onnx.ModelProto, arrays: Mapping[str, Array]) -> dict[str, Array]:
    """The arrays, those of one weight under one `storage`. Only what seems to be a copy is read."""
    found = dict(arrays)
    notes = _notes(model.graph)
    for group in _noted(model.graph, arrays, notes) if notes else _unrolled(model.graph, arrays):
        first = arrays[group[0]]
        storage = first.storage or f"copies of {first.name}"
        found.update((name, dataclasses.replace(arrays[name], storage=storage)) for name in group)
    return found


def _notes(graph: onnx.GraphProto) -> dict[str, str]:
    """What each folded value was folded from, in the exporter's words."""
    props = ((v.name, p) for v in graph.value_info for p in v.metadata_props)
    return {name: p.value for name, p in props if p.key.endswith(_FOLDED_FROM)}


def _noted(graph: onnx.GraphProto, arrays: Mapping[str, Array], notes: Mapping[str, str]) -> Iterator[list[str]]:
    """Values of the same bytes that were folded from the same."""
    names = [t.name for t in graph.initializer if t.name in notes and _is_weight(arrays.get(t.name))]
    yield from _equal(arrays, names, lambda name: notes[name])


def _is_weight(array: Array | None) -> bool:
    return array is not None and "float" in array.dtype and not array.quantized and sum(n > 1 for n in array.shape) > 1


def _equal(arrays: Mapping[str, Array], names: Iterable[str], key: Callable[[str], Hashable]) -> Iterator[list[str]]:
    """Groups of two or more names whose arrays are the same, bit by bit, and have the same `key`."""
    alike: dict[Hashable, list[str]] = {}
    for name in names:
        alike.setdefault((arrays[name].shape, arrays[name].dtype, key(name)), []).append(name)
    for group in alike.values():
        by_head: dict[bytes | None, list[str]] = {}
        for name in group if len(group) > 1 else ():
            by_head.setdefault(_head(arrays[name]), []).append(name)
        by_head.pop(None, None)
        for same in by_head.values():
            left = same
            while len(left) > 1:
                first = arrays[left[0]].read()
                copies = [left[0], *(name for name in left[1:] if _same_bytes(first, arrays[name]))]
                if len(copies) > 1:
                    yield copies
                left = [name for name in left if name not in set(copies)]


def _head(array: Array) -> bytes | None:
    """The bytes of the first values; None for what cannot be read, which the loader reports."""
    try:
        return array.read().reshape(-1)[:_HEAD].tobytes()
    except InitauditError:
        return None


def _same_bytes(first: np.ndarray[Any, Any], other: Array) -> bool:
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (first, other.read()))
    return bool(np.array_equal(a, b))


# ---------------------------------------------------------------------- recurrences


@dataclass(frozen=True)
class _Use:
    """The one place where a weight is used: the index of the node, and what the node does with it."""

    node: int
    call: Hashable


class _Program:
    """The nodes of a graph by number, which is their order, and who makes what they read."""

    def __init__(self, graph: onnx.GraphProto, arrays: Mapping[str, Array]) -> None:
        self.nodes, self.arrays = list(graph.node), arrays
        self.maker = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.read_by: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.read_by.setdefault(name, []).append(i)

    def use(self, name: str) -> _Use | None:
        """Where a weight is used; None for one that several nodes read, or none."""
        readers = self.read_by.get(name, [])
        if len(readers) != 1:
            return None
        node = self.nodes[readers[0]]
        attributes = tuple(sorted((a.name, a.SerializeToString(deterministic=True)) for a in node.attribute))
        return _Use(readers[0], (node.domain, node.op_type, list(node.input).index(name), attributes))

    def before(self, start: int, stop: set[int]) -> set[int]:
        """The nodes that a node's inputs are made by, without those in `stop` and what lies before these."""
        seen: set[int] = set()
        stack = [start]
        while stack:
            for name in self.nodes[stack.pop()].input:
                maker = self.maker.get(name)
                if maker is not None and maker not in seen and maker not in stop:
                    seen.add(maker)
                    stack.append(maker)
        return seen

    def element(self, index: int) -> tuple[str, bytes] | None:
        """(signal, place) where a node takes one element of a sequence out of it, as x[:, 3] does; None for another node."""
        node = self.nodes[index]
        if node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Gather":
            held = self.arrays.get(input_name(node, 1))
            return self._at(node.input[0], str(attribute_of(node, "axis", 0)), held) if held and not held.shape else None
        if node.op_type != "Squeeze":
            return None
        # One step wide, and then without that axis: what is cut into channels or heads keeps it.
        cut = self.nodes[self.maker[node.input[0]]] if node.input[0] in self.maker else None
        if cut is not None and cut.op_type == "Split":
            return cut.input[0], str(list(cut.output).index(node.input[0])).encode()
        if cut is not None and cut.op_type == "Slice" and len(cut.input) > 2:
            return self._at(cut.input[0], input_name(cut, 3), self.arrays.get(cut.input[1]))
        return None

    @staticmethod
    def _at(signal: str, axis: str, place: Array | None) -> tuple[str, bytes] | None:
        return None if place is None else (signal, axis.encode() + b" " + place.read().tobytes())


def _unrolled(graph: onnx.GraphProto, arrays: Mapping[str, Array]) -> Iterator[list[str]]:
    """Weights of equal bytes at the steps of a recurrence.

    In its steps the same cell reads its own state, and at each the next element of one sequence. Layers that were copied
    stand in a row as well, but what comes in between is the row's own.
    """
    program = _Program(graph, arrays)
    elements = {i: e for i in range(len(program.nodes)) if (e := program.element(i)) is not None}
    if max(Counter(signal for signal, _ in elements.values()).values(), default=0) < 2:
        return
    names = [t.name for t in graph.initializer if _is_weight(arrays.get(t.name))]
    uses = {name: use for name in names if (use := program.use(name)) is not None}
    groups = [sorted(g, key=lambda name: uses[name].node) for g in _equal(arrays, uses, lambda name: uses[name].call)]
    chains: list[dict[int, int]] = []
    beside: list[list[str]] = []
    for group in groups:
        steps = _steps(program, [uses[name].node for name in group], elements)
        if steps is not None:
            chains.append(steps)
            yield group
        else:
            beside.append(group)
    # What the cell does to its input alone is no chain, but stands once in each step of one.
    yield from (g for g in beside if any(_once_each([uses[name].node for name in g], steps) for steps in chains))


def _steps(program: _Program, places: list[int], elements: Mapping[int, tuple[str, bytes]]) -> dict[int, int] | None:
    """The step that each node belongs to, by the next of `places` that needs it, where these are the steps of a recurrence.

    Behind the last there is one step more, which is in no entry. None where they are anything else.
    """
    step_of: dict[int, int] = {}
    cells: list[Counter[str]] = []
    taken: list[dict[str, bytes]] = []
    for step, place in enumerate(places):
        new = program.before(place, set(step_of))
        if step and places[step - 1] not in new:
            return None
        step_of.update(dict.fromkeys(new, step))
        cells.append(Counter(program.nodes[i].op_type for i in new))
        taken.append(dict(elements[i] for i in sorted(new) if i in elements))
    # What the first steps need is more: the sequence itself is made there, and the initial state.
    if any(cell != cells[-1] for cell in cells[2:]) or cells[-1] - cells[1]:
        return None
    for signal in set.intersection(*(set(t) for t in taken[1:])):
        at = [t[signal] for t in taken if signal in t]
        if len(set(at)) == len(at) > 1:
            return step_of
    return None


def _once_each(places: list[int], steps: Mapping[int, int]) -> bool:
    """Whether these stand in steps of their own that follow each other, nearly from the first to the last."""
    last = max(steps.values(), default=0) + 1
    found = sorted(steps.get(place, last) for place in places)
    return len(found) >= last - 1 and found == list(range(found[0], found[0] + len(found)))
