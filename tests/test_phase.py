"""Init, trained or mixed: on real networks before and after training, and on made-up evidence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from initaudit import audit
from initaudit.expect.phase import TensorRecord, phase_of
from initaudit.expect.recognise import recognise
from initaudit.expect.schemes import site_of
from initaudit.measure.moments import measure
from initaudit.measure.observation import observe


def network(init):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    if init == "normal(0.02)":
        for m in net:
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, 0.02)
                nn.init.zeros_(m.bias)
    return net


def train(net, steps=300, skip=()):
    digits = load_digits()
    x, y = torch.tensor(digits.images / 16, dtype=torch.float32), torch.tensor(digits.target)
    optimizer = torch.optim.Adam([p for n, p in net.named_parameters() if n not in skip], lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (32,))
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net


def records(net):
    found = []
    for name, module in net.named_modules():
        if isinstance(module, nn.Linear):
            w, b = module.weight.detach().numpy(), module.bias.detach().numpy()
            site = site_of(w.shape, ("o", "i"))
            found.append(TensorRecord(f"{name}.weight", "weight", measure(w), recognise(observe(w), site)))
            own = site_of(b.shape, ("o",), fans=(w.shape[1], w.shape[0]))
            found.append(TensorRecord(f"{name}.bias", "bias", measure(b), recognise(observe(b), own), f"{name}.weight"))
        elif isinstance(module, nn.LayerNorm):
            found.append(TensorRecord(f"{name}.weight", "scale", measure(module.weight.detach().numpy())))
            found.append(TensorRecord(f"{name}.bias", "bias", measure(module.bias.detach().numpy())))
    return found


@pytest.mark.parametrize("init", ["default", "normal(0.02)"])
def test_before_after_and_with_a_layer_left_out(init):
    assert phase_of(records(network(init))).phase == "init"
    trained = phase_of(records(train(network(init))))
    assert trained.phase == "trained"
    assert trained.moved > 0
    partly = phase_of(records(train(network(init), skip=("4.weight", "4.bias"))))
    assert partly.phase == "mixed"
    assert partly.tensors["4.weight"] == "init"
    assert partly.tensors["1.weight"] == "trained"
    assert "biases and scales" in str(partly)


def weight(name, values):
    array = np.asarray(values, np.float32)
    return TensorRecord(name, "weight", measure(array), recognise(observe(array), site_of(array.shape, ("o", "i"))))


def vector(name, kind, values, bias_of=None):
    return TensorRecord(name, kind, measure(np.asarray(values, np.float32)), None, bias_of)


RNG = np.random.default_rng(0)
FRESH = RNG.normal(0, 0.02, (64, 80))
MOVED = FRESH + np.outer(RNG.normal(size=64), RNG.uniform(0, 1, 80)) * 0.02


@pytest.mark.parametrize(
    ("found", "phase"),
    [
        ([], "unknown"),
        ([weight("a", FRESH), weight("b", FRESH)], "init"),
        ([weight("a", MOVED), weight("b", MOVED)], "trained"),
        # A sine table is no draw, and a model with it and untouched biases is fresh all the same.
        (
            [weight("a", FRESH), weight("t", MOVED), vector("b", "bias", np.zeros(64), "a"), vector("s", "scale", np.ones(64))],
            "init",
        ),
        # A small normal weight that looks fresh but whose bias moved was trained; one whose bias stayed was not.
        (
            [weight("a", FRESH), vector("b", "bias", RNG.normal(0, 1, 64), "a"), vector("s", "scale", RNG.normal(1, 0.1, 64))],
            "trained",
        ),
        (
            [
                *(weight("a", FRESH), vector("ab", "bias", np.zeros(64), "a"), weight("m", MOVED)),
                *(vector("mb", "bias", RNG.normal(0, 1, 64), "m"), vector("s", "scale", RNG.normal(1, 0.1, 64))),
            ],
            "mixed",
        ),
        # Scales that one law drew in every layer were not trained; those whose means differ from layer to layer were.
        ([weight("a", FRESH), *(vector(f"s{i}", "scale", RNG.normal(1, 0.02, 256)) for i in range(4))], "init"),
        ([weight("a", FRESH), *(vector(f"s{i}", "scale", RNG.normal(1 + i / 99, 0.02, 256)) for i in range(4))], "trained"),
        # Biases of one value, as of several critics, were drawn or trained: nothing tells.
        (
            [
                *(weight("a", FRESH), weight("b", FRESH), vector("ab", "bias", [-0.0167], "a")),
                *(vector("bb", "bias", [0.03], "b"), vector("cb", "bias", [-0.01], "c")),
            ],
            "init",
        ),
        # Running statistics that moved prove only that data passed.
        (
            [
                weight("a", FRESH),
                vector("r", "running_mean", RNG.normal(0, 1, 64)),
                vector("v", "running_var", np.full(64, 2.0)),
            ],
            "init",
        ),
    ],
)
def test_made_up_evidence(found, phase):
    assert phase_of(found).phase == phase


class Masked(nn.Module):
    """A convolution under a mask, then a value and a gate that starts open, behind a transposed one."""

    def __init__(self):
        super().__init__()
        self.up, self.conv, self.pair = nn.ConvTranspose2d(4, 16, 4, 2, 1), nn.Conv2d(16, 64, 5, padding=2), nn.Linear(64, 128)
        self.register_buffer("mask", torch.tril(torch.ones(5, 5)))
        with torch.no_grad():
            self.pair.weight[64:] *= 1e-4
            self.pair.bias.copy_((torch.arange(128) >= 64).float())

    def forward(self, x):
        h = torch.relu(self.up(x))
        h = torch.relu(torch.nn.functional.conv2d(h, self.conv.weight * self.mask, self.conv.bias, padding=2)).mean((2, 3))
        value, gate = self.pair(h).chunk(2, -1)
        return value * torch.sigmoid(gate)


def test_masks_gates_and_biases_of_other_conventions_are_fresh():
    torch.manual_seed(0)
    assert audit(Masked(), (torch.randn(4, 4, 8, 8),)).report.phase == "init"


def test_units_that_are_all_equal_are_no_sign_of_training():
    """No step makes two units equal: they were written so, and rules about the start of training apply."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(40, 24), nn.Flatten(1), nn.Linear(72, 25), nn.ReLU(), nn.Linear(25, 5))
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.dim() == 2):
            p.copy_(p[:1].clone().expand_as(p))
    found = audit(model, torch.randint(0, 40, (16, 3)))
    assert found.report.phase != "trained"
    assert found.verdict == "fail"


class Splines(nn.Module):
    """Kolmogorov-Arnold layers as they are often written: curves that were fitted to noise beside a default matrix."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.base, self.curves = nn.Linear(width_in, width_out, bias=False), nn.Parameter(torch.empty(width_out, width_in * 8))
        with torch.no_grad():
            noise = torch.randn(width_out, width_in, 3) @ torch.randn(3, 8) * torch.rand(width_out, 1, 1) ** 2
            self.curves.copy_(noise.flatten(1))
        self.centres = torch.linspace(-2, 2, 8)

    def forward(self, x):
        bumps = torch.exp(-((x.unsqueeze(-1) - self.centres) ** 2)).flatten(1)
        return self.base(nn.functional.silu(x)) + nn.functional.linear(bumps, self.curves)


class Memory(nn.Module):
    """A default LSTM, and layers by Xavier with a gain of nobody's and biases of N(0, 0.01)."""

    def __init__(self):
        super().__init__()
        self.lstm, self.hidden, self.out = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 32), nn.Linear(32, 4)
        for layer in (self.hidden, self.out):
            nn.init.xavier_uniform_(layer.weight, 1.4)
            nn.init.normal_(layer.bias, 0, 0.01)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.lstm(x)[0][:, -1])))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("make", "shape"),
    [(lambda: nn.Sequential(Splines(6, 16), Splines(16, 16), Splines(16, 2)), (32, 6)), (Memory, (32, 10, 8))],
)
def test_laws_that_nobody_knows_are_no_training(make, shape, seed):
    torch.manual_seed(seed)
    found = audit(make(), torch.randn(shape))
    assert [f.code for f in found.findings if f.severity != "info"] == []
    assert found.report.phase in ("init", "unknown")
