"""ONNX models: the graph as onnx parses it, and every constant of it as a lazy array.

External data never passes through onnx, nor do large weights that stand in the file itself: they are left out of what onnx
parses, and mapped. Names: a constant keeps its own name (an initializer's, or the output of its Constant node). Where one of
a subgraph shares its name with another, it carries where it stands before a slash ("If_0.then_branch/weight"); one of a local
function always does ("my.domain::Block/scale").
"""

from __future__ import annotations

import mmap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.foreign import SAVED_MODEL
from initaudit.load.onnx_copies import one_weight
from initaudit.load.onnx_fused import is_fused, unfused
from initaudit.load.onnx_quantized import in_floats, is_quantized
from initaudit.load.onnx_structure import check_structure, node_label, schema_problems, subgraphs
from initaudit.load.onnx_tensors import STRING, sparse_array, tensor_array
from initaudit.load.onnx_wire import check_messages, looks_like_model, without_weights
from initaudit.load.spans import Span, reason, show

if TYPE_CHECKING:
    import onnx

FORMAT = "onnx"
GUESS = 1  # no magic number, but a structure
MAX_FILE_BYTES = (1 << 31) - 1  # protobuf's own limit for one message
NOTHING: Mapping[str, Span] = {}


def recognise(path: Path, head: bytes) -> bool:
    """True for a file whose fields are those of an onnx.ModelProto; protobuf has no magic number to go by."""
    return bool(head) and path.name != SAVED_MODEL and looks_like_model(path)


def load(path: Path) -> Checkpoint:
    """Reads the model at `path`; raises `UnreadableModel` for one that is damaged, empty, too large or hostile."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]

    where = show(path, 200)
    size = path.stat().st_size
    if size > MAX_FILE_BYTES:
        raise UnreadableModel(where, f"an ONNX file of {size} bytes", "at most 2 GiB", "save its weights as external data")
    check_messages(path, where)
    model = onnx.ModelProto()
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            graph, places = without_weights(data)
        model.ParseFromString(graph)
        spans = _mapped(model, places, path)
    except (DecodeError, ValueError, RuntimeError) as error:
        advice = "it is truncated or damaged: copy or export it again"
        raise UnreadableModel(where, "not a complete ONNX model", advice=advice) from error
    return _checkpoint(model, where, str(path), path.parent, spans)


def _mapped(model: onnx.ModelProto, places: list[tuple[int, int] | None], path: Path) -> dict[str, Span]:
    """The bytes of each initializer that was left in the file; in `model` it becomes external data of that same file."""
    spans: dict[str, Span] = {}
    for tensor, place in zip(model.graph.initializer, places, strict=True):
        if place is not None:
            begin, end = place
            spans.setdefault(tensor.name, Span(path, begin, end - begin))
            tensor.data_location = 1  # EXTERNAL
            for key, value in (("location", path.name), ("offset", str(begin)), ("length", str(end - begin))):
                tensor.external_data.add(key=key, value=value)
    return spans


def load_proto(model: onnx.ModelProto, folder: str | Path | None = None) -> Checkpoint:
    """The checkpoint of a model in memory; external data, where it has any, is looked for in `folder`."""
    name = show(model.graph.name) or "model"
    return _checkpoint(model, name, name, None if folder is None else Path(folder))


def scope_of_subgraph(scope: str, node: onnx.NodeProto, index: int, attribute: str) -> str:
    """The scope of a graph held by the `index`-th node of the scope: "If_0.then_branch"."""
    inner = f"{node_label(node, index)}.{attribute}"
    return f"{scope}/{inner}" if scope else inner


def scope_of_function(function: onnx.FunctionProto) -> str:
    """The scope of a local function: "domain::name"."""
    return f"{function.domain}::{function.name}" + (f":{function.overload}" if function.overload else "")


@dataclass(frozen=True)
class _Found:
    """A constant: where it stands, its own name, and what makes its array under the name that the report uses."""

    scope: str
    name: str
    make: Callable[[str], Array]


def _checkpoint(
    model: onnx.ModelProto, where: str, source: str, folder: Path | None, spans: Mapping[str, Span] = NOTHING
) -> Checkpoint:
    try:
        notes = list(check_structure(model, where))
        problems = schema_problems(model)
        arrays: dict[str, Array] = {}
        for key, make in _keyed(model, where, folder, spans):
            if key in arrays:
                problems.append(Problem("IA001", key, f"two constants are called {show(repr(key))}; the first is read"))
                continue
            try:
                arrays[key] = make(key)
            except UnreadableModel as error:
                problems.append(Problem("IA001", key, str(error)))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UnreadableModel(where, f"not a valid ONNX model ({reason(error)})") from error
    arrays = one_weight(model, arrays)
    if is_fused(model):
        model = unfused(model)
    if is_quantized(model):
        model, arrays, note = in_floats(model, arrays)
        notes.append(note)
    if model.training_info:
        notes.append("training_info is not read: the weights are those of the inference graph")
    return Checkpoint(source, FORMAT, arrays, model, tuple(problems), metadata=_metadata(model), notes=tuple(notes))


def _keyed(
    model: onnx.ModelProto, where: str, folder: Path | None, spans: Mapping[str, Span]
) -> Iterator[tuple[str, Callable[[str], Array]]]:
    """Every constant under the name of the module's docstring."""
    found = list(_graph_constants(model.graph, "", where, folder, spans))
    counts = Counter(constant.name for constant in found)
    for constant in found:
        alone = not constant.scope or counts[constant.name] == 1
        yield constant.name if alone else f"{constant.scope}/{constant.name}", constant.make
    for function in model.functions:
        scope = scope_of_function(function)
        yield from ((f"{c.scope}/{c.name}", c.make) for c in _node_constants(function, scope, where, folder))


def _graph_constants(
    graph: onnx.GraphProto, scope: str, where: str, folder: Path | None, spans: Mapping[str, Span] = NOTHING
) -> Iterator[_Found]:
    for tensor in graph.initializer:
        if tensor.data_type != STRING:
            yield _Found(scope, tensor.name, partial(_tensor, tensor, where, folder, spans.get(tensor.name)))
    for sparse in graph.sparse_initializer:
        yield _Found(scope, sparse.values.name, partial(_sparse, sparse, where))
    yield from _node_constants(graph, scope, where, folder)


def _tensor(tensor: onnx.TensorProto, where: str, folder: Path | None, span: Span | None, key: str) -> Array:
    return tensor_array(tensor, key, where, folder, span)


def _sparse(sparse: onnx.SparseTensorProto, where: str, key: str) -> Array:
    return sparse_array(sparse, key, where)


def _number(number: np.ndarray[Any, Any], key: str) -> Array:
    return Array(key, number.shape, number.dtype.name, lambda: number)


def _node_constants(
    body: onnx.GraphProto | onnx.FunctionProto, scope: str, where: str, folder: Path | None
) -> Iterator[_Found]:
    for index, node in enumerate(body.node):
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output:
            for attribute in node.attribute:
                make = _constant_value(attribute, where, folder)
                if make is not None:
                    yield _Found(scope, node.output[0], make)
        for name, graph in subgraphs(node):
            yield from _graph_constants(graph, scope_of_subgraph(scope, node, index, name), where, folder)


def _constant_value(attribute: onnx.AttributeProto, where: str, folder: Path | None) -> Callable[[str], Array] | None:
    """What makes the array of one attribute of a Constant node; None for text and for a reference to a function's argument."""
    if attribute.ref_attr_name:
        return None
    if attribute.name == "value":
        return None if attribute.t.data_type == STRING else partial(_tensor, attribute.t, where, folder, None)
    if attribute.name == "sparse_value":
        return partial(_sparse, attribute.sparse_tensor, where)
    values: dict[str, tuple[Any, str]] = {
        "value_float": (attribute.f, "float32"),
        "value_floats": (list(attribute.floats), "float32"),
        "value_int": (attribute.i, "int64"),
        "value_ints": (list(attribute.ints), "int64"),
    }
    if attribute.name not in values:
        return None
    number = np.array(values[attribute.name][0], values[attribute.name][1])
    number.setflags(write=False)
    return partial(_number, number)


def _metadata(model: onnx.ModelProto) -> dict[str, Any]:
    return {
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "properties": {entry.key: entry.value for entry in model.metadata_props},
        "functions": [scope_of_function(function) for function in model.functions],
    }
