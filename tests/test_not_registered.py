"""Weights that no optimizer is given are named by their way in Python. Judge: torch's own list of parameters."""

import pytest
import torch
from torch import nn

import initaudit

OUTSIDE = nn.Linear(8, 8)
X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


class Box:
    """An object that is no module."""

    def __init__(self, inner):
        self.inner = inner


class Net(nn.Module):
    """Layers held by `hold`, called by `call`, and a head."""

    def __init__(self, hold, call):
        super().__init__()
        torch.manual_seed(0)
        self.call, self.head = call, nn.Linear(8, 3)
        hold(self)

    def forward(self, x):
        return self.head(self.call(self, x))


def listed(net):
    net.layers = [nn.Linear(8, 8), nn.Linear(8, 8)]


def hidden(net):
    net.inner = nn.Module()
    object.__setattr__(net.inner, "stem", nn.Linear(8, 8))


def nothing(net):
    pass


def through(net, x):
    for layer in net.layers:
        x = torch.relu(layer(x))
    return x


def forces(net, x):
    x = x.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(net.head(x).square().sum(), x, create_graph=True)
    return slope


def with_no_grad(net, x):
    with torch.no_grad():
        return through(net, x)


# What holds the layers, how forward calls them, the first name, what the help begins with
STRAY = {
    "list": (listed, through, "layers.0.weight", "model.layers = torch.nn.ModuleList(model.layers)"),
    "dict": (
        lambda net: setattr(net, "by", {"a": nn.Linear(8, 8)}),
        lambda net, x: net.by["a"](x),
        "by.a.weight",
        "model.by = torch.nn.ModuleDict(model.by)",
    ),
    "nested": (
        lambda net: setattr(net, "by", [{"a.b": (nn.Linear(8, 8),)}]),
        lambda net, x: net.by[0]["a.b"][0](x),
        "by.0.a_b.0.weight",
        "hold them in",
    ),
    "object": (
        lambda net: setattr(net, "box", Box(nn.Sequential(nn.Linear(8, 8)))),
        lambda net, x: net.box.inner(x),
        "box.inner.0.weight",
        "hold them in",
    ),
    "attribute that is hidden": (hidden, lambda net, x: net.inner.stem(x), "inner.stem.weight", "hold them in"),
    "tensor": (
        lambda net: setattr(net, "scale", torch.ones(8, requires_grad=True)),
        lambda net, x: x * net.scale,
        "scale",
        "model.scale = torch.nn.Parameter(model.scale)",
    ),
    "tensors": (
        lambda net: setattr(net, "scales", [torch.ones(8, requires_grad=True)]),
        lambda net, x: x * net.scales[0],
        "scales.0",
        "model.scales = torch.nn.ParameterList(model.scales)",
    ),
    "global": (nothing, lambda net, x: OUTSIDE(x), "", "hold them in"),
    "drawn in forward": (nothing, lambda net, x: nn.Linear(8, 8)(x), "", "build the layer in __init__"),
}


@pytest.mark.parametrize(("hold", "call", "name", "help"), STRAY.values(), ids=STRAY)
def test_a_weight_that_is_not_registered_is_named(hold, call, name, help):
    found = [f for f in initaudit.audit(Net(hold, call), X).findings if f.code == "IA314"]
    assert [(f.severity, f.tensor) for f in found] == [("warning", name)]
    assert found[0].help.startswith(help)


@pytest.mark.parametrize(("hold", "call", "help"), [(h, c, t) for h, c, _, t in STRAY.values() if t.startswith("model.")])
def test_the_line_that_is_proposed_registers_it(hold, call, help):
    net = Net(hold, call)
    before = len(list(net.parameters()))
    exec(help, {"model": net, "torch": torch})
    assert len(list(net.parameters())) > before
    assert "IA314" not in {f.code for f in initaudit.audit(net, X).findings}


def test_where_nothing_else_is_trainable_it_is_an_error():
    net = Net(listed, through)
    net.head.requires_grad_(False)
    found = initaudit.audit(net, X).findings
    assert [(f.code, f.severity) for f in found if f.severity == "error"] == [("IA314", "error")]


HEALTHY = {
    "a ModuleList": (lambda net: setattr(net, "layers", nn.ModuleList([nn.Linear(8, 8)])), through),
    "a list of registered layers": (
        lambda net: setattr(net, "layers", [net.head]),
        lambda net, x: x @ net.layers[0].weight.T @ net.head.weight,
    ),
    "frozen layers in a list": (lambda net: setattr(net, "layers", [nn.Linear(8, 8).requires_grad_(False)]), through),
    "a constant": (lambda net: setattr(net, "mask", torch.ones(8)), lambda net, x: x * net.mask),
    "layers under no_grad": (listed, with_no_grad),
    "forces": (nothing, forces),
    "zeros made in forward": (nothing, lambda net, x: torch.cat([x[:, 1:], nn.Parameter(torch.zeros(len(x), 1))], 1)),
    "layers that are not called": (listed, lambda net, x: x),
}


@pytest.mark.parametrize(("hold", "call"), HEALTHY.values(), ids=HEALTHY)
def test_what_is_no_weight_of_training_is_left_alone(hold, call):
    assert "IA314" not in {f.code for f in initaudit.audit(Net(hold, call), X).findings}


def test_inputs_that_ask_for_a_gradient_are_no_weights():
    net = Net(nothing, lambda net, x: x)
    assert "IA314" not in {f.code for f in initaudit.audit(net, X.clone().requires_grad_()).findings}


def test_layers_of_a_list_have_the_names_and_lines_of_their_way():
    def held(net):
        net.layers = [nn.Linear(8, 8).requires_grad_(False)]
        nn.init.constant_(net.layers[0].weight, 1e-9)

    report = initaudit.audit(Net(held, through), X)
    assert report.layers[0].tensor == "layers.0.weight"
    assert not any("get_parameter" in f.help for f in report.findings)
