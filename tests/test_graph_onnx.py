"""Weights of ONNX files by every way on which they reach their place of use.

Judges: onnxruntime for values; the tensor, axes and fans that each file was written with for pairs.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from initaudit.errors import UnreadableModel
from initaudit.graph.execute import Executor, specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.graph.graph import Graph
from initaudit.load import load, load_proto
from initaudit.pair.pair import pair

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
IN, OUT = 6, 10  # units in, units out


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * 0.4).astype(np.float32)


def tensor(name: str, value: object) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


def node(op: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **attributes)


def value(name: str, shape: tuple[object, ...] | None = None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, tensors=(), inputs=None, functions=(), opset=21, output="y") -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid("own", 1) for _ in functions[:1])]
    graph = helper.make_graph(list(nodes), "g", inputs or [value("x", (3, IN))], [value(output)], list(tensors))
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def run(made: onnx.ModelProto, *inputs: np.ndarray) -> Graph:
    """The graph, after its outputs were held against those of onnxruntime."""
    inputs = inputs or (normal(3, IN, seed=7),)
    checkpoint = load_proto(made)
    given = tuple(torch.from_numpy(x) for x in inputs)
    graph = specialise(from_onnx(checkpoint.program, checkpoint.arrays), given)
    assert graph.notes == ()
    names = [i.name for i in graph.inputs]
    options = onnxruntime.SessionOptions()  # optimized, it multiplies quantised weights as integers
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, dict(zip(names, inputs, strict=True)))
    with torch.no_grad():
        (result,) = Executor(graph).run(*given)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4, atol=1e-6)
    return graph


W = normal(IN, OUT)
PRODUCT = [node("MatMul", "x v", "h"), node("Relu", "h", "y")]
F16 = W.astype(np.float16)
QUANTISED = np.round(W / 0.01).astype(np.int8)

# nodes that make "v" [IN, OUT] of the file's tensors, the tensors, what is reported: stored shape, axes, stored or computed
CHAINS = {
    "direct": ([], [tensor("v", W)], "v", (IN, OUT), "io", True),
    "identity": ([node("Identity", "w", "v")], [tensor("w", W)], "w", (IN, OUT), "io", True),
    "transpose": ([node("Transpose", "w", "v", perm=[1, 0])], [tensor("w", W.T.copy())], "w", (OUT, IN), "oi", True),
    "twice": (
        [node("Transpose", "w", "t", perm=[1, 0]), node("Identity", "t", "i"), node("Transpose", "i", "v")],
        [tensor("w", W)],
        "w",
        (IN, OUT),
        "io",
        True,
    ),
    "cast": ([node("Cast", "w", "v", to=FLOAT)], [tensor("w", F16)], "w", (IN, OUT), "io", True),
    "reshape": (
        [node("Reshape", "w s", "v")],
        [tensor("w", W.reshape(-1)), tensor("s", [IN, OUT])],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "squeeze": ([node("Squeeze", "w a", "v")], [tensor("w", W[None]), tensor("a", [0])], "w", (IN, OUT), "io", False),
    "flatten": ([node("Flatten", "w", "v", axis=1)], [tensor("w", W[..., None])], "w", (IN, OUT), "io", False),
    "dequantised": (
        [node("DequantizeLinear", "w s", "v")],
        [tensor("w", QUANTISED), tensor("s", np.float32(0.01))],
        "w",
        (IN, OUT),
        "io",
        True,  # the loader hands out the numbers that the integers stand for, under the name and axes of the integers
    ),
    "slice": (
        [node("Slice", "w b e a", "v")],
        [tensor("w", normal(IN, 3 * OUT)), tensor("b", [OUT]), tensor("e", [2 * OUT]), tensor("a", [1])],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "split": (
        [node("Split", "w", "p v q", axis=1, num_outputs=3)],
        [tensor("w", normal(IN, 3 * OUT))],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "gather": (
        [node("Gather", "w k", "v", axis=0)],
        [tensor("w", normal(3, IN, OUT)), tensor("k", np.int64(1))],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "concat": (
        [node("Concat", "w u", "v", axis=1)],
        [tensor("w", normal(IN, 7)), tensor("u", normal(IN, 3))],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "weight_norm": (
        [node("ReduceL2", "w a", "n", keepdims=1), node("Div", "w n", "d"), node("Mul", "d g", "v")],
        [tensor("w", W), tensor("a", [0]), tensor("g", normal(1, OUT))],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "scaled": ([node("Mul", "w c", "v")], [tensor("w", W), tensor("c", np.float32(0.1))], "w", (IN, OUT), "io", False),
    "lora": (
        [node("MatMul", "a b", "d"), node("Add", "w d", "v")],
        [tensor("w", W), tensor("a", normal(IN, 2)), tensor("b", normal(2, OUT))],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "expand": ([node("Expand", "w s", "v")], [tensor("w", normal(IN, 1)), tensor("s", [IN, OUT])], "w", (IN, OUT), "io", False),
    "tile": ([node("Tile", "w s", "v")], [tensor("w", normal(IN, OUT // 2)), tensor("s", [1, 2])], "w", (IN, OUT), "io", False),
    "pad": (
        [node("Pad", "w s", "v")],
        [tensor("w", normal(IN, OUT - 2)), tensor("s", [0, 0, 0, 2])],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "where": (
        [node("Where", "m w z", "v")],
        [tensor("w", W), tensor("m", normal(IN, OUT) > 0), tensor("z", np.float32(0))],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "constant_node": ([node("Constant", "", "v", value=tensor("any", W))], [], "v", (IN, OUT), "io", True),
    "constant_floats": (
        [node("Constant", "", "w", value_floats=W.reshape(-1).tolist()), node("Reshape", "w s", "v")],
        [tensor("s", [IN, OUT])],
        "w",
        (IN, OUT),
        "io",
        False,
    ),
    "constant_of_shape": (
        [
            node("Constant", "", "s", value_ints=[IN, OUT]),
            node("ConstantOfShape", "s", "v", value=tensor("c", np.float32([0.5]))),
        ],
        [],
        "v",
        (IN, OUT),
        "io",
        False,
    ),
    "constant_sparse": (
        [
            node(
                "Constant",
                "",
                "v",
                sparse_value=helper.make_sparse_tensor(
                    tensor("k", np.float32([1, 2])), tensor("k.i", np.int64([3, 17])), [IN, OUT]
                ),
            )
        ],
        [],
        "v",
        (IN, OUT),
        "io",
        True,
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_weight_behind_a_chain(name):
    nodes, tensors, main, shape, axes, stored = CHAINS[name]
    made = model([*nodes, *PRODUCT], tensors)
    (p,) = pair(run(made))
    assert (p.tensor, p.operator, p.role, p.fan_in, p.fan_out, p.groups) == (main, "linear", "contraction", IN, OUT, 1)
    assert (p.shape, "".join(p.axes), p.stored) == (shape, axes, stored)
    assert [(f.activation.name, f.path) for f in p.feeds] == [("relu", ())]
    # The loader dequantises: what is left of a DequantizeLinear hands its numbers on.
    labels = ["Identity" if n.op_type == "DequantizeLinear" else n.op_type for n in nodes if "s" not in n.output]
    operators = [label for label in labels if label != "Constant"]
    assert [label for label in p.provenance if label != "getitem"] == operators
    if not stored:
        parts = [t.name for t in tensors if t.data_type == FLOAT]
        assert sorted(p.constants) == sorted(parts) or name in ("constant_floats", "constant_of_shape")


def test_weights_of_a_sparse_initializer_and_of_another_file(tmp_path):
    """One of few values among zeros, one that stands outside of the file: their own names, shapes and fans."""
    where = np.int64([3, 17, 40])
    sparse = helper.make_sparse_tensor(tensor("v", np.float32([1, -2, 0.5])), tensor("i", where), [IN, OUT])
    made = model([*PRODUCT[:1], node("MatMul", "h o", "y")], [tensor("o", normal(OUT, 4))])
    made.graph.sparse_initializer.append(sparse)
    path = tmp_path / "model.onnx"
    onnx.save(made, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    checkpoint = load(path)
    assert checkpoint.problems == ()
    assert (tmp_path / "weights.bin").stat().st_size == 4 * OUT * 4
    x = torch.from_numpy(normal(3, IN, seed=7))
    graph = specialise(from_onnx(checkpoint.program, checkpoint.arrays), (x,))
    first, second = pair(graph)
    assert (first.tensor, first.shape, "".join(first.axes), first.fan_in, first.fan_out) == ("v", (IN, OUT), "io", IN, OUT)
    assert (second.tensor, second.shape, second.fan_in, second.fan_out, second.stored) == ("o", (OUT, 4), OUT, 4, True)
    dense = np.zeros(IN * OUT, np.float32)
    dense[where] = [1, -2, 0.5]
    (y,) = Executor(graph).run(x)
    np.testing.assert_allclose(y.detach(), x.numpy() @ dense.reshape(IN, OUT) @ normal(OUT, 4), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_quantised_along_an_axis_and_transposed(axis):
    """What the scale lies along is an axis of the stored tensor, whichever way the product reads it."""
    scale = np.linspace(0.005, 0.02, (OUT, IN)[axis]).astype(np.float32)
    stored = np.random.default_rng(0).integers(-99, 99, (OUT, IN)).astype(np.int8)
    nodes = [node("DequantizeLinear", "w s", "d", axis=axis), node("Transpose", "d", "v", perm=[1, 0]), *PRODUCT]
    (p,) = pair(run(model(nodes, [tensor("w", stored), tensor("s", scale)])))
    assert (p.tensor, p.shape, "".join(p.axes), p.fan_in, p.fan_out, p.stored) == ("w", (OUT, IN), "oi", IN, OUT, True)


def test_packed_projections_share_their_tensor():
    """One packed matrix for queries, keys and values: three places of use of slices of one tensor."""
    parts = [node("Split", "w", "a b c", axis=1, num_outputs=3)]
    products = [node("MatMul", f"x {n}", f"h{n}") for n in "abc"]
    tail = [node("Add", "ha hb", "s"), node("Mul", "s hc", "y")]
    pairs = pair(run(model([*parts, *products, *tail], [tensor("w", normal(IN, 3 * OUT))])))
    assert [(p.tensor, p.fan_in, p.fan_out, p.shape) for p in pairs] == [("w", IN, OUT, (IN, OUT))] * 3
    assert len({p.value for p in pairs}) == 3


def test_an_input_with_an_initialiser_of_its_name_is_a_weight():
    """As files before IR version 4 have it."""
    made = model(PRODUCT, [tensor("v", W)], [value("x", (3, IN)), value("v", (IN, OUT))])
    checkpoint = load_proto(made)
    graph = from_onnx(checkpoint.program, checkpoint.arrays)
    assert [i.name for i in graph.inputs] == ["x"]
    (p,) = pair(specialise(graph, (torch.ones(3, IN),)))
    assert p.tensor == "v"


def test_a_kernel_that_is_an_input_is_no_weight():
    made = model([node("MatMul", "x v", "y")], [], [value("x", (3, IN)), value("v", (IN, OUT))])
    assert pair(run(made, normal(3, IN), W)) == ()


def test_statistics_that_an_exporter_merged_with_weights():
    """Fresh running statistics equal fresh scales and shifts, so one tensor serves as both, perhaps behind an Identity."""
    ones, zeros = tensor("g", np.ones(OUT, np.float32)), tensor("b", np.zeros(OUT, np.float32))
    nodes = [
        node("MatMul", "x v", "h"), node("Identity", "g", "var"), node("Identity", "b", "mean"),
        node("BatchNormalization", "h g b mean var", "n"), node("Relu", "n", "y"),
    ]  # fmt: skip
    checkpoint = load_proto(model(nodes, [tensor("v", W), ones, zeros]))
    graph = from_onnx(checkpoint.program, checkpoint.arrays)
    x = torch.from_numpy(normal(8, IN))
    (y,) = Executor(graph).run(x)
    expected = torch.relu(torch.nn.functional.batch_norm(x @ torch.from_numpy(W), None, None, training=True))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert {k: c.kind for k, c in graph.constants.items()} == dict.fromkeys("vgb", "parameter")


def test_statistics_are_no_weights():
    parts = {"g": np.full(OUT, 1.5), "b": np.zeros(OUT), "m": np.ones(OUT), "s": np.full(OUT, 2.0)}
    nodes = [node("MatMul", "x v", "h"), node("BatchNormalization", "h g b m s", "y")]
    graph = run(model(nodes, [tensor("v", W), *(tensor(k, a.astype(np.float32)) for k, a in parts.items())]))
    assert {k: c.kind for k, c in graph.constants.items()} == {
        "v": "parameter", "g": "parameter", "b": "parameter", "m": "buffer", "s": "buffer",
    }  # fmt: skip
    assert [f.path for p in pair(graph) for f in p.feeds] == [("batch_norm", "output")]


def test_an_unknown_operator_leaves_the_rest_to_be_audited():
    nodes = [node("MatMul", "x v", "h"), node("Relu", "h", "r"),
             helper.make_node("Mystery", ["r"], ["u"], "mystery", domain="ai.example"), node("MatMul", "u o", "y")]  # fmt: skip
    made = model(nodes, [tensor("v", W), tensor("o", normal(OUT, 2))])
    made.opset_import.append(helper.make_opsetid("ai.example", 1))
    checkpoint = load_proto(made)
    graph = specialise(from_onnx(checkpoint.program, checkpoint.arrays), (torch.ones(3, IN),))
    assert [p.feeds[0].activation.name for p in pair(graph) if p.tensor == "v"] == ["relu"]
    with torch.no_grad():
        (result,) = Executor(graph).run(torch.ones(3, IN))
    torch.testing.assert_close(result, torch.relu(torch.ones(3, IN) @ torch.from_numpy(W)))


def test_a_value_that_nobody_makes_is_refused():
    graph = helper.make_graph([node("MatMul", "x nowhere", "y")], "g", [value("x", (3, IN))], [value("y")])
    with pytest.raises(UnreadableModel, match="nowhere"):
        from_onnx(helper.make_model(graph), {})
