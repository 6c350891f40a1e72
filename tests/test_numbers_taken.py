"""Forward that takes its values out one by one is traced once, by running, and found to pass no gradient."""

import pytest
import torch
from torch import nn

import initaudit
from initaudit.graph import from_torch

X = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))


class Encoded(nn.Module):
    def __init__(self, taken):
        super().__init__()
        self.encoder, self.head, self.taken = (
            nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 8)),
            nn.Linear(8, 5),
            taken,
        )

    def forward(self, x):
        h = self.encoder(x)
        return self.head(torch.tensor(self.taken(h)).view(h.shape))


TAKEN = {
    "one by one": lambda h: [float(v) for v in h.flatten()],
    "by their places": lambda h: [h.flatten()[i].item() for i in range(h.numel())],
    "row by row": lambda h: [float(v) for row in h for v in row],
    "a list": lambda h: h.flatten().tolist(),
}


@pytest.mark.parametrize("taken", TAKEN.values(), ids=TAKEN)
def test_it_is_traced_once(taken, monkeypatch):
    traced = []
    by_running = from_torch._by_running
    monkeypatch.setattr(from_torch, "_by_running", lambda *given: traced.append(1) or by_running(*given))
    torch.manual_seed(0)
    found = initaudit.audit(Encoded(taken), X)
    assert len(traced) == 1
    (lost,) = [f for f in found.findings if f.code == "IA311"]
    assert lost.severity == "error"
    assert {lost.tensor, *lost.related} == {"encoder.0.weight", "encoder.0.bias", "encoder.2.weight", "encoder.2.bias"}


def test_a_long_line_is_taken_apart_before_any_node_is_made(monkeypatch):
    def node(*_, **__):
        raise AssertionError("a value became a node")

    monkeypatch.setattr(torch.Tensor, "__float__", node)
    with pytest.raises(ValueError, match="more than 100 numbers"), from_torch._FewNumbers():
        [float(v) for v in torch.randn(101)]


def test_a_short_line_may_be_taken_apart():
    with from_torch._FewNumbers():
        assert len(torch.randn(100).unbind()) == 100
        assert len(list(torch.randn(200, 2))) == 200
