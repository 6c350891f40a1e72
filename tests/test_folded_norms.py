"""Batch norms that exporters fold into weights: no init rule judges what is left, and fresh ones are put back.

Judge: the module itself, whose norms are there to be seen.
"""

from __future__ import annotations

import copy
import functools

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import helper, numpy_helper
from torch import nn
from zoo import EXPORTERS, Block, quiet

import initaudit
from initaudit.graph.execute import Executor, specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.graph.onnx_folded import folded_norms
from initaudit.load import load_proto

DRAWN = ("IA101", "IA102", "IA103", "IA104", "IA105", "IA106", "IA109", "IA110", "IA201", "IA301", "IA302", "IA303", "IA304")


def plain(bias: bool = False) -> nn.Module:
    """As deep as a VGG-19, with the framework's own init: without its norms it would vanish."""
    layers: list[nn.Module] = []
    for i in (3, *(16,) * 16):
        layers += [nn.Conv2d(i, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


class Inverted(nn.Module):
    """Inverted residuals with depthwise kernels, drawn as MobileNet draws them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = self.norm(nn.Conv2d(3, 16, 3, 2, 1, bias=False)), nn.Linear(16, 10)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *self.norm(nn.Conv2d(16, 64, 1, bias=False)), nn.Hardswish(),
                *self.norm(nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False)), nn.Hardswish(),
                *self.norm(nn.Conv2d(64, 16, 1, bias=False)),
            )
            for _ in range(4)
        )  # fmt: skip
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    @staticmethod
    def norm(conv: nn.Conv2d) -> nn.Sequential:
        return nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels))

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.fc(x.mean((2, 3)))


class Residual(nn.Module):
    """The last norm of every branch starts at zero, so that folding leaves nothing of its kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.layers, self.fc = nn.Sequential(Block(16, 16), Block(16, 32, 2), Block(32, 32)), nn.Linear(32, 10)
        for m in self.modules():
            if isinstance(m, Block):
                nn.init.zeros_(m.bn2.weight)

    def forward(self, x):
        return self.fc(F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1).flatten(1))


def dense() -> nn.Module:
    layers: list[nn.Module] = []
    for i in (12, *(32,) * 14):
        layers += [nn.Linear(i, 32), nn.BatchNorm1d(32), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(32, 10))


NETWORKS = {"plain": plain, "plain-bias": lambda: plain(True), "inverted": Inverted, "residual": Residual, "dense": dense}
# The newer exporter takes seconds a network.
FRESH = [
    *((n, "legacy") for n in NETWORKS if n != "plain-bias"),
    ("plain-bias", "dynamo_optimized"),
    ("dense", "dynamo_optimized"),
]
MOVED = [*((n, "legacy") for n in ("plain-bias", "residual")), ("inverted", "dynamo_optimized")]


def example(name: str) -> torch.Tensor:
    return torch.randn(8, 12) if name == "dense" else torch.randn(8, 3, 12, 12)


@functools.cache
def network(name: str, trained: bool) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, x, labels = NETWORKS[name](), example(name), torch.arange(8)
        optimizer = torch.optim.Adam(module.parameters(), 3e-3)
        for _ in range(25 if trained else 0):
            optimizer.zero_grad()
            F.cross_entropy(module(x + 0.3 * torch.randn_like(x)), labels).backward()
            optimizer.step()
    return module


@functools.cache
def folded(name: str, exporter: str, trained: bool) -> onnx.ModelProto:
    with torch.random.fork_rng(devices=[]), quiet():
        return EXPORTERS[exporter](copy.deepcopy(network(name, trained)), (example(name),))


def codes(audit: initaudit.auditing.run.Audit) -> set[str]:
    return {f.code for f in audit.findings if f.severity != "info" or f.code in DRAWN}


@pytest.mark.parametrize(("name", "exporter"), FRESH)
def test_a_fresh_norm_is_put_back(name, exporter):
    module = network(name, False)
    model = folded(name, exporter, False)
    visible = sum(n.op_type == "BatchNormalization" for n in model.graph.node)
    assert bool(visible) == (name == "dense" and exporter == "legacy")
    of_module, of_file = initaudit.audit(module, (example(name),)), initaudit.audit(model)
    assert (of_file.verdict, of_file.report.phase, codes(of_file)) == ("pass", "init", set())
    assert (of_module.verdict, of_module.report.phase, codes(of_module)) == ("pass", "init", set())
    if not visible:
        assert any("batch norm folded" in note and "put back" in note for note in of_file.report.notes)
    # What the graph computes is what the module computes in training.
    checkpoint, x = load_proto(model), example(name)
    (y,) = Executor(specialise(from_onnx(checkpoint.program, checkpoint.arrays), (x,))).run(x)
    torch.testing.assert_close(y, copy.deepcopy(module).train()(x), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(("name", "exporter"), MOVED)
def test_what_a_norm_has_learnt_is_left_alone(name, exporter):
    module, model = network(name, True), folded(name, exporter, True)
    audit = initaudit.audit(model)
    assert (audit.verdict, audit.report.phase, codes(audit)) == ("pass", "trained", set())
    assert any("batch norm folded" in note and "has learnt" in note for note in audit.report.notes)
    checkpoint, x = load_proto(model), example(name)
    (y,) = Executor(specialise(from_onnx(checkpoint.program, checkpoint.arrays), (x,))).run(x)
    torch.testing.assert_close(y, copy.deepcopy(module).eval()(x), rtol=1e-3, atol=1e-4)


def test_statistics_that_data_moved_before_any_training():
    """Calibrated norms: nothing is trained, so training will use the statistics of the batch, folded away or not."""
    module = copy.deepcopy(network("dense", False)).train()
    with torch.no_grad():
        for _ in range(3):
            module(example("dense"))
    with quiet():
        model = EXPORTERS["legacy"](copy.deepcopy(module), (example("dense"),))
    for audit in (initaudit.audit(model), initaudit.audit(module.eval(), (example("dense"),))):
        assert (audit.verdict, audit.report.phase, codes(audit)) == ("pass", "init", set())


def with_norms(depth: int) -> onnx.ModelProto:
    """Convolutions, norms and ReLUs in a row, drawn as torch draws them."""
    nodes, tensors, value = [], [], "x"
    for i in range(depth):
        drawn = {"w": nn.Conv2d(16 if i else 3, 16, 3).weight.detach(), "g": torch.ones(16), "b": torch.zeros(16)}
        drawn |= {"m": torch.zeros(16), "v": torch.ones(16)}
        tensors += [numpy_helper.from_array(t.numpy(), f"{k}{i}") for k, t in drawn.items()]
        nodes += [
            helper.make_node("Conv", [value, f"w{i}"], [f"c{i}"], pads=[1, 1, 1, 1]),
            helper.make_node("BatchNormalization", [f"c{i}", *(f"{k}{i}" for k in "gbmv")], [f"n{i}"]),
            helper.make_node("Relu", [f"n{i}"], [f"r{i}"]),
        ]
        value = f"r{i}"
    ends = [helper.make_tensor_value_info("x", 1, [4, 3, 12, 12])], [helper.make_tensor_value_info(value, 1, None)]
    return helper.make_model(
        helper.make_graph(nodes, "g", *ends, tensors), opset_imports=[helper.make_opsetid("", 17)], ir_version=8
    )


@pytest.mark.parametrize("level", ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED"])
def test_norms_that_onnxruntime_folds(level, tmp_path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.log_severity_level = 3
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = with_norms(16)
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    made = onnx.load(tmp_path / "folded.onnx")
    assert not any(n.op_type == "BatchNormalization" for n in made.graph.node)
    for audit in (initaudit.audit(made), initaudit.audit(model)):
        assert (audit.verdict, audit.report.phase, codes(audit)) == ("pass", "init", set())
    assert any("put back" in note for note in initaudit.audit(made).report.notes)


def by_hand(weight: str, bias: str) -> onnx.ModelProto:
    shape, zeros = (8, 3, 3, 3), torch.zeros(8)
    tensors = [numpy_helper.from_array(v.numpy(), n) for n, v in ((weight, torch.randn(shape)), (bias, zeros))]
    node = helper.make_node("Conv", ["x", weight, bias], ["y"])
    values = [helper.make_tensor_value_info(n, 1, None) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize(
    ("weight", "bias", "found"),
    [
        ("model/conv/Conv2D_weights_fused_bn", "model/conv/Conv2D_bias_fused_bn", True),  # tf2onnx
        ("onnx::Conv_12", "onnx::Conv_13", True),
        ("onnx::Conv_12", "conv.bias", False),  # a weight norm folded: the bias keeps its name
        ("conv.weight", "conv.bias", False),
    ],
)
def test_the_traces_that_exporters_leave(weight, bias, found):
    checkpoint = load_proto(by_hand(weight, bias))
    assert bool(folded_norms(checkpoint.program.graph, checkpoint.arrays).restored) == found
