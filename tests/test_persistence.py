"""What does not learn a task of memory by design is asked to become another network of its kind before it is blamed."""

import pytest
import torch
from torch import nn

from initaudit.auditing.probing import summary
from initaudit.auditing.run import evidence_on
from initaudit.config import Config
from initaudit.load import from_module
from initaudit.probe.persistence import persist
from initaudit.probe.verdict import Risk, may_follow
from initaudit.rules.ia313_untrainable import Untrainable


class Sums(nn.Module):
    """An identity recurrence (Le et al. 2015): it sees sums over time, on which random labels do not hang."""

    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.RNN(2, 48, nonlinearity="relu", batch_first=True), nn.Linear(48, 1)
        nn.init.eye_(self.rnn.weight_hh_l0)
        nn.init.normal_(self.rnn.weight_ih_l0, 0, 0.1)
        for bias in (self.rnn.bias_hh_l0, self.rnn.bias_ih_l0):
            nn.init.zeros_(bias)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Density(nn.Module):
    """Affine couplings that begin closed (Dinh et al. 2017), and the logarithm of a density, which is far from 1."""

    def __init__(self, numbers=4, depth=8, width=32):
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(numbers, width), nn.ReLU(), nn.Linear(width, 2 * numbers)) for _ in range(depth)
        )
        for net in self.nets:
            nn.init.zeros_(net[-1].weight)
            nn.init.zeros_(net[-1].bias)

    def forward(self, x):
        change = torch.zeros(x.shape[0])
        for i, net in enumerate(self.nets):
            keep = ((torch.arange(x.shape[1]) + i) % 2).float()
            scale, shift = net(x * keep).chunk(2, 1)
            scale = torch.tanh(scale) * (1 - keep)
            x, change = x * scale.exp() + shift * (1 - keep), change + scale.sum(1)
        return -10 * x.square().sum(1) + change


class Turning(nn.Module):
    """Points that move along their differences (Satorras et al. 2021, whose gain is 0.001): it turns with its inputs."""

    def __init__(self, width=24, depth=3):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.edges, self.nodes, self.moves = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for _ in range(depth):
            self.edges.append(nn.Sequential(nn.Linear(2 * width + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()))
            self.nodes.append(nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width)))
            self.moves.append(nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1, bias=False)))
            nn.init.xavier_uniform_(self.moves[-1][-1].weight, gain=0.001)

    def forward(self, h, x):
        h, n = self.first(h), h.shape[1]
        for edge, node, move in zip(self.edges, self.nodes, self.moves, strict=True):
            apart = x[:, :, None] - x[:, None]
            pair = h[:, :, None].expand(-1, -1, n, -1), h[:, None].expand(-1, n, -1, -1), apart.square().sum(-1, keepdim=True)
            e = edge(torch.cat(pair, -1))
            x, h = x + (apart * move(e)).mean(2), h + node(torch.cat([h, e.sum(2)], -1))
        return x


def marked(length=30):
    x = torch.rand(64, length, 2)
    x[..., 1] = torch.eye(length)[torch.rand(64, length).argsort(1)[:, :2]].sum(1)
    return (x,)


def bent():
    x = torch.randn(64, 4)
    x[:, 1] = x[:, 0] ** 2
    return (2 * x,)


def charged():
    charge = torch.randint(2, (64, 5)) * 2.0 - 1
    return torch.stack([charge, torch.ones(64, 5)], -1), torch.randn(64, 5, 3)


HEALTHY = {
    "a sum": (Sums, marked),
    "a density": (Density, bent),
    "a symmetry": (Turning, charged),
}


@pytest.mark.parametrize(("build", "inputs"), HEALTHY.values(), ids=HEALTHY)
def test_what_learns_another_task_than_memory_is_left_alone(build, inputs):
    torch.manual_seed(0)
    model = build()
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = evidence_on(from_module(model), Config(), inputs=inputs())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert not list(Untrainable().check(found))
    later = found.trace.persisted
    assert later.task == "following"
    assert later.losses[0] >= 1 > 0.5 > later.losses[-1]
    assert any("with other weights" in line for line in summary(found.trace))


def graph_of(model, inputs):
    return evidence_on(from_module(model), Config(), inputs=inputs).graph


def test_what_is_dead_follows_nothing():
    torch.manual_seed(0)
    model, given = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), (torch.randn(64, 8),)
    nn.init.constant_(model[0].bias, -30.0)
    later = persist(graph_of(model, given), given, 0, None)
    assert later.task == "memory"
    assert later.losses[-1] > 0.9


class Mixed(nn.Module):
    """A deep graph network without skips: of a node it keeps how many neighbours it has (Li et al. 2018)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(24))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight)
        self.head = nn.Linear(16, 4)

    def forward(self, x, near):
        for layer in self.layers:
            x = torch.relu(near @ layer(x))
        return self.head(x)


def test_to_follow_along_one_line_is_no_learning():
    torch.manual_seed(0)
    near = ((torch.rand(40, 40) < 0.2) | torch.eye(40).bool()).float()
    near = torch.maximum(near, near.T)
    scale = near.sum(1) ** -0.5
    given = torch.randn(40, 16), scale[:, None] * near * scale
    later = persist(graph_of(Mixed(), given), given, 0, None)
    assert later.task == "memory"
    assert later.losses[-1] > 0.9


def risk(symmetry=0.0, exploding=0.0):
    return Risk(symmetry, 0.0, exploding, 1.0, 1.0)


def test_neither_what_explodes_nor_copies_are_excused_by_it():
    assert may_follow(risk())
    assert not may_follow(risk(exploding=0.9))
    assert not may_follow(risk(symmetry=0.9))
