"""The registry, what roles say about weights, budgets, devices, control flow and recurrent layers."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, parser

from initaudit.errors import InitauditError, LimitExceeded, UnsupportedOperator
from initaudit.onnx_ops import registry
from initaudit.onnx_ops.backend import Backend
from initaudit.onnx_ops.budget import Budget, metered
from initaudit.onnx_ops.registry import lookup, operator, role_of
from initaudit.onnx_ops.run import run_model
from initaudit.roles import Kind, Operand, Role


def fn(name, domain=""):
    return lookup(name, domain).function


# --- the registry


@pytest.mark.parametrize("entry", registry.operators(), ids=lambda o: f"{o.domain}::{o.name}")
def test_every_operator_is_well_declared(entry):
    assert entry.function.__doc__.strip().endswith(".")
    assert entry.role.kind in get_args(Kind)
    assert role_of(entry.function) == entry.role
    names = {p.name for p in entry.parameters}
    assert set(entry.role.data) <= names
    # fx prints a call as module.name, so that is where the function must be found.
    module = __import__(entry.function.__module__, fromlist=["_"])
    assert getattr(module, entry.function.__name__) is entry.function
    if onnx.defs.has(entry.name, entry.domain):
        attributes = {a for a in onnx.defs.get_schema(entry.name, 28, entry.domain).attributes if "string" not in a}
        assert attributes <= entry.attributes


def test_the_default_domain_has_two_names():
    assert lookup("Add", "ai.onnx") is lookup("Add")
    assert lookup("Add", "nowhere") is None


def test_a_duplicate_or_a_missing_field_is_refused():
    with pytest.raises(ValueError, match="twice"):

        @operator(Role("pointwise"))
        def Add(a):
            """Again."""

    with pytest.raises(ValueError, match="docstring"):

        @operator(Role("pointwise"))
        def NoDocumentation(a):
            return a

    with pytest.raises(ValueError, match="kind"):

        @operator(Role("magic"))
        def Magic(a):
            """Of no known kind."""

    assert lookup("Magic") is None


# --- weights: the judge of fan-in is the layer itself, fed unit noise through unit weights


def bound(name, arguments, constants, domain=""):
    entry = lookup(name, domain)
    call = {}
    for parameter in entry.parameters:
        value = arguments.get(parameter.name, None if parameter.default is parameter.empty else parameter.default)
        if isinstance(value, torch.Tensor):
            value = Operand(tuple(value.shape), parameter.name in constants)
        elif isinstance(value, list) and value and isinstance(value[0], torch.Tensor):
            value = [Operand(tuple(v.shape), f"{parameter.name}{i}" in constants) for i, v in enumerate(value)]
        call[parameter.name] = value
    return entry.role.weights(call)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(math.prod(shape)))


FANS = [
    ("Conv", {"x": noise(64, 8, 9, 9), "w": noise(16, 8, 3, 3)}, (72, 144), "oikk"),
    ("Conv", {"x": noise(64, 8, 9, 9), "w": noise(16, 2, 3, 3), "group": 4}, (18, 36), "oikk"),
    ("Conv", {"x": noise(64, 96, 30), "w": noise(96, 1, 5), "group": 96}, (5, 5), "oik"),
    ("ConvTranspose", {"x": noise(64, 8, 9, 9), "w": noise(8, 4, 3, 3)}, (72, 36), "iokk"),
    ("ConvTranspose", {"x": noise(64, 8, 9, 9), "w": noise(8, 4, 3, 3), "group": 2}, (36, 36), "iokk"),
    ("MatMul", {"a": noise(500, 20), "b": noise(20, 30)}, (20, 30), "io"),
    ("Gemm", {"a": noise(500, 20), "b": noise(20, 30)}, (20, 30), "io"),
    ("Gemm", {"a": noise(500, 20), "b": noise(30, 20), "transB": 1}, (20, 30), "oi"),
    ("Gemm", {"a": noise(20, 500), "b": noise(20, 30), "transA": 1}, (20, 30), "io"),
    ("MatMul", {"a": noise(4, 200, 20), "b": noise(4, 20, 30)}, (20, 30), "nio"),
]


@pytest.mark.parametrize(("name", "arguments", "fans", "letters"), FANS, ids=lambda v: v if isinstance(v, str) else "")
def test_fan_in_is_the_variance_of_the_layers_output(name, arguments, fans, letters):
    weight = "w" if "w" in arguments else "b"
    (use,) = bound(name, arguments, {weight})
    assert use.argument == weight
    assert "".join(use.axes) == letters
    assert use.fans(tuple(arguments[weight].shape)) == fans
    inputs = [v for v in arguments.values() if isinstance(v, torch.Tensor)]
    y = fn(name)(*inputs, **{k: v for k, v in arguments.items() if not isinstance(v, torch.Tensor)})
    if name == "ConvTranspose":
        # Away from the border every tap contributes.
        y = y[..., 3:-3, 3:-3]
    assert y.pow(2).mean().item() == pytest.approx(fans[0], rel=0.15)
    taps = math.prod(size for size, letter in zip(arguments[weight].shape, letters, strict=True) if letter == "k")
    assert y.shape[use.unit_axis] == fans[1] * use.groups // taps


def test_a_constant_on_the_left_is_a_matrix_o_i():
    (use,) = bound("MatMul", {"a": noise(30, 20), "b": noise(20, 500)}, {"a"})
    assert (use.axes, use.unit_axis, use.fans((30, 20))) == (("o", "i"), -2, (20, 30))


def test_the_left_operand_of_gemm_may_be_the_weight():
    (use,) = bound("Gemm", {"a": noise(20, 30), "b": noise(20, 500), "transA": 1}, {"a"})
    assert (use.argument, use.axes) == ("a", ("i", "o"))


def test_of_two_signals_none_is_a_weight_and_of_two_constants_the_right_one():
    """A table that is sent through a layer is constant too, and a signal all the same (see `graph/constness.py`)."""
    arguments = {"a": noise(3, 4), "b": noise(4, 5)}
    assert bound("MatMul", arguments, set()) == ()
    (use,) = bound("MatMul", arguments, {"a", "b"})
    assert (use.argument, use.axes) == ("b", ("i", "o"))


@pytest.mark.parametrize(
    ("equation", "shapes", "place", "axes", "unit_axis"),
    [
        ("bi,oi->bo", [(3, 4), (5, 4)], 1, "oi", -1),
        ("bqi,ihd->bqhd", [(2, 3, 4), (4, 5, 6)], 1, "ioo", None),
        ("nbi,nio->nbo", [(2, 3, 4), (2, 4, 5)], 1, "nio", -1),
        ("oi,bi->bo", [(5, 4), (3, 4)], 0, "oi", -1),
        ("...i,io->...o", [(3, 4), (4, 5)], 1, "io", -1),
    ],
)
def test_einsum_names_the_axes_by_its_letters(equation, shapes, place, axes, unit_axis):
    tensors = [noise(*shape) for shape in shapes]
    call = {"inputs": [Operand(tuple(t.shape), i == place) for i, t in enumerate(tensors)], "equation": equation}
    (use,) = lookup("Einsum").role.weights(call)
    assert ("".join(use.axes), use.index, use.unit_axis) == (axes, place, unit_axis)
    size = {a: math.prod(n for n, x in zip(shapes[place], use.axes, strict=True) if x == a) for a in "oi"}
    assert use.fans(shapes[place]) == (size["i"], size["o"])


def test_a_table_is_a_weight_only_where_a_signal_picks_its_rows():
    table, ids = noise(9, 4), torch.zeros(2, 3, dtype=torch.int64)
    (use,) = bound("Gather", {"data": table, "indices": ids}, {"data"})
    assert (use.axes, use.fans((9, 4))) == (("v", "d"), (1, 4))
    # Rows that constants pick are a position table; a single one is a slice.
    assert len(bound("Gather", {"data": table, "indices": ids}, {"data", "indices"})) == 1
    assert bound("Gather", {"data": table, "indices": ids[:1, 0]}, {"data", "indices"}) == ()
    assert bound("Gather", {"data": table, "indices": ids, "axis": 1}, {"data"}) == ()


def test_a_recurrent_layer_has_two_weights_with_gates():
    arguments = {"x": noise(5, 2, 6), "w": noise(2, 16, 6), "r": noise(2, 16, 4), "b": noise(2, 32)}
    first, second = bound("LSTM", arguments, {"w", "r", "b"})
    assert (first.argument, second.argument, first.bias) == ("w", "r", "b")
    assert first.gates == ("i", "o", "f", "c")
    assert first.fans((2, 16, 6)) == (6, 4)
    assert second.fans((2, 16, 4)) == (4, 4)


def test_a_strided_transposed_convolution_overlaps_less():
    (use,) = bound("ConvTranspose", {"x": noise(1, 4, 5, 5), "w": noise(4, 3, 4, 4), "strides": [2, 2]}, {"w"})
    assert use.overlap == 0.25


# --- shape arithmetic stays on the host, data on its device


def test_shapes_of_meta_tensors_are_real_numbers_and_data_stays_meta():
    x = torch.empty(2, 3, 4, device="meta")
    shape = fn("Shape")(x)
    assert shape.device.type == "cpu"
    assert shape.tolist() == [2, 3, 4]
    target = fn("Concat")(fn("Gather")(shape, torch.tensor([0])), torch.tensor([-1]), axis=0)
    y = fn("Reshape")(x, target)
    assert (y.device.type, tuple(y.shape)) == ("meta", (2, 12))
    assert fn("Add")(y, torch.ones(12)).device.type == "meta"
    assert fn("Gather")(y, torch.tensor([1]), axis=1).device.type == "meta"


def test_an_image_network_runs_on_meta():
    x, w = torch.empty(1, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    y = fn("MaxPool")(fn("Relu")(fn("Conv")(x, w, pads=[1, 1, 1, 1])), kernel_shape=[2, 2], strides=[2, 2])
    scale = torch.empty(4, device="meta")
    y = fn("BatchNormalization")(y, scale, scale, scale, scale)
    y = fn("Resize")(y, None, torch.tensor([1.0, 1.0, 2.0, 2.0]), mode="linear")
    y = fn("AveragePool")(fn("Pad")(y, torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])), kernel_shape=[2, 2])
    assert tuple(fn("Softmax")(fn("GlobalAveragePool")(y)).shape) == (1, 4, 1, 1)


# --- recurrent layers against torch's own, their gradients too


@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize(("name", "order"), [("LSTM", [0, 3, 1, 2]), ("GRU", [1, 0, 2]), ("RNN", [0])])
def test_recurrent_layers_are_torchs_in_another_order_of_gates(name, order, direction):
    torch.manual_seed(0)
    both = direction == "bidirectional"
    layer = getattr(torch.nn, name)(6, 4, bidirectional=both)
    x = torch.randn(5, 2, 6)
    expected = layer(x)[0]

    def stacked(stem):
        suffixes = ["", "_reverse"][: 1 + both]
        parts = [getattr(layer, stem + suffix).detach().reshape(len(order), 4, -1)[order].flatten(0, 1) for suffix in suffixes]
        return torch.stack(parts)

    w, r = stacked("weight_ih_l0").requires_grad_(), stacked("weight_hh_l0").requires_grad_()
    b = torch.cat([stacked("bias_ih_l0"), stacked("bias_hh_l0")], 1).squeeze(-1)
    extra = {"linear_before_reset": 1} if name == "GRU" else {}
    fused = fn(name)(x, w, r, b, direction=direction, **extra)
    # Lengths given make it take the written-out loop.
    looped = fn(name)(x, w, r, b, torch.tensor([5, 5]), direction=direction, **extra)
    for y in (fused, looped):
        assert y.shape == (5, 1 + both, 2, 4)
        torch.testing.assert_close(y.transpose(1, 2).flatten(2), expected, rtol=1e-4, atol=1e-5)
    first = torch.autograd.grad(fused.square().sum(), (w, r))
    second = torch.autograd.grad(looped.square().sum(), (w, r))
    for a, e in zip(first, second, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_lengths_end_a_sequence_early_in_both_directions():
    x, w, r = noise(5, 2, 3), noise(2, 16, 3), noise(2, 16, 4)
    y, h, c = fn("LSTM")(x, w, r, None, torch.tensor([3, 5]), direction="bidirectional", outputs=3)
    short, short_h, short_c = fn("LSTM")(x[:3, :1], w, r, direction="bidirectional", outputs=3)
    assert not y[3:, :, 0].any()
    torch.testing.assert_close(y[:3, :, :1], short)
    torch.testing.assert_close(h[:, :1], short_h)
    torch.testing.assert_close(c[:, :1], short_c)


# --- what an untrusted graph may spend


def model(text):
    made = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    return made


DOUBLINGS = " ".join(f"x{i + 1} = Concat<axis = 0>(x{i}, x{i})" for i in range(45))
LARGE = {
    "ConstantOfShape": "() => (float[n] y) { s = Constant<value_ints = [1000000, 1000000]>() y = ConstantOfShape(s) }",
    "Expand": "(float[1] x) => (float[n] y) { s = Constant<value_ints = [1000000, 1000000]>() y = Expand(x, s) }",
    "Tile": "(float[1] x) => (float[n] y) { s = Constant<value_ints = [1000000000000]>() y = Tile(x, s) }",
    "Pad": "(float[1] x) => (float[n] y) { s = Constant<value_ints = [0, 1000000000000]>() y = Pad(x, s) }",
    "Range": """() => (int64[n] y) {
        a = Constant<value_int = 0>() b = Constant<value_int = 1000000000000>() c = Constant<value_int = 1>()
        y = Range(a, b, c) }""",
    "OneHot": """() => (float[n] y) {
        d = Constant<value_int = 1000000000000>() i = Constant<value_ints = [0]>() v = Constant<value_floats = [0.0, 1.0]>()
        y = OneHot(i, d, v) }""",
    "Resize": """(float[1,1,1,1] x) => (float[n] y) {
        s = Constant<value_floats = [1.0, 1.0, 1000000.0, 1000000.0]>() y = Resize(x, , s) }""",
    "RandomNormal": "() => (float[n] y) { y = RandomNormal<shape = [1000000, 1000000]>() }",
    "Concat": "(float[64] x0) => (float[n] y) {" + DOUBLINGS + " y = Identity(x45) }",
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_large_outputs_are_refused_before_they_are_made(text):
    made = model(f"g {text}")
    feeds = {i.name: torch.zeros([d.dim_value for d in i.type.tensor_type.shape.dim]) for i in made.graph.input}
    with pytest.raises(LimitExceeded, match="elements"):
        run_model(made, feeds, Budget(elements=2**20))


def endless_loop():
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"])],
        "body",
        [helper.make_tensor_value_info("i", TensorProto.INT64, []), helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("d", TensorProto.BOOL, [])],
    )
    loop = helper.make_node("Loop", ["", "t"], [], body=body)
    true = helper.make_node("Constant", [], ["t"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    return helper.make_model(helper.make_graph([true, loop], "g", [], []), opset_imports=[helper.make_opsetid("", 21)])


def test_an_endless_loop_ends():
    with pytest.raises(LimitExceeded, match="trips"):
        run_model(endless_loop(), {}, Budget(trips=500))
    with pytest.raises(LimitExceeded, match="seconds"):
        run_model(endless_loop(), {}, Budget(trips=10**9, seconds=0.05))


def laughing(levels):
    functions = []
    for level in range(levels):
        inner = ("Identity", "") if level == 0 else (f"f{level - 1}", "own")
        nodes = [
            helper.make_node(inner[0], ["x"], ["y"], domain=inner[1]),
            helper.make_node(inner[0], ["y"], ["z"], domain=inner[1]),
        ]
        imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
        functions.append(helper.make_function("own", f"f{level}", ["x"], ["z"], nodes, imports))
    graph = helper.make_graph(
        [helper.make_node(f"f{levels - 1}", ["x"], ["y"], domain="own")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    return helper.make_model(
        graph, functions=functions, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    )


def test_functions_within_functions_are_counted():
    assert run_model(laughing(3), {"x": torch.ones(1)})[0].item() == 1
    with pytest.raises(LimitExceeded, match="functions"):
        run_model(laughing(41), {"x": torch.ones(1)}, Budget(expansions=1000))


def test_a_function_that_calls_itself_ends():
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    own = helper.make_function("own", "f", ["x"], ["y"], [helper.make_node("f", ["x"], ["y"], domain="own")], imports)
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("f", ["x"], ["y"], domain="own")], "g", [value], [result])
    made = helper.make_model(graph, functions=[own], opset_imports=imports)
    with pytest.raises(LimitExceeded, match="within one another"):
        run_model(made, {"x": torch.ones(1)})


def test_the_budget_in_force_reaches_an_operator_that_is_called_directly():
    with metered(Budget(elements=10)), pytest.raises(LimitExceeded):
        fn("ConstantOfShape")(torch.tensor([11]))
    assert fn("ConstantOfShape")(torch.tensor([11])).numel() == 11


# --- errors name the node


def test_an_unknown_operator_is_named():
    node = helper.make_node("Conv", ["x"], ["y"], domain="com.microsoft.nchwc", name="blocked")
    with pytest.raises(UnsupportedOperator, match=r"com\.microsoft\.nchwc::Conv 'blocked'"):
        Backend.run_node(node, [np.zeros(1, np.float32)])


def test_an_unknown_attribute_is_refused():
    node = helper.make_node("Relu", ["x"], ["y"], slope=0.5)
    with pytest.raises(UnsupportedOperator, match="slope"):
        Backend.run_node(node, [np.zeros(1, np.float32)])


def test_a_failing_operator_names_its_node():
    node = helper.make_node("MatMul", ["a", "b"], ["y"], name="product")
    with pytest.raises(InitauditError, match="'product': failed"):
        Backend.run_node(node, [np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)])


def test_a_branch_sees_the_values_around_it():
    made = model(
        """g (float[2] x, bool c) => (float[2] y) {
        k = Constant<value_float = 3.0>()
        y = If (c) <then_branch = a () => (float[2] p) { p = Mul(x, k) }, else_branch = b () => (float[2] q) { q = Neg(x) }>
        }"""
    )
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (y,) = run_model(made, {"x": x, "c": torch.tensor(True)})
    assert y.tolist() == [3.0, 6.0]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [3.0, 3.0]
    assert run_model(made, {"x": x, "c": torch.tensor(False)})[0].tolist() == [-1.0, -2.0]


def test_a_body_of_the_standard_stands_in_for_an_operator_without_a_function():
    assert lookup("HannWindow") is None
    node = helper.make_node("HannWindow", ["n"], ["w"])
    (window,) = Backend.run_node(node, [np.array(8)])
    np.testing.assert_allclose(window, torch.hann_window(8).numpy(), atol=1e-6)
