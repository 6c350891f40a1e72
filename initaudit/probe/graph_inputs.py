"""Made-up inputs for a graph whose inputs declare a type and perhaps a shape, as those of an ONNX file do."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from initaudit.errors import InitauditError, UnreadableModel, UsageError
from initaudit.graph.calls import arguments, nodes_in, role_of
from initaudit.graph.execute import MetaExecutor
from initaudit.graph.graph import Graph, Input, shape_of
from initaudit.probe.guesses import LENGTHS, POSITIONS, SIDES, mismatch

Shape = tuple[int, ...]

# Arguments of either door's operators that pick places along an axis.
_PICKERS = ("indices", "index", "indices_")
# What an index passes on its way to a table, and what it may be computed with.
_KEEPS_NUMBERS = ("passthrough", "pointwise", "merge", "opaque")
_STEPS = 400
_SEARCHED = 1 << 22  # numbers of a table that is looked through: among more rows one for padding is hardly ever drawn
_PADDINGS = 4  # rows of zeros that a table may hold for padding; more of them are something else
_TRIES = 120


def tables(graph: Graph) -> dict[str, int]:
    """For every input that picks rows of a table: the rows of the smallest one it picks from.

    The walk goes from the input through what moves or converts numbers, and ends where a comparison makes a mask of them.
    """
    found: dict[str, int] = {}
    for node, given in _placeholders(graph):
        if (rows := min((size for size, _ in _indexed(node)), default=None)) is not None:
            found[given.name] = rows
    return found


def _paddings(graph: Graph) -> dict[str, set[int]]:
    """For every input that picks rows of tables: those that are zeros throughout.

    A row for padding is masked away wherever it stands; behind a norm, whose epsilon alone then divides, nothing that is
    measured of it says anything of the network.
    """
    found: dict[str, set[int]] = {}
    for node, given in _placeholders(graph):
        for _, table in _indexed(node):
            constant = graph.constants.get(str(table.target)) if table.op == "get_attr" else None
            if (
                constant is not None
                and len(constant.shape) == 2
                and constant.shape[0] > 2
                and math.prod(constant.shape) <= _SEARCHED
            ):
                zeros = (constant.value() == 0).all(1).nonzero().flatten().tolist()
                if len(zeros) <= _PADDINGS:
                    found.setdefault(given.name, set()).update(zeros)
    return found


def _placeholders(graph: Graph) -> Iterator[tuple[fx.Node, Input]]:
    yield from zip((n for n in graph.fx.nodes if n.op == "placeholder"), graph.inputs, strict=True)


def _indexed(start: fx.Node) -> Iterator[tuple[int, fx.Node]]:
    """The tables that the numbers of an input pick rows from, and how many each has."""
    seen, stack = {start}, [start]
    while stack and len(seen) < _STEPS:
        node = stack.pop()
        for user in node.users:
            if user.op != "call_function":
                continue
            picked = _picked(user, node)
            if picked is not None:
                yield picked
            elif user not in seen and role_of(user).kind in _KEEPS_NUMBERS and user.meta.get("dtype") != torch.bool:
                seen.add(user)
                stack.append(user)


def _picked(call: fx.Node, index: fx.Node) -> tuple[int, fx.Node] | None:
    """The size of the axis along which `call` picks the places that `index` names, and from what; None where it does not."""
    bound = arguments(call)
    role = role_of(call)
    for name, value in bound.items():
        if name in _PICKERS and any(n is index for n in nodes_in(value)):
            data = next((bound[k] for k in (*role.data, "weight", "data", "self") if isinstance(bound.get(k), fx.Node)), None)
            if data is index or data is None:
                data = bound.get("weight", data)
            shape = shape_of(data) if isinstance(data, fx.Node) else None
            if shape is None:
                return None
            axis = bound.get("axis", bound.get("dim", 0))
            if isinstance(value, (list, tuple)):
                axis = next(i for i, v in enumerate(value) if v is index)
            known = isinstance(axis, int) and -len(shape) <= axis < len(shape)
            return (shape[axis], data) if known and isinstance(data, fx.Node) else None
        if name == "depth" and role.name in ("one_hot", "OneHot") and bound.get("indices") is index:
            return None
    return None


def for_graph(graph: Graph, *, shapes: Mapping[str, Any] | None = None, batch: int = 8, seed: int = 0) -> tuple[Tensor, ...]:
    """One tensor for every input of `graph`, in order; `shapes` (name to InputSpec) fixes some.

    Symbolic sizes of one name are one size: the first axis `batch`, positions 16, sides of images 32, or what the operators
    downstream accept, found by runs without arithmetic. Floats are N(0, 1), indices uniform below the rows of their table,
    indices of positions counted up, masks ones. Raises UnreadableModel where no sizes fit, UsageError for a name that is no
    input.
    """
    shapes = shapes or {}
    names = [i.name for i in graph.inputs]
    for name in shapes:
        if name not in names:
            raise UsageError(f"--input {name}", "the model has no such input", "one of " + ", ".join(names))
    rows, paddings = tables(graph), _paddings(graph)
    generator = torch.Generator().manual_seed(seed)
    error = ""
    tried = set[tuple[Shape, ...]]()
    queue = _choices(graph, shapes, batch, "")
    while len(tried) < _TRIES:
        chosen = next(queue, None)
        if chosen is None:
            break
        if chosen in tried:
            continue
        tried.add(chosen)
        state = generator.get_state()
        values = tuple(
            _value(i, s, rows.get(i.name), paddings.get(i.name, set()), generator)
            for i, s in zip(graph.inputs, chosen, strict=True)
        )
        failure = runs(graph, values)
        if failure is None:
            return values
        generator.set_state(state)
        if not error:
            # What the first failure says about sizes is tried before the ladder.
            error = failure
            queue = itertools.chain(_choices(graph, shapes, batch, failure), queue)
    if len(tried) == 1 and not _symbols(graph, shapes):
        return values  # the file fixes every size: that it cannot be run is for the probe to say
    shown = "; ".join(" ".join(f"{n}={'x'.join(map(str, s))}" for n, s in zip(names, c, strict=True)) for c in list(tried)[:3])
    raise UnreadableModel(
        "inputs",
        f"no sizes were found that the graph accepts ({error[:160]})",
        advice=f"tried {shown}; give them with --input {names[0]}=2x3x224x224:float32",
    )


def runs(graph: Graph, values: Sequence[Tensor]) -> str | None:
    """Runs the graph without arithmetic: None, or the error that says which sizes do not fit.

    An operator that cannot be run so, or a shape that depends on data, is no objection.
    """
    runner = _Trial(graph)
    flat = [v.to("meta") if v.is_floating_point() else v for v in values]
    try:
        with torch.no_grad():
            runner.run(*flat)
    except (NotImplementedError, InitauditError):
        return None
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        text = " ".join(str(error).split())
        return None if "meta" in text and ("item" in text or "kernel" in text or "device" in text) else text
    return None


class _Trial(MetaExecutor):
    """Leaves no note of the shapes it sees: they are those of an attempt."""

    def run_node(self, n: fx.Node) -> Any:
        return None if n.meta.get("tainted") else fx.Interpreter.run_node(self, n)


def _symbols(graph: Graph, shapes: Mapping[str, Any]) -> dict[str, tuple[Input, int]]:
    """The free sizes by name, with the first place at which each stands; inputs without a shape have none."""
    found: dict[str, tuple[Input, int]] = {}
    for given in graph.inputs:
        if given.shape is None or given.name in shapes:
            continue
        for axis, size in enumerate(given.shape):
            if isinstance(size, str):
                found.setdefault(size, (given, axis))
    return found


def _choices(graph: Graph, shapes: Mapping[str, Any], batch: int, error: str) -> Iterator[tuple[Shape, ...]]:
    """Shapes of all inputs: the usual sizes, then those the error names, then one free size after another along its ladder."""
    symbols = _symbols(graph, shapes)
    usual = {s: _ladder(given, axis, batch)[0] for s, (given, axis) in symbols.items()}
    # A size of an input that was described holds for the others that share its name.
    for given in graph.inputs:
        if given.name in shapes and given.shape is not None:
            usual.update({s: n for s, n in zip(given.shape, shapes[given.name].shape, strict=False) if isinstance(s, str)})
    yield _filled(graph, shapes, usual, batch)
    spatial = [s for s, (given, axis) in symbols.items() if _is_spatial(given, axis)]
    for number in dict.fromkeys(int(n) for n in re.findall(r"(?<![\w.])\d{1,5}(?![\w.])", error)):
        if 1 < number <= 4096:
            for name in symbols:
                yield _filled(graph, shapes, {**usual, name: number}, batch)
            yield _filled(graph, shapes, {**usual, **dict.fromkeys(spatial, number)}, batch)
    if spatial:
        for side in (*_solved(error), *SIDES):
            yield _filled(graph, shapes, {**usual, **dict.fromkeys(spatial, side)}, batch)
    for name, (given, axis) in symbols.items():
        for size in _ladder(given, axis, batch):
            yield _filled(graph, shapes, {**usual, name: size}, batch)


def _solved(error: str) -> list[int]:
    """Sides near the one at which a matrix behind a flattening gets the features it wants: features grow with the square."""
    gap = mismatch(error)
    if gap is None:
        return []
    middle = SIDES[0] * math.sqrt(gap[1] / gap[0])
    return sorted(range(max(2, int(middle * 0.7)), int(middle * 1.3) + 3), key=lambda side: abs(side - middle))[:40]


def _is_spatial(given: Input, axis: int) -> bool:
    return given.shape is not None and len(given.shape) in (4, 5) and axis >= 2 and given.dtype.is_floating_point


def _ladder(given: Input, axis: int, batch: int) -> tuple[int, ...]:
    """Sizes for one free axis, the usual one first."""
    rank = len(given.shape or ())
    if axis == 0:
        return (batch, 1)
    if _is_spatial(given, axis):
        return SIDES
    if given.dtype.is_floating_point and rank == 3 and axis == 2:
        return (64, *LENGTHS, 3, 1)
    if given.dtype.is_floating_point and rank == 4 and axis == 1:
        return (3, 1, 4, POSITIONS)
    if given.dtype.is_floating_point and rank == 2:
        return (64, *LENGTHS)
    return (POSITIONS, 8, 32, 64, 128)


def _filled(graph: Graph, shapes: Mapping[str, Any], sizes: Mapping[str, int], batch: int) -> tuple[Shape, ...]:
    found = []
    for given in graph.inputs:
        if given.name in shapes:
            found.append(tuple(shapes[given.name].shape))
        elif given.shape is None:
            # A file that says nothing: rows of features are no likelier than images, so the least is assumed.
            found.append((batch, 3, SIDES[0], SIDES[0]) if given.dtype.is_floating_point else (batch, POSITIONS))
        else:
            found.append(tuple(max(1, sizes[s]) if isinstance(s, str) else s for s in given.shape))
    return tuple(found)


def _value(given: Input, shape: Shape, rows: int | None, paddings: set[int], generator: torch.Generator) -> Tensor:
    """One input. An integer that picks no row is a mask or a length: ones."""
    if rows is not None and "pos" in given.name.lower() and len(shape) > 0:
        # Any position would do as well; counted up they are what training sees.
        return (torch.arange(shape[-1]) % max(1, rows)).expand(shape).to(given.dtype).contiguous()
    if rows is not None:
        places = torch.tensor([r for r in range(max(1, rows)) if r not in paddings] or [0])
        return places[torch.randint(0, places.numel(), shape, generator=generator)].to(given.dtype)
    if given.dtype.is_floating_point and (len(shape) > 0 and math.prod(shape) > 0):
        return torch.randn(shape, generator=generator).to(given.dtype)
    return torch.ones(shape, dtype=given.dtype)
