"""What a trace says of the whole network, against autograd, closed forms and updates really made."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from initaudit.graph.from_torch import from_module
from initaudit.probe.passes import cotangents
from initaudit.probe.run import probe


def traced(module, *inputs, seed=0):
    graph = from_module(module, inputs)
    return probe(graph, graph.examples, seed=seed)


def mlp(*widths, activation=nn.Tanh, gain=1.0, bias=0.0):
    layers = []
    for a, b in itertools.pairwise(widths):
        layer = nn.Linear(a, b)
        nn.init.normal_(layer.weight, std=gain / math.sqrt(a))
        nn.init.normal_(layer.bias, std=bias) if bias else nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers[:-1])


class Skip(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), mlp(width, 2 * width, width, activation=nn.GELU)

    def forward(self, x):
        return x + self.inner(self.norm(x))


def test_gains_of_blocks_multiply_to_the_jacobian_and_are_those_of_autograd():
    torch.manual_seed(0)
    module, x = nn.Sequential(mlp(12, 24), Skip(24), Skip(24), mlp(24, 8)), torch.randn(16, 12)
    trace = traced(module, x, seed=4)
    found = trace.measures
    assert len(found.blocks) == 4
    assert found.jacobian_gain == pytest.approx(math.prod(b.gain for b in found.blocks))
    values = [x.clone().requires_grad_(True)]
    for part in module:
        values.append(part(values[-1]))
    (c,) = cotangents([values[-1]], 16, torch.Generator().manual_seed(4))
    gradients = torch.autograd.grad(values[-1], values, c)
    for block, before, after in zip(found.blocks, gradients, gradients[1:], strict=False):
        assert block.gain == pytest.approx((before.norm() / after.norm()).square().item(), rel=1e-4)


def test_the_gain_of_a_linear_map_is_its_frobenius_norm_over_the_outputs():
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 500), torch.randn(64, 30)
    expected = layer.weight.square().sum().item() / 500
    assert traced(layer, x).measures.jacobian_gain == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("gain", "bias"), [(0.9, 0.1), (0.8, 0.3)])
def test_the_depth_scale_of_tanh_is_that_of_mean_field_theory(gain, bias):
    torch.manual_seed(0)
    module, x = mlp(600, *[600] * 14, activation=nn.Tanh, gain=gain, bias=bias), torch.randn(1, 600) + 0.3 * torch.randn(8, 600)
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    weight = weight / weight.sum()
    q = 1.0
    for _ in range(500):
        q = gain**2 * float(weight @ torch.tanh(math.sqrt(q) * z).square()) + bias**2
    chi = gain**2 * float(weight @ (1 - torch.tanh(math.sqrt(q) * z).square()).square())
    assert traced(module, x).measures.depth_scale == pytest.approx(-1 / math.log(chi), rel=0.15)  # Schoenholz 2017, eq. 9


def test_inputs_that_grow_apart_have_no_depth_scale():
    torch.manual_seed(0)
    x = torch.randn(1, 300) + 0.1 * torch.randn(8, 300)
    assert traced(mlp(*[300] * 10, gain=3.0), x).measures.depth_scale is None


def test_finite_width_counts_the_layers_behind_the_first():
    torch.manual_seed(0)
    found = traced(mlp(10, 20, 50, 5), torch.randn(4, 10)).measures
    assert found.beta == pytest.approx(1 / 20 + 1 / 50)


def test_gradients_scatter_between_seeds_as_beta_says():
    # Hanin & Nica 2020: the variance of ln(norm²) of a product of k matrices of width n with ReLU is near 5 k / n.
    width, layers, logs = 24, 12, []
    for seed in range(24):
        torch.manual_seed(seed)
        module = mlp(width, *[width] * layers, activation=nn.ReLU, gain=math.sqrt(2))
        trace = traced(module, torch.randn(1, width), seed=seed)
        logs.append(math.log(trace.measures.jacobian_gain))
    assert trace.measures.beta == pytest.approx((layers - 1) / width)
    scatter = torch.tensor(logs).var().item()
    assert trace.measures.beta < scatter < 12 * trace.measures.beta


def test_the_initial_loss_is_the_cross_entropy_with_labels_at_random():
    torch.manual_seed(0)
    module, x = mlp(16, 64, 10, gain=3.0), torch.randn(256, 16)
    (found,) = traced(module, x).measures.heads
    logits = module(x)
    losses = [F.cross_entropy(logits, torch.randint(0, 10, (256,))).item() for _ in range(300)]
    assert found.classes == 10
    assert found.loss == pytest.approx(sum(losses) / 300, rel=0.02)
    assert found.chance == pytest.approx(math.log(10))
    assert found.std == pytest.approx(logits.var(1, correction=0).mean().sqrt().item(), rel=1e-5)


def test_room_in_half_precision():
    torch.manual_seed(0)
    module, x = nn.Linear(8, 4, bias=False), torch.randn(16, 8)
    with torch.no_grad():
        module.weight.mul_(2000)
    found = traced(module, x).measures.headroom["float16"]
    assert found.weight == pytest.approx(math.log2(65504 / module.weight.abs().max().item()))
    assert found.signal == pytest.approx(math.log2(65504 / module(x).abs().max().item()), abs=1e-4)
    (weight,) = traced(module, x).weights
    assert found.gradient == pytest.approx(math.log2(weight.gradient_norm / math.sqrt(32) * 2**24))


def test_updates_of_sgd_and_adam_are_those_of_torch():
    torch.manual_seed(0)
    module, x = mlp(12, 24, 6), torch.randn(16, 12)
    trace = traced(module, x, seed=3)
    weights = [m.weight for m in module if isinstance(m, nn.Linear)]
    for optimizer, name in ((torch.optim.SGD, "sgd_update"), (torch.optim.Adam, "adam_update")):
        before = [w.detach().clone() for w in weights]
        step = optimizer(module.parameters(), lr=1e-6)
        step.zero_grad()
        out = module(x)
        (out * cotangents([out], 16, torch.Generator().manual_seed(3))[0]).sum().backward()
        step.step()
        for record, old, new in zip(trace.weights, before, weights, strict=True):
            moved = (new.detach().double() - old.double()).norm() / old.norm() / 1e-6
            assert getattr(record, name) == pytest.approx(moved.item(), rel=0.05)
        with torch.no_grad():
            for old, new in zip(before, weights, strict=True):
                new.copy_(old)


def test_units_left_after_one_update_are_those_that_the_probe_tells_apart():
    torch.manual_seed(0)
    module, x = mlp(8, 16, 16, 4), torch.randn(32, 8)
    with torch.no_grad():
        module[0].weight[8:] = module[0].weight[:8].clone()
        module[2].weight[:, 8:12] = module[2].weight[:, :4].clone()  # four pairs of the eight feed on equally
    record = traced(module, x, seed=2).weights[0]
    out = module(x)
    (out * cotangents([out], 32, torch.Generator().manual_seed(2))[0]).sum().backward()
    with torch.no_grad():
        stepped = module[0].weight - 0.1 * module[0].weight.grad
    distances = torch.cdist(stepped.double(), stepped.double()) + torch.eye(16) * 9
    copies = int((distances.min(1).values < 1e-6).sum())
    assert copies == 8
    assert record.units.distinct_values == 8
    assert record.units.distinct == 16 - copies // 2


class Last(nn.Module):
    def __init__(self, kind, width=48, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(6, width, batch_first=options.pop("batch_first", True), **options)
        self.head = nn.Linear(width * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1] if self.layer.batch_first else self.layer(x)[0][-1])


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_recurrent_layer_along_time_is_that_of_autograd(kind, batch_first):
    torch.manual_seed(0)
    module = Last(kind, batch_first=batch_first)
    x = torch.randn(5, 12, 6) if batch_first else torch.randn(12, 5, 6)
    trace = traced(module, x)
    (record,) = trace.time
    leaf = x.clone().requires_grad_(True)
    out = module.layer(leaf)[0]
    last = out[:, -1] if batch_first else out[-1]
    gains = []
    for _ in range(64):
        (gradient,) = torch.autograd.grad(last, leaf, torch.randn_like(last), retain_graph=True)
        gains.append(gradient.square().sum((0, 2) if batch_first else (1, 2)))
    expected = torch.stack(gains).mean(0)
    assert record.steps == 12
    # One cotangent for 5 x 48 outputs: the further back, the fewer directions are left to average over.
    decades = [abs(math.log10(f / w)) for f, w in zip(record.gradient, expected.tolist(), strict=True)]
    assert max(decades) < 0.8
    assert max(decades[-2:]) < 0.2
    signal = out.square().mean((0, 2) if batch_first else (1, 2))
    assert record.signal == pytest.approx(signal.tolist(), rel=1e-4)
    assert record.gradient_rate == pytest.approx((record.gradient[0] / record.gradient[-1]) ** (1 / 11))


def test_tokens_that_are_copies_have_rank_one():
    torch.manual_seed(0)
    layer, x = nn.Linear(12, 24), torch.randn(6, 1, 12).expand(6, 9, 12).contiguous()
    alike = traced(layer, x).signals
    apart = traced(layer, torch.randn(6, 9, 12)).signals
    ranks = [[s.token_rank for s in signals.values() if s.token_rank is not None] for signals in (alike, apart)]
    assert ranks[0][-1] == pytest.approx(1.0, abs=1e-6)
    assert ranks[1][-1] > 3
