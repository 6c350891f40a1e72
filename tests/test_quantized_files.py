"""Files that onnxruntime's quantisers and its optimiser wrote of our own networks.

Judges: onnxruntime running the same file for outputs and dequantised weights, the audit of the file before for all else.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper, version_converter
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn
from zoo import EXPORTERS, Recurrent, ResNet, quiet

import initaudit
from initaudit.graph.execute import Executor, specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.load import load, load_proto

CPU = ["CPUExecutionProvider"]


@pytest.fixture(scope="module", autouse=True)
def _silence():
    """The quantisers log through the root logger, and onnxruntime warns about what it cannot fuse."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    onnxruntime.set_default_logger_severity(4)
    yield
    onnxruntime.set_default_logger_severity(2)
    logging.disable(before)


def drawn(module: nn.Module, scale: float = 1.0) -> nn.Module:
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(m.weight).data.mul_(scale)
            nn.init.zeros_(m.bias)
    return module


def mlp(scale: float = 1.0) -> nn.Module:
    """Twelve layers; drawn at 0.4 of He's standard deviation it vanishes."""
    widths = [32] + [64] * 12
    layers = [part for i in widths[:-1] for part in (nn.Linear(i, 64), nn.ReLU())]
    return drawn(nn.Sequential(*layers, nn.Linear(64, 10)), scale)


def convolutions() -> nn.Module:
    """A kernel of every kind; the activations are those that the quantiser has integer versions of."""
    return drawn(
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.LeakyReLU(0.1),
            nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Sigmoid(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )
    )  # fmt: skip


class Branches(nn.Module):
    """A sum and a concatenation of quantised branches."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
            nn.Conv2d(16, 16, 3, padding=1),
        )
        self.head = nn.Linear(32, 10)
        drawn(self)

    def forward(self, x):
        x = F.relu(self.a(x))
        return self.head(torch.cat([F.relu(x + self.c(F.relu(self.b(x)))), x], 1).mean((2, 3)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(200, 64), nn.Linear(64, 5)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0, norm_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        nn.init.normal_(self.table.weight, 0, 0.02)
        for p in self.layers.parameters():  # they start as copies of one another
            if p.dim() > 1:
                nn.init.xavier_uniform_(p)

    def forward(self, ids):
        return self.head(self.layers(self.table(ids)).mean(1))


NETWORKS = {
    "mlp": (mlp, lambda: torch.randn(8, 32)),
    "vanishing": (lambda: mlp(0.4), lambda: torch.randn(8, 32)),
    "convolutions": (convolutions, lambda: torch.randn(8, 3, 16, 16)),
    "branches": (Branches, lambda: torch.randn(8, 3, 16, 16)),
    "encoder": (Encoder, lambda: torch.randint(0, 200, (4, 9))),
    "recurrent": (lambda: Recurrent("LSTM", bidirectional=True), lambda: torch.randn(3, 7, 6)),
    "folded": (ResNet, lambda: torch.randn(4, 3, 16, 16)),
}


class Reader(CalibrationDataReader):
    def __init__(self, name: str, make) -> None:
        self.batches = iter([{name: make().numpy()} for _ in range(4)])

    def get_next(self):
        return next(self.batches, None)


def static(format: QuantFormat, per_channel: bool):
    def quantize(source: Path, target: Path, name: str, make) -> None:
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8 if per_channel else QuantType.QUInt8}
        quantize_static(source, target, Reader(name, make), quant_format=format, per_channel=per_channel, **types)

    return quantize


def dynamic(kind: QuantType, per_channel: bool):
    def quantize(source: Path, target: Path, name: str, make) -> None:
        quantize_dynamic(source, target, weight_type=kind, per_channel=per_channel)

    return quantize


def blocks(bits: int, symmetric: bool, operators=("MatMul",)):
    def quantize(source: Path, target: Path, name: str, make) -> None:
        model = onnx.load(source)
        if "Gather" in operators:  # its table becomes 4-bit integers, which came with opset 21
            model = version_converter.convert_version(model, 21)
            model.ir_version = 10
        made = MatMulNBitsQuantizer(model, bits=bits, block_size=32, is_symmetric=symmetric, op_types_to_quantize=operators)
        made.process()
        made.model.save_model_to_file(str(target), False)

    return quantize


WAYS = {
    "dynamic": dynamic(QuantType.QUInt8, False),
    "dynamic-channels": dynamic(QuantType.QInt8, True),
    "qdq": static(QuantFormat.QDQ, False),
    "qdq-channels": static(QuantFormat.QDQ, True),
    "integers": static(QuantFormat.QOperator, False),
    "4 bits": blocks(4, True),
    "4 bits-points": blocks(4, False, ("MatMul", "Gather")),
    "8 bits": blocks(8, True),
}
OPTIMISED = " optimised"
# network, way, the operators of the file that this case is about
CASES = [
    ("mlp", "dynamic", {"MatMulInteger", "DynamicQuantizeLinear"}),
    ("mlp", "dynamic-channels" + OPTIMISED, {"DynamicQuantizeMatMul"}),
    ("vanishing", "dynamic", {"MatMulInteger"}),
    ("vanishing", "qdq-channels", {"QuantizeLinear", "DequantizeLinear"}),
    ("vanishing", "integers", {"QGemm"}),
    ("convolutions", "dynamic-channels", {"ConvInteger"}),
    ("convolutions", "qdq", {"QuantizeLinear", "DequantizeLinear"}),
    ("convolutions", "qdq-channels" + OPTIMISED, {"QLinearConv", "QLinearLeakyRelu", "QLinearSigmoid"}),
    ("branches", "qdq-channels" + OPTIMISED, {"QLinearConv", "QLinearAdd", "QLinearConcat", "QGemm"}),
    ("encoder", "dynamic" + OPTIMISED, {"DynamicQuantizeMatMul", "DequantizeLinear"}),
    ("encoder", "integers", {"QLinearMatMul", "QLinearAdd", "QLinearMul", "QLinearSoftmax", "QGemm"}),
    ("encoder", "4 bits", {"MatMulNBits"}),
    ("encoder", "4 bits-points", {"MatMulNBits", "GatherBlockQuantized"}),
    ("encoder", "8 bits", {"MatMulNBits"}),
    ("recurrent", "dynamic", {"DynamicQuantizeLSTM"}),
    ("folded", "dynamic", {"ConvInteger"}),
    ("folded", "qdq-channels", {"DequantizeLinear"}),
]  # fmt: skip


@functools.cache
def floating(name: str) -> tuple[onnx.ModelProto, torch.Tensor, initaudit.auditing.run.Audit]:
    """The file before quantisation, an input, and its audit."""
    make, inputs = NETWORKS[name]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        x = inputs()
        model = EXPORTERS["legacy"](make(), (x,))
    return model, x, initaudit.audit(model)


def quantised(name: str, way: str, folder: Path) -> Path:
    model, _, _ = floating(name)
    onnx.save(model, folder / "float.onnx")
    path = folder / "quantised.onnx"
    with torch.random.fork_rng(devices=[]), quiet():
        WAYS[way.removesuffix(OPTIMISED)](folder / "float.onnx", path, model.graph.input[0].name, NETWORKS[name][1])
    if way.endswith(OPTIMISED):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / "optimised.onnx")
        onnxruntime.InferenceSession(path, options, providers=CPU)
        path = folder / "optimised.onnx"
    return path


def codes(audit) -> list[tuple[str, str]]:
    return sorted((f.code, f.severity) for f in audit.findings)


@pytest.mark.parametrize(("name", "way", "operators"), CASES, ids=lambda v: v.replace(" ", "-") if isinstance(v, str) else "")
def test_a_quantised_file_is_audited_like_the_one_before(name, way, operators, tmp_path):
    _, x, before = floating(name)
    path = quantised(name, way, tmp_path)
    model = onnx.load(path)
    assert operators <= {n.op_type for n in model.graph.node}
    after = initaudit.audit(path)
    assert (after.verdict, after.report.phase, codes(after)) == (before.verdict, before.report.phase, codes(before))
    assert after.risk, "a floating-point path exists, so the probe runs"
    (note,) = [n for n in after.report.notes if n.startswith("quantised")]
    assert "more" not in note

    # The same weights at the same places with the same fans and nearly the same spread; those stored as integers say so.
    def kind(layer):
        return layer.operator, layer.role, layer.fan_in, layer.fan_out, layer.groups

    def place(layer):  # parallel branches may be written in another order
        return *kind(layer), layer.observed["variance"]

    for a, b in zip(sorted(after.layers, key=place), sorted(before.layers, key=place), strict=True):
        assert kind(a) == kind(b)
        assert [v.name for v in a.activations] == [v.name for v in b.activations]
        # Steps of 1/15 of a block's range add a twelfth of their square to the variance.
        assert a.observed["variance"] == pytest.approx(b.observed["variance"], rel=0.1 if "4 bits" in way else 0.01)
    packed = [layer for layer in after.layers if any("dequantized from" in p for p in layer.provenance)]
    # In blocks only products without a bias of their own are quantised, an LSTM is one weight more than its head.
    assert len(packed) >= (6 if "bits" in way else len(after.layers) - 1)
    if name == "folded":
        return  # its norms are put back: what onnxruntime computes is another thing
    checkpoint = load(path)
    graph = specialise(from_onnx(checkpoint.program, checkpoint.arrays), (x,))
    with torch.no_grad():
        (y,) = Executor(graph).run(x)
    session = onnxruntime.InferenceSession(path, providers=CPU)
    (expected,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.abs(y.numpy() - expected).mean() < 0.25 * expected.std()


# ---------------------------------------------------------------- dequantised weights, exactly

RANDOM = np.random.default_rng(0)


def whole(high: int, *shape: int) -> np.ndarray:
    return RANDOM.integers(0, high, shape).astype(np.uint8)


def normal(*shape: int) -> np.ndarray:
    return RANDOM.normal(size=shape).astype(np.float32)


def one(op: str, given: np.ndarray, attributes: dict, domain: str = "com.microsoft", first: bool = True, **tensors):
    """A node that reads x and the tensors; its own input stands at the front, else behind the first tensor."""
    names = list(tensors)
    inputs = ["x", *names] if first else [names[0], "x", *names[1:]]
    node = helper.make_node(op, inputs, ["y"], domain=domain, **attributes)
    kind = helper.np_dtype_to_tensor_dtype(given.dtype)
    values = [helper.make_tensor_value_info("x", kind, given.shape)], [helper.make_tensor_value_info("y", 1, None)]
    held = [numpy_helper.from_array(v, k) for k, v in tensors.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(helper.make_graph([node], "g", *values, held), opset_imports=opsets, ir_version=10)


def four(*shape: int, signed: bool = False) -> np.ndarray:
    values = RANDOM.integers(0, 16, shape)
    return (values - 8).astype(np.int8).astype(ml_dtypes.int4) if signed else values.astype(np.uint8).astype(ml_dtypes.uint4)


ROWS = np.arange(8)
TABLE = {"block_size": 32, "quantize_axis": 1, "gather_axis": 0}
NBITS = {"K": 64, "N": 5, "block_size": 32}
IDENTITY = np.eye(64, dtype=np.float32)
EXACT = {
    "table": one("GatherBlockQuantized", ROWS, TABLE, first=False, w=four(8, 64), s=normal(8, 2), z=four(8, 2)),
    "table-signed": one("GatherBlockQuantized", ROWS, TABLE, first=False, w=four(8, 64, signed=True), s=normal(8, 2)),
    "table-bytes": one("GatherBlockQuantized", ROWS, TABLE | {"bits": 4}, first=False, w=whole(256, 8, 32), s=normal(8, 2)),
    "table-bytes-points": one(
        "GatherBlockQuantized", ROWS, TABLE | {"bits": 4}, first=False, w=whole(256, 8, 32), s=normal(8, 2), z=whole(256, 8, 1)
    ),
    "table-8-bits": one("GatherBlockQuantized", ROWS, TABLE | {"bits": 8}, first=False, w=whole(256, 8, 64), s=normal(8, 2)),
    "product-4-bits": one("MatMulNBits", IDENTITY, NBITS | {"bits": 4}, w=whole(256, 5, 2, 16), s=normal(5, 2)),
    "product-points": one(
        "MatMulNBits", IDENTITY, NBITS | {"bits": 4}, w=whole(256, 5, 2, 16), s=normal(5, 2), z=whole(256, 5, 1)
    ),
    "product-8-bits": one("MatMulNBits", IDENTITY, NBITS | {"bits": 8}, w=whole(256, 5, 2, 32), s=normal(5, 2)),
}


@pytest.mark.parametrize("name", EXACT)
def test_dequantised_weights_are_those_of_onnxruntime(name):
    model = EXACT[name]
    given = IDENTITY if name.startswith("product") else ROWS
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=CPU)
    (expected,) = session.run(None, {"x": given})
    array = load_proto(model).arrays["w"]
    assert array.quantized
    np.testing.assert_allclose(array.read(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["convolutions", "encoder"])
def test_weights_behind_dequantise_are_those_of_onnxruntime(name, tmp_path):
    """Every weight behind a DequantizeLinear, which onnxruntime is asked for as an output."""
    path = quantised(name, "qdq-channels", tmp_path)
    model = onnx.load(path)
    constants = {t.name for t in model.graph.initializer}
    wanted = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants}
    checkpoint = load_proto(model)
    for output in wanted:
        model.graph.output.append(helper.make_empty_tensor_value_info(output))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=CPU)
    x = floating(name)[1]
    found = session.run(list(wanted), {session.get_inputs()[0].name: x.numpy()})
    assert len(found) >= 5
    for (_, source), expected in zip(wanted.items(), found, strict=True):
        np.testing.assert_allclose(checkpoint.arrays[source].read(), expected, rtol=1e-6)


def test_where_the_graph_does_not_tell_a_scale_the_probe_says_so():
    """An integer product whose result nobody scales back."""
    tensors = [numpy_helper.from_array(whole(256, 4, 5), "w")]
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"], "product")
    ends = [helper.make_tensor_value_info("x", TensorProto.UINT8, [3, 4])], [helper.make_tensor_value_info("y", 6, None)]
    model = helper.make_model(helper.make_graph([node], "g", *ends, tensors), opset_imports=[helper.make_opsetid("", 21)])
    audit = initaudit.audit(model)
    assert not audit.risk
    assert any(f.code == "IA004" and "integers" in f.message for f in audit.findings)
    assert audit.verdict == "pass"
