"""Graphs written as other exporters write them, drawn as their frameworks draw: paired, judged, and no alarm.

Judges: onnxruntime for what the graph computes; the weights, axes and fans that each graph was written with.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper, numpy_helper

import initaudit
from initaudit.graph.execute import Executor, specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.load import load_proto
from initaudit.pair.pair import pair

FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


class Writer:
    """A graph node by node; a constant is written where it is first read."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, domain: str = "", outputs: int = 1, **attributes) -> str:
        names = [f"{kind}_{len(self.nodes)}:{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, f"{kind}_{len(self.nodes)}", domain=domain, **attributes))
        return names[0]

    def hold(self, name: str, value) -> str:
        held = np.asarray(value)
        self.tensors.append(numpy_helper.from_array(held.astype(np.float32) if held.dtype == float else held, name))
        return name

    def glorot(self, *shape: int, fans: tuple[int, int]) -> np.ndarray:
        limit = np.sqrt(6 / sum(fans))
        return self.rng.uniform(-limit, limit, shape)

    def orthogonal(self, rows: int, columns: int) -> np.ndarray:
        q, r = np.linalg.qr(self.rng.normal(size=(max(rows, columns), min(rows, columns))))
        q = q * np.sign(np.diag(r))
        return q if rows >= columns else q.T

    def model(self, shape, output: str, opset: int = 15, domains=(), kind: int = FLOAT) -> onnx.ModelProto:
        ends = [helper.make_tensor_value_info("input", kind, shape)], [helper.make_empty_tensor_value_info(output)]
        opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 3) for d in domains)]
        return helper.make_model(helper.make_graph(self.nodes, "g", *ends, self.tensors), opset_imports=opsets, ir_version=8)


def keras_cnn(opset: int) -> onnx.ModelProto:
    """tf2onnx: channels last at the ends, transposed around convolutions; Glorot's weights and zero biases."""
    w, value, i = Writer(), "input", 3
    value = w.op("Transpose", value, perm=[0, 3, 1, 2])
    for n, o in enumerate((16, 32, 32)):
        kernel = w.hold(f"conv{n}/Conv2D/ReadVariableOp:0", w.glorot(o, i, 3, 3, fans=(9 * i, 9 * o)))
        bias = w.hold(f"conv{n}/bias:0", np.zeros(o))
        value = w.op("Conv", value, kernel, bias, auto_pad="SAME_UPPER", kernel_shape=[3, 3], strides=[1, 1])
        value = w.op("MaxPool", w.op("Relu", value), kernel_shape=[2, 2], strides=[2, 2], auto_pad="VALID")
        i = o
    value = w.op("Transpose", value, perm=[0, 2, 3, 1])
    value = w.op("Reshape", value, w.hold("flatten/const:0", np.array([-1, 512])))
    for n, (a, b) in enumerate(((512, 64), (64, 10))):
        value = w.op("MatMul", value, w.hold(f"dense{n}/MatMul/ReadVariableOp:0", w.glorot(a, b, fans=(a, b))))
        value = w.op("Add", value, w.hold(f"dense{n}/bias:0", np.zeros(b)))
        value = w.op("Softmax" if n else "Relu", value, **({"axis": -1} if n else {}))
    return w.model(["batch", 32, 32, 3], value, opset)


def keras_lstm(opset: int) -> onnx.ModelProto:
    """tf2onnx: time first, gates i o f c, orthogonal recurrent weights, a forget gate that starts open."""
    w, hidden = Writer(), 32
    value = w.op("Transpose", "input", perm=[1, 0, 2])
    kernels = [w.glorot(hidden, 16, fans=(16, 4 * hidden)) for _ in range(4)]
    recurrent = w.orthogonal(hidden, 4 * hidden)
    gates = [recurrent[:, g * hidden : (g + 1) * hidden].T for g in range(4)]
    bias = np.zeros((1, 8 * hidden))
    bias[:, 2 * hidden : 3 * hidden] = 1
    names = (
        w.hold("lstm/W", np.concatenate(kernels)[None]),
        w.hold("lstm/R", np.concatenate(gates)[None]),
        w.hold("lstm/B", bias),
    )
    value = w.op(
        "LSTM", value, *names, outputs=2, hidden_size=hidden, direction="forward", activations=["Sigmoid", "Tanh", "Tanh"]
    )
    last = w.nodes[-1].output[1]
    axes = {"axes": [0]} if opset < 13 else {}
    value = w.op("Squeeze", last, *([] if axes else [w.hold("axes", np.array([0]))]), **axes)
    value = w.op("MatMul", value, w.hold("dense/kernel", w.glorot(hidden, 4, fans=(hidden, 4))))
    return w.model(["batch", 12, 16], w.op("Add", value, w.hold("dense/bias", np.zeros(4))), opset)


def caffe2_style(opset: int) -> onnx.ModelProto:
    """Old files: Gemm that broadcasts by attribute, Dropout and batch norm that say they test, Reshape by attribute."""
    w, value = Writer(), "input"
    old = {"broadcast": 1} if opset < 7 else {}
    kernel = w.rng.normal(size=(16, 3, 3, 3)) * np.sqrt(2 / 27)
    value = w.op("Conv", value, w.hold("w0", kernel), w.hold("b0", np.zeros(16)), kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    parts = {"s": np.ones(16), "c": np.zeros(16), "m": np.zeros(16), "v": np.ones(16)}
    names = [w.hold(k, v) for k, v in parts.items()]
    value = w.op("BatchNormalization", value, *names, **({"is_test": 1} if opset < 7 else {}), epsilon=1e-5)
    value = w.op("AveragePool", w.op("Relu", value), kernel_shape=[4, 4], strides=[4, 4])
    value = w.op("Flatten", value, axis=1)
    for n, (a, b) in enumerate(((64, 48), (48, 5))):
        held = w.hold(f"fc{n}", w.rng.normal(size=(b, a)) * np.sqrt(2 / a)), w.hold(f"fb{n}", np.zeros(b))
        value = w.op("Gemm", value, *held, transB=1, **old)
        if not n:
            options = {"ratio": 0.5} if opset < 12 else {}
            value = w.op("Dropout", w.op("Relu", value), **options, **({"is_test": 1} if opset < 7 else {}))
    return w.model([4, 3, 8, 8], value, opset)


def paddle_mobile(opset: int) -> onnx.ModelProto:
    """paddle2onnx: depthwise kernels, biases added behind, a hard swish written out, a product behind a reshape."""
    w, value, i = Writer(), "input", 3
    for n, (o, group) in enumerate(((16, 1), (16, 16), (32, 1))):
        kernel = w.rng.normal(size=(o, i // group, 3, 3)) * np.sqrt(2 / (9 * i // group))
        value = w.op("Conv", value, w.hold(f"conv2d_{n}.w_0", kernel), kernel_shape=[3, 3], pads=[1, 1, 1, 1], group=group)
        bias = w.op("Reshape", w.hold(f"conv2d_{n}.b_0", np.zeros(o)), w.hold(f"shape_{n}", np.array([1, o, 1, 1])))
        value = w.op("Add", value, bias)
        gate = w.op("Clip", w.op("Add", value, w.hold(f"three_{n}", np.float32(3))), w.hold(f"zero_{n}", np.float32(0)),
                    w.hold(f"six_{n}", np.float32(6)))  # fmt: skip
        value = w.op("Div", w.op("Mul", value, gate), w.hold(f"sixth_{n}", np.float32(6)))
        i = o
    value = w.op("Reshape", w.op("GlobalAveragePool", value), w.hold("flat", np.array([0, -1])))
    value = w.op("MatMul", value, w.hold("linear_0.w_0", w.glorot(32, 10, fans=(32, 10))))
    return w.model(["batch", 3, 16, 16], w.op("Add", value, w.hold("linear_0.b_0", np.zeros(10))), opset)


# what reads like (fan in, fan out, activation) for every weight, in order
CNN = [(27, 144, "relu"), (144, 288, "relu"), (288, 288, "relu"), (512, 64, "relu"), (64, 10, "softmax")]
GRAPHS = {
    "keras cnn": (keras_cnn, (11, 13, 17, 21), CNN),
    "keras lstm": (keras_lstm, (9, 13, 21), [(16, 32, None), (32, 32, None), (32, 4, "linear")]),
    "caffe2": (caffe2_style, (6, 9, 12, 15), [(27, 144, "relu"), (64, 48, "relu"), (48, 5, "linear")]),
    "paddle": (
        paddle_mobile,
        (13, 17),
        [(27, 144, "hardswish"), (9, 9, "hardswish"), (144, 288, "hardswish"), (32, 10, "linear")],
    ),
}
CASES = [(name, opset) for name, (_, opsets, _) in GRAPHS.items() for opset in opsets]


@pytest.mark.parametrize(("name", "opset"), CASES)
def test_a_graph_in_the_style_of_another_exporter(name, opset):
    make, _, expected = GRAPHS[name]
    model = make(opset)
    shape = [d.dim_value or 2 for d in model.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    checkpoint = load_proto(model)
    assert checkpoint.problems == ()
    graph = specialise(from_onnx(checkpoint.program, checkpoint.arrays), (torch.from_numpy(x),))
    assert graph.notes == ()
    # Fresh statistics are replaced by those of the batch, and onnxruntime knows no opset before 7.
    if name != "caffe2":
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            (y,) = Executor(graph).run(torch.from_numpy(x))
        np.testing.assert_allclose(y.numpy(), session.run(None, {"input": x})[0], rtol=1e-4, atol=1e-5)
    found = [(p.fan_in, p.fan_out, p.feeds[0].activation.name if p.role != "recurrent" else None) for p in pair(graph)]
    assert found == expected
    audit = initaudit.audit(model)
    assert audit.verdict == "pass", [(f.code, f.message) for f in audit.findings]
    assert audit.report.phase == "init"
    assert audit.risk


def test_classical_machine_learning_around_a_network():
    """skl2onnx: a scaler in front and labels behind are not known; what lies between is audited."""
    w = Writer()
    value = w.op("Scaler", "input", domain="ai.onnx.ml", offset=[0.0] * 16, scale=[1.0] * 16)
    for n, (a, b) in enumerate(((16, 32), (32, 32), (32, 3))):
        value = w.op("MatMul", value, w.hold(f"coefficient{n}", w.glorot(a, b, fans=(a, b))))
        value = w.op("Add", value, w.hold(f"intercepts{n}", w.glorot(1, b, fans=(a, b))))
        value = w.op("Softmax" if n == 2 else "Relu", value)
    best = w.op("ArgMax", value, axis=1, keepdims=1)
    label = w.op("ArrayFeatureExtractor", w.hold("classes", np.arange(3)), best, domain="ai.onnx.ml")
    model = w.model(["batch", 16], w.op("Cast", label, to=INT64), 15, ["ai.onnx.ml"])
    audit = initaudit.audit(model)
    assert audit.verdict == "pass"
    unknown = {f.code: f.severity for f in audit.findings}
    assert unknown["IA002"] == "info"
    assert {layer.tensor for layer in audit.layers} <= {"coefficient0", "coefficient1", "coefficient2"}
    assert len(audit.layers) == 3
    assert [layer.observed["variance"] for layer in audit.layers] == pytest.approx([2 / 48, 2 / 64, 2 / 35], rel=0.2)


def test_an_operator_that_is_not_known_cuts_no_gradient_off():
    """What lies on either side of it gets none in the probe; nobody says that it never will."""
    w, value = Writer(), "input"
    for n in range(4):
        value = w.op("MatMul", value, w.hold(f"w{n}", w.rng.normal(size=(16, 16)) * np.sqrt(2 / 16)))
        value = w.op("Relu", w.op("Add", value, w.hold(f"b{n}", np.zeros(16))))
        if n == 1:
            value = w.op("Mystery", value, domain="ai.example")
    audit = initaudit.audit(w.model(["batch", 16], value, 17, ["ai.example"]))
    codes = {f.code: f.severity for f in audit.findings}
    assert audit.verdict == "pass"
    assert codes["IA002"] == "info"
    assert "IA311" not in codes
    assert [layer.tensor for layer in audit.layers] == ["w0", "w1", "w2", "w3"]
