"""Branches that start closed on purpose learn from their last layer on, and what vanishes inside them is told all the same."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from initaudit import audit
from initaudit.auditing.probing import summary
from initaudit.auditing.run import evidence_on
from initaudit.config import Config
from initaudit.load import from_module
from initaudit.rules.ia313_untrainable import Untrainable

WIDTH = 24


def layers(*sizes):
    found = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.SiLU())]
    return nn.Sequential(*found)


class Step(nn.Module):
    """Points move along their differences, each by a number that a network makes of features and distances.

    Satorras et al. 2021, "E(n) equivariant graph neural networks", equations 3 to 6: the last layer of the number's network is
    drawn by Xavier with a gain of 0.001.
    """

    def __init__(self, last, gain):
        super().__init__()
        self.edge, self.number = layers(2 * WIDTH + 1, WIDTH, WIDTH), layers(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, 1, bias=False)
        self.node = None if last else nn.Sequential(*layers(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        nn.init.xavier_uniform_(self.out.weight, gain=gain)

    def forward(self, h, x):
        apart = x[:, :, None] - x[:, None]
        pair = [h[:, :, None].expand(-1, -1, h.shape[1], -1), h[:, None].expand(-1, h.shape[1], -1, -1)]
        edges = self.edge(torch.cat([*pair, apart.square().sum(-1, keepdim=True)], -1))
        x = x + (apart * self.out(self.number(edges))).mean(2)
        return (h if self.node is None else h + self.node(torch.cat([h, edges.sum(2)], -1))), x


class Points(nn.Module):
    def __init__(self, depth=4, gain=0.001, ends=True):
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.steps = nn.ModuleList([Step(ends and i == depth - 1, gain) for i in range(depth)])

    def forward(self, h, x):
        h = self.first(h)
        for step in self.steps:
            h, x = step(h, x)
        return x


def audited(change=None, **options):
    torch.manual_seed(0)
    model = Points(**options)
    if change is not None:
        with torch.no_grad():
            change(model)
    return audit(model, (torch.randn(16, 6, 3), torch.randn(16, 6, 3)))


def codes(found, *severities):
    return {f.code for f in found.findings if f.severity in (severities or ("error", "warning"))}


@pytest.mark.parametrize("gain", [0.001, 1e-5])
def test_a_closed_branch_has_lost_nothing(gain):
    assert not codes(audited(gain=gain)) & {"IA101", "IA103", "IA301", "IA303"}


def test_what_vanishes_inside_a_closed_branch_is_told():
    def fade(model):
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.out_features > 1:
                module.weight.mul_(0.01)

    assert codes(audited(fade), "error") & {"IA101", "IA103", "IA303"}


def test_small_layers_in_series_close_no_branch():
    torch.manual_seed(0)
    model = nn.Sequential(*layers(32, *[48] * 6), nn.Linear(48, 4))
    with torch.no_grad():
        for i in (2, 4, 6):
            model[i].weight.mul_(1e-3)
    assert codes(audit(model, torch.randn(64, 32))) & {"IA101", "IA103", "IA301", "IA303", "IA307"}


def test_what_is_left_over_at_the_end_of_a_stack_is_no_error():
    found = [f for f in audited(ends=False).findings if f.code == "IA311"]
    assert [f.severity for f in found] == ["warning"]
    assert all(name.startswith("steps.3.node") for f in found for name in (f.tensor, *f.related))
    # As many as are used: half of a network is no end of a stack.
    left = [f for f in audited(ends=False, depth=2).findings if f.code == "IA311"]
    assert [f.severity for f in left] == ["error"]


def evidence(model, inputs):
    return evidence_on(from_module(model), Config(), inputs=inputs)


def test_further_steps_are_asked_before_a_network_is_called_untrainable():
    torch.manual_seed(0)
    found = evidence(Points(), (torch.randn(16, 6, 3), torch.randn(16, 6, 3)))
    assert min(found.risk.untrainable_sgd, found.risk.untrainable_adam) > 0.5
    assert found.trace.persisted.losses[-1] < 0.5
    assert not list(Untrainable().check(found))
    assert any("of adam at 0.003 learnt" in line for line in summary(found.trace))


def test_further_steps_that_learn_nothing_excuse_nothing():
    found = evidence(*Untrainable.invalid()[0].build())
    assert found.trace.persisted.task == "memory"
    assert min(found.trace.persisted.losses) > 0.9
    assert list(Untrainable().check(found))


def test_who_remembers_because_neighbours_are_unrelated_has_not_learnt():
    """Of the networks that were trained, deep ones of twice He's weights remember in 100 steps, and fail."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(29) for m in (nn.Linear(96, 96), nn.Tanh())], nn.Linear(96, 10))
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 2.4 / 96**0.5)
    found = evidence(model, torch.randn(64, 96))
    assert min(found.risk.untrainable_sgd, found.risk.untrainable_adam) > 0.5
    assert found.trace.persisted is None
