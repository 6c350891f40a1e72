"""A small cut of benchmarks/zoo.py: silence on healthy networks, and one fault at a time found at its root."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from initaudit import audit


def plain(depth: int = 8, act: type[nn.Module] = nn.ReLU, gain: float = math.sqrt(2)) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(depth):
        linear = nn.Linear(64, 64)
        nn.init.normal_(linear.weight, std=gain / 8)
        nn.init.zeros_(linear.bias)
        layers += [linear, act()]
    return nn.Sequential(*layers, nn.Linear(64, 5))


def convs() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 24), (24, 24), (24, 32), (32, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


class Block(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        for linear in (self.up, self.down):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def stream() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 48), *(Block() for _ in range(6)), nn.LayerNorm(48), nn.Linear(48, 5))


class Probe(nn.Module):
    """A learnt query that the program repeats for every example, as poolers by attention have it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 32))
        self.pool, self.head = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 5)

    def forward(self, x):
        return self.head(self.pool(self.query.repeat(len(x), 1, 1), x, x)[0][:, 0])


ROWS, IMAGES, TOKENS = (16, 64), (8, 3, 12, 12), (16, 48)
HEALTHY = {
    "plain": (plain, ROWS),
    "tanh": (lambda: plain(act=nn.Tanh, gain=5 / 3), ROWS),
    "selu": (lambda: plain(12, nn.SELU, 1.0), ROWS),
    "convolutions": (convs, IMAGES),
    "stream": (stream, TOKENS),
    "a repeated query": (Probe, (8, 6, 32)),
}


def built(make, shape):
    torch.manual_seed(0)
    return make(), torch.randn(shape)


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_network_is_passed_in_silence(name):
    module, x = built(*HEALTHY[name])
    found = audit(module, (x,))
    assert [f for f in found.findings if f.severity != "info"] == []
    assert found.verdict == "pass"


def zero(w):
    w.zero_()


def thousandfold(w):
    w.mul_(1000)


def thousandth(w):
    w.div_(1000)


def nan(w):
    w[0, 0] = math.nan


def shifted(w):
    w.add_(2 * w.std())


def overflowing(w):
    w.view(-1)[::1000] = 1e5


# The network, the weight, the fault, the codes of which the first finding may have any.
FAULTS = [
    ("plain", "8.weight", zero, ("IA201",)),
    ("tanh", "8.weight", zero, ("IA307", "IA201")),
    ("plain", "8.weight", thousandfold, ("IA102",)),
    ("plain", "8.weight", thousandth, ("IA101", "IA109")),
    ("plain", "8.weight", nan, ("IA401",)),
    ("plain", "8.weight", shifted, ("IA107",)),
    ("convolutions", "6.weight", shifted, ("IA107",)),
    ("plain", "8.weight", overflowing, ("IA402",)),
    ("stream", "2.down.weight", thousandfold, ("IA109", "IA102")),
]


@pytest.mark.parametrize(("name", "weight", "change", "codes"), FAULTS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_one_fault_is_one_finding_that_names_it(name, weight, change, codes):
    module, x = built(*HEALTHY[name])
    with torch.no_grad():
        change(module.get_parameter(weight))
    loud = [f for f in audit(module, (x,)).findings if f.severity != "info"]
    assert [(f.code in codes, f.tensor) for f in loud] == [(True, weight)]


def constant(w):
    w.fill_(0.1)


PAIRS = [
    (("4.weight", constant, "IA201"), ("12.weight", thousandth, "IA101")),
    (("4.weight", nan, "IA401"), ("12.weight", thousandfold, "IA109")),
    (("4.bias", lambda b: b.fill_(-20), "IA111"), ("12.weight", thousandth, "IA109")),
]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " and ".join(code for _, _, code in pair))
def test_two_faults_are_two_findings(pair):
    module, x = built(*HEALTHY["plain"])
    with torch.no_grad():
        for name, change, _ in pair:
            change(module.get_parameter(name))
    loud = [f for f in audit(module, (x,)).findings if f.severity != "info"]
    assert [f.code for f in loud] == [code for _, _, code in pair]
    assert [f.tensor for f in loud] == [name.replace("bias", "weight") for name, _, _ in pair]


def test_thirty_layers_that_lose_the_signal_are_one_finding():
    torch.manual_seed(0)
    loud = [f for f in audit(plain(30, gain=0.8), (torch.randn(ROWS),)).findings if f.severity != "info"]
    assert len(loud) == 1
    assert loud[0].code == "IA101"
    assert len({loud[0].tensor, *loud[0].related}) == 30
    assert "IA303" in loud[0].message


def decoder() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(16, 512), nn.ReLU(), nn.Unflatten(1, (32, 4, 4))),
        *(nn.ConvTranspose2d(32, 32, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU()),
        nn.ConvTranspose2d(16, 3, 4, 2, 1),
    )


SCALED = {
    "plain": (lambda: nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.ReLU())), nn.Linear(64, 5)), ROWS),
    "tanh": (lambda: nn.Sequential(*(m for _ in range(6) for m in (nn.Linear(64, 64), nn.Tanh())), nn.Linear(64, 5)), ROWS),
    "transposed": (decoder, (16, 16)),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("biases", [False, True])
def test_a_default_network_multiplied_by_ten_is_no_trained_one(name, biases):
    module, x = built(*SCALED[name])
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(10 if biases or p.dim() > 1 else 1)
    found = audit(module, (x,))
    assert found.report.phase in ("init", "unknown")
    (loud,) = [f for f in found.findings if f.severity != "info"]
    assert loud.code == ("IA310" if name == "transposed" else "IA102")
