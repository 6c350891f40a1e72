"""One network through both doors: the module itself, and the ONNX files that torch's exporters write of it."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import onnx
import pytest
import torch
from onnx import numpy_helper
from zoo import CASES, KEEPS, MODELS, build, exported, quiet, without_noise

from initaudit.graph.execute import Executor, specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.graph.from_torch import from_module
from initaudit.graph.graph import Graph
from initaudit.load import load_proto
from initaudit.pair.evaluate import ConstantReader
from initaudit.pair.pair import pair

NORMS = ("batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm")
# The dynamo exporter takes seconds a model: what it writes with dynamic axes or optimized is sampled unless all is asked for.
SAMPLED = {"dynamo_dynamic": ("cnn", "encoder", "bilstm"), "dynamo_optimized": ("resnet", "unet", "gpt2", "bilstm")}
EVERYTHING = bool(os.environ.get("INITAUDIT_ALL_EXPORTS"))
CHOSEN = [(n, e) for n, e in CASES if EVERYTHING or n in SAMPLED.get(e, (n,))]


def through_onnx(name: str, exporter: str, inputs: tuple[torch.Tensor, ...]) -> Graph:
    checkpoint = load_proto(onnx.load_from_string(exported(name, exporter)))
    return specialise(from_onnx(checkpoint.program, checkpoint.arrays), inputs)


def through_torch(name: str) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    module, inputs = build(name)
    return from_module(module, inputs), inputs


def described(graph: Graph) -> dict[tuple[object, ...], int]:
    """How often each kind of weight occurs: operator, fans, variance to four digits, activations and what is on the way.

    A weight that an unrolled recurrence uses at every step counts once; of one that holds both directions of a recurrent
    layer, each counts.
    """
    reader, nodes = ConstantReader(graph), {n.name: n for n in graph.fx.nodes}
    seen: dict[tuple[object, ...], set[object]] = {}
    for p in pair(graph):
        value = reader.value(nodes[p.value])
        parts = list(value) if p.axes[0] == "n" and p.role == "recurrent" else [value]
        key = (p.tensor, p.operator, p.fan_in, p.fan_out, len(parts))
        seen.setdefault(key, set()).update(_feeds(p))
        for i, part in enumerate(parts):
            seen.setdefault((*key, i), set()).add(f"{float(part.var()):.4g}")
    counted: dict[tuple[object, ...], int] = {}
    for key, feeds in seen.items():
        if len(key) == 5:
            for i in range(key[4]):
                (variance,) = seen[(*key, i)]
                entry = (*key[1:4], variance, tuple(sorted(feeds)))
                counted[entry] = counted.get(entry, 0) + 1
    return counted


def _feeds(p) -> set[tuple[object, ...]]:
    if p.role == "recurrent":
        return {(f.activation.name,) for f in p.feeds}
    on = [(any(n in f.path for n in NORMS), "add" in f.path, "attention" in f.path) for f in p.feeds]
    return {(f.activation.name, *o) for f, o in zip(p.feeds, on, strict=True)}


def as_products(entries: dict[tuple[object, ...], int]) -> list[tuple[object, ...]]:
    """What is left where an exporter unrolls a recurrent layer into matrix products: fans, variances and activations."""
    names = [(*e[1:4], tuple(sorted({f[0] for f in e[4]}))) for e, count in entries.items() for _ in range(count)]
    return sorted(names)


@pytest.mark.parametrize(("name", "exporter"), CHOSEN)
def test_both_doors_compute_the_same(name, exporter):
    """The judge is the module itself as in training: its norms are fresh, and those that evaluation folds are put back."""
    module, inputs = build(name)
    graph = through_onnx(name, exporter, inputs)
    with torch.no_grad(), quiet():
        truth = without_noise(copy.deepcopy(module)).train()(*inputs)
    result, *_ = Executor(graph).run(*inputs)
    assert all("put back" in note for note in graph.notes)
    # A restored norm may divide by another epsilon than 1e-5, and what was folded was rounded.
    loose = {"rtol": 1e-3, "atol": 1e-4} if graph.notes else {"rtol": 1e-4, "atol": 2e-6}
    torch.testing.assert_close(result, truth, **loose)
    of_module, inputs = through_torch(name)
    if exporter in KEEPS:
        torch.testing.assert_close(result, Executor(of_module).run(*inputs)[0], rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize(("name", "exporter"), [c for c in CHOSEN if c[1] in KEEPS])
def test_both_doors_pair_the_same(name, exporter):
    of_module, inputs = through_torch(name)
    of_onnx = through_onnx(name, exporter, inputs)
    first, second = described(of_module), described(of_onnx)
    if name == "rnn" and exporter.startswith("dynamo"):
        assert as_products(first) == as_products(second)
    else:
        assert first == second


@pytest.mark.parametrize(("name", "exporter"), [c for c in CHOSEN if c[1] not in KEEPS])
def test_what_evaluation_folds_is_not_lost(name, exporter):
    """Norms may be folded into the weights and tables into constants: every matrix is still paired, with its fans."""
    of_module, inputs = through_torch(name)
    first, second = pair(of_module), pair(through_onnx(name, exporter, inputs))

    def fans(pairs):
        matrices = {(p.tensor, p.operator, p.fan_in, p.fan_out) for p in pairs if p.role != "embedding"}
        return sorted((m[2], m[3]) for m in matrices if m[1] != "lstm") + sorted({m[2:] for m in matrices if m[1] == "lstm"})

    assert fans(first) == fans(second)
    assert {f.activation.name for p in first for f in p.feeds} == {f.activation.name for p in second for f in p.feeds}


LIGHT = sorted((Path(onnx.__file__).parent / "backend/test/data/light").glob("*.onnx"))


@pytest.mark.parametrize("file", LIGHT, ids=lambda f: f.stem)
def test_the_models_that_onnx_ships_are_built_and_paired(file):
    """Every convolution and matrix product of the file is paired, in the file's own names."""
    model = onnx.load(file)
    checkpoint = load_proto(model)
    graph = from_onnx(checkpoint.program, checkpoint.arrays)
    inputs = tuple(torch.zeros([d if isinstance(d, int) else 1 for d in i.shape], dtype=i.dtype) for i in graph.inputs)
    graph = specialise(graph, inputs)
    assert graph.notes == ()
    sites = {p.site: p for p in pair(graph)}
    wanted = [n for n in model.graph.node if n.op_type in ("Conv", "Gemm", "MatMul")]
    assert {n.name or n.output[0] for n in wanted} == set(sites)
    relus = {n.input[0] for n in model.graph.node if n.op_type == "Relu"}
    for node in wanted:
        if node.output[0] in relus:
            assert "relu" in {f.activation.name for f in sites[node.name or node.output[0]].feeds}


# DenseNet, ResNet and the Inceptions take seconds a run; SqueezeNet and ShuffleNet have every operator that they have.
@pytest.mark.parametrize("stem", ["light_squeezenet", "light_shufflenet"])
def test_the_models_that_onnx_ships_run(stem):
    """Against the outputs that are stored next to them."""
    (file,) = [f for f in LIGHT if f.stem == stem]
    model = onnx.load(file)
    checkpoint = load_proto(model)
    graph = from_onnx(checkpoint.program, checkpoint.arrays)
    stored = onnx.TensorProto()
    stored.ParseFromString(file.with_name(f"{stem}_output_0.pb").read_bytes())
    expected = torch.from_numpy(numpy_helper.to_array(stored).copy())
    inputs = [torch.zeros([d if isinstance(d, int) else 1 for d in i.shape]) for i in graph.inputs]
    with torch.no_grad():
        (result,) = Executor(graph).run(*inputs)
    assert result.shape == expected.shape
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("name", MODELS)
def test_tracing_leaves_the_module_as_it_was(name):
    module, inputs = build(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    state = torch.get_rng_state()
    pair(from_module(module, inputs))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
