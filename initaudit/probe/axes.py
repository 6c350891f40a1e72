"""Which axis of a signal counts examples and which counts units, carried along the graph while it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.graph.calls import role_of, signal_inputs
from initaudit.roles import WeightUse


@dataclass(frozen=True)
class Axes:
    """`batch` counts `examples`: place p along it belongs to example (p // inner) % examples. None: not known.

    More places than examples come from windows and heads (inner > 1) and from positions that stand before the examples.
    """

    batch: int | None = None
    examples: int = 1
    inner: int = 1
    unit: int | None = None


UNKNOWN = Axes()


def first_tensor(value: Any) -> Tensor | None:
    """The value itself, or the first element of a tuple of them; None where that is no floating-point tensor."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    return value if isinstance(value, Tensor) and value.is_floating_point() else None


def read_index(node: fx.Node) -> int:
    """Of a call with several results, the first that the graph reads: a recurrence may be read at its last state alone."""
    places = [u.args[1] for u in node.users if role_of(u).name == "getitem" and len(u.args) > 1 and isinstance(u.args[1], int)]
    return min((i for i in places if i >= 0), default=0) if len(places) == len(node.users) else 0


def main_of(node: fx.Node, value: Any) -> Any:
    """The value of a call, or of several the one that the graph reads first."""
    if not isinstance(value, (tuple, list)) or not value:
        return value
    return value[min(read_index(node), len(value) - 1)]


def axes_of(
    node: fx.Node,
    value: Any,
    known: Mapping[fx.Node, Axes],
    shapes: Mapping[fx.Node, tuple[int, ...]],
    uses: tuple[WeightUse, ...],
    again: Callable[[fx.Node, Tensor], Any],
    seen: dict[Any, Axes],
) -> Axes:
    """The axes of `value`, which `node` made out of signals whose axes are `known`.

    `again(source, stand_in)` runs the node once more with the stand-in for the signal `source`; only nodes that move elements
    without arithmetic are run so. `seen` remembers what such calls did, for a network repeats its layers.
    """
    head = main_of(node, value)
    if not isinstance(head, Tensor) or head.dim() == 0:
        return UNKNOWN
    if node.op == "placeholder":
        return Axes(batch=0, examples=head.shape[0])
    sources = [s for s in signal_inputs(node) if s in known and s in shapes]
    kind = role_of(node).kind
    if kind == "embedding" and not sources:
        # ONNX calls the table the data: the examples are those of the places that are looked up in it.
        sources = [s for s in node.all_input_nodes if s in known and s in shapes]
    if not sources:
        return UNKNOWN
    shape = tuple(head.shape)
    if kind == "embedding" and not uses:
        kind = "passthrough"  # a place picked out of a signal
    if kind == "passthrough":
        source = sources[0]
        if role_of(source).kind == "recurrent" and role_of(node).name == "getitem" and shapes[source] != shape:
            # Another result than the one that was followed: a state beside the sequence.
            return _state(source, known[source], shape)
        key = _signature(node, source, known[source], shapes[source], shape)
        if key is None or key not in seen:
            moved = _moved(node, source, known[source], shapes[source], shape, again)
            if key is None:
                return moved
            seen[key] = moved
        return seen[key]
    batch, unit, origin = None, None, UNKNOWN
    for source in sources:
        found, from_shape = known[source], shapes[source]
        offset = len(shape) - len(from_shape) if kind in ("pointwise", "merge") else 0
        if kind == "recurrent" and read_index(node) > 0:
            return _state(node, found, shape)
        if kind == "recurrent" and found.batch == 1:
            offset = len(shape) - len(from_shape)  # ONNX puts an axis of directions between time and examples
        if batch is None and found.batch is not None:
            batch, origin = _same(found.batch + offset, found.batch, shape, from_shape), found
        if unit is None and found.unit is not None:
            unit = _same(found.unit + offset, found.unit, shape, from_shape)
    for use in uses:
        unit = use.unit_axis % len(shape) if use.unit_axis is not None else unit
    if kind in ("recurrent", "embedding"):
        unit = len(shape) - 1
    return Axes(batch, origin.examples, origin.inner, unit if unit != batch else None)


def _state(node: fx.Node, axes: Axes, shape: tuple[int, ...]) -> Axes:
    """A last state of a recurrent layer, `l n h`; with ONNX's layout 1 `n l h`."""
    batch = 0 if node.kwargs.get("layout") else 1
    if axes.batch is None or len(shape) != 3 or axes.inner != 1 or shape[batch] != axes.examples:
        return UNKNOWN
    return Axes(batch, axes.examples, 1, 2)


def _signature(node: fx.Node, source: fx.Node, axes: Axes, before: tuple[int, ...], after: tuple[int, ...]) -> Any:
    """What decides where a call moves the axes; None where another signal does."""
    if len(node.all_input_nodes) > 1 or source not in node.all_input_nodes:
        return None
    return str(node.target), repr((node.args, node.kwargs)).replace(source.name, "_"), axes, before, after


def _same(axis: int, before: int, shape: tuple[int, ...], source: tuple[int, ...]) -> int | None:
    return axis if 0 <= axis < len(shape) and shape[axis] == source[before] else None


def _moved(
    node: fx.Node,
    source: fx.Node,
    axes: Axes,
    before: tuple[int, ...],
    after: tuple[int, ...],
    again: Callable[[fx.Node, Tensor], Any],
) -> Axes:
    """Where the axes went: numbers that count along one axis are sent through, and looked for in the result."""

    def follow(axis: int | None, count: int, inner: int) -> tuple[int | None, int]:
        if axis is None or axis >= len(before):
            return None, 1
        codes = (torch.arange(before[axis]) // inner % count).to(torch.int32)
        stand_in = codes.view([-1 if i == axis else 1 for i in range(len(before))]).expand(before)
        try:
            try:
                result = again(source, stand_in)
            except RuntimeError:
                # A view of numbers that do not lie one after the other.
                result = again(source, stand_in.contiguous())
        except (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
            # Interpolation and the like refuse integers; they do not move axes.
            return _same(axis, axis, after, before), inner
        result = result[0] if isinstance(result, (tuple, list)) else result
        if not isinstance(result, Tensor) or tuple(result.shape) != after:
            return None, 1
        if not result.numel():  # what is left beside a rotary embedding of whole heads
            return _same(axis, axis, after, before), inner
        varying = [
            i for i in range(result.dim()) if result.shape[i] > 1 and bool((_line(result, i) != _line(result, i)[0]).any())
        ]
        if count == 1:
            return (axis if axis < len(after) and after[axis] == before[axis] else None), inner
        if len(varying) != 1:
            return None, 1
        line = _line(result, varying[0])
        times = int((line == line[0]).long().cumprod(0).sum())
        if line.numel() % (times * count) == 0 and bool((line == torch.arange(line.numel()) // times % count).all()):
            return varying[0], times
        return None, 1

    batch, inner = follow(axes.batch, axes.examples, axes.inner)
    unit, times = follow(axes.unit, before[axes.unit], 1) if axes.unit is not None and axes.unit < len(before) else (None, 1)
    exact = unit is not None and times == 1 and after[unit] == before[axes.unit or 0]
    return Axes(batch, axes.examples, inner, unit if exact else None)


def _line(x: Tensor, axis: int) -> Tensor:
    for i in range(x.dim() - 1, -1, -1):
        if i != axis:
            x = x.select(i, 0)
    return x.cpu()
