"""Copied experts are named, and not the router of zeros that gets no gradient because of them."""

import copy

import pytest
import torch
from torch import nn

import initaudit

X = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))


class Listed(nn.Module):
    """One module an expert; `best` are weighed, all where it is 0."""

    def __init__(self, copied, zero, width=32, best=0):
        super().__init__()
        made = [nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 5)) for _ in range(4)]
        self.experts = nn.ModuleList(copy.deepcopy(made[0]) for _ in made) if copied else nn.ModuleList(made)
        self.router, self.best = nn.Linear(20, 4), best
        if zero:
            for parameter in self.router.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x):
        share, made = self.router(x).softmax(-1), torch.stack([e(x) for e in self.experts], 1)
        if self.best:
            share, chosen = share.topk(self.best, -1)
            share = share / share.sum(-1, keepdim=True)
            made = made.gather(1, chosen[..., None].expand(-1, -1, 5))
        return (share[..., None] * made).sum(1)


class Stacked(nn.Module):
    """All experts in one tensor."""

    def __init__(self, copied, zero):
        super().__init__()
        self.router, self.head = nn.Linear(20, 4), nn.Linear(16, 3)
        self.experts = nn.Parameter(torch.randn(1, 20, 16).repeat(4, 1, 1) / 4 if copied else torch.randn(4, 20, 16) / 4)
        if zero:
            for parameter in self.router.parameters():
                nn.init.zeros_(parameter)

    def forward(self, x):
        hidden = torch.einsum("bi,eid->bed", x, self.experts).relu()
        return self.head(torch.einsum("be,bed->bd", self.router(x).softmax(-1), hidden))


KINDS = {
    "listed": Listed,
    "of few weights": lambda copied, zero: Listed(copied, zero, width=2),
    "the best two": lambda copied, zero: Listed(copied, zero, best=2),
    "stacked": Stacked,
}


def alarms(build, copied, zero):
    torch.manual_seed(0)
    return [
        (f.code, f.severity, f.tensor.split(".")[0])
        for f in initaudit.audit(build(copied, zero), X).findings
        if f.severity != "info"
    ]


@pytest.mark.parametrize("build", KINDS.values(), ids=KINDS)
def test_the_copies_are_named_and_not_the_router(build):
    (found,) = alarms(build, copied=True, zero=True)
    assert found in (("IA203", "error", "experts"), ("IA202", "error", "experts"))


def test_a_router_of_zeros_between_experts_of_their_own_is_healthy():
    assert [alarms(build, copied=False, zero=True) for build in (Listed, Stacked)] == [[], []]


def test_a_drawn_router_tells_copies_apart():
    assert alarms(Listed, copied=True, zero=False) == [("IA203", "warning", "experts")]


def test_a_zero_that_chooses_nothing_is_blamed_itself():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 5)
    )
    nn.init.zeros_(model[4].weight)
    model[2].weight.data.copy_(torch.randn(32, 32) / 4)
    assert {f.code for f in initaudit.audit(model, X).findings if f.severity == "error"} <= {"IA201", "IA207", "IA307"}
