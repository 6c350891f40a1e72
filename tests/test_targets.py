"""What virtual steps have to learn: judged by least squares, and by networks of few inputs that were trained."""

import itertools
import math

import pytest
import torch
from torch import nn

import initaudit
from initaudit.probe.targets import numbers_of, targets_of


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def explained(x, y):
    """The share of the variance of y [rows, ...] that a linear function of x [rows, numbers] explains."""
    x = torch.cat([x.double(), torch.ones(len(x), 1, dtype=torch.float64)], 1)
    y = y.reshape(len(x), -1).double()
    left = y - x @ torch.linalg.lstsq(x, y).solution
    return float(1 - left.square().sum() / (y - y.mean(0)).square().sum())


# inputs, places of the output, and the numbers [rows, n] that a target is a function of
LINEAR = {
    "a time": ([torch.randn(32, 1)], (), lambda x: x[0]),
    "two inputs": ([torch.randn(32, 2), torch.randn(32, 3, 2)], (), lambda x: torch.cat([x[0], x[1].flatten(1)], 1)),
    "a time and what all share": ([torch.randn(32, 1), torch.randn(5, 7)], (), lambda x: x[0]),
    "places": ([torch.randn(32, 20, 3)], (20,), lambda x: x[0].reshape(-1, 3)),
    "pixels": ([torch.randn(32, 3, 8, 8)], (8, 8), lambda x: x[0].movedim(1, -1).reshape(-1, 3)),
    "pixels without channels": ([torch.randn(32, 8, 8)], (8, 8), lambda x: x[0].reshape(-1, 1)),
    "a latent": ([torch.randn(32, 4)], (6, 6), lambda x: x[0]),
    "not at zero": ([1e4 + torch.randn(32, 2).double()], (), lambda x: x[0]),
}


@pytest.mark.parametrize("name", LINEAR)
def test_few_numbers_have_linear_targets(name):
    inputs, places, by = LINEAR[name]
    targets = targets_of(inputs, 32, 32, places, drawn())
    numbers = targets.numbers(1)
    assert numbers.shape == (32, math.prod(places), 1)
    assert explained(by(inputs), numbers) == pytest.approx(1, abs=1e-6)
    assert float(numbers.mean()) == pytest.approx(0, abs=1e-4)
    assert float(numbers.std()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("inputs", "places"),
    [
        ([torch.randn(32, 64)], ()),
        ([torch.randn(32, 31)], ()),
        ([torch.randint(9, (32, 1))], ()),
        ([torch.randn(32, 1), torch.randint(9, (32, 1))], ()),
        ([torch.randn(32, 2, 70)], (2,)),
        ([torch.ones(32, 3)], ()),
        ([torch.full((32, 3), math.inf)], ()),
        ([torch.randn(7, 3)], ()),
        ([], ()),
    ],
)
def test_what_can_be_told_apart_is_to_be_remembered(inputs, places):
    """By the same draws whatever the inputs are."""
    count = math.prod(places)
    targets = targets_of(inputs, 32, 32, places, drawn())
    assert targets.given is None
    order = torch.randperm(32 * count, generator=drawn())
    assert torch.equal(targets.classes(5).flatten(), (torch.arange(32 * count) % 5)[order])


@pytest.mark.parametrize("given", [1, 4, 64])
@pytest.mark.parametrize("count", [2, 3, 10, 32, 100])
def test_classes_are_as_frequent_as_can_be(given, count):
    targets = targets_of([torch.randn(32, given)], 32, 32, (), drawn())
    sizes = torch.bincount(targets.classes(count).flatten(), minlength=count)
    assert int(sizes.sum()) == 32
    assert int(sizes.max()) - int(sizes.min()) <= 1


def test_two_classes_of_a_line_are_its_halves():
    x = torch.randn(32, 1)
    label = targets_of([x], 32, 32, (), drawn()).classes(2).flatten()[x.flatten().argsort()]
    assert int((label[1:] != label[:-1]).sum()) == 1
    halves = targets_of([x], 32, 32, (), drawn()).halves(1).flatten()[x.flatten().argsort()]
    assert int((halves[1:] != halves[:-1]).sum()) == 1


def test_numbers_of_an_example():
    assert numbers_of([torch.randn(8, 3, 2), torch.randn(8), torch.randn(4, 4)], 8) == 7
    assert numbers_of([torch.randn(8, 3), torch.randint(2, (8,))], 8) is None
    assert numbers_of([torch.tensor(1.0)], 1) is None


def perceptron(*sizes, act):
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [nn.Linear(a, b)] + [act()] * (i < len(sizes) - 2)
    return nn.Sequential(*layers)


def glorot(net):
    for layer in net[::2]:
        nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net


# network and inputs; each was trained on a sine of its inputs by SGD and Adam at benchmarks/few_inputs.py's rates
FEW = {
    "a time, tanh": (lambda: perceptron(1, 20, 20, 20, 1, act=nn.Tanh), torch.linspace(-2, 2, 64)[:, None]),
    "a time, SiLU": (lambda: perceptron(1, 32, 32, 32, 1, act=nn.SiLU), torch.rand(64, 1)),
    "a time, sigmoid": (lambda: perceptron(1, 20, 1, act=nn.Sigmoid), torch.rand(64, 1)),
    "a time, ReLU": (lambda: perceptron(1, 64, 64, 1, act=nn.ReLU), torch.rand(64, 1)),
    "place and time": (lambda: glorot(perceptron(2, *[20] * 8, 1, act=nn.Tanh)), 2 * torch.rand(64, 2) - 1),
    "two classes of a plane": (lambda: perceptron(2, 32, 32, 2, act=nn.Tanh), torch.randn(64, 2)),
    "a time, ten classes": (lambda: perceptron(1, 32, 32, 10, act=nn.GELU), torch.randn(64, 1)),
    "places of a field": (lambda: perceptron(2, 64, 64, 3, act=nn.Tanh), torch.rand(8, 30, 2)),
}


def audited(net, inputs):
    found = initaudit.audit(net, inputs)
    return found, [(f.code, f.severity) for f in found.findings if f.severity != "info"]


@pytest.mark.parametrize("name", FEW)
def test_a_network_of_few_inputs_is_left_alone(name):
    torch.manual_seed(0)
    net, inputs = FEW[name][0](), FEW[name][1]
    found, said = audited(net, inputs)
    assert said == []
    assert max(found.risk["untrainable"].values()) < 0.2
    assert audited(net, None)[1] == []


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("fault", ["equal", "tiny", "dead"])
def test_and_a_sick_one_is_told(name, fault):
    torch.manual_seed(0)
    net = FEW[name][0]()
    with torch.no_grad():
        # Units that are alike part at once where what reads them tells them apart: the last layer is made equal too.
        for layer in net[::2] if fault == "equal" else net[:-1:2]:
            if fault == "equal":
                layer.weight.fill_(0.1)
                layer.bias.fill_(0.1)
            elif fault == "tiny":
                layer.weight.mul_(1e-4)
                layer.bias.zero_()
            else:
                layer.bias.fill_(-1e3)
    assert audited(net, FEW[name][1])[1] != []
