"""The probe against torch.autograd on the module itself, and against closed forms."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from initaudit.graph.from_torch import from_module
from initaudit.probe.passes import batch_of, cotangents
from initaudit.probe.run import probe


class Residual(nn.Module):
    def __init__(self, width=8, gate=None):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.gate = None if gate is None else nn.Parameter(torch.tensor(gate))

    def forward(self, x):
        y = self.conv2(F.relu(self.norm(self.conv1(x)), inplace=True))
        return x + (y if self.gate is None else self.gate * y)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear = nn.Embedding(20, 12), weight_norm(nn.Linear(12, 12))
        self.packed, self.head = nn.Parameter(torch.randn(24, 12) * 0.3), nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids):
        x = torch.tanh(self.linear(self.embedding(ids)))
        q, k = F.linear(x, self.packed[:12]), F.linear(x, self.packed[12:])
        return self.head(q * torch.sigmoid(k))


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(10, 6).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(4, 10)), nn.Parameter(torch.zeros(6, 4))

    def forward(self, x):
        return F.linear(x, self.base.weight + self.b @ self.a, self.base.bias)


class Reader(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.layer = getattr(nn, kind)(6, 10, batch_first=True, **options)
        self.head = nn.Linear(20 if options.get("bidirectional") else 10, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0].mean(1))


def encoder():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    return nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 5))


def images():
    return torch.randn(4, 3, 8, 8)


def series():
    return torch.randn(3, 7, 6)


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.GELU(), nn.Linear(9, 4)), series),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, groups=8), nn.LeakyReLU(0.1), nn.Flatten(1)
        ),
        images,
    ),
    "residual": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(), Residual(gate=0.5)), images),
    "transposed": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2)),
        images,
    ),
    "tied": (Tied, lambda: torch.randint(0, 20, (4, 5))),
    "lora": (Lora, lambda: torch.randn(5, 10)),
    "encoder": (encoder, series),
    "lstm": (lambda: Reader("LSTM", bidirectional=True, num_layers=2), series),
    "gru": (lambda: Reader("GRU"), series),
    "rnn": (lambda: Reader("RNN", nonlinearity="relu"), series),
}


def judge(module, x, seed):
    """The gradients of the probe's loss by autograd on the module, dropout off and norms in training mode."""
    module = module.train()
    module.zero_grad()
    with torch.random.fork_rng():
        out = module(x)
    outputs = [out] if isinstance(out, torch.Tensor) else list(out)
    drawn = cotangents(outputs, batch_of([x]), torch.Generator().manual_seed(seed))
    sum((o * c).sum() for o, c in zip(outputs, drawn, strict=True)).backward()
    return {n: p.grad.clone() if p.grad is not None else None for n, p in module.named_parameters()}


@pytest.mark.parametrize("name", MODULES)
def test_gradients_of_every_parameter_are_those_of_autograd(name):
    build, make = MODULES[name]
    torch.manual_seed(0)
    module, x = build(), make()
    trace = probe(from_module(module, (x,)), (x,), seed=3)
    expected = judge(module, x, 3)
    assert not trace.unknown
    for key, gradient in expected.items():
        if gradient is None:
            assert key not in trace.parameters
            continue
        found = trace.parameters.get(key, trace.parameters.get("head.weight"))  # the embedding is tied to the head
        assert found.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-5, abs=1e-9), key


def test_a_tied_weight_has_one_record_a_place_and_their_gradients_add_up_to_the_parameters():
    torch.manual_seed(0)
    module, ids = Tied(), torch.randint(0, 20, (4, 5))
    trace = probe(from_module(module, (ids,)), (ids,))
    tied = [w for w in trace.weights if w.constants in (("embedding.weight",), ("head.weight",))]
    assert len({w.node for w in tied}) == 2
    assert all(w.gradient_norm > 0 for w in tied)


def test_the_caller_is_left_as_he_was():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(0.5))
    x = images()
    state = {k: v.clone() for k, v in module.state_dict().items()}
    graph, given, threads, generator = from_module(module, (x,)), x.clone(), torch.get_num_threads(), torch.get_rng_state()
    probe(graph, (x,), seed=5)
    assert torch.equal(x, given)
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.get_num_threads() == threads
    assert module.training
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(v, state[k]) for k, v in module.state_dict().items())


def test_deterministic_for_a_seed():
    x = images()
    torch.manual_seed(0)
    graph = from_module(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)), (x,))
    assert probe(graph, (x,), seed=1) == probe(graph, (x,), seed=1)
    assert probe(graph, (x,), seed=1) != probe(graph, (x,), seed=2)


def test_the_second_moment_of_every_edge_is_that_of_the_tensors():
    torch.manual_seed(0)
    first, second = nn.Linear(16, 32), nn.Linear(32, 4)
    x = torch.randn(24, 16)
    trace = probe(from_module(nn.Sequential(first, nn.Tanh(), second), (x,)), (x,))
    hidden = first(x)
    signals = list(trace.signals.values())
    for signal, value in zip(signals[1:], (hidden, hidden.tanh(), second(hidden.tanh())), strict=True):
        assert signal.moment2 == pytest.approx(value.square().mean().item(), rel=1e-5)
        assert signal.mean == pytest.approx(value.mean().item(), rel=1e-4, abs=1e-6)
        if signal.kind == "contraction":
            assert signal.peak == pytest.approx(value.abs().max().item(), rel=1e-6)
        assert signal.rank == pytest.approx(participation(value), rel=1e-6)
        rows = F.normalize(value.double(), dim=1)
        pairs = (rows @ rows.T).fill_diagonal_(0).sum() / (24 * 23)
        assert signal.cosine == pytest.approx(pairs.item(), abs=1e-6)
        assert signal.spread == pytest.approx((value.var(0, correction=0).mean() / value.square().mean()).item(), rel=1e-4)
    # The cotangent of an example has norm 1: its elements have a second moment of one over their number.
    assert signals[-1].gradient_moment2 == pytest.approx(1 / 4, rel=0.5)


def participation(rows):
    """(Σλ)²/Σλ² over the squared singular values."""
    squares = torch.linalg.svdvals(rows.double()).square()
    return (squares.sum().square() / squares.square().sum()).item()


def test_moments_survive_numbers_whose_squares_leave_the_range_of_float32():
    class Scale(nn.Module):
        def forward(self, x):
            return x * 1e25, x * 1e-25

    x = torch.randn(64, 8)
    trace = probe(from_module(Scale(), (x,)), (x,))
    up, down = (trace.signals[name] for name in trace.outputs)
    assert up.moment2 == pytest.approx(1e50 * x.square().mean().item(), rel=1e-5)
    assert down.moment2 == pytest.approx(1e-50 * x.square().mean().item(), rel=1e-5)
    assert up.finite


@pytest.mark.parametrize(("activation", "bias", "share"), [(nn.ReLU, -50.0, 1.0), (nn.ReLU, 0.0, 0.0), (nn.Tanh, 40.0, 0.0)])
def test_dead_units(activation, bias, share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 2))
    nn.init.constant_(model[0].bias, bias)
    x = torch.randn(32, 8)
    trace = probe(from_module(model, (x,)), (x,))
    (signal,) = [s for s in trace.signals.values() if s.dead is not None]
    assert signal.dead == (share if activation is nn.ReLU else 1.0)
    assert signal.saturated == (1.0 if bias else 0.0)


class HandSilu(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(x)


@pytest.mark.parametrize("activation", [nn.SiLU, HandSilu, nn.GELU, nn.Softplus, nn.Hardswish, nn.PReLU])
def test_slopes_are_those_of_autograd(activation):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), activation(), nn.Linear(16, 2))
    x = torch.randn(32, 8)
    trace = probe(from_module(model, (x,)), (x,))
    (signal,) = [s for s in trace.signals.values() if s.slope is not None]
    hidden = model[0](x).detach().requires_grad_(True)
    (slope,) = torch.autograd.grad(model[1](hidden).sum(), hidden)
    assert signal.slope == pytest.approx(slope.square().mean().sqrt().item(), rel=1e-5)


def test_one_unit_in_four_saturates():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    nn.init.zeros_(model[0].bias)
    with torch.no_grad():
        model[0].bias[:2] = 30.0
    x = torch.randn(16, 4)
    trace = probe(from_module(model, (x,)), (x,))
    assert [s.saturated for s in trace.signals.values() if s.saturated is not None] == [0.25]


def test_the_first_node_that_is_not_finite_is_named():
    class Broken(nn.Module):
        def forward(self, x):
            y = x.square()
            return torch.log(y - 100) + y

    x = torch.randn(4, 3)
    trace = probe(from_module(Broken(), (x,)), (x,))
    assert trace.first_non_finite.startswith("log")
    assert not trace.signals[trace.first_non_finite].finite


def test_attention_entropy():
    class Attend(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return F.scaled_dot_product_attention(self.scale * x, x + 0, 1 * x)

    x = torch.randn(2, 2, 16, 8)
    for scale, low, high in ((0.0, 0.999, 1.001), (1000.0, -0.001, 0.1)):
        trace = probe(from_module(Attend(scale), (x,)), (x,))
        (entropy,) = [s.entropy for s in trace.signals.values() if s.entropy is not None]
        assert low <= entropy <= high


def units_of(model, x):
    return [w.units for w in probe(from_module(model, (x,)), (x,)).weights]


def test_copies_of_units_are_counted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[8:], model[0].bias[8:] = model[0].weight[:8].clone(), model[0].bias[:8].clone()
        first = units_of(model, torch.randn(32, 8))
        model[2].weight[:, 8:] = model[2].weight[:, :8].clone()
        second = units_of(model, torch.randn(32, 8))
    assert [u.distinct for u in first] == [16, 16, 4]  # equal values, but the outgoing weights tell them apart
    assert [u.distinct for u in second] == [8, 16, 4]
    assert first[0].distinct_values == 8


def test_constant_and_zero_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    for m in model[:4:2]:
        nn.init.constant_(m.weight, 0.1)
        nn.init.constant_(m.bias, 0.0)
    nn.init.zeros_(model[4].weight)
    x = torch.randn(32, 8)
    # A zero head is no copy: its rows get different gradients.
    assert [u.distinct for u in units_of(model, x)] == [1, 1, 4]
    nn.init.constant_(model[4].weight, 0.1)
    assert [u.distinct for u in units_of(model, x)] == [1, 1, 4]


def silent(model, x):
    trace = probe(from_module(model, (x,)), (x,))
    return {name: p.revived for name, p in trace.parameters.items() if p.gradient_zero}


def test_healthy_zeros_are_told_from_zeros_in_series():
    torch.manual_seed(0)
    x = images()
    gated = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(gate=0.0))
    found = silent(gated, x)
    assert set(found.values()) == {1}
    assert "1.conv1.weight" in found
    series_of_zeros = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Residual(gate=0.0))
    for p in (series_of_zeros[1].conv2.weight, series_of_zeros[1].conv2.bias):
        nn.init.zeros_(p)
    found = silent(series_of_zeros, x)
    assert found["1.conv2.weight"] is None
    assert found["1.gate"] is None
    lora = Lora()
    x = torch.randn(5, 10)
    assert silent(lora, x) == {"a": 1}
    nn.init.zeros_(lora.a)
    assert silent(lora, x) == {"a": None, "b": None}


def test_dead_relu_is_not_revived():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    nn.init.constant_(model[0].bias, -50.0)
    assert silent(model, torch.randn(16, 8)) == {"0.weight": None, "0.bias": None, "2.weight": None}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_probed_in_float32(dtype):
    torch.manual_seed(0)
    model, x = encoder().to(dtype), series().to(dtype)
    trace = probe(from_module(model, (x,)), (x,))
    assert not trace.unknown
    assert all(s.finite and math.isfinite(s.moment2) for s in trace.signals.values() if s.moment2 is not None)
    assert all(p.gradient_norm is not None for p in trace.parameters.values())


def test_batch_and_tokens_are_followed_through_transposes():
    torch.manual_seed(0)
    x = torch.randn(5, 7, 6)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=False, dropout=0.0)

    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.layer = nn.Linear(6, 16), layer

        def forward(self, x):
            return self.layer(self.embed(x).transpose(0, 1)).transpose(0, 1)

    trace = probe(from_module(SequenceFirst(), (x,)), (x,))
    linears = [trace.signals[w.node] for w in trace.weights]
    assert all(s.cosine is not None for s in linears)
    assert linears[0].token_cosine is not None


def test_virtual_steps_say_how_many_and_how_fast():
    from initaudit.auditing.run import gather
    from initaudit.config import Config
    from initaudit.load import from_module as load_module

    said = []
    net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    gather(load_module(net), Config(), inputs=(torch.randn(32, 16),), progress=said.append)
    steps = re.compile(r"probing: virtual steps with \w+ at [\d.e-]+, \d+ of \d+ steps, [\d,]+ steps/s")
    assert any(steps.fullmatch(label) for label in said), said
