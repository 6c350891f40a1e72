"""The same network, batch and seed through both doors: the same risk and the same verdict, healthy or sick."""

from __future__ import annotations

import copy
import math

import onnx
import pytest
import torch
from torch import nn
from zoo import EXPORTERS, ResNet, UNet, encoder, quiet

import initaudit
from initaudit.graph.from_onnx import from_onnx
from initaudit.load import load_proto


class Recurrent(nn.Module):
    """Reads the last output of a sequence, or the last state alone."""

    def __init__(self, kind: str, state: bool = False, **options: object) -> None:
        super().__init__()
        self.rnn = getattr(nn, kind)(6, 24, batch_first=True, **options)
        self.head, self.state = nn.Linear(24, 4), state

    def forward(self, x):
        outputs, last = self.rnn(x)
        last = last[0] if isinstance(last, tuple) else last
        return self.head(last[-1] if self.state else outputs[:, -1])


class MixerBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.tokens = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.units = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        x = x + self.tokens(self.norms[0](x).transpose(1, 2)).transpose(1, 2)
        return x + self.units(self.norms[1](x))


def stack(depth, act, gain):
    layers = [f for i in range(depth) for f in (nn.Linear(64 if i else 20, 64), act())]
    model = nn.Sequential(*layers, nn.Linear(64, 5))
    for p in model.parameters():
        nn.init.zeros_(p) if p.dim() == 1 else nn.init.normal_(p, 0, gain / math.sqrt(p.shape[1]))
    return model


def convs():
    layers = [f for i in range(4) for f in (nn.Conv2d(16 if i else 3, 16, 3, padding=1), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))
    for p in model.parameters():
        nn.init.zeros_(p) if p.dim() == 1 else nn.init.kaiming_normal_(p)
    return model


def scaled(model, factor):
    """Every matrix and kernel times `factor`."""
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(factor)
    return model


def mixer():
    return nn.Sequential(nn.Linear(6, 16), MixerBlock(), MixerBlock(), nn.LayerNorm(16), nn.Flatten(), nn.Linear(128, 4))


FLAT, IMAGE, SERIES = (16, 20), (8, 3, 16, 16), (16, 8, 6)
NETWORKS = {
    "mlp": (lambda: stack(6, nn.ReLU, math.sqrt(2)), FLAT),
    "chaotic mlp": (lambda: stack(20, nn.Tanh, 4.0), FLAT),
    "vanishing mlp": (lambda: stack(20, nn.Tanh, 0.3), FLAT),
    "cnn": (convs, IMAGE),
    "vanishing cnn": (lambda: scaled(convs(), 0.03), IMAGE),
    "resnet": (ResNet, IMAGE),
    "transformer": (encoder, (8, 7, 12)),
    "transformer of large weights": (lambda: scaled(encoder(), 100.0), (8, 7, 12)),
    "lstm": (lambda: Recurrent("LSTM"), SERIES),
    "lstm of zero weights": (lambda: scaled(Recurrent("LSTM"), 0.0), SERIES),
    "gru": (lambda: Recurrent("GRU"), SERIES),
    "last state of a gru": (lambda: Recurrent("GRU", state=True), SERIES),
    "rnn of large weights": (lambda: scaled(Recurrent("RNN", state=True), 8.0), SERIES),
    "unet": (UNet, (4, 3, 16, 16)),
    "mixer": (mixer, SERIES),
    "mixer of tiny weights": (lambda: scaled(mixer(), 1e-3), SERIES),
}
SICK = ("chaotic mlp", "vanishing mlp", "vanishing cnn", "lstm of zero weights")


def both(name, exporter="legacy"):
    make, shape = NETWORKS[name]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        model, x = make().train(), torch.randn(shape)
        file = EXPORTERS[exporter](copy.deepcopy(model), (x,))
    return initaudit.audit(model, (x,)), initaudit.audit(file, (x,))


def flat(risk):
    return {**{k: v for k, v in risk.items() if k != "untrainable"}, **risk["untrainable"]}


@pytest.mark.parametrize("name", NETWORKS)
def test_both_doors_judge_alike(name):
    module, file = both(name)
    first, second = flat(module.risk), flat(file.risk)
    assert first.keys() == second.keys()
    assert {k: v for k, v in first.items() if abs(v - second[k]) > 0.02} == {}, second
    assert module.verdict == file.verdict
    assert (module.verdict == "fail") == (name in SICK) or name not in (*SICK, "mlp", "cnn", "resnet", "gru", "lstm")


def test_the_start_of_a_recurrence_is_no_weight_and_merged_biases_have_owners_of_their_own():
    _, shape = NETWORKS["gru"]
    for name, weights in (("last state of a gru", {"rnn", "head"}), ("mlp", None)):
        make, shape = NETWORKS[name]
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)
            model = make()
            file = EXPORTERS["legacy"](copy.deepcopy(model), (torch.randn(shape),))
        checkpoint = load_proto(file)
        graph = from_onnx(checkpoint.program, checkpoint.arrays)
        trained = [c for c in graph.constants.values() if c.trainable]
        assert sum(math.prod(c.shape) for c in trained) == sum(p.numel() for p in model.parameters())
        if weights is None:
            assert len(trained) == len(list(model.parameters()))
            assert len(onnx.load_from_string(file.SerializeToString()).graph.initializer) < len(trained)
