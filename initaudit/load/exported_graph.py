"""The graph of an exported program as plain records, read from its JSON: nothing is imported, no expression is evaluated.

torch.export.load hands the strings of symbolic sizes to sympy, whose parser is Python's eval, and imports what a graph names.
Here a size is its hint, a number, and an operator stays a name that `initaudit.graph.from_exported` looks up in a list.
Source: torch/_export/serde/schema.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from initaudit.errors import UnreadableModel
from initaudit.load.spans import show

MAX_NODES = 1_000_000
MAX_DEPTH = 16  # of graphs within graphs
# torch/_export/serde/schema.py, ScalarType
SCALAR_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 10: "complex64",
    11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2",
    31: "float8_e4m3fnuz", 32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
_MEMORY_FORMATS = {1: "contiguous_format", 2: "channels_last", 3: "channels_last_3d", 4: "preserve_format"}
_LISTS = ("as_ints", "as_floats", "as_bools", "as_strings", "as_int_lists", "as_float_lists")
_PLAIN = ("as_int", "as_float", "as_bool", "as_string", "as_operator")
_NAMED_LISTS = ("as_tensors", "as_optional_tensors", "as_nested_tensors", "as_sym_ints", "as_sym_floats", "as_sym_bools")
_NAMED = ("as_tensor", "as_optional_tensor", "as_sym_int", "as_sym_float", "as_sym_bool")


@dataclass(frozen=True)
class Ref:
    """A value that a graph names."""

    name: str


@dataclass(frozen=True)
class Word:
    """A constant of torch by its name: "float32" as a dtype, "channels_last" as a memory format, and so on."""

    kind: Literal["dtype", "memory_format", "layout", "device"]
    name: str


@dataclass(frozen=True)
class Body:
    """A graph: the names of its inputs, its steps, and what it returns."""

    inputs: tuple[Any, ...]
    steps: tuple[Step, ...] = field(repr=False)
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class Step:
    """One call. `arguments` are (name, by keyword, value); `results` are names, a list of names for a list, or None.

    `modules` is the path of module calls around it, from the outermost: (key, path).
    """

    target: str
    arguments: tuple[tuple[str, bool, Any], ...]
    results: tuple[Any, ...]
    modules: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Place:
    """An input of the user: its name, its sizes (a symbolic one as (least, hint, most)), its dtype; None for no tensor."""

    name: str
    shape: tuple[int | tuple[int, int, int], ...] | None
    dtype: str
    value: Any = None


@dataclass(frozen=True)
class ExportedGraph:
    """`held` maps an input of the body to "parameter", "buffer" or "constant" and its name; `places` are the others."""

    body: Body
    held: Mapping[str, tuple[str, str]]
    places: tuple[Place, ...]


def read_graph(text: bytes, where: str) -> ExportedGraph:
    """The graph in the JSON `text`; raises `UnreadableModel` for what is no such graph or a kind of value that is not read."""
    try:
        document = json.loads(text)
        module = document["graph_module"]
        graph = module["graph"]
        held = dict(_held(module["signature"]["input_specs"]))
        ranges = document.get("range_constraints") or {}
        values = graph["tensor_values"]
        given = [_argument(spec["user_input"]["arg"], 0) for spec in module["signature"]["input_specs"] if "user_input" in spec]
        places = tuple(_place(value, values, ranges) for value in given)
        body = _body(graph, 0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UnreadableModel(where, f"its graph is not described as torch.export does ({show(repr(error))})") from error
    if sum(1 for _ in _all_steps(body)) > MAX_NODES:
        raise UnreadableModel(where, f"a graph of more than {MAX_NODES:,} calls")
    return ExportedGraph(body, held, places)


def _all_steps(body: Body) -> Iterator[Step]:
    for step in body.steps:
        yield step
        for _, _, value in step.arguments:
            if isinstance(value, Body):
                yield from _all_steps(value)


def _held(specs: list[Any]) -> Iterator[tuple[str, tuple[str, str]]]:
    for spec in specs:
        for kind, key in (
            ("parameter", "parameter_name"),
            ("buffer", "buffer_name"),
            ("tensor_constant", "tensor_constant_name"),
        ):
            if kind in spec:
                yield str(spec[kind]["arg"]["name"]), (kind.removeprefix("tensor_"), str(spec[kind][key]))


def _place(value: Any, values: Mapping[str, Any], ranges: Mapping[str, Any]) -> Place:
    if not isinstance(value, Ref):
        return Place("", None, "", value)
    meta = values[value.name]
    sizes = tuple(_size(size, ranges) for size in meta["sizes"])
    return Place(value.name, sizes, SCALAR_TYPES[meta["dtype"]])


def _size(size: Mapping[str, Any], ranges: Mapping[str, Any]) -> int | tuple[int, int, int]:
    """A size; of a symbolic one the hint and, where it is a symbol by itself, the range that the export recorded for it."""
    if "as_int" in size:
        return _whole(size["as_int"])
    expression = size["as_expr"]
    hint = _whole((expression.get("hint") or {}).get("as_int"))
    text = str(expression["expr_str"])
    found = next((r for name, r in ranges.items() if text == name or text.startswith(f"Symbol('{name}'")), None) or {}
    least, most = found.get("min_val"), found.get("max_val")
    return (least if isinstance(least, int) else hint, hint, most if isinstance(most, int) else hint)


def _whole(value: Any) -> int:
    if not isinstance(value, int) or not 0 <= value < 1 << 48:
        raise TypeError(f"{value!r} is no size")
    return int(value)


def _body(graph: Mapping[str, Any], depth: int) -> Body:
    if depth > MAX_DEPTH:
        raise ValueError("graphs within graphs, too deep")
    inputs = tuple(_argument(value, depth) for value in graph["inputs"])
    outputs = tuple(_argument(value, depth) for value in graph["outputs"])
    return Body(inputs, tuple(_step(node, depth) for node in graph["nodes"]), outputs)


def _step(node: Mapping[str, Any], depth: int) -> Step:
    arguments = tuple((str(a["name"]), a.get("kind") == 2, _argument(a["arg"], depth)) for a in node["inputs"])
    results = tuple(_argument(value, depth) for value in node["outputs"])
    return Step(str(node["target"]), arguments, results, tuple(_modules(str(node["metadata"].get("nn_module_stack", "")))))


def _modules(text: str) -> Iterator[tuple[str, str]]:
    """ "key,path,type;..." as the exporter writes it."""
    for entry in text.split(";"):
        key, _, rest = entry.partition(",")
        if rest:
            yield key, rest.rpartition(",")[0]


def _argument(value: Mapping[str, Any], depth: int) -> Any:
    """What an argument stands for: plain values, `Ref`, `Word`, `Body`, and lists of these."""
    (kind, held), *others = value.items()
    if others:
        raise TypeError("a value of two kinds")
    if kind == "as_none":
        return None
    if kind in _NAMED:
        return _named(held)
    if kind in _NAMED_LISTS:
        return [[_named(x) for x in item] if isinstance(item, list) else _named(item) for item in held]
    if kind in _PLAIN or kind in _LISTS:
        return _plain(held)
    if kind == "as_complex":
        return complex(held["real"], held["imag"])
    if kind == "as_scalar_type":
        return Word("dtype", SCALAR_TYPES[held])
    if kind == "as_memory_format":
        return Word("memory_format", _MEMORY_FORMATS[held])
    if kind == "as_layout" and held == 7:
        return Word("layout", "strided")
    if kind == "as_device":
        return Word("device", "cpu")  # wherever it was exported: it is looked at here
    if kind == "as_graph":
        return _body(held["graph"], depth + 1)
    raise TypeError(f"{kind} is not read")


def _named(held: Any) -> Any:
    if not isinstance(held, dict):
        raise TypeError("no name")
    if "name" in held or "as_name" in held:
        return Ref(str(held.get("name", held.get("as_name"))))
    (kind, inner), *_ = held.items()
    return None if kind == "as_none" else _named(inner) if kind == "as_tensor" else _plain(inner)


def _plain(held: Any) -> Any:
    if isinstance(held, list):
        return [_plain(item) for item in held]
    if held in ("Infinity", "-Infinity", "NaN"):  # JSON has no such numbers
        return float(held.replace("Infinity", "inf"))
    if held is None or isinstance(held, (bool, int, float, str)):
        return held
    raise TypeError("no plain value")
