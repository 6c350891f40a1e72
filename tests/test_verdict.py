"""The risk: its virtual steps against the framework's optimizers, its features against closed forms, its model's shape."""

import math

import pytest
import torch
from torch import nn

import initaudit
from initaudit.graph.from_torch import from_module
from initaudit.probe.cause import worst_stretch
from initaudit.probe.features import features, lowest_loss
from initaudit.probe.response import RATES, STEPS, _move
from initaudit.probe.run import probe
from initaudit.probe.verdict import coefficients, judge, probability


def stack(depth, width, act, gain, out=10, seed=0):
    """Linear layers N(0, gain²/fan_in) with zero biases."""
    torch.manual_seed(seed)
    layers = []
    for i in range(depth):
        layers += [nn.Linear(64 if i == 0 else width, width), act()]
    model = nn.Sequential(*layers, nn.Linear(width, out))
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, gain / math.sqrt(layer.in_features))
            nn.init.zeros_(layer.bias)
    return model


def traced(model, *inputs, seed=0):
    graph = from_module(model, inputs)
    return graph, probe(graph, inputs, seed=seed)


def risk_of(model, *inputs):
    return judge(*traced(model, *inputs))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(("optimizer", "rate"), RATES)
def test_a_virtual_step_is_the_frameworks(optimizer, rate):
    weight = nn.Parameter(noise(4, 3))
    start, memory, moved = weight.detach().clone(), {}, torch.zeros(4, 3)
    judge = torch.optim.SGD([weight], rate, momentum=0.9) if optimizer == "sgd" else torch.optim.Adam([weight], rate)
    for step in range(1, 6):
        weight.grad = noise(4, 3) * step
        moved = moved + _move(memory, "w", weight.grad, optimizer, rate, step)
        judge.step()
        assert torch.allclose(start + moved, weight.detach(), atol=1e-6)


def test_the_weights_stay_and_a_seed_repeats():
    model, x = stack(3, 32, nn.ReLU, math.sqrt(2)), noise(16, 64)
    before = [p.detach().clone() for p in model.parameters()]
    first, second = traced(model, x)[1], traced(model, x)[1]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert first.response == second.response
    assert first.response[0].optimizer == "sgd"


HEADS = {
    "scores": lambda w: nn.Linear(w, 5),
    "one number": lambda w: nn.Sequential(nn.Linear(w, 1), nn.Flatten(0)),
    "probabilities": lambda w: nn.Sequential(nn.Linear(w, 5), nn.Softmax(1)),
    "log-probabilities": lambda w: nn.Sequential(nn.Linear(w, 5), nn.LogSoftmax(1)),
    "yes or no": lambda w: nn.Sequential(nn.Linear(w, 3), nn.Sigmoid()),
    "positions": lambda w: nn.Sequential(nn.Linear(w, 12), nn.Unflatten(1, (4, 3))),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_task_of_memory_is_learnt_whatever_the_output(head):
    """A healthy network learns it, from about the loss of guessing on; one with a dead layer in front of its head does not."""
    torch.manual_seed(3)
    body = stack(2, 64, nn.ReLU, math.sqrt(2))[:-1]
    model = nn.Sequential(body, HEADS[head](64))
    _, trace = traced(model, noise(24, 64))
    assert trace.response
    assert 0.7 < trace.response[0].losses[0] < 2.5
    assert lowest_loss(trace, "adam") < 0.8
    with torch.no_grad():
        body[2].bias.fill_(-1e3)
    _, dead = traced(model, noise(24, 64))
    assert lowest_loss(dead, "sgd") > 0.85
    assert lowest_loss(dead, "adam") > 0.85


def test_a_batch_size_written_into_the_graph_is_no_obstacle():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 32), nn.Linear(64, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)).reshape(40, 64))

    _, trace = traced(Fixed(), noise(40, 2, 8))
    assert len(trace.response) >= 2


def test_what_is_large_takes_no_steps():
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.Flatten())
    graph, trace = traced(model, noise(8, 3, 64, 64))
    assert trace.response == ()
    assert "unlearnt_sgd" not in features(trace)
    assert 0 <= judge(graph, trace).untrainable_sgd <= 1


def test_chaos_follows_the_mean_field():
    """The judge: chi1 = σw² E[tanh'(√q z)²] at the length map's fixed point, to the power of the depth (Poole et al. 2016)."""
    sigma, depth = 3.0, 16
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2)
    density /= density.sum()
    q = 1.0
    for _ in range(100):
        q = sigma**2 * float((torch.tanh(math.sqrt(q) * z) ** 2 * density).sum())
    chi = sigma**2 * float(((1 - torch.tanh(math.sqrt(q) * z) ** 2) ** 2 * density).sum())
    _, trace = traced(stack(depth, 400, nn.Tanh, sigma), noise(16, 64))
    assert features(trace)["chaos"] == pytest.approx(depth * math.log10(chi) - 2, abs=0.12 * depth * math.log10(chi))
    _, calm = traced(stack(depth, 100, nn.ReLU, math.sqrt(2)), noise(16, 64))
    assert features(calm)["chaos"] == 0


def test_the_model_is_monotone():
    for by_kind in coefficients().values():
        for weights in by_kind.values():
            names = [n for n in weights if n != "intercept"]
            assert all(weights[n] >= 0 for n in names)
            low = dict.fromkeys(names, 0.5)
            for name in names:
                assert probability({**low, name: 1.5}, weights) >= probability(low, weights)
            assert probability(dict.fromkeys(names, 0.0), weights) < 0.1


def bn(change):
    torch.manual_seed(0)
    layers = []
    for i in range(5):
        layers += [nn.Conv2d(1 if i == 0 else 16, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        change(model)
    return model


@pytest.mark.parametrize(
    ("build", "learns"),
    [
        (lambda: (bn(lambda m: None), noise(32, 1, 8, 8)), True),
        (lambda: (bn(lambda m: m[6].weight.zero_()), noise(32, 1, 8, 8)), True),
        (lambda: (bn(lambda m: m[6].weight.mul_(1e-4)), noise(32, 1, 8, 8)), True),
        (lambda: (bn(lambda m: [m[i].weight.zero_() for i in (0, 3, 6)]), noise(32, 1, 8, 8)), False),
        (lambda: (bn(lambda m: m[7].bias.fill_(-99)), noise(32, 1, 8, 8)), False),
        (lambda: (stack(6, 96, nn.ReLU, math.sqrt(2)), noise(32, 64)), True),
        (lambda: (stack(10, 96, nn.Sigmoid, 1.0), noise(32, 64)), False),
        (lambda: (stack(30, 96, nn.Tanh, 4.0), noise(32, 64)), False),
        (lambda: (stack(12, 96, nn.ReLU, 0.3), noise(32, 64)), False),
    ],
    ids=["norms", "zero before a norm", "tiny before a norm", "zeros", "shut", "he", "sigmoids", "chaotic", "vanishing"],
)
def test_the_risk_of_what_is_known(build, learns):
    """Their like was trained: the first three and He reach more than 0.9 on 8x8 digits under SGD and Adam, the others 0.3."""
    model, x = build()
    risk = risk_of(model, x)
    for value in (risk.untrainable_sgd, risk.untrainable_adam):
        assert (value < 0.5) == learns
    assert bool(risk.cause) != learns


def test_a_mask_of_infinities_breaks_nothing():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

        def forward(self, x):
            scores = self.q(x) @ x.transpose(1, 2) / 4
            mask = torch.ones(6, 6, dtype=torch.bool).triu(1)
            return self.head(scores.masked_fill(mask, -math.inf).softmax(-1) @ self.v(x))

    torch.manual_seed(0)
    graph, trace = traced(Masked(), noise(8, 6, 16))
    assert trace.first_non_finite is not None
    assert not trace.broken
    assert judge(graph, trace).untrainable_adam < 0.5


def test_an_overflow_is_a_finding_at_its_place():
    model = stack(10, 64, nn.ReLU, 1e8)
    audit = initaudit.audit(model, noise(8, 64))
    assert audit.verdict == "fail"
    assert audit.risk["exploding"] == 1
    assert "not finite from" in audit.report.cause


@pytest.mark.parametrize(
    ("powers", "falls", "expected"),
    [
        ([("a", 1.0), ("b", 0.1), ("c", 0.01), ("d", 0.001)], True, ("a", "d", 3, "layer", 10**0.5)),
        ([("a", 1.0), ("b", 1.0), ("c", 1e-8), ("d", 0.9e-8)], True, ("b", "c", 1, "layer", 1e4)),
        ([("a", 1.0), ("b", 100.0), ("c", 1e4), ("d", 1e3)], False, ("a", "c", 2, "layer", 10)),
        (
            [(f"blocks.{i // 2}.fc{i % 2}", 10.0**-i) for i in range(8)],
            True,
            ("blocks.0", "blocks.3", 3, "block", 10 ** (7 / 6)),
        ),
    ],
)
def test_the_worst_stretch(powers, falls, expected):
    found = worst_stretch(powers, falls=falls)
    assert (found.first, found.last, found.steps, found.unit) == expected[:4]
    assert found.factor == pytest.approx(expected[4])
    assert worst_stretch(powers, falls=falls).decades >= 0
    assert worst_stretch([("a", 1.0), ("b", 1.0)], falls=falls) is None


def test_steps_are_few():
    assert STEPS * len(RATES) <= 100
