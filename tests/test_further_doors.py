"""Architectures beyond those of `zoo`, audited as a module and as the file that an exporter wrote of it: one judgement."""

from __future__ import annotations

import collections
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import EXPORTERS, FirstOutput, quiet, without_noise

import initaudit


class Autoencoder(nn.Module):
    """Variational, with both parameters of its code and a decoder of transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 16, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 4, 2, 1), nn.LeakyReLU(0.2))
        self.mean, self.spread, self.start = nn.Linear(512, 16), nn.Linear(512, 16), nn.Linear(16, 512)
        self.up = nn.Sequential(
            nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1), nn.Sigmoid()
        )

    def forward(self, x):
        h = self.down(x).flatten(1)
        return self.up(self.start(self.mean(h) + 0.5 * torch.exp(0.5 * self.spread(h))).view(-1, 32, 4, 4))


class Squeeze(nn.Module):
    """Channels scaled by what the whole image says about them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels // 4, 1), nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x):
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.SiLU(), Squeeze(16),
            nn.Conv2d(16, 32, 3, 2, 1, bias=False), nn.InstanceNorm2d(32, affine=True), nn.ELU(), Squeeze(32),
            nn.AvgPool2d(2), nn.PixelShuffle(2),
        )  # fmt: skip
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.layers(x).mean((2, 3)))


class Dilated(nn.Module):
    """Causal convolutions with weight norm and residuals."""

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.weight_norm
        self.convs = nn.ModuleList(norm(nn.Conv1d(32 if i else 8, 32, 3, dilation=2**i)) for i in range(4))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            y = F.relu(conv(F.pad(x, (2 * 2**i, 0))))
            x = x + y if i else y
        return self.head(x[..., -1])


class Mixer(nn.Module):
    """Layers over positions and over channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 10)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(4))
        self.over = nn.ModuleList(
            nn.Sequential(nn.Linear(n, 64), nn.GELU(), nn.Linear(64, n)) for _ in range(2) for n in (16, 32)
        )

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        for i in range(0, 4, 2):
            x = x + self.over[i](self.norms[i](x).mT).mT
            x = x + self.over[i + 1](self.norms[i + 1](x))
        return self.head(x.mean(1))


class Translator(nn.Module):
    """A GRU reads, two layers of LSTM write."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(100, 16), nn.Linear(32, 100)
        self.reader = nn.GRU(16, 32, batch_first=True)
        self.writer = nn.LSTM(16, 32, num_layers=2, batch_first=True)

    def forward(self, first, second):
        return self.head(self.writer(self.table(second))[0] + self.reader(self.table(first))[1][-1][:, None])


class Experts(nn.Module):
    """A soft mixture of experts whose weights are packed."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(32, 4), nn.Linear(32, 5)
        self.up, self.down = nn.Parameter(torch.randn(4, 32, 64) * 0.25), nn.Parameter(torch.randn(4, 64, 32) * 0.18)

    def forward(self, x):
        hidden = torch.einsum("bi,eij->bej", x, self.up).relu()
        return self.head(torch.einsum("be,bej,ejk->bk", self.router(x).softmax(-1), hidden, self.down))


class Queries(nn.Module):
    """Learned queries sent through a layer and asked against the input: no weight, though they depend on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(5, 16) * 0.25)
        self.q, self.k, self.v, self.head = (nn.Linear(16, n) for n in (16, 16, 16, 3))

    def forward(self, x):
        scores = self.q(self.tokens) @ self.k(x).transpose(1, 2) / 4
        return self.head(torch.relu(scores.softmax(-1) @ self.v(x)).mean(1))


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return FirstOutput(ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=4)))


def images() -> tuple[torch.Tensor, ...]:
    return (torch.randn(4, 3, 16, 16),)


NETWORKS = {
    "autoencoder": (Autoencoder, images),
    "excited": (Excited, images),
    "dilated": (Dilated, lambda: (torch.randn(4, 8, 20),)),
    "mixer": (Mixer, images),
    "translator": (Translator, lambda: (torch.randint(0, 100, (2, 7)), torch.randint(0, 100, (2, 6)))),
    "experts": (Experts, lambda: (torch.randn(8, 32),)),
    "queries": (Queries, lambda: (torch.randn(4, 6, 16),)),
    "vit": (vit, images),
}
CASES = [(n, "legacy_training") for n in NETWORKS if n not in ("mixer", "vit")]  # the older exporter has no .mT
CASES += [(n, "dynamo") for n in ("mixer", "vit", "queries")]


def weights(audit) -> dict[tuple[object, ...], int]:
    """How often each kind of weight occurs: role, fans, ratios to four digits, activations."""
    return collections.Counter(
        (
            layer.role, layer.fan_in, layer.fan_out, layer.groups,
            *(None if r is None else f"{r:.4g}" for r in layer.ratio.values()),
            tuple(sorted({a.name for a in layer.activations})),
        )
        for layer in audit.layers
    )  # fmt: skip


@pytest.mark.parametrize(("name", "exporter"), CASES)
def test_both_doors_judge_the_same(name, exporter):
    make, inputs = NETWORKS[name]
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(0)
        module, x = without_noise(make()), inputs()
        model = EXPORTERS[exporter](copy.deepcopy(module), x)
        first, second = initaudit.audit(module.train(exporter != "dynamo"), x), initaudit.audit(model)
    assert (first.verdict, first.report.phase) == (second.verdict, second.report.phase)
    assert {f.code for f in first.findings} == {f.code for f in second.findings}
    assert weights(first) == weights(second)
    assert first.risk["vanishing"] == pytest.approx(second.risk["vanishing"], abs=0.1)
    assert first.risk["exploding"] == pytest.approx(second.risk["exploding"], abs=0.1)
