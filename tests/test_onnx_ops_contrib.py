"""The operators that onnxruntime's optimiser and quantiser write, against onnxruntime running the same node."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from initaudit.onnx_ops.backend import Backend

RANDOM = np.random.default_rng(0)
MICROSOFT = "com.microsoft"


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


def whole(low, high, *shape, kind=np.uint8):
    return RANDOM.integers(low, high, size=shape).astype(kind)


@dataclass(frozen=True)
class Node:
    operator: str
    inputs: tuple
    outputs: int = 1
    domain: str = MICROSOFT
    attributes: dict = field(default_factory=dict)
    label: str = ""
    rtol: float = 1e-4
    used: tuple[int, ...] | None = None

    def __str__(self):
        return f"{self.operator}-{self.label}" if self.label else self.operator


def model_of(node: Node):
    names = [f"x{i}" if value is not None else "" for i, value in enumerate(node.inputs)]
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, node.inputs, strict=True)
        if v is not None
    ]
    used = node.used or tuple(range(node.outputs))
    outputs = [f"y{i}" if i in used else "" for i in range(node.outputs)]
    made = helper.make_node(node.operator, names, outputs, domain=node.domain, **node.attributes)
    results = [helper.make_empty_tensor_value_info(name) for name in outputs if name]
    graph = helper.make_graph([made], "one", inputs, results)
    imports = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    return model, {n: v for n, v in zip(names, node.inputs, strict=True) if v is not None}


def conv_inputs(*more):
    return (normal(2, 4, 7, 6), normal(6, 4, 3, 3), *more)


def angles(length, width):
    place = np.arange(length)[:, None] / 10.0 ** np.linspace(0, 2, width)
    return np.cos(place).astype(np.float32), np.sin(place).astype(np.float32)


QKV = (normal(2, 5, 12), normal(2, 5, 12), normal(2, 5, 12))
PADDING = np.array([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]], np.int32)
GQA = (normal(2, 5, 64), normal(2, 5, 32), normal(2, 5, 32))
LENGTHS = (np.array([4, 4], np.int32), np.array(5, np.int32))
LATER = (np.array([7, 7], np.int32), np.array(8, np.int32))
CONV = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
EMBED = (
    whole(0, 9, 2, 5, kind=np.int32),
    whole(0, 2, 2, 5, kind=np.int32),
    normal(9, 8),
    normal(7, 8),
    normal(2, 8),
    normal(8),
    normal(8),
)

NODES = [
    Node("FusedConv", conv_inputs(normal(6)), attributes=CONV | {"activation": "Relu"}),
    Node("FusedConv", conv_inputs(normal(6), normal(2, 6, 7, 6)), attributes=CONV | {"activation": "Relu"}, label="sum"),
    Node("FusedConv", conv_inputs(), attributes=CONV | {"activation": "LeakyRelu", "activation_params": [0.3]}, label="leaky"),
    Node("FusedConv", conv_inputs(), attributes=CONV | {"activation": "Clip", "activation_params": [-0.5, 1.0]}, label="clip"),
    Node("FusedMatMul", (normal(3, 4), normal(3, 5)), attributes={"transA": 1, "alpha": 0.5}),
    Node("FusedMatMul", (normal(2, 3, 4), normal(2, 5, 4)), attributes={"transB": 1, "alpha": 2.0}, label="batched"),
    Node("FusedMatMul", (normal(2, 3, 4), normal(2, 3, 5)), attributes={"transA": 1}, label="batched-left"),
    Node("FusedMatMul", (normal(3, 2, 4), normal(2, 4, 5)), attributes={"transBatchA": 1}, label="batch-axis"),
    Node(
        "FusedMatMul",
        (normal(3, 2, 4), normal(2, 3, 5)),
        attributes={"transBatchA": 1, "transA": 1},
        label="batch-axis-transposed",
    ),
    Node("FusedGemm", (normal(3, 4), normal(4, 5), normal(5)), attributes={"activation": "Relu", "alpha": 0.5}),
    Node("Gelu", (normal(3, 4),)),
    Node("BiasGelu", (normal(3, 4), normal(4))),
    Node("FastGelu", (normal(3, 4), normal(4))),
    Node("FastGelu", (normal(3, 4),), label="plain"),
    Node("QuickGelu", (normal(3, 4),), attributes={"alpha": 1.5}),
    Node("SimplifiedLayerNormalization", (normal(2, 3, 8), normal(8)), domain="", attributes={"epsilon": 1e-3}),
    Node("SkipLayerNormalization", (normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8), normal(8)), outputs=4, used=(0, 3)),
    Node("SkipLayerNormalization", (normal(2, 3, 8), normal(2, 3, 8), normal(8)), label="plain"),
    Node("SkipSimplifiedLayerNormalization", (normal(2, 3, 8), normal(2, 3, 8), normal(8)), outputs=4, used=(0, 3)),
    Node("SkipSimplifiedLayerNormalization", (normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8)), label="bias"),
    Node("EmbedLayerNormalization", EMBED, outputs=3, used=(0, 2)),
    Node("EmbedLayerNormalization", (*EMBED, PADDING), outputs=2, label="mask"),
    Node("Attention", (normal(2, 5, 8), normal(8, 36), normal(36)), attributes={"num_heads": 3}),
    Node(
        "Attention",
        (normal(2, 5, 8), normal(8, 36), normal(36)),
        attributes={"num_heads": 3, "unidirectional": 1},
        label="causal",
    ),
    Node("Attention", (normal(2, 5, 8), normal(8, 36), normal(36), PADDING), attributes={"num_heads": 3}, label="padding"),
    Node(
        "Attention",
        (normal(2, 5, 8), normal(8, 36), normal(36), np.array([3, 5], np.int32)),
        attributes={"num_heads": 3},
        label="lengths",
    ),
    Node(
        "Attention",
        (normal(2, 5, 8), normal(8, 36), normal(36), None, normal(2, 2, 3, 4, 4)),
        2,
        attributes={"num_heads": 3},
        label="past",
    ),
    Node(
        "Attention",
        (normal(2, 5, 8), normal(8, 36), normal(36), None, None, normal(2, 3, 5, 5)),
        attributes={"num_heads": 3, "scale": 0.3},
        label="bias",
    ),
    Node("MultiHeadAttention", QKV, attributes={"num_heads": 3}),
    Node("MultiHeadAttention", (*QKV, normal(36), PADDING), attributes={"num_heads": 3}, label="bias-padding"),
    Node("MultiHeadAttention", QKV, attributes={"num_heads": 3, "unidirectional": 1, "scale": 0.2}, label="causal"),
    Node("MultiHeadAttention", (*QKV, None, None, normal(2, 3, 5, 5)), attributes={"num_heads": 3}, label="attention-bias"),
    Node(
        "MultiHeadAttention",
        (*QKV, None, None, None, normal(2, 3, 4, 4), normal(2, 3, 4, 4)),
        outputs=3,
        attributes={"num_heads": 3},
        label="past",
    ),
    Node("RotaryEmbedding", (normal(2, 5, 16), np.array([2]), *angles(9, 4)), attributes={"num_heads": 2}),
    Node(
        "RotaryEmbedding",
        (normal(2, 3, 5, 8), whole(0, 9, 2, 5, kind=np.int64), *angles(9, 4)),
        attributes={"interleaved": 1},
        label="apart",
    ),
    Node("GroupQueryAttention", (*GQA, None, None, *LENGTHS), 3, attributes={"num_heads": 4, "kv_num_heads": 2}),
    Node(
        "GroupQueryAttention",
        (*GQA, None, None, *LENGTHS, *angles(9, 8)),
        3,
        attributes={"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1, "local_window_size": 3},
        label="rotary-window",
    ),
    Node(
        "GroupQueryAttention",
        (normal(2, 1, 64), normal(2, 1, 32), normal(2, 1, 32), normal(2, 2, 7, 16), normal(2, 2, 7, 16), *LATER, *angles(9, 8)),
        3,
        attributes={"num_heads": 4, "kv_num_heads": 2, "do_rotary": 1},
        label="past",
    ),
    Node(
        "MatMulNBits",
        (normal(3, 64), whole(0, 256, 5, 2, 16), normal(5, 2)),
        attributes={"K": 64, "N": 5, "block_size": 32, "bits": 4},
    ),
    Node(
        "MatMulNBits",
        (normal(3, 80), whole(0, 256, 5, 3, 16), normal(5, 3), whole(0, 256, 5, 2)),
        attributes={"K": 80, "N": 5, "block_size": 32, "bits": 4},
        label="zero-points",
    ),
    Node("QuantizeLinear", (normal(3, 4), np.array(0.02, np.float32), np.array(100, np.uint8)), domain=""),
    Node(
        "QuantizeLinear",
        (normal(3, 4), np.array([0.1, 0.02, 0.01], np.float32)),
        domain="",
        attributes={"axis": 0, "output_dtype": TensorProto.INT8},
        label="axis",
    ),
    Node(
        "DequantizeLinear",
        (whole(0, 256, 3, 4), np.array([0.1, 0.2, 0.3], np.float32), np.array([1, 2, 3], np.uint8)),
        domain="",
        attributes={"axis": 0},
    ),
    Node(
        "DequantizeLinear",
        (whole(-99, 99, 4, 6, kind=np.int8), normal(2, 6)),
        domain="",
        attributes={"axis": 0, "block_size": 2},
        label="blocks",
    ),
    Node("DynamicQuantizeLinear", (normal(3, 4),), 3, domain=""),
    Node(
        "MatMulInteger", (whole(0, 256, 3, 4), whole(0, 256, 4, 5), np.array(12, np.uint8), np.array(13, np.uint8)), domain=""
    ),
    Node(
        "MatMulInteger",
        (whole(0, 256, 3, 4), whole(-128, 128, 4, 5, kind=np.int8), np.array(9, np.uint8), whole(0, 5, 5, kind=np.int8)),
        domain="",
        label="columns",
    ),
    Node(
        "ConvInteger",
        (whole(0, 256, 2, 4, 6, 6), whole(0, 256, 6, 2, 3, 3), np.array(12, np.uint8)),
        domain="",
        attributes={"group": 2, "pads": [1, 0, 1, 2]},
    ),
    Node(
        "QLinearMatMul",
        (
            whole(0, 256, 3, 4),
            np.array(0.02, np.float32),
            np.array(120, np.uint8),
            whole(0, 256, 4, 5),
            np.array(0.03, np.float32),
            np.array(110, np.uint8),
            np.array(0.9, np.float32),
            np.array(128, np.uint8),
        ),
        domain="",
    ),
    Node(
        "QLinearConv",
        (
            whole(0, 256, 2, 4, 6, 6),
            np.array(0.02, np.float32),
            np.array(120, np.uint8),
            whole(-99, 99, 6, 4, 3, 3, kind=np.int8),
            np.linspace(0.01, 0.05, 6).astype(np.float32),
            np.zeros(6, np.int8),
            np.array(0.9, np.float32),
            np.array(128, np.uint8),
            whole(-500, 500, 6, kind=np.int32),
        ),
        domain="",
        attributes={"strides": [2, 1]},
    ),
]


@pytest.mark.parametrize("node", NODES, ids=str)
def test_a_node_agrees_with_onnxruntime(node):
    model, feeds = model_of(node)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    expected = session.run(None, feeds)
    actual = Backend.run_model(model, list(feeds.values()))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype
        if a.dtype.kind in "iu":
            # A product that falls on a half between two integers may be rounded either way.
            assert np.abs(a.astype(int) - e.astype(int)).max() <= (1 if node.operator.startswith("QLinear") else 0)
        np.testing.assert_allclose(a, e, rtol=node.rtol, atol=1 if a.dtype.kind in "iu" else 2e-5)


def saved_by_onnxruntime(model, path, level):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(path), session


def exported(module, inputs, path):
    module.eval()
    program = torch.onnx.export(module, inputs, dynamo=True, verbose=False)
    program.save(path)
    return onnx.load(path)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, 32), torch.nn.Linear(32, 8)
        self.first, self.second = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)

    def forward(self, x):
        x = self.first(x + 0.5 * x)
        return self.second(x + self.down(torch.nn.functional.gelu(self.up(x))))


class Image(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3), torch.nn.LeakyReLU(0.2)
        )

    def forward(self, x):
        return self.layers(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("module", "shape", "fused"),
    [(Block, (2, 5, 8), {"BiasGelu", "SkipLayerNormalization"}), (Image, (1, 3, 9, 9), {"FusedConv"})],
    ids=["transformer", "convolution"],
)
def test_files_that_onnxruntime_optimised_run(module, shape, fused, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(shape)
    network = module()
    model = exported(network, (x,), tmp_path / "plain.onnx")
    optimised, session = saved_by_onnxruntime(
        model, tmp_path / "optimised.onnx", onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    )
    assert {node.op_type for node in optimised.graph.node if node.domain == MICROSOFT} & fused
    (actual,) = Backend.run_model(optimised, [x.numpy()])
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)
