"""Shapes found by runs on zeros are those that torch's meta device finds, and nothing large or unknown is run so."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from initaudit.graph import execute, stand_in
from initaudit.graph.calls import bind, role_for
from initaudit.graph.execute import specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.load.onnx_file import load_proto
from initaudit.onnx_ops import registry

node = helper.make_node


def weight(name, *shape):
    return numpy_helper.from_array(np.random.default_rng(0).normal(0, 0.2, shape).astype(np.float32), name)


def ints(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


# (shape of x, nodes, constants); the last output is y.
GRAPHS = {
    "perceptron": ((5, 6), [node("Gemm", ["x", "w", "b"], ["a"], transB=1), node("Gelu", ["a"], ["y"])],
                   [weight("w", 7, 6), weight("b", 7)]),
    "grouped convolution": ((2, 4, 9, 9), [node("Conv", ["x", "w"], ["a"], group=2, strides=[2, 2], pads=[1, 0, 2, 1]),
                                          node("AveragePool", ["a"], ["y"], kernel_shape=[2, 2], ceil_mode=1)],
                            [weight("w", 6, 2, 3, 3)]),
    "broadcasting": ((3, 1, 4), [node("Add", ["x", "w"], ["a"]), node("Softmax", ["a"], ["s"]),
                                 node("ReduceMean", ["s"], ["y"], axes=[1], keepdims=0)], [weight("w", 5, 1)]),
    "shapes computed": ((2, 6, 4), [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["n"]),
                                    node("Concat", ["n", "rest"], ["t"], axis=0), node("Reshape", ["x", "t"], ["r"]),
                                    node("MatMul", ["r", "w"], ["y"])],
                        [ints("zero", 0), ints("rest", -1), weight("w", 24, 3)]),
    "normalised": ((2, 8, 5), [node("LayerNormalization", ["x", "w", "b"], ["a"], axis=-1), node("Transpose", ["a"], ["t"]),
                               node("Slice", ["t", "from", "to", "axis"], ["y"])],
                   [weight("w", 5), weight("b", 5), ints("from", 1), ints("to", 4), ints("axis", 1)]),
    "shape of numbers": ((4, 3), [node("NonZero", ["x"], ["i"]), node("Cast", ["i"], ["y"], to=TensorProto.FLOAT)], []),
    "does not fit": ((4, 3), [node("MatMul", ["x", "w"], ["y"])], [weight("w", 5, 2)]),
    "padded beyond reason": ((1, 1, 8, 8), [node("Conv", ["x", "w"], ["y"], pads=[90_000] * 4)], [weight("w", 1, 1, 3, 3)]),
    "dropout": ((4, 3), [node("Dropout", ["x"], ["d"]), node("MatMul", ["d", "w"], ["y"])], [weight("w", 3, 2)]),
}  # fmt: skip


def specialised(name):
    shape, nodes, constants = GRAPHS[name]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (("x", shape), ("y", None))]
    graph = helper.make_graph(nodes, name, ends[:1], ends[1:], constants)
    opset = 20 if name == "perceptron" else 17
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    checkpoint = load_proto(made)
    return specialise(from_onnx(checkpoint.program, checkpoint.arrays), (torch.ones(shape),))


def told(graph):
    shapes = [(n.op, str(n.target), n.meta.get("shape"), n.meta.get("dtype")) for n in graph.fx.nodes]
    return shapes, sorted(graph.constants), graph.notes, graph.refused


@pytest.mark.parametrize("name", GRAPHS)
def test_zeros_tell_the_shapes_that_the_meta_device_tells(name, monkeypatch):
    state = torch.get_rng_state()
    found = told(specialised(name))
    assert torch.equal(state, torch.get_rng_state())
    monkeypatch.setattr(execute, "WORK", -1)
    assert found == told(specialised(name))


def test_what_is_run_so_is_run_on_zeros(monkeypatch):
    """The test above compares two ways, not one with itself."""
    ran = []
    plain = stand_in.stand_in

    def spy(target, args, kwargs):
        ran.append(target.__name__)
        return plain(target, args, kwargs)

    monkeypatch.setattr(execute, "stand_in", spy)
    specialised("grouped convolution")
    assert ran == ["Conv", "AveragePool"]
    ran.clear()
    for name in ("shape of numbers", "padded beyond reason"):
        specialised(name)
    assert ran in ([], ["Cast"])
    with monkeypatch.context() as patch:
        patch.setattr(execute, "ALL_WORK", 0)
        specialised("grouped convolution")
    assert ran in ([], ["Cast"])


def work(name, *args, **kwargs):
    target = registry.lookup(name).function
    return stand_in.work_of(role_for(target), bind(target, args, kwargs))


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_work_bounds_products_and_outputs():
    assert work("MatMul", meta(8, 32), meta(32, 16)) == 8 * 32 * 16
    assert work("MatMul", meta(10**6, 1), meta(1, 10**6)) >= 10**12
    assert work("Add", meta(10**6, 1), meta(1, 10**6)) >= 10**12
    assert work("Conv", meta(1, 1, 8, 8), meta(1, 1, 3, 3), pads=[0, 0, 10**6, 0]) >= 10**12
    assert work("MaxPool", meta(1, 1, 8, 8), kernel_shape=[2, 2], pads=[10**6] * 4) >= 10**12
    assert work("Einsum", meta(1000), meta(1000), equation="i,j->ij") >= 10**6
    for name, args in (("NonZero", [meta(3)]), ("Reshape", [meta(3, 2), meta(1, dtype=torch.int64)]), ("Shape", [meta(3)])):
        assert math.isinf(work(name, *args)), name


def test_outputs_beyond_the_budget_are_left_to_the_meta_device():
    tile = registry.lookup("Tile").function
    assert stand_in.stand_in(tile, (meta(1000), torch.tensor([100_000])), {}) is None
    small = stand_in.stand_in(tile, (meta(10), torch.tensor([3])), {})
    assert small.is_meta
    assert small.shape == (30,)
