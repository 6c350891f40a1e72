"""Biases that hold a unit or a gate, whatever comes in, are named; those of usual schemes are left alone."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import initaudit
from initaudit.pair.activation import recognise
from initaudit.rules.ia111_bias_kills_units import flat_ends

WORDS = torch.randint(10, (32, 10), generator=torch.Generator().manual_seed(0))
X = torch.randn(32, 20, generator=torch.Generator().manual_seed(0))
H = 32


class Recurrent(nn.Module):
    def __init__(self, kind, change=None, **settings):
        super().__init__()
        self.table, self.layer = nn.Embedding(10, 16), getattr(nn, kind)(16, H, batch_first=True, **settings)
        self.head = nn.Linear(H * (2 if settings.get("bidirectional") else 1), 10)
        if change is not None:
            with torch.no_grad():
                change(self.layer)

    def forward(self, words):
        return self.head(self.layer(self.table(words))[0][:, -1])


class Cells(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(10, 16), nn.LSTMCell(16, H), nn.Linear(H, 10)
        with torch.no_grad():
            self.cell.bias_ih[3 * H :] = bias

    def forward(self, words):
        h = c = torch.zeros(words.shape[0], H)
        for x in self.table(words).unbind(1):
            h, c = self.cell(x, (h, c))
        return self.head(h)


def gate(place, value, name="bias_ih_l0"):
    return lambda layer: getattr(layer, name)[place * H : (place + 1) * H].fill_(value)


def chrono(longest):
    """Tallec & Ollivier 2018: input gates that are shut for memories of up to `longest` steps."""

    def change(layer):
        bias = (torch.rand(H) * (longest - 2) + 1).log()
        layer.bias_ih_l0[:H], layer.bias_ih_l0[H : 2 * H] = -bias, bias

    return change


HELD = {
    "an output gate": (lambda: Recurrent("LSTM", gate(3, -15.0)), "layer.bias_ih_l0", "output gate"),
    "an input gate": (lambda: Recurrent("LSTM", gate(0, -15.0, "bias_hh_l0")), "layer.bias_hh_l0", "input gate"),
    "an update gate": (lambda: Recurrent("GRU", gate(1, 15.0)), "layer.bias_ih_l0", "update gate"),
    "a state": (lambda: Recurrent("RNN", gate(0, 20.0)), "layer.bias_ih_l0", "state"),
    "a second layer": (
        lambda: Recurrent("LSTM", gate(3, -15.0, "bias_ih_l1"), num_layers=2),
        "layer.bias_ih_l1",
        "output gate",
    ),
    "a cell": (lambda: Cells(-15.0), "cell.bias_ih", "output gate"),
}


@pytest.mark.parametrize(("build", "bias", "name"), HELD.values(), ids=HELD)
def test_the_bias_of_a_gate_is_named(build, bias, name):
    torch.manual_seed(0)
    found = [f for f in initaudit.audit(build(), WORDS).findings if f.severity != "info"]
    assert [(f.code, f.severity, f.tensor) for f in found] == [("IA111", "error", bias)]
    assert f"units of the {name}" in found[0].message


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("kind", "place", "value"), [("LSTM", 3, -15.0), ("GRU", 1, 15.0), ("RNN", 0, 20.0)])
def test_in_a_file_too(kind, place, value, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "model.onnx"
    torch.onnx.export(Recurrent(kind, gate(place, value)).eval(), (WORDS,), path, dynamo=False)
    found = [f for f in initaudit.audit(path).findings if f.severity != "info"]
    assert [(f.code, f.severity) for f in found] == [("IA111", "error")]
    assert "held by their bias" in found[0].message


SOUND = {
    "a forget gate at 1": lambda: Recurrent("LSTM", gate(1, 1.0)),
    "a forget gate at 15": lambda: Recurrent("LSTM", gate(1, 15.0)),
    "an output gate at -3": lambda: Recurrent("LSTM", gate(3, -3.0)),
    "an update gate at 3": lambda: Recurrent("GRU", gate(1, 3.0)),
    "memories of 30 steps": lambda: Recurrent("LSTM", chrono(30)),
    "two layers": lambda: Recurrent("LSTM", num_layers=2),
    "cells": lambda: Cells(0.0),
}


@pytest.mark.parametrize("build", SOUND.values(), ids=SOUND)
def test_gates_that_are_not_held(build):
    torch.manual_seed(0)
    assert [f.message for f in initaudit.audit(build(), WORDS).findings if f.severity != "info"] == []


def test_gates_that_are_shut_for_long_memories_are_not_blamed():
    torch.manual_seed(0)
    assert "IA111" not in {f.code for f in initaudit.audit(Recurrent("LSTM", chrono(1000)), WORDS).findings}


class Clamp(nn.Module):
    def __init__(self, low, high):
        super().__init__()
        self.low, self.high = low, high

    def forward(self, x):
        return x.clamp(self.low, self.high)


def plain(activation, bias):
    layers = [nn.Linear(20, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 5)]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight)
        nn.init.constant_(layer.bias, bias)
    return nn.Sequential(*layers)


CLAMPS = {
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "hardsigmoid": nn.Hardsigmoid,
    "from -2 to 3": lambda: Clamp(-2, 3),
    "to 1": lambda: Clamp(None, 1),
    "from 0 to 20": lambda: Clamp(0, 20),
}


@pytest.mark.parametrize("activation", CLAMPS.values(), ids=CLAMPS)
def test_a_bias_above_a_clamp_is_named(activation):
    torch.manual_seed(0)
    found = [f for f in initaudit.audit(plain(activation(), 60.0), X).findings if f.severity != "info"]
    assert [(f.code, f.severity) for f in found] == [("IA111", "error")]
    assert "never leave the flat top" in found[0].message
    assert "zeros_" in found[0].help


@pytest.mark.parametrize("activation", [nn.ReLU6, nn.ReLU, nn.GELU, nn.Hardswish], ids=lambda a: a.__name__)
@pytest.mark.parametrize("bias", [0.1, 1.0])
def test_a_small_bias_is_no_fault(activation, bias):
    torch.manual_seed(0)
    assert "IA111" not in {f.code for f in initaudit.audit(plain(activation(), bias), X).findings}


@pytest.mark.parametrize(
    ("function", "ends"),
    [
        (lambda z: np.maximum(z, 0), (0, math.inf)),
        (lambda z: 1e-4 * np.maximum(z, 0), (0, math.inf)),
        (lambda z: np.clip(z, 0, 6), (0, 6)),
        (lambda z: np.clip(z, -2, 3), (-2, 3)),
        (lambda z: z * np.clip(z / 6 + 0.5, 0, 1), (-3, math.inf)),
        (lambda z: np.maximum(z, 0) ** 2, (0, math.inf)),
        (np.tanh, (-math.inf, math.inf)),
        (lambda z: np.where(z > 0, z, np.expm1(np.minimum(z, 0))), (-math.inf, math.inf)),
        (lambda z: np.where(z > 0, z, 0.01 * z), (-math.inf, math.inf)),
        (lambda z: z, (-math.inf, math.inf)),
    ],
)
def test_where_an_activation_ends_flat(function, ends):
    assert flat_ends(recognise(function)) == pytest.approx(ends, abs=2e-3)
