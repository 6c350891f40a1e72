"""Mean-field moments against the probe's measurement, and against Monte Carlo and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import nn

from initaudit.graph.from_torch import from_module
from initaudit.probe import fields
from initaudit.probe.fields import Draws, Field
from initaudit.probe.propagation import propagate
from initaudit.probe.run import probe


class Block(nn.Module):
    def __init__(self, width, norm_first):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm_first = norm_first

    def forward(self, x):
        if self.norm_first:
            return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Bottle(nn.Module):
    def __init__(self, width):
        super().__init__()
        inner = width // 4
        self.body = nn.Sequential(
            *(nn.Conv2d(width, inner, 1), nn.GroupNorm(4, inner), nn.SiLU()),
            *(nn.Conv2d(inner, inner, 3, padding=1), nn.GroupNorm(4, inner), nn.SiLU(), nn.Conv2d(inner, width, 1)),
        )

    def forward(self, x):
        return x + self.body(x)


class Mixer(nn.Module):
    def __init__(self, tokens, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 64), nn.GELU(), nn.Linear(64, tokens))
        self.inside = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, width))

    def forward(self, x):
        x = x + self.across(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.inside(self.norm2(x))


class Written(nn.Module):
    """Attention spelled out, with a causal mask and gated feed-forward layers."""

    def __init__(self, width=64, heads=4):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up, self.down = nn.Linear(width, 160), nn.Linear(width, 160), nn.Linear(160, width)
        self.norm1, self.norm2, self.heads = nn.RMSNorm(width), nn.RMSNorm(width), heads
        self.register_buffer("mask", torch.full((16, 16), -1e9).triu(1))

    def forward(self, x):
        b, t, d = x.shape
        h = self.norm1(x)
        q, k, v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(d // self.heads) + self.mask
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def vgg(activation, norm):
    layers, inside = [], 3
    for width, blocks in ((64, 2), (96, 2), (128, 2)):
        for _ in range(blocks):
            layers += [nn.Conv2d(inside, width, 3, padding=1), norm(width), activation()]
            inside = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4, 64), activation(), nn.Linear(64, 32))


def residual(norm_first, blocks=6, width=48):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2, padding=1),
        *(Block(width, norm_first) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 32),
    )


def encoder(norm_first):
    layers = [nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=norm_first) for _ in range(3)]
    return nn.Sequential(nn.Linear(12, 64), *layers, nn.Linear(64, 32))


def without_norm(width):
    return nn.Identity()


NETWORKS = {
    "vgg, relu": (lambda: vgg(nn.ReLU, without_norm), (8, 3, 16, 16)),
    "vgg, gelu, batch norm": (lambda: vgg(nn.GELU, nn.BatchNorm2d), (8, 3, 16, 16)),
    "mlp, tanh": (lambda: nn.Sequential(*[f for _ in range(8) for f in (nn.Linear(96, 96), nn.Tanh())]), (32, 96)),
    "mlp, relu": (lambda: nn.Sequential(*[f for _ in range(8) for f in (nn.Linear(96, 96), nn.ReLU())]), (32, 96)),
    "resnet": (lambda: residual(False), (8, 3, 16, 16)),
    "resnet, norm first": (lambda: residual(True), (8, 3, 16, 16)),
    "bottlenecks, group norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 64, 3), *(Bottle(64) for _ in range(4)), nn.AvgPool2d(2)),
        (8, 3, 16, 16),
    ),
    "mixer": (lambda: nn.Sequential(nn.Linear(12, 64), *(Mixer(16, 64) for _ in range(3))), (8, 16, 12)),
    "written attention": (lambda: nn.Sequential(nn.Linear(12, 64), Written(), Written()), (8, 16, 12)),
    "encoder": (lambda: encoder(False), (8, 16, 12)),
    "encoder, norm first": (lambda: encoder(True), (8, 16, 12)),
}
ZOO = ("resnet", "densenet", "unet", "encoder", "gpt2", "bert", "llama")


def distances(module, inputs):
    """|log10(predicted / measured)| of the second moment at every edge, and how many edges were measured."""
    graph = from_module(module, inputs)
    trace, prediction = probe(graph, graph.examples), propagate(graph)
    measured = {n: s.moment2 for n, s in trace.signals.items() if s.moment2}
    found = [abs(math.log10(prediction.fields[n].moment2 / m)) for n, m in measured.items() if n in prediction.fields]
    return found, len(measured), prediction


@pytest.mark.parametrize("name", [*NETWORKS, *(f"zoo {n}" for n in ZOO)])
def test_nine_edges_in_ten_are_within_0_15_of_the_measured_second_moment(name):
    if name.startswith("zoo "):
        module, inputs = zoo.build(name[4:])
    else:
        torch.manual_seed(0)
        build, shape = NETWORKS[name]
        module, inputs = build(), (torch.randn(shape),)
    found, edges, prediction = distances(module, inputs)
    within = sum(d <= 0.15 for d in found) / len(found)
    print(f"{name}: {len(found)} of {edges} edges predicted, {within:.3f} of them within 0.15, worst {max(found):.2f}")
    assert within >= 0.9
    assert len(found) >= 0.85 * edges
    assert len(found) == edges or prediction.unknown  # what is not predicted says why


def test_what_has_no_formula_says_so_and_so_does_what_follows():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.head, self.norm = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 8), nn.LayerNorm(8)

        def forward(self, x):
            return self.norm(self.head(self.lstm(x)[0]))

    prediction = propagate(from_module(Reader(), (torch.randn(2, 5, 8),)))
    reasons = list(prediction.unknown.values())
    assert any("no formula" in r for r in reasons)
    assert any(r.startswith("downstream of") for r in reasons)
    (norm,) = [f for n, f in prediction.fields.items() if n.startswith("layer_norm")]
    assert norm.approximate
    assert norm.moment2 == pytest.approx(1.0)


def monte_carlo(field, phi, count=400_000):
    """The moments of phi over pairs that share a unit's mean."""
    generator = torch.Generator().manual_seed(1)
    u, a, b = (torch.randn(count, generator=generator, dtype=torch.float64) for _ in range(3))
    centre, apart = math.sqrt(field.across - field.mean**2), math.sqrt(field.moment2 - field.across)
    x, y = (phi(field.mean + centre * u + apart * e) for e in (a, b))
    return x.mean().item(), x.square().mean().item(), (x * y).mean().item()


@pytest.mark.parametrize("phi", [torch.relu, torch.tanh, F.gelu, torch.sigmoid, lambda z: F.leaky_relu(z, 0.1)])
def test_quadrature_against_monte_carlo(phi):
    x = Field(0.3, 1.7, 0.9, 0.9)
    found, (mean, moment2, across) = fields.pointwise(x, phi), monte_carlo(x, phi)
    assert found.mean == pytest.approx(mean, rel=0.01)
    assert found.moment2 == pytest.approx(moment2, rel=0.01)
    assert found.across == pytest.approx(across, rel=0.01)


def test_correlation_of_relu_is_the_arc_cosine_kernel():
    for c in (0.0, 0.3, 0.9):
        found = fields.pointwise(Field(0.0, 1.0, c, c), torch.relu)
        angle = math.acos(c)
        exact = (math.sin(angle) + (math.pi - angle) * c) / (2 * math.pi)  # Cho & Saul 2009, eq. 3 and 6
        assert found.across == pytest.approx(exact, rel=5e-3)


def test_contraction_of_weights_with_a_mean_against_draws():
    torch.manual_seed(0)
    weight, x = torch.randn(4096, 64) * 0.1 + 0.05, torch.randn(256, 64) + 0.5
    z = x @ weight.T
    found = fields.contraction(Field(0.5, 1.25, 0.25, 0.25), 64, fields.draws(weight), Draws(0.0, 0.0, 0))
    assert found.mean == pytest.approx(z.mean().item(), rel=0.02)
    assert found.moment2 == pytest.approx(z.square().mean().item(), rel=0.05)


def test_the_largest_of_normal_numbers():
    found = fields.largest(Field(0.0, 1.0, 0.0, 0.0), 2, None, None)
    assert found.mean == pytest.approx(1 / math.sqrt(math.pi), rel=0.05)  # the mean of the larger of two
    assert found.moment2 == pytest.approx(1.0, rel=0.05)
