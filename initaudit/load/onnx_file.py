"""ONNX models: the graph as onnx parses it, and every constant of it as a lazy array.

External data never passes through onnx. Names: a constant of the main graph keeps its own name (an initializer's, or the
output of its Constant node); one inside a subgraph or a local function carries where it stands before a slash, such as
"If_0.then_branch/weight" or "my.domain::Block/scale" (`scope_of_subgraph`, `scope_of_function`), because names repeat there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from initaudit.errors import UnreadableModel
from initaudit.load.checkpoint import Array, Checkpoint, Problem
from initaudit.load.onnx_structure import check_structure, node_label, schema_problems, subgraphs
from initaudit.load.onnx_tensors import STRING, sparse_array, tensor_array
from initaudit.load.onnx_wire import check_messages, looks_like_model
from initaudit.load.spans import reason, show

if TYPE_CHECKING:
    import onnx

FORMAT = "onnx"
MAX_FILE_BYTES = (1 << 31) - 1  # protobuf's own limit for one message
Make = Callable[[], Array]


def recognise(path: Path, head: bytes) -> bool:
    """True for a file whose fields are those of an onnx.ModelProto; protobuf has no magic number to go by."""
    return bool(head) and looks_like_model(path)


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
        model.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError, RuntimeError) as error:
        advice = "it is truncated or damaged: copy or export it again"
        raise UnreadableModel(where, "not a complete ONNX model", advice=advice) from error
    return _checkpoint(model, where, str(path), path.parent)


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


def constant_key(scope: str, name: str) -> str:
    """The key in `Checkpoint.arrays` of the constant `name` in `scope` ("" for the main graph)."""
    return f"{scope}/{name}" if scope else name


def _checkpoint(model: onnx.ModelProto, where: str, source: str, folder: Path | None) -> Checkpoint:
    try:
        notes = list(check_structure(model, where))
        problems = schema_problems(model)
        arrays: dict[str, Array] = {}
        for key, make in _constants(model, where, folder):
            if key in arrays:
                problems.append(Problem("IA001", key, f"two constants are called {show(repr(key))}; the first is read"))
                continue
            try:
                arrays[key] = make()
            except UnreadableModel as error:
                problems.append(Problem("IA001", key, str(error)))
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UnreadableModel(where, f"not a valid ONNX model ({reason(error)})") from error
    if model.training_info:
        notes.append("training_info is not read: the weights are those of the inference graph")
    return Checkpoint(source, FORMAT, arrays, model, tuple(problems), metadata=_metadata(model), notes=tuple(notes))


def _constants(model: onnx.ModelProto, where: str, folder: Path | None) -> Iterator[tuple[str, Make]]:
    yield from _graph_constants(model.graph, "", where, folder)
    for function in model.functions:
        yield from _node_constants(function, scope_of_function(function), where, folder)


def _graph_constants(graph: onnx.GraphProto, scope: str, where: str, folder: Path | None) -> Iterator[tuple[str, Make]]:
    for tensor in graph.initializer:
        if tensor.data_type != STRING:
            key = constant_key(scope, tensor.name)
            yield key, lambda tensor=tensor, key=key: tensor_array(tensor, key, where, folder)  # type: ignore[misc]
    for sparse in graph.sparse_initializer:
        key = constant_key(scope, sparse.values.name)
        yield key, lambda sparse=sparse, key=key: sparse_array(sparse, key, where)  # type: ignore[misc]
    yield from _node_constants(graph, scope, where, folder)


def _node_constants(
    body: onnx.GraphProto | onnx.FunctionProto, scope: str, where: str, folder: Path | None
) -> Iterator[tuple[str, Make]]:
    for index, node in enumerate(body.node):
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output:
            key = constant_key(scope, node.output[0])
            for attribute in node.attribute:
                make = _constant_value(attribute, key, where, folder)
                if make is not None:
                    yield key, make
        for name, graph in subgraphs(node):
            yield from _graph_constants(graph, scope_of_subgraph(scope, node, index, name), where, folder)


def _constant_value(attribute: onnx.AttributeProto, key: str, where: str, folder: Path | None) -> Make | None:
    """What makes the array of one attribute of a Constant node; None for text and for a reference to a function's argument."""
    if attribute.ref_attr_name:
        return None
    if attribute.name == "value":
        tensor = attribute.t
        return None if tensor.data_type == STRING else lambda: tensor_array(tensor, key, where, folder)
    if attribute.name == "sparse_value":
        return lambda: sparse_array(attribute.sparse_tensor, key, where)
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
    return lambda: Array(key, number.shape, number.dtype.name, lambda: number)


def _metadata(model: onnx.ModelProto) -> dict[str, Any]:
    return {
        "ir_version": model.ir_version,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "properties": {entry.key: entry.value for entry in model.metadata_props},
        "functions": [scope_of_function(function) for function in model.functions],
    }
