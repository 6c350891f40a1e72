"""Weights of modules, their fans and where they come from. Judges: the framework's own layers."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from initaudit.graph.from_torch import from_module
from initaudit.pair.pair import pair


def pairs_of(module, *inputs):
    with torch.random.fork_rng(devices=[]):
        return pair(from_module(module, inputs))


def by_tensor(module, *inputs):
    found = {}
    for p in pairs_of(module, *inputs):
        found.setdefault(p.tensor, p)
    return found


def fed(p):
    """(activation, path) of everything that a weight feeds."""
    return [(f.activation.name, f.path) for f in p.feeds]


# ---------------------------------------------------------------------------------------------- fans


class Weighted(nn.Module):
    """A function of the input and one weight of this shape."""

    def __init__(self, shape, call):
        super().__init__()
        self.w, self.call = nn.Parameter(torch.randn(shape)), call

    def forward(self, x):
        return self.call(x, self.w)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7, bias=False), (4, 5), "linear", 1),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, bias=False), (2, 3, 30), "conv", 1),
    "conv2d": (lambda: nn.Conv2d(3, 4, (3, 2), bias=False), (2, 3, 12, 12), "conv", 1),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, bias=False), (1, 2, 8, 8, 8), "conv", 1),
    "dilated": (lambda: nn.Conv2d(3, 4, 3, dilation=2, bias=False), (2, 3, 16, 16), "conv", 1),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), (2, 6, 12, 12), "conv", 2),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 12, 12), "conv", 6),
    "depth multiplier": (lambda: nn.Conv2d(3, 12, 3, groups=3, bias=False), (2, 3, 12, 12), "conv", 3),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4, bias=False), (2, 3, 16, 16), "conv", 1),
    "transposed": (lambda: nn.ConvTranspose2d(3, 5, 3, bias=False), (2, 3, 12, 12), "conv_transpose", 1),
    "upsampling": (lambda: nn.ConvTranspose2d(3, 5, 2, stride=2, bias=False), (2, 3, 12, 12), "conv_transpose", 1),
    "overlapping": (lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, bias=False), (2, 4, 12, 12), "conv_transpose", 1),
    "transposed groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), (2, 4, 12, 12), "conv_transpose", 2),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 4, stride=4, bias=False), (2, 4, 12), "conv_transpose", 1),
    "x @ w": (lambda: Weighted((5, 7), lambda x, w: x @ w), (4, 5), "linear", 1),
    "x @ w.T": (lambda: Weighted((7, 5), lambda x, w: x @ w.T), (4, 5), "linear", 1),
    "w @ x": (lambda: Weighted((7, 5), lambda x, w: w @ x), (5, 4), "linear", 1),
    "w.T @ x": (lambda: Weighted((5, 7), lambda x, w: w.T @ x), (5, 4), "linear", 1),
    "matrix times vector": (lambda: Weighted((7, 5), lambda x, w: torch.mv(w, x)), (5,), "linear", 1),
    "vector": (lambda: Weighted((5,), lambda x, w: x @ w), (4, 5), "linear", 1),
    "addmm": (lambda: Weighted((5, 7), lambda x, w: torch.addmm(torch.zeros(7), x, w)), (4, 5), "linear", 1),
    "experts": (lambda: Weighted((3, 5, 7), lambda x, w: torch.bmm(x, w)), (3, 4, 5), "linear", 1),
    "experts transposed": (
        lambda: Weighted((3, 7, 5), lambda x, w: torch.bmm(x, w.transpose(1, 2))), (3, 4, 5), "linear", 1,
    ),
    "einsum": (lambda: Weighted((5, 7), lambda x, w: torch.einsum("bi,io->bo", x, w)), (4, 5), "einsum", 1),
    "einsum o i": (lambda: Weighted((7, 5), lambda x, w: torch.einsum("oi,bti->bto", w, x)), (2, 4, 5), "einsum", 1),
    "einsum heads": (
        lambda: Weighted((5, 2, 3), lambda x, w: torch.einsum("bti,ihd->bthd", x, w)), (2, 4, 5), "einsum", 1,
    ),
    "einsum out of heads": (
        lambda: Weighted((2, 3, 5), lambda x, w: torch.einsum("bthd,hdo->bto", x, w)), (2, 4, 2, 3), "einsum", 1,
    ),
    "einsum experts": (
        lambda: Weighted((3, 5, 7), lambda x, w: torch.einsum("ebi,eio->ebo", x, w)), (3, 4, 5), "einsum", 1,
    ),
    "einsum without arrow": (lambda: Weighted((5, 7), lambda x, w: torch.einsum("bi,io", x, w)), (4, 5), "einsum", 1),
    "einsum dots": (lambda: Weighted((5, 7), lambda x, w: torch.einsum("...i,io->...o", x, w)), (2, 4, 5), "einsum", 1),
    "tensordot": (lambda: Weighted((5, 7), lambda x, w: torch.tensordot(x, w, dims=1)), (2, 4, 5), "linear", 1),
    "inner": (lambda: Weighted((7, 5), lambda x, w: torch.inner(x, w)), (2, 5), "linear", 1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_fans_are_those_that_the_layer_itself_has(name):
    """With all weights and inputs 1 an output counts its products, and with all cotangents 1 an input's gradient its units."""
    make, shape, operator, groups = LAYERS[name]
    module = make()
    (p,) = pairs_of(module, torch.randn(shape))
    weight = next(module.parameters())
    with torch.no_grad():
        weight.fill_(1)
    x = torch.ones(shape, requires_grad=True)
    y = module(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    y = y.detach()
    inside = y[..., 4:-4, 4:-4] if operator == "conv_transpose" and y.dim() == 4 else y[..., 4:-4] if y.dim() == 3 else y
    products = inside.mean() if operator == "conv_transpose" else y.max()
    assert p.fan_in * p.overlap == pytest.approx(float(products))
    assert p.fan_out == pytest.approx(float(gradient.max())) or name == "patches"
    assert (p.operator, p.groups, p.tensor, p.shape) == (operator, groups, next(iter(module.state_dict())), tuple(weight.shape))
    assert p.stored


@pytest.mark.parametrize("name", LAYERS)
def test_variance_of_the_output_for_unit_inputs(name):
    """Judge: the layer on N(0, 1) inputs, its weights N(0, 1): E y^2 = fan_in · overlap (He et al. 2015, eq. 5)."""
    make, shape, operator, _ = LAYERS[name]
    (p,) = pairs_of(make(), torch.randn(shape))
    total, count = 0.0, 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for _ in range(60):
            module = make()
            nn.init.normal_(next(module.parameters()))
            y = module(torch.randn(shape))
            if operator == "conv_transpose":
                y = y[..., 4:-4, 4:-4] if y.dim() == 4 else y[..., 4:-4]
            total, count = total + float(y.square().sum()), count + y.numel()
    assert total / count == pytest.approx(p.fan_in * p.overlap, rel=0.25)


def test_bilinear():
    module = nn.Bilinear(3, 4, 5)
    (p,) = pairs_of(module, torch.randn(2, 3), torch.randn(2, 4))
    assert (p.tensor, p.operator, p.fan_in, p.shape, p.bias) == ("weight", "bilinear", 12, (5, 3, 4), "bias")
    nn.init.ones_(module.weight)
    nn.init.zeros_(module.bias)
    assert float(module(torch.ones(1, 3), torch.ones(1, 4)).detach().max()) == p.fan_in


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_recurrent_layers(kind, gates, options):
    """Judge: the fans that torch.nn gives one gate's block of each weight, h x i and h x h."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(nn, kind)(6, 10, **options)

        def forward(self, x):
            return self.rnn(x)[0]

    module = Layer()
    found = by_tensor(module, torch.randn(4, 2, 6))
    expected = {k: v for k, v in module.named_parameters() if "weight" in k}
    assert set(found) == set(expected)
    for name, w in expected.items():
        p = found[name]
        assert (p.fan_in, p.fan_out, len(p.gates), p.role) == (w.shape[1], w.shape[0] // gates, gates, "recurrent")
        names = sorted(f.activation.name for f in p.feeds)
        assert names == {4: ["sigmoid"] * 3 + ["tanh"], 3: ["sigmoid"] * 2 + ["tanh"], 1: ["tanh"]}[gates]


def test_lstm_with_projection():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(6, 10, proj_size=4)

        def forward(self, x):
            return self.rnn(x)[0]

    found = by_tensor(Layer(), torch.randn(4, 2, 6))
    fans = {k: (p.fan_in, p.fan_out) for k, p in found.items()}
    assert fans == {"rnn.weight_ih_l0": (6, 10), "rnn.weight_hh_l0": (4, 10), "rnn.weight_hr_l0": (10, 4)}


def test_cells():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 10), nn.GRUCell(10, 8), nn.RNNCell(8, 4, nonlinearity="relu")

        def forward(self, x):
            return self.rnn(self.gru(self.lstm(x)[0]))

    found = by_tensor(Cells(), torch.randn(5, 6))
    assert {k: (p.fan_in, p.fan_out) for k, p in found.items()} == {
        "lstm.weight_ih": (6, 10), "lstm.weight_hh": (10, 10), "gru.weight_ih": (10, 8), "gru.weight_hh": (8, 8),
        "rnn.weight_ih": (8, 4), "rnn.weight_hh": (4, 4),
    }  # fmt: skip
    assert {f.activation.name for f in found["rnn.weight_ih"].feeds} == {"relu"}
    assert {f.activation.name for f in found["lstm.weight_ih"].feeds} == {"sigmoid", "tanh"}


TABLES = {
    "embedding": lambda: (nn.Embedding(20, 6), torch.randint(0, 20, (2, 5))),
    "bag": lambda: (nn.EmbeddingBag(20, 6, mode="sum"), torch.randint(0, 20, (2, 5))),
    "functional": lambda: (Weighted((20, 6), lambda i, w: F.embedding(i, w)), torch.randint(0, 20, (2, 5))),
    "indexed": lambda: (Weighted((20, 6), lambda i, w: w[i]), torch.randint(0, 20, (2, 5))),
    "index_select": lambda: (Weighted((20, 6), lambda i, w: w.index_select(0, i)), torch.randint(0, 20, (5,))),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """A row is picked, not summed: one product a unit, as many units as features."""
    module, ids = TABLES[name]()
    (p,) = pairs_of(module, ids)
    assert (p.role, p.operator, p.fan_in, p.fan_out, p.axes) == ("embedding", "embedding", 1, 6, ("v", "d"))


# ---------------------------------------------------------------------------------------------- provenance


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(6, 9)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(9, 2))

    def forward(self, x):
        return F.relu(F.linear(x, self.base.weight + self.b @ self.a, self.base.bias))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * 6, 6))

    def forward(self, x):
        q, k, v = self.qkv.chunk(3)
        return F.scaled_dot_product_attention(F.linear(x, q), F.linear(x, k), F.linear(x, v))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.body, self.head = nn.Embedding(20, 6), nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(torch.tanh(self.body(self.table(ids))))


def test_weights_that_are_computed():
    x = torch.randn(4, 6)
    cases = {
        "weight norm": (parametrizations.weight_norm(nn.Linear(6, 9)), "parametrizations.weight.original1"),
        "spectral norm": (parametrizations.spectral_norm(nn.Linear(6, 9)), "parametrizations.weight.original"),
        "orthogonal": (parametrizations.orthogonal(nn.Linear(6, 9)), "parametrizations.weight.original"),
        "lora": (Lora(), "base.weight"),
        "centred": (Weighted((9, 6), lambda x, w: F.linear(x, w - w.mean(1, keepdim=True))), "w"),
        "scaled": (Weighted((9, 6), lambda x, w: F.linear(x, w * 0.1)), "w"),
    }
    for name, (module, tensor) in cases.items():
        p = pairs_of(module, x)[0]
        assert (p.tensor, p.fan_in, p.fan_out, p.shape, p.stored) == (tensor, 6, 9, (9, 6), False), name
        assert p.provenance, name


def test_old_weight_norm():
    with pytest.warns(FutureWarning):
        module = torch.nn.utils.weight_norm(nn.Conv1d(4, 6, 3))
    p = pairs_of(module, torch.randn(2, 4, 9))[0]
    assert (p.tensor, p.fan_in, p.shape, set(p.constants)) == ("weight_v", 12, (6, 4, 3), {"weight_v", "weight_g"})


def test_packed_projections_are_three_uses_of_one_tensor():
    pairs = pairs_of(Packed(), torch.randn(2, 5, 6))
    assert [(p.tensor, p.fan_in, p.fan_out, p.shape) for p in pairs] == [("qkv", 6, 6, (6, 6))] * 3
    assert {f for p in pairs for f in fed(p)} == {("linear", ("attention",))}


def test_a_tied_table_is_named_by_who_uses_it():
    first, _, last = pairs_of(Tied(), torch.randint(0, 20, (2, 5)))
    assert (first.tensor, first.role, first.fan_in) == ("table.weight", "embedding", 1)
    assert (last.tensor, last.role, last.fan_in, last.fan_out) == ("head.weight", "contraction", 6, 20)
    assert first.constants == last.constants


def test_names_sites_and_source_lines():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = torch.relu(layer(x))
            return x

    first, second = pairs_of(Model(), torch.randn(2, 4))
    assert [(p.tensor, p.site, p.bias) for p in (first, second)] == [
        ("layers.0.weight", "layers.0", "layers.0.bias"), ("layers.1.weight", "layers.1", "layers.1.bias"),
    ]  # fmt: skip
    lines, start = inspect.getsourcelines(Model.forward)
    called = next(i for i, line in enumerate(lines) if "layer(x)" in line) + start
    assert (first.location.file, first.location.line) == (__file__, called)


def test_a_weight_used_twice_is_paired_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Linear(6, 6)

        def forward(self, x):
            return torch.tanh(self.w(torch.relu(self.w(x))))

    assert [fed(p) for p in pairs_of(Twice(), torch.randn(2, 6))] == [[("relu", ())], [("tanh", ())]]


def test_a_weight_that_feeds_several():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            h = self.w(x)
            return self.a(torch.relu(h)) + self.b(torch.sin(h))

    assert sorted(fed(pairs_of(Fork(), torch.randn(2, 6))[0])) == [("relu", ()), ("sin", ())]
