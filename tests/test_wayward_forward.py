"""Networks whose forward follows the data, wants plain numbers, or takes several inputs side by side."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import initaudit
import initaudit.graph.from_torch
import initaudit.probe.run
from initaudit.probe.dry_run import DryRun
from initaudit.probe.inputs import for_module


class Branches(nn.Module):
    """A layer is only called where the signal is large enough."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        for layer in self.layers:
            if x.abs().mean() > 1e-3:
                x = F.relu(layer(x))
        return self.head(x)


class Halts(nn.Module):
    """Adaptive computation: steps until the units say that it is enough."""

    def __init__(self):
        super().__init__()
        self.cell, self.halt, self.head = nn.GRUCell(8, 32), nn.Linear(32, 1), nn.Linear(32, 4)

    def forward(self, x):
        state, spent = torch.zeros(x.shape[0], 32), 0.0
        while spent < 0.99:
            state = self.cell(x, state)
            spent += float(torch.sigmoid(self.halt(state)).mean())
        return self.head(state)


class Experts(nn.Module):
    """Each expert sees the rows that were sent to it."""

    def __init__(self, width=32, count=4):
        super().__init__()
        self.gate = nn.Linear(width, count)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width)) for _ in range(count))
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        weight, chosen = self.gate(x).softmax(-1).topk(2, -1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            if rows.numel():
                out = out.index_add(0, rows, expert(x[rows]) * weight[rows, slot, None])
        return self.head(x + out)


class ThroughNumpy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 32), nn.Linear(32, 2)

    def forward(self, x):
        return self.head(F.relu(self.body(x - float(x.detach().cpu().numpy().mean()))))


class Critic(nn.Module):
    """A state and an action side by side: 17 + 6 features in any split."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(23, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, state, action):
        return self.net(torch.cat([state, action], -1))


class Physics(nn.Module):
    """A coordinate and a time."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 1))

    def forward(self, x, t):
        return self.net(torch.cat([x, t], -1))


ACTIVATIONS = {
    Branches: ("layers.0.weight", "relu"),
    Halts: ("cell.weight_hh", "tanh"),
    Experts: ("experts.0.0.weight", "gelu"),
    ThroughNumpy: ("body.weight", "relu"),
    Critic: ("net.0.weight", "relu"),
    Physics: ("net.0.weight", "tanh"),
}


@pytest.mark.parametrize("network", ACTIVATIONS, ids=lambda n: n.__name__)
def test_it_is_audited_without_being_told_its_inputs(network):
    torch.manual_seed(0)
    audit = initaudit.audit(network())
    tensor, activation = ACTIVATIONS[network]
    fed = {layer.tensor: {a.name for a in layer.activations} for layer in audit.layers}
    assert activation in fed[tensor]
    assert (audit.verdict, [f.code for f in audit.findings if f.severity != "info"]) == ("pass", [])
    assert audit.report.phase in ("init", "unknown")


@pytest.mark.parametrize("network", [Critic, Physics], ids=lambda n: n.__name__)
def test_the_inputs_that_are_found_run_for_real(network):
    module = network()
    positional, keywords = for_module(module, shapes={}, batch=4, seed=0)
    result = module(*positional, **keywords)
    assert (result.shape[0], result.shape[-1]) == (4, 1)


def test_a_run_without_arithmetic_refuses_what_a_real_one_refuses():
    module = nn.Linear(8, 4)
    truths = torch.ones(2, 8, dtype=torch.bool)
    assert not DryRun(module).run([truths], {}, ["input"]).ok
    with pytest.raises(RuntimeError):
        module(truths)


def test_no_gradient_is_claimed_where_the_way_to_the_output_was_not_run():
    """Given inputs of a type that the first product refuses: everything behind it is unknown, not dead."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    graph = initaudit.graph.from_torch.from_module(net, (torch.randn(4, 8),))
    trace = initaudit.probe.run.probe(graph, (torch.ones(4, 8, dtype=torch.bool),))
    assert trace.unknown
    assert trace.parameters == {}


class TakesNumbers(nn.Module):
    """An encoder whose codes are taken out of the tensor, all of them or the first few."""

    def __init__(self, few):
        super().__init__()
        self.encoder, self.head, self.few = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8)), nn.Linear(8, 5), few

    def forward(self, x):
        codes = self.encoder(x)
        return self.head(codes + codes[0].sum().item() if self.few else torch.tensor(codes.tolist()))


def test_a_forward_that_takes_many_numbers_is_run_and_not_traced_number_by_number(monkeypatch):
    """torch.export makes a symbol of each number, at some 10 milliseconds: a batch of 256 would take 20 seconds."""
    symbols = []
    create = torch.fx.experimental.symbolic_shapes.ShapeEnv.create_unbacked_symfloat
    monkeypatch.setattr(
        torch.fx.experimental.symbolic_shapes.ShapeEnv,
        "create_unbacked_symfloat",
        lambda self: symbols.append(1) or create(self),
    )
    torch.manual_seed(0)
    found = initaudit.audit(TakesNumbers(few=False), torch.randn(256, 20))
    assert len(symbols) <= initaudit.graph.from_torch._NUMBERS
    assert any("numbers out of tensors" in note for note in found.report.notes)
    assert [(f.code, f.severity, f.tensor) for f in found.findings] == [("IA311", "error", "encoder.0.weight")]


def test_a_forward_that_takes_few_numbers_is_traced():
    torch.manual_seed(0)
    found = initaudit.audit(TakesNumbers(few=True), torch.randn(32, 20))
    assert found.report.notes == ()
    assert found.verdict == "pass"
