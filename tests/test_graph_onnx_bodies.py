"""Weights inside functions, branches and loops of ONNX files. Judges: onnxruntime, and what each file was written with."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from test_graph_onnx import BOOL, IN, INT64, OUT, W, model, node, normal, run, tensor, value

from initaudit.graph.execute import Executor
from initaudit.graph.from_onnx import from_onnx
from initaudit.load import load_proto
from initaudit.pair.pair import pair


def test_arguments_and_constants_of_local_functions():
    """A function called twice: what it is handed keeps its name, what it holds has the loader's."""
    held = node("Constant", "", "k", value=tensor("any", normal(OUT, OUT)))
    body = [held, node("MatMul", "a b", "p"), node("Relu", "p", "q"), node("MatMul", "q k", "c")]
    opsets = [helper.make_opsetid("", 21)]
    function = helper.make_function("own", "layer", ["a", "b"], ["c"], body, opsets)
    calls = [helper.make_node("layer", ["x", "w1"], ["h"], "first", domain="own"),
             helper.make_node("layer", ["h", "w2"], ["y"], "second", domain="own")]  # fmt: skip
    made = model(calls, [tensor("w1", W), tensor("w2", normal(OUT, OUT, seed=2))], functions=[function])
    pairs = pair(run(made))
    assert [p.tensor for p in pairs] == ["w1", "own::layer/k", "w2", "own::layer/k"]
    assert all(p.tensor in load_proto(made).arrays for p in pairs)
    assert [p.site for p in pairs] == ["first/p", "first/c", "second/p", "second/c"]
    assert [p.feeds[0].activation.name for p in pairs] == ["relu", "linear", "relu", "linear"]


def test_a_function_passes_its_attributes_into_the_bodies_of_its_control_flow():
    """An attribute that refers to the function's own, inside a branch."""
    leaky = helper.make_node("LeakyRelu", ["a"], ["t"])
    leaky.attribute.append(onnx.AttributeProto(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT))
    then = helper.make_graph([leaky], "then", [], [value("t")])
    other = helper.make_graph([node("Identity", "a", "e")], "else", [], [value("e")])
    branch = helper.make_node("If", ["c"], ["r"], "branch", then_branch=then, else_branch=other)
    made = helper.make_function("own", "act", ["a", "c"], ["r"], [branch], [helper.make_opsetid("", 21)], ["slope"])
    call = helper.make_node("act", ["h", "c"], ["y"], "call", domain="own", slope=0.3)
    whole = model([node("MatMul", "x v", "h"), call], [tensor("v", W)],
                  [value("x", (3, IN)), value("c", (), BOOL)], functions=[made])  # fmt: skip
    (p,) = pair(run(whole, normal(3, IN), np.array(True)))
    assert {(f.activation.name, f.activation.parameters.get("negative_slope")) for f in p.feeds} == {
        ("leaky_relu", 0.3), ("linear", None),
    }  # fmt: skip


def branches(names=("w", "w")) -> tuple[onnx.GraphProto, onnx.GraphProto]:
    """A linear layer with ReLU, and one with tanh; both hold a weight, perhaps of the same name."""
    made = []
    for name, act, seed in ((names[0], "Relu", 1), (names[1], "Tanh", 2)):
        nodes = [
            node("Transpose", name, "t", perm=[1, 0]), node("MatMul", "h t", "p"), node(act, "p", "q"),
        ]  # fmt: skip
        made.append(helper.make_graph(nodes, act, [], [value("q")], [tensor(name, normal(OUT, OUT, seed=seed))]))
    return made[0], made[1]


@pytest.mark.parametrize("taken", [True, False])
@pytest.mark.parametrize("names", [("w", "w"), ("a", "b")])
def test_weights_of_both_branches_of_an_if(names, taken):
    then, other = branches(names)
    nodes = [
        node("MatMul", "x v", "h"), node("If", "c", "r", then_branch=then, else_branch=other), node("MatMul", "r o", "y"),
    ]  # fmt: skip
    made = model(nodes, [tensor("v", W), tensor("o", normal(OUT, 4, seed=3))], [value("x", (3, IN)), value("c", (), BOOL)])
    graph = run(made, normal(3, IN), np.array(taken))
    pairs = {p.tensor: p for p in pair(graph)}
    keys = ("r.then_branch/w", "r.else_branch/w") if names == ("w", "w") else names
    assert set(pairs) == {"v", *keys, "o"}
    assert set(keys) <= set(load_proto(made).arrays)
    for key, act in zip(keys, ("relu", "tanh"), strict=True):
        p = pairs[key]
        assert (p.shape, "".join(p.axes), p.fan_in, p.fan_out, p.stored) == ((OUT, OUT), "oi", OUT, OUT, True)
        assert [f.activation.name for f in p.feeds] == [act]
        assert p.provenance == ("Transpose",)
        assert {p.node, p.value} <= {n.name for n in graph.fx.nodes}
    # What flows into the branches and out of them is followed through.
    assert {f.activation.name for f in pairs["v"].feeds} == {"linear"}
    assert len(pairs["o"].feeds) == 1


def test_an_if_whose_condition_is_known_is_its_branch():
    then, other = branches(("a", "b"))
    nodes = [node("MatMul", "x v", "h"), node("Identity", "c", "k"), node("If", "k", "y", then_branch=then, else_branch=other)]
    graph = run(model(nodes, [tensor("v", W), tensor("c", np.array(False))]))
    assert [(p.tensor, p.feeds[0].activation.name) for p in pair(graph)] == [("v", "linear"), ("b", "tanh")]
    assert graph.unused == ("a",)


def loop(carried: bool) -> onnx.ModelProto:
    """h := tanh(h w + x u), three times; `w` is an initializer of the body, or carried along unchanged."""
    inputs = [value("i", (), INT64), value("c", (), BOOL), value("s"), *([value("w")] if carried else [])]
    body = [
        node("MatMul", "s w", "a"), node("MatMul", "x u", "b"), node("Add", "a b", "d"), node("Tanh", "d", "t"),
        node("Identity", "c", "k"), *([node("Identity", "w", "w2")] if carried else []),
    ]  # fmt: skip
    outputs = [value("k", (), BOOL), value("t"), *([value("w2")] if carried else []), value("d")]
    held = [tensor("u", normal(IN, OUT, seed=5))] + ([] if carried else [tensor("w", normal(OUT, OUT, seed=4))])
    graph = helper.make_graph(body, "body", inputs, outputs, held)
    outer = [
        node("Loop", f"m  s0{' w0' if carried else ''}".replace("  ", " @ "), f"l{' lw' if carried else ''} scan", body=graph)
    ]
    outer[0].input[1] = ""
    outer += [node("Add", "l z", "q"), node("MatMul", "q o", "y")]
    tensors = [tensor("m", np.int64(3)), tensor("o", normal(OUT, 4, seed=6)), tensor("z", normal(OUT))]
    tensors += [tensor("w0", normal(OUT, OUT, seed=4))] if carried else []
    return model(outer, tensors, [value("x", (3, IN)), value("s0", (3, OUT))])


@pytest.mark.parametrize("carried", [False, True])
def test_weights_of_a_loop(carried):
    graph = run(loop(carried), normal(3, IN), normal(3, OUT, seed=9))
    pairs = {p.tensor: p for p in pair(graph)}
    recurrent = "w0" if carried else "w"
    assert set(pairs) == {recurrent, "u", "o"}
    assert (pairs[recurrent].fan_in, pairs["u"].fan_in, pairs["o"].fan_out) == (OUT, IN, 4)
    assert [f.activation.name for f in pairs["u"].feeds if f.path == ("add",)][:1] == ["tanh"]
    assert [f.activation.name for f in pairs[recurrent].feeds if f.path == ("add",)][:1] == ["tanh"]
    # The pairs that a second trip would add are those of the first.
    assert len(pair(graph)) == 3


def test_layers_that_a_scan_runs_through():
    """One matrix a layer, stacked: the scan hands the body one at a time."""
    inputs = [value("s"), value("w")]
    body = [node("MatMul", "s w", "a"), node("Relu", "a", "t")]
    graph = helper.make_graph(body, "body", inputs, [value("t")])
    nodes = [node("Scan", "h ws", "r", body=graph, num_scan_inputs=1), node("MatMul", "r o", "y")]
    first = node("MatMul", "x v", "h")
    tensors = [tensor("v", W), tensor("ws", normal(4, OUT, OUT)), tensor("o", normal(OUT, 2))]
    made = run(model([first, *nodes], tensors))
    pairs = {p.tensor: p for p in pair(made)}
    assert set(pairs) == {"v", "ws", "o"}
    assert (pairs["ws"].fan_in, pairs["ws"].fan_out) == (OUT, OUT)
    assert "relu" in {f.activation.name for f in pairs["ws"].feeds}
    assert pairs["ws"].value in {n.name for n in made.fx.nodes}


def test_weights_of_an_if_inside_a_loop_inside_an_if():
    then, other = branches(("a", "b"))
    inner = [node("If", "c", "n", then_branch=then, else_branch=other), node("Identity", "k0", "k")]
    body = helper.make_graph(
        inner, "body", [value("i", (), INT64), value("k0", (), BOOL), value("h")], [value("k", (), BOOL), value("n")]
    )
    deep = helper.make_graph([helper.make_node("Loop", ["m", "", "g"], ["l"], "loop", body=body)], "then", [], [value("l")])
    flat = helper.make_graph([node("Identity", "g", "e")], "else", [], [value("e")])
    nodes = [node("MatMul", "x v", "g"), helper.make_node("If", ["c"], ["y"], "outer", then_branch=deep, else_branch=flat)]
    made = model(nodes, [tensor("v", W), tensor("m", np.int64(2))], [value("x", (3, IN)), value("c", (), BOOL)])
    for taken in (True, False):
        graph = run(made, normal(3, IN), np.array(taken))
        assert {p.tensor: p.feeds[0].activation.name for p in pair(graph)} == {"v": "linear", "a": "relu", "b": "tanh"}


def test_gradients_reach_weights_inside_bodies():
    """Judge: the same recurrence written in torch."""
    checkpoint = load_proto(loop(False))
    graph = from_onnx(checkpoint.program, checkpoint.arrays)
    x, s = torch.from_numpy(normal(3, IN)), torch.from_numpy(normal(3, OUT, seed=9))
    w, u = (torch.from_numpy(v).requires_grad_() for v in (normal(OUT, OUT, seed=4), normal(IN, OUT, seed=5)))
    h = s
    for _ in range(3):
        h = torch.tanh(h @ w + x @ u)
    expected = torch.autograd.grad(
        (((h + torch.from_numpy(normal(OUT))) @ torch.from_numpy(normal(OUT, 4, seed=6))) ** 2).sum(), (w, u)
    )
    leaves = {name: graph.constants[name].value().clone().requires_grad_() for name in ("w", "u")}

    class Leaves(Executor):
        def get_attr(self, target, args, kwargs):
            return leaves[target] if target in leaves else super().get_attr(target, args, kwargs)

    (y,) = Leaves(graph).run(x, s)
    found = torch.autograd.grad((y**2).sum(), (leaves["w"], leaves["u"]))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
