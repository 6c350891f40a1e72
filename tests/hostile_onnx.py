"""ONNX files that are damaged or made to hurt, built in memory; each must end in one line, or lose one tensor only."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = [helper.make_opsetid("", 20)]
WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def model(
    nodes: list[onnx.NodeProto] | None = None,
    tensors: list[onnx.TensorProto] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
    opsets: list[onnx.OperatorSetIdProto] | None = None,
    output: str = "y",
) -> onnx.ModelProto:
    """x (2, 3) times w (3, 4), with whatever is added."""
    floats = TensorProto.FLOAT
    graph = helper.make_graph(
        nodes if nodes is not None else [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", floats, [2, 3])],
        [helper.make_tensor_value_info(output, floats, None)],
        [numpy_helper.from_array(WEIGHT, "w"), *(tensors or [])],
    )
    return helper.make_model(graph, opset_imports=opsets or OPSET, functions=functions or [], ir_version=10)


def raw_tensor(name: str, dims: list[int], dtype: int, data: bytes) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=dtype, raw_data=data)
    tensor.dims.extend(dims)
    return tensor


def external(name: str, location: str, dims: list[int] | None = None, **entries: str) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.dims.extend([4] if dims is None else dims)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


def relu(a: str, b: str) -> onnx.NodeProto:
    return helper.make_node("Relu", [a], [b])


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    imports = [*OPSET, helper.make_opsetid("f", 1)]
    return helper.make_function("f", name, ["a"], ["b"], nodes, imports)


def calls(name: str, times: int) -> list[onnx.NodeProto]:
    names = ["a", *(f"t{i}" for i in range(times - 1)), "b"]
    return [helper.make_node(name, [names[i]], [names[i + 1]], domain="f") for i in range(times)]


def laughs(levels: int) -> onnx.ModelProto:
    """Each function calls the next one twice: 2**levels nodes in a few kilobytes."""
    functions = [function(f"f{i}", calls(f"f{i + 1}", 2)) for i in range(levels)]
    functions.append(function(f"f{levels}", [relu("a", "b")]))
    return model(
        [helper.make_node("f0", ["x"], ["y"], domain="f")], functions=functions, opsets=[*OPSET, helper.make_opsetid("f", 1)]
    )


def recursive() -> onnx.ModelProto:
    functions = [function("f0", calls("f1", 1)), function("f1", calls("f0", 1))]
    return model(
        [helper.make_node("f0", ["x"], ["y"], domain="f")], functions=functions, opsets=[*OPSET, helper.make_opsetid("f", 1)]
    )


def long_chain(levels: int) -> onnx.ModelProto:
    """Functions that call one another in a row deeper than Python's own stack."""
    functions = [function(f"f{i}", calls(f"f{i + 1}", 1)) for i in range(levels)]
    functions.append(function(f"f{levels}", [relu("a", "b")]))
    return model(
        [helper.make_node("f0", ["x"], ["y"], domain="f")], functions=functions, opsets=[*OPSET, helper.make_opsetid("f", 1)]
    )


def nested(depth: int) -> bytes:
    """A graph in an If in a graph ... as bytes, because protobuf would not build it."""

    def field(number: int, content: bytes) -> bytes:
        size, out = len(content), b""
        while size > 127:
            out, size = out + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + out + bytes([size]) + content

    graph = field(2, b"g")
    for _ in range(depth):
        graph = field(1, field(4, b"If") + field(5, field(1, b"then_branch") + field(6, graph)))
    return b"\x08\x0a" + field(7, graph)


def swollen(megabytes: int) -> bytes:
    """Nothing but empty nodes, two bytes each."""
    graph = b"\x0a\x00" * (megabytes << 19)
    size = len(graph)
    varint = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14 & 127 | 128, size >> 21])
    return b"\x08\x0a\x3a" + varint + graph


def _bytes(made: onnx.ModelProto) -> bytes:
    content: bytes = made.SerializeToString()
    return content


def _with_duplicate_output() -> onnx.ModelProto:
    return model([relu("x", "y"), relu("x", "y")])


def _subgraph_undefined() -> onnx.ModelProto:
    inner = helper.make_graph([relu("nowhere", "z")], "t", [], [helper.make_tensor_value_info("z", 1, None)])
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    return model([node])


def _no_opset() -> onnx.ModelProto:
    made = model()
    del made.opset_import[:]
    return made


# Refused as a whole: name -> (bytes, what the line says)
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "truncated": (lambda: _bytes(model())[:60], "not a complete ONNX model"),
    "no graph": (lambda: _bytes(onnx.ModelProto(ir_version=10, producer_name="p")), "without a graph"),
    "empty graph": (lambda: _bytes(onnx.ModelProto(ir_version=10, graph=onnx.GraphProto(name="g"))), "without a graph"),
    "deep nest": (lambda: nested(5000), "not a complete ONNX model"),
    "swollen": (lambda: swollen(20), "fields"),
    "cycle": (lambda: _bytes(model([relu("b", "a"), relu("a", "b"), relu("b", "y")])), "unsorted or form a cycle"),
    "self loop": (lambda: _bytes(model([relu("y", "y")])), "unsorted or form a cycle"),
    "unsorted": (lambda: _bytes(model([relu("a", "y"), relu("x", "a")])), "unsorted or form a cycle"),
    "undefined input": (lambda: _bytes(model([relu("nowhere", "y")])), "is not defined"),
    "undefined input in a subgraph": (lambda: _bytes(_subgraph_undefined()), "is not defined"),
    "undefined output": (lambda: _bytes(model(output="nowhere")), "computed by no node"),
    "duplicate output": (lambda: _bytes(_with_duplicate_output()), "defined twice"),
    "output that is an input": (lambda: _bytes(model([relu("x", "x")], output="x")), "defined twice"),
    "duplicate initializer": (lambda: _bytes(model(tensors=[numpy_helper.from_array(WEIGHT, "w")])), "defined twice"),
    "opset 9999": (lambda: _bytes(model(opsets=[helper.make_opsetid("", 9999)])), "opset 9999"),
    "opset 0": (lambda: _bytes(model(opsets=[helper.make_opsetid("", 0)])), "opset 0"),
    "two opsets": (lambda: _bytes(model(opsets=[*OPSET, helper.make_opsetid("ai.onnx", 9)])), "two opsets"),
    "no opset": (lambda: _bytes(_no_opset()), "no opset"),
    "recursive functions": (lambda: _bytes(recursive()), "calls itself"),
    "billion laughs": (lambda: _bytes(laughs(41)), "expand to more than"),
    "billion laughs, 500 levels": (lambda: _bytes(laughs(500)), "expand to more than"),
}

# One tensor is lost and the rest is read: name -> (tensor, what the problem says)
FLOAT, FOUR = TensorProto.FLOAT, bytes(16)
LOST: dict[str, tuple[Callable[[], onnx.TensorProto], str]] = {
    "dtype 99": (lambda: raw_tensor("bad", [4], 99, FOUR), "data type 99"),
    "dtype 0": (lambda: raw_tensor("bad", [4], 0, FOUR), "data type 0"),
    "negative size": (lambda: raw_tensor("bad", [-2, -2], FLOAT, FOUR), "negative size"),
    "one negative size": (lambda: raw_tensor("bad", [-4], FLOAT, FOUR), "negative size"),
    "overflowing shape": (lambda: raw_tensor("bad", [2**40, 2**40], FLOAT, FOUR), "more elements"),
    "overflow that wraps to 4": (lambda: raw_tensor("bad", [2**62, 4, 4], FLOAT, FOUR), "more elements"),
    "huge next to zero": (lambda: raw_tensor("bad", [2**62, 0], FLOAT, b""), "more elements"),
    "short raw data": (lambda: raw_tensor("bad", [4], FLOAT, FOUR[:10]), "10 bytes"),
    "long raw data": (lambda: raw_tensor("bad", [3], FLOAT, FOUR), "16 bytes"),
    "few typed entries": (lambda: TensorProto(name="bad", data_type=FLOAT, dims=[4], float_data=[1, 2]), "2 entries"),
    "no data": (lambda: TensorProto(name="bad", data_type=FLOAT, dims=[4]), "0 entries"),
    "segment": (lambda: TensorProto(name="bad", data_type=FLOAT, dims=[], float_data=[1], segment=TensorProto.Segment(begin=0)),
                "segments"),
    "external ..": (lambda: external("bad", "../data.bin"), "relative path inside"),
    "external absolute": (lambda: external("bad", "/etc/hostname"), "relative path inside"),
    "external device": (lambda: external("bad", "/dev/zero"), "relative path inside"),
    "external with a back step inside": (lambda: external("bad", "sub/../data.bin"), "relative path inside"),
    "external without a name": (lambda: external("bad", ""), "relative path inside"),
    "external NUL": (lambda: external("bad", "data.bin\0x"), "relative path inside"),
    "external backslash": (lambda: external("bad", "..\\data.bin"), "relative path inside"),
    "external missing": (lambda: external("bad", "absent.bin"), "no such file"),
    "external folder": (lambda: external("bad", "sub"), "not a regular file"),
    "external symbolic link": (lambda: external("bad", "link.bin"), "a link"),
    "external through a linked folder": (lambda: external("bad", "linked/secret.bin"), "a link"),
    "external hard link": (lambda: external("bad", "hard.bin"), "hard link"),
    "external pipe": (lambda: external("bad", "pipe"), "not a regular file"),
    "external empty": (lambda: external("bad", "empty.bin"), "has 0 bytes"),
    "external length 2**50": (lambda: external("bad", "data.bin", length=str(2**50)), "has 64 bytes"),
    "external short": (lambda: external("bad", "data.bin", [100]), "has 64 bytes"),
    "external length that does not fit": (lambda: external("bad", "data.bin", length="8"), "8 bytes"),
    "external offset -8": (lambda: external("bad", "data.bin", offset="-8"), "external data from -8"),
    "external offset past the end": (lambda: external("bad", "data.bin", offset="60"), "has 64 bytes"),
    "external offset abc": (lambda: external("bad", "data.bin", offset="abc"), "invalid literal"),
    "external offset of many digits": (lambda: external("bad", "data.bin", offset="9" * 10000), "external data with"),
}  # fmt: skip


def furnish(folder: Path) -> None:
    """The files and links that the external tensors point to."""
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "secret.bin").write_bytes(bytes(64))
    (outside / "hard.bin").write_bytes(bytes(64))
    (folder / "sub").mkdir()
    (folder / "data.bin").write_bytes(bytes(range(64)))
    (folder / "empty.bin").write_bytes(b"")
    (folder / "link.bin").symlink_to(outside / "secret.bin")
    (folder / "linked").symlink_to(outside)
    os.link(outside / "hard.bin", folder / "hard.bin")
    os.mkfifo(folder / "pipe")


def _constant(name: str, values: object, kind: type = np.int64) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=kind), name)


def _growing(op: str, given: list[str], tensors: list[onnx.TensorProto], **attributes: object) -> onnx.ModelProto:
    """x grows into petabytes by one operator."""
    return model([helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node(op, given, ["y"], **attributes)], tensors)


def doubling(times: int) -> onnx.ModelProto:
    names = ["h", *(f"t{i}" for i in range(times - 1)), "y"]
    nodes = [helper.make_node("Concat", [names[i]] * 2, [names[i + 1]], axis=0) for i in range(times)]
    return model([helper.make_node("MatMul", ["x", "w"], ["h"]), *nodes])


def endless(nodes: list[onnx.NodeProto] | None = None, scan: bool = False) -> onnx.ModelProto:
    """A Loop whose condition never turns false; with `scan` every trip leaves a value behind."""
    floats, truth = TensorProto.FLOAT, TensorProto.BOOL
    inputs = [
        helper.make_tensor_value_info("i", TensorProto.INT64, []),
        helper.make_tensor_value_info("c", truth, []),
        helper.make_tensor_value_info("s", floats, None),
    ]
    body_nodes = [helper.make_node("Identity", ["c"], ["k"]), *(nodes or [helper.make_node("Tanh", ["s"], ["t"])])]
    outputs = [helper.make_tensor_value_info("k", truth, []), helper.make_tensor_value_info("t", floats, None)]
    if scan:
        body_nodes.append(helper.make_node("Identity", ["t"], ["u"]))
        outputs.append(helper.make_tensor_value_info("u", floats, None))
    body = helper.make_graph(body_nodes, "body", inputs, outputs)
    made = ["y", "all"] if scan else ["y"]
    loop = helper.make_node("Loop", ["", "yes", "h"], made, "endless", body=body)
    return model([helper.make_node("MatMul", ["x", "w"], ["h"]), loop], [_constant("yes", True, np.bool_)])


def nested_loops(depth: int) -> onnx.ModelProto:
    """Loops in one another, each of 1000 trips."""
    floats = TensorProto.FLOAT
    node = helper.make_node("Tanh", ["s"], ["t"])
    for level in range(depth):
        inputs = [
            helper.make_tensor_value_info(f"i{level}", TensorProto.INT64, []),
            helper.make_tensor_value_info(f"c{level}", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", floats, None),
        ]
        outputs = [
            helper.make_tensor_value_info(f"c{level}o", TensorProto.BOOL, []),
            helper.make_tensor_value_info("t", floats, None),
        ]
        keep = helper.make_node("Identity", [f"c{level}"], [f"c{level}o"])
        body = helper.make_graph([keep, node], f"body{level}", inputs, outputs)
        last = level == depth - 1
        node = helper.make_node("Loop", ["many", "", "h" if last else "s"], ["y" if last else "t"], f"loop{level}", body=body)
    return model([helper.make_node("MatMul", ["x", "w"], ["h"]), node], [_constant("many", 1000)])


HUGE = [2**20, 2**20]
# Read, and then dangerous to run: the rest of the audit goes on, and a line says why nothing was run
DANGEROUS: dict[str, Callable[[], onnx.ModelProto]] = {
    "huge ConstantOfShape": lambda: model(
        [helper.make_node("ConstantOfShape", ["big"], ["c"]), helper.make_node("MatMul", ["x", "w"], ["h"]),
         helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0), helper.make_node("Add", ["h", "r"], ["y"])],
        [_constant("big", HUGE)],
    ),
    "huge Range": lambda: model(
        [helper.make_node("Range", ["zero", "most", "one"], ["c"]), helper.make_node("ReduceSum", ["c"], ["r"], keepdims=0),
         helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "r"], ["y"])],
        [_constant("zero", 0.0, np.float32), _constant("most", 1e12, np.float32), _constant("one", 1.0, np.float32)],
    ),
    "huge Expand": lambda: _growing("Expand", ["h", "big"], [_constant("big", [2**40, 2, 4])]),
    "huge Tile": lambda: _growing("Tile", ["h", "big"], [_constant("big", HUGE)]),
    "huge Pad": lambda: _growing("Pad", ["h", "big"], [_constant("big", [0, 0, 2**40, 2**20])]),
    "negative Pad": lambda: _growing("Pad", ["h", "big"], [_constant("big", [-9, -9, -9, -9])]),
    "huge Resize": lambda: _growing("Resize", ["h", "", "big"], [_constant("big", [1e6, 1e6], np.float32)]),
    "huge OneHot": lambda: model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("ArgMax", ["h"], ["i"], axis=1),
         helper.make_node("OneHot", ["i", "depth", "ends"], ["o"]), helper.make_node("ReduceSum", ["o"], ["r"], keepdims=0),
         helper.make_node("Add", ["h", "r"], ["y"])],
        [_constant("depth", 2**45), _constant("ends", [0.0, 1.0], np.float32)],
    ),
    "doubling Concat": lambda: doubling(45),
    "growing MatMul": lambda: model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Reshape", ["h", "tall"], ["a"]),
         helper.make_node("Tile", ["a", "times"], ["b"]), helper.make_node("Transpose", ["b"], ["c"]),
         helper.make_node("MatMul", ["b", "c"], ["y"])],
        [_constant("tall", [-1, 1]), _constant("times", [2**20, 1])],
    ),
    "endless Loop": lambda: endless(),
    "endless Loop that keeps all": lambda: endless(scan=True),
    "endless Loop that grows": lambda: endless([helper.make_node("Concat", ["s", "s"], ["t"], axis=0)]),
    "loops in loops": lambda: nested_loops(4),
    "Loop of 2**62 trips": lambda: model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]),
         helper.make_node("Loop", ["many", "", "h"], ["y"], body=endless().graph.node[1].attribute[0].g)],
        [_constant("many", 2**62)],
    ),
}  # fmt: skip
