"""Gradients at every place of use through ONNX files, against autograd on the torch module that they were written from.

What a file shares (tied weights, initializers that an exporter merged because they are equal) has one gradient a place of use;
in the module that judges, every name has a parameter of its own, so its gradient is that of one place too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import onnx
import pytest
import torch
from torch import nn
from zoo import EXPORTERS, KEEPS, MODELS, build, exportable, exported, quiet, without_noise

from initaudit.graph.constness import constant_nodes
from initaudit.graph.execute import specialise
from initaudit.graph.from_onnx import from_onnx
from initaudit.load import load_proto
from initaudit.probe.backward import backward
from initaudit.probe.passes import Pass, batch_of, cotangents
from initaudit.probe.run import probe

# Gates of torch in the order of ONNX: i f g o -> i o f g, r z n -> z r n.
_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
# The older exporter keeps one initializer for equal values in evaluation mode; folding a norm changes the weight itself.
CASES = [(n, e) for n in MODELS for e in ("dynamo", "legacy_training") if exportable(n, e) and (n, e) != ("rnn", "dynamo")]
CASES += [(n, "legacy") for n in ("encoder", "bert", "bilstm", "cnn")]


@dataclass(frozen=True)
class Site:
    """A tensor at one place of use, or a parameter of the judge: in order of execution."""

    name: str
    order: int
    value: torch.Tensor
    gradient: torch.Tensor


def copied_encoder() -> nn.Module:
    """torch starts the layers of an encoder as copies of one another, so exporters that merge equal values merge the layers."""
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(12, 32), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), nn.Linear(32, 5))


def untied(module: nn.Module) -> nn.Module:
    """A copy in which every name of a parameter holds a parameter of its own."""
    module = copy.deepcopy(module)
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        owner, _, last = name.rpartition(".")
        module.get_submodule(owner)._parameters[last] = nn.Parameter(parameter.detach().clone())
    for m in module.modules():
        if isinstance(m, nn.RNNBase):
            m._flat_weights = [getattr(m, n) for n in m._flat_weights_names]
    return module


def judged(module: nn.Module, inputs: tuple[torch.Tensor, ...], cotangent: torch.Tensor) -> list[Site]:
    """Every parameter with its gradient, as ONNX lays it out where that is another way.

    Two things of torch stand in no file: the dropout inside an attention, which is no module of its own, and the row of a
    table that is kept out of training.
    """
    module = untied(module)
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            part.dropout = 0.0
        elif isinstance(part, nn.Embedding):
            part.padding_idx = None
    first: dict[str, int] = {}

    def note(name: str) -> None:
        first.setdefault(name, len(first))

    for name, part in module.named_modules():
        part.register_forward_pre_hook(lambda *_, name=name: note(name))
    with quiet():
        (module(*inputs) * cotangent).sum().backward()
    found = []
    for name, part in module.named_modules():
        order = next(first[n] for n in _outwards(name) if n in first)
        own = {n: p for n, p in part.named_parameters(recurse=False) if p.grad is not None}
        if isinstance(part, nn.RNNBase):
            found += _recurrent(name, part, order)
        else:
            found += [Site(f"{name}.{n}", order, p.detach(), p.grad) for n, p in own.items()]
    return found


def _outwards(name: str) -> Iterator[str]:
    """The module and those around it: a weight may be used by a module that holds its owner."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def _recurrent(name: str, part: nn.RNNBase, order: int) -> list[Site]:
    """W, R and B of every layer, the directions stacked."""
    gates = _GATES[type(part).__name__]
    ends = ("", "_reverse") if part.bidirectional else ("",)

    def laid(parameter: torch.Tensor) -> torch.Tensor:
        chunks = parameter.chunk(len(gates))
        return torch.cat([chunks[g] for g in gates])

    found = []
    for i in range(part.num_layers):
        for kind in ("weight_ih", "weight_hh", "bias"):
            stacked = []
            for what in ("value", "gradient"):
                names = ("bias_ih", "bias_hh") if kind == "bias" else (kind,)
                rows = []
                for end in ends:
                    held = [getattr(part, f"{n}_l{i}{end}") for n in names]
                    rows.append(torch.cat([laid(p.grad if what == "gradient" else p.detach()) for p in held]))
                stacked.append(torch.stack(rows))
            found.append(Site(f"{name}.{kind}_l{i}", order, *stacked))
    return found


def through_onnx(model: onnx.ModelProto, inputs: tuple[torch.Tensor, ...]):
    """The sites as the probe differentiates them, the gradients of parameters, the cotangent that it drew, and its trace."""
    checkpoint = load_proto(model)
    graph = specialise(from_onnx(checkpoint.program, checkpoint.arrays), inputs)
    run = Pass(graph, constant_nodes(graph.fx))
    run.run(*inputs)
    ends = run.ends()
    drawn = cotangents(ends, batch_of(inputs), torch.Generator().manual_seed(0))
    place = {n: i for i, n in enumerate(graph.fx.nodes)}
    gradients = backward(run, ends, drawn, keep=True)
    sites = [Site(f"{n.name}:{w.name}", place[n], run.leaves[n, w].detach(), g) for (n, w), g in gradients.items()]
    return sites, run.parameter_gradients(gradients), drawn[0], probe(graph, inputs, seed=0)


def layouts(site: Site) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Value and gradient in the layouts in which exporters write a matrix or a vector."""
    value, gradient = site.value.squeeze(), site.gradient.squeeze()
    yield value, gradient
    if value.dim() == 2:
        yield value.mT, gradient.mT


def laid_like(site: Site, parameter: Site) -> torch.Tensor | None:
    """The gradient at a site in the layout of the parameter, where it holds that parameter's values; else None.

    Of a table that is always read from the top a file may hold the first rows only.
    """
    wanted = parameter.value.squeeze()
    for value, gradient in layouts(site):
        if value.shape == wanted.shape and torch.equal(value, wanted):
            return gradient
        if value.shape[1:] == wanted.shape[1:] and wanted.dim() == 2 and torch.equal(value, wanted[: len(value)]):
            return torch.cat([gradient, torch.zeros(len(wanted) - len(value), *gradient.shape[1:])])
    return None


def compared(parameters: list[Site], sites: list[Site]) -> dict[str, tuple[float, Site]]:
    """The relative difference of every parameter's gradient and the site that it belongs to: each site once.

    Of several sites with equal values the nearest gradient counts; that they are in the right order is for the caller to see.
    """
    left, found = list(sites), {}
    for parameter in parameters:
        held = [(s, g) for s in left if (g := laid_like(s, parameter)) is not None]
        assert held, f"{parameter.name} is used nowhere in the file"
        norm = max(float(parameter.gradient.norm()), 1e-30)
        errors = [float((g - parameter.gradient.squeeze()).norm()) / norm for _, g in held]
        best = min(range(len(held)), key=errors.__getitem__)
        found[parameter.name] = errors[best], held[best][0]
        left.remove(held[best][0])
    return found


def check(module: nn.Module, inputs, model: onnx.ModelProto) -> None:
    sites, _, cotangent, trace = through_onnx(model, inputs)
    parameters = judged(module, inputs, cotangent)
    # A gradient that is zero but for rounding (the bias in front of a batch norm, that of an attention's keys) has no
    # relative error: it is compared with the largest.
    largest = max(float(p.gradient.norm()) for p in parameters)
    tiny = {p.name for p in parameters if float(p.gradient.norm()) < 1e-5 * largest}
    found = compared([p for p in parameters if p.name not in tiny], sites)
    assert {name: error for name, (error, _) in found.items() if not error < 1e-5} == {}
    orders = {p.name: p.order for p in parameters}
    for a, (_, first) in found.items():
        for b, (_, second) in found.items():
            if first.order < second.order and first.value.shape == second.value.shape:
                assert orders[a] <= orders[b], f"{a} is told at the place of {b}"
    seen = {f"{r.node}:{r.weight}": r.gradient_norm for r in trace.weights}
    told = {site.name: float(site.gradient.norm()) for site in sites if site.name in seen}
    assert told
    assert seen == pytest.approx(told, rel=1e-4, abs=1e-7 * largest)


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_gradients_per_site_are_those_of_the_module(name, exporter):
    module, inputs = build(name)
    model = onnx.load_from_string(exported(name, exporter))
    module = without_noise(module).train(exporter in KEEPS)
    check(module, inputs, model)


def test_gradients_of_a_recurrence_that_is_written_out():
    """Its weights are used at every step, at the first one on a state of zeros: their sum is the parameter's own."""
    module, inputs = build("rnn")
    sites, summed, cotangent, _ = through_onnx(onnx.load_from_string(exported("rnn", "dynamo")), inputs)
    (module(*inputs) * cotangent).sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(summed[name], parameter.grad, rtol=1e-5, atol=1e-6)
    steps = [s for s in sites if torch.equal(s.value, module.rnn.weight_hh_l0.detach().mT)]
    assert len(steps) == 7
    first = min(steps, key=lambda s: s.order)
    assert not first.gradient.any()  # nothing has been remembered yet


@pytest.mark.parametrize("exporter", ["legacy_training", "legacy"])
def test_layers_that_are_copies_of_one_another(exporter):
    """Evaluation files hold one initializer for equal tensors: the three layers, their zero biases and the ones of norms."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        module, inputs = copied_encoder(), (torch.randn(3, 7, 12),)
        model = EXPORTERS[exporter](copy.deepcopy(module), inputs)
    assert len(model.graph.initializer) == (13 if exporter == "legacy" else len(list(module.parameters())))
    check(module.train(exporter in KEEPS), inputs, model)


def test_the_two_places_of_a_tied_head():
    """One initializer, read by a Gather and (transposed) by a product: two sites, each with its own gradient."""
    _, inputs = build("gpt2")
    model = onnx.load_from_string(exported("gpt2", "dynamo"))
    sites, summed, _, _ = through_onnx(model, inputs)
    (name,) = [t.name for t in model.graph.initializer if list(t.dims) == [200, 64]]
    pair = [s for s in sites if s.value.shape in ((200, 64), (64, 200))]
    assert len(pair) == 2
    table, head = (s.gradient if s.value.shape == (200, 64) else s.gradient.mT for s in pair)
    assert float((table - head).norm()) > 0.1 * float(head.norm())
    torch.testing.assert_close(summed[name], table + head)
