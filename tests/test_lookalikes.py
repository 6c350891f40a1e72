"""Healthy networks of unusual make that a linter of weights is tempted to alarm about."""

from __future__ import annotations

import copy
import math

import lookalikes as look
import onnx
import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional as F

from initaudit import audit


def linear(fan_in, fan_out, std, bias=True):
    layer = nn.Linear(fan_in, fan_out, bias=bias)
    nn.init.normal_(layer.weight, 0, std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class Attention(nn.Module):
    def __init__(self, width, heads=4, *, scaled=True):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5 if scaled else 1.0
        self.q, self.k, self.v, self.o = (linear(width, width, width**-0.5, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).flatten(2))


class Residual(nn.Module):
    def __init__(self, branch, scale=None):
        super().__init__()
        self.branch, self.scale = branch, None if scale is None else nn.Parameter(scale)

    def forward(self, x):
        y = self.branch(x)
        return x + (y if self.scale is None else self.scale * y)


class PostNorm(nn.Module):
    def __init__(self, width, branch, alpha):
        super().__init__()
        self.branch, self.norm, self.alpha = branch, nn.LayerNorm(width), alpha

    def forward(self, x):
        return self.norm(self.alpha * x + self.branch(x))


def deepnorm(alpha=True):
    """Wang et al. 2022; without alpha the post-norm transformer as published, whose gradients are the same at both ends."""
    depth, width = 12, 48
    up, down = ((2 * depth) ** 0.25, (8 * depth) ** -0.25) if alpha else (1.0, 1.0)
    blocks = []
    for _ in range(depth):
        attention = Attention(width)
        mlp = nn.Sequential(nn.Linear(width, 96), nn.ReLU(), nn.Linear(96, width))
        for w, gain in (
            (attention.q, 1),
            (attention.k, 1),
            (attention.v, down),
            (attention.o, down),
            (mlp[0], down),
            (mlp[2], down),
        ):
            nn.init.xavier_normal_(w.weight, gain)
        blocks += [PostNorm(width, attention, up), PostNorm(width, mlp, up)]
    return nn.Sequential(nn.Linear(16, width), *blocks, nn.Linear(width, 5)), torch.randn(4, 8, 16)


def mup():
    """Yang et al. 2022: queries and the output layer start at zero, hidden variance is 1/fan_in whatever the fan."""
    width, blocks = 64, []
    for _ in range(4):
        attention = Attention(width)
        nn.init.zeros_(attention.q.weight)
        mlp = nn.Sequential(linear(width, 4 * width, width**-0.5), nn.GELU(), linear(4 * width, width, (4 * width) ** -0.5))
        blocks += [Residual(nn.Sequential(nn.LayerNorm(width), m)) for m in (attention, mlp)]
    return nn.Sequential(nn.Linear(16, width), *blocks, nn.LayerNorm(width), linear(width, 9, 0.0)), torch.randn(4, 8, 16)


def t5():
    """Raffel et al. 2020: the scores' scale sits in the queries' weights."""
    width, blocks = 64, []
    for _ in range(3):
        attention = Attention(width, scaled=False)
        nn.init.normal_(attention.q.weight, 0, (width * 16) ** -0.5)
        mlp = nn.Sequential(linear(width, 256, width**-0.5), nn.ReLU(), linear(256, width, 256**-0.5))
        blocks += [Residual(nn.Sequential(nn.RMSNorm(width), m)) for m in (attention, mlp)]
    return nn.Sequential(nn.Embedding(99, width), *blocks, nn.RMSNorm(width), linear(width, 99, 0.05)), torch.randint(
        0, 99, (4, 8)
    )


def fixup():
    """Zhang et al. 2019: zeros at the end of every branch and in the head, so that at first nothing gets a gradient."""
    blocks = []
    for _ in range(6):
        first, last = (nn.Conv2d(16, 16, 3, padding=1, bias=False) for _ in range(2))
        nn.init.normal_(first.weight, 0, math.sqrt(2 / 144) * 6**-0.5)
        nn.init.zeros_(last.weight)
        blocks.append(Residual(nn.Sequential(nn.ReLU(), first, nn.ReLU(), last), torch.ones(1)))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), linear(16, 5, 0.0))
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *blocks, head), torch.randn(8, 3, 10, 10)


def adaptive_norm_zero():
    """Peebles & Xie 2023 (DiT): modulation and output start at zero."""

    class Block(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.norm, self.modulation = nn.LayerNorm(width, elementwise_affine=False), linear(width, 3 * width, 0.0)
            self.mlp = nn.Sequential(linear(width, 96, 0.2), nn.GELU(), linear(96, width, 0.1))

        def forward(self, x, c):
            shift, scale, gate = self.modulation(F.silu(c)).chunk(3, -1)
            return x + gate * self.mlp(self.norm(x) * (1 + scale) + shift)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.embed = nn.Linear(8, 48), nn.Linear(8, 48)
            self.blocks, self.last = nn.ModuleList(Block(48) for _ in range(3)), linear(48, 8, 0.0)

        def forward(self, x):
            c, x = self.embed(x.flip(-1)), self.first(x)
            for block in self.blocks:
                x = block(x, c)
            return self.last(x)

    return Net(), torch.randn(16, 8)


def bilinear_upsampling():
    """Long et al. 2015 (FCN): depthwise kernels of one positive formula."""
    up = nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12, bias=False)
    taps = torch.tensor([0.25, 0.75, 0.75, 0.25])
    up.weight.data.copy_((taps[:, None] * taps).expand(12, 1, 4, 4))
    again = copy.deepcopy(up)
    body = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    return nn.Sequential(body, up, nn.ReLU(), nn.Conv2d(12, 12, 1), again, nn.ReLU(), nn.Conv2d(12, 4, 1)), torch.randn(
        8, 3, 8, 8
    )


def fourier_features():
    """Tancik et al. 2020: a large projection that ends in sines."""

    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("frequencies", 10 * torch.randn(2, 64))

        def forward(self, x):
            phase = 2 * math.pi * x @ self.frequencies
            return torch.cat([phase.sin(), phase.cos()], -1)

    return nn.Sequential(Features(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 3)), torch.rand(64, 2)


def looks_linear():
    """Balduzzi et al. 2017: each unit beside its negative before ReLU, which passes the whole signal."""
    layers = [nn.Linear(32, 64, bias=False)]
    layers += [m for _ in range(6) for m in (nn.ReLU(), nn.Linear(64, 64, bias=False))]
    for i, layer in enumerate(layers[::2]):
        block = nn.init.orthogonal_(torch.empty(32, 32))
        layer.weight.data.copy_(torch.cat([block, -block]) if i == 0 else torch.cat([torch.cat([block, -block], 1)] * 2))
        layer.weight.data[32:] = -layer.weight.data[:32]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(64, 5)), torch.randn(16, 32)


def temporal_convolutions():
    """Bai et al. 2018: N(0, 0.01) under weight norm, with the framework's biases."""
    blocks = []
    for dilation in (1, 2, 4):
        pair = [nn.Conv1d(16, 16, 3, padding=dilation, dilation=dilation) for _ in range(2)]
        for conv in pair:
            nn.init.normal_(conv.weight, 0, 0.01)
        a, b = (nn.utils.parametrizations.weight_norm(c) for c in pair)
        blocks.append(Residual(nn.Sequential(a, nn.ReLU(), b, nn.ReLU())))
    return nn.Sequential(nn.Conv1d(4, 16, 1), *blocks, nn.Flatten(), nn.Linear(256, 3)), torch.randn(8, 4, 16)


def word_vectors():
    """Mikolov et al. 2013: a table of U(±1/2d) and one of zeros."""

    class Skipgram(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.contexts = nn.Embedding(300, 32), nn.Embedding(300, 32)
            nn.init.uniform_(self.words.weight, -1 / 64, 1 / 64)
            nn.init.zeros_(self.contexts.weight)

        def forward(self, ids):
            return (self.words(ids[:, 0]) * self.contexts(ids[:, 1])).sum(-1)

    return Skipgram(), torch.randint(0, 300, (32, 2))


HEALTHY = (
    *(deepnorm, mup, t5, fixup, adaptive_norm_zero, bilinear_upsampling, fourier_features, looks_linear),
    *(temporal_convolutions, word_vectors),
)


def alarms(model, inputs):
    return [(f.code, f.tensor, f.message) for f in audit(model, inputs).findings if f.severity != "info"]


@pytest.mark.parametrize("build", [*HEALTHY, *look.LOOKALIKES], ids=lambda f: f.__name__)
def test_a_healthy_network_is_left_alone(build):
    torch.manual_seed(0)
    model, inputs = build()
    assert alarms(model, (inputs,)) == []


@pytest.mark.parametrize("build", look.LOOKALIKES, ids=lambda f: f.__name__)
def test_and_so_it_is_after_training(build):
    torch.manual_seed(1)
    model, inputs = build()
    assert alarms(look.trained(model, inputs).eval(), (inputs,)) == []


# The older exporter has no operator for RMSNorm.
FILES = (
    *((look.grouped_queries, "dynamo"), (look.rezero, "dynamo"), (look.depthwise, "legacy_training")),
    *((look.layer_scale, "legacy_training"), (look.zero_gammas, "legacy_training"), (look.siren, "legacy_training")),
    *((look.tied_head, "legacy_training"), (look.relative_positions, "legacy_training")),
)


@pytest.mark.parametrize(("build", "exporter"), FILES, ids=lambda x: getattr(x, "__name__", x))
def test_and_so_is_its_file(build, exporter, tmp_path):
    torch.manual_seed(2)
    model, inputs = build()
    with zoo.quiet():
        onnx.save(zoo.EXPORTERS[exporter](model, (inputs,)), tmp_path / "model.onnx")
    assert alarms(str(tmp_path / "model.onnx"), None) == []


def test_a_post_norm_stack_keeps_its_gradient():
    """Autograd is the judge: the first block's gradient is as large as the last's, and the audit must not say otherwise."""
    torch.manual_seed(0)
    model, inputs = deepnorm(alpha=False)
    model(inputs).square().mean().backward()
    norms = [float(block.branch[0].weight.grad.norm()) for block in (model[2], model[-2])]
    assert 0.3 < norms[0] / norms[1] < 30
    assert [(f.code, f.message) for f in audit(model, (inputs,)).findings if f.severity != "info"] == []


@pytest.mark.parametrize(
    ("norm", "images", "alarmed"),
    [
        (lambda n: nn.GroupNorm(8, n), True, True),
        (lambda n: nn.GroupNorm(8, n), False, False),
        (nn.LayerNorm, False, False),
        (nn.RMSNorm, False, True),
        (nn.BatchNorm2d, True, True),
    ],
)
def test_a_mean_is_harmless_where_a_norm_of_the_units_alone_takes_it_away(norm, images, alarmed):
    """SGD is the judge: on digits-like inputs the shifted network learns as fast as the other, or not."""
    losses = []
    for shift in (0.0, 2.0):
        torch.manual_seed(0)
        layers, i = [], 3 if images else 32
        for _ in range(3):
            layers += [nn.Conv2d(i, 32, 3, padding=1) if images else nn.Linear(i, 32), norm(32), nn.ReLU()]
            i = 32
        model = nn.Sequential(*layers, *([nn.AdaptiveAvgPool2d(1), nn.Flatten()] if images else []), nn.Linear(i, 4))
        with torch.no_grad():
            for layer in layers[::3]:
                nn.init.kaiming_normal_(layer.weight).add_(shift * layer.weight.std())
                nn.init.zeros_(layer.bias)
        y = torch.randint(4, (128,))
        x = torch.randn(4, *((3, 6, 6) if images else (32,)))[y] + 0.5 * torch.randn(128, *((3, 6, 6) if images else (32,)))
        if shift:
            assert ("IA107" in {code for code, _, _ in alarms(model, (x[:32],))}) == alarmed
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(15):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
    assert (losses[1] > 1.3 * losses[0]) == alarmed
