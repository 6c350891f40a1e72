"""Weights of modules and what they feed. Judges: the activation that was written, and the framework's own layers."""

from __future__ import annotations

import inspect
import math

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


class Calls(nn.Module):
    """A linear layer, some function, a linear layer."""

    def __init__(self, function, width=8, out=8):
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(out, 3)
        self.function = function if isinstance(function, nn.Module) else None
        self.call = function

    def forward(self, x):
        return self.second(self.call(self.first(x)))


# ---------------------------------------------------------------------------------------------- activations

MODULES = {
    nn.ELU(): "elu", nn.ELU(0.5): "elu",
    nn.Hardshrink(): "hardshrink", nn.Hardsigmoid(): "hardsigmoid", nn.Hardtanh(): "hardtanh",
    nn.Hardtanh(-2, 2): "clip", nn.Hardswish(): "hardswish", nn.LeakyReLU(0.2): "leaky_relu", nn.LogSigmoid(): "log_sigmoid",
    nn.PReLU(): "leaky_relu", nn.PReLU(8): "prelu", nn.ReLU(): "relu", nn.ReLU6(): "relu6", nn.RReLU(): "leaky_relu",
    nn.SELU(): "selu", nn.CELU(2.0): "celu", nn.GELU(): "gelu", nn.GELU("tanh"): "gelu", nn.Sigmoid(): "sigmoid",
    nn.SiLU(): "silu", nn.Mish(): "mish", nn.Softplus(): "softplus", nn.Softplus(2.0): "softplus",
    nn.Softshrink(): "softshrink",
    nn.Softsign(): "softsign", nn.Tanh(): "tanh", nn.Tanhshrink(): "tanhshrink", nn.Threshold(0.0, 0.0): "relu",
    nn.Threshold(0.1, 20.0): "custom", nn.Softmax(-1): "softmax", nn.Softmin(-1): "softmax", nn.LogSoftmax(-1): "softmax",
    nn.Identity(): "linear", nn.Dropout(0.3): "linear", nn.AlphaDropout(0.3): "linear",
    nn.ReLU(inplace=True): "relu", nn.SiLU(inplace=True): "silu", nn.LeakyReLU(0.3, inplace=True): "leaky_relu",
    nn.ELU(inplace=True): "elu", nn.Hardtanh(inplace=True): "hardtanh", nn.Mish(inplace=True): "mish",
    nn.Hardswish(inplace=True): "hardswish", nn.SELU(inplace=True): "selu", nn.ReLU6(inplace=True): "relu6",
}  # fmt: skip

WRITTEN = {
    "x*sigmoid(x)": (lambda x: x * torch.sigmoid(x), "silu"),
    "x/(1+exp(-x))": (lambda x: x / (1 + torch.exp(-x)), "silu"),
    "erf gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))), "gelu"),
    "erf gelu 2": (lambda x: x * 0.5 * (torch.erf(x * 0.7071067811865476) + 1.0), "gelu"),
    "tanh gelu": (lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), "gelu"),
    "tanh gelu pow": (
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), "gelu",
    ),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), "quick_gelu"),
    "hardswish": (lambda x: x * F.relu6(x + 3) / 6, "hardswish"),
    "hardsigmoid": (lambda x: F.relu6(x + 3) / 6, "hardsigmoid"),
    "relu squared": (lambda x: F.relu(x) ** 2, "squared_relu"),
    "square of relu": (lambda x: torch.square(torch.relu(x)), "squared_relu"),
    "clamp": (lambda x: x.clamp(min=0), "relu"),
    "maximum": (lambda x: torch.maximum(x, torch.zeros_like(x)), "relu"),
    "where": (lambda x: torch.where(x > 0, x, 0.1 * x), "leaky_relu"),
    "masked": (lambda x: x * (x > 0), "relu"),
    "max of two lines": (lambda x: torch.max(x, 0.2 * x), "leaky_relu"),
    "abs": (torch.abs, "abs"),
    "softplus": (lambda x: torch.log(1 + torch.exp(x)), "softplus"),
    "mish": (lambda x: x * torch.tanh(F.softplus(x)), "mish"),
    "siren": (lambda x: torch.sin(30 * x), "sin"),
    "gaussian": (lambda x: torch.exp(-(x**2)), "gaussian"),
    "snake": (lambda x: x + torch.sin(x) ** 2, "custom"),
    "lecun tanh": (lambda x: 1.7159 * torch.tanh(2 / 3 * x), "tanh"),
    "scaled relu": (lambda x: math.sqrt(2) * F.relu(x), "relu"),
    "negated": (lambda x: -F.relu(-x), "custom"),
    "soft clipping": (lambda x: 30 * torch.tanh(x / 30), "tanh"),
    "swish 1.5": (lambda x: x * torch.sigmoid(1.5 * x), "swish"),
    "affine": (lambda x: 3 * x - 1, "linear"),
    "in place": (lambda x: x.mul_(torch.sigmoid(x)), "silu"),
    "in place relu": (lambda x: F.relu_(x), "relu"),
    "functional in place": (lambda x: F.leaky_relu(x, 0.25, inplace=True), "leaky_relu"),
    "clone then in place": (lambda x: x.clone().tanh_(), "tanh"),
    "half": (lambda x: F.relu(x.half()).float(), "relu"),
    "autocast": (lambda x: torch.tanh(x.to(torch.bfloat16)).to(x.dtype), "tanh"),
    "reshaped": (lambda x: F.gelu(x.reshape(2, -1, 8)).reshape(-1, 8), "gelu"),
    "permuted": (lambda x: F.silu(x.T).T, "silu"),
    "chunks joined": (lambda x: torch.cat([F.relu(c) for c in x.chunk(2, -1)], -1), "relu"),
}  # fmt: skip
PARAMETERS = {
    "where": {"negative_slope": 0.1}, "max of two lines": {"negative_slope": 0.2}, "siren": {"omega": 30},
    "functional in place": {"negative_slope": 0.25},
    "swish 1.5": {"beta": 1.5},
}  # fmt: skip


@pytest.mark.parametrize(("module", "name"), MODULES.items(), ids=[repr(m) for m in MODULES])
def test_every_activation_of_the_framework(module, name):
    p = by_tensor(Calls(module).train(), torch.randn(4, 6))["first.weight"]
    assert fed(p) == [(name, ())]
    if isinstance(module, nn.LeakyReLU):
        assert p.feeds[0].activation.parameters == {"negative_slope": module.negative_slope}
    if name not in ("softmax", "linear"):
        x = torch.linspace(-3, 3, 101, dtype=torch.float64)
        wide = x[:, None].expand(-1, 8)
        judge = module.eval().double()(wide.clone()).detach()[:, 0].numpy()
        assert p.feeds[0].activation.function(x.numpy()) == pytest.approx(judge, abs=1e-6)


@pytest.mark.parametrize("name", WRITTEN)
def test_activations_written_out_by_hand(name):
    function, expected = WRITTEN[name]
    p = by_tensor(Calls(function), torch.randn(4, 6))["first.weight"]
    assert fed(p) == [(expected, ())]
    if name in PARAMETERS:
        assert p.feeds[0].activation.parameters == pytest.approx(PARAMETERS[name], abs=1e-4)
    if expected == "linear":
        return
    x = torch.linspace(-3, 3, 96, dtype=torch.float64).reshape(-1, 8)
    judge = function(x.clone()).double().numpy()
    tolerance = 2e-2 if name in ("half", "autocast") else 1e-6
    assert p.feeds[0].activation.function(x.numpy()) == pytest.approx(judge, abs=tolerance)


GATED = {
    "glu": (lambda x: F.glu(x, -1), [("sigmoid", ("glu",)), ("linear", ("glu",))]),
    "swiglu": (lambda x: F.silu(x[:, :4]) * x[:, 4:], [("silu", ()), ("linear", ("multiply",))]),
    "geglu": (lambda x: F.gelu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0], [("gelu", ()), ("linear", ("multiply",))]),
    "reglu": (lambda x: torch.relu(x.split(4, -1)[0]) * x.split(4, -1)[1], [("relu", ()), ("linear", ("multiply",))]),
    "crelu": (lambda x: torch.cat([F.relu(x), F.relu(-x)], -1)[:, :4], [("relu", ()), ("custom", ())]),
    "maxout": (lambda x: x.reshape(-1, 4, 2).amax(-1), [("linear", ("max",))]),
}


@pytest.mark.parametrize("name", GATED)
def test_gates(name):
    function, expected = GATED[name]
    p = by_tensor(Calls(function, out=4), torch.randn(4, 6))["first.weight"]
    assert sorted(fed(p)) == sorted(expected)


class Structures(nn.Module):
    """Gates, excitation and slopes that are learned."""

    def __init__(self):
        super().__init__()
        self.stem, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.value, self.gate, self.scale = nn.Linear(8, 8), nn.Linear(8, 8), nn.Parameter(torch.ones(8) * 1e-4)
        self.alpha, self.head = nn.Parameter(torch.zeros(())), nn.Linear(8, 2)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        x = x.mean((2, 3))
        x = x + self.scale * self.value(x)
        x = x + torch.tanh(self.alpha) * torch.tanh(self.gate(x))
        return self.head(x)


def test_squeeze_excitation_layer_scale_and_learned_gates():
    found = {k: fed(p) for k, p in by_tensor(Structures(), torch.randn(2, 3, 8, 8)).items()}
    assert found == {
        "stem.weight": [("relu", ())],
        "down.weight": [("relu", ())],
        "up.weight": [("sigmoid", ())],
        "value.weight": [("linear", ("scale", "add"))],
        "gate.weight": [("tanh", ())],
        "head.weight": [("linear", ("output",))],
    }


# ---------------------------------------------------------------------------------------------- paths

PATHS = {
    "batch norm": (lambda: nn.Sequential(nn.BatchNorm1d(8), nn.ReLU()), ("batch_norm",)),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(8), nn.ReLU()), ("layer_norm",)),
    "rms norm": (lambda: nn.Sequential(nn.RMSNorm(8), nn.ReLU()), ("rms_norm",)),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(2, 8), nn.ReLU()), ("group_norm",)),
    "dropout": (lambda: nn.Sequential(nn.Dropout(), nn.ReLU()), ()),
    "layer norm by hand": (
        lambda: lambda x: F.relu((x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)),
        ("layer_norm",),
    ),
    "std norm by hand": (
        lambda: lambda x: F.relu((x - x.mean(-1, True)) / (x.std(-1, keepdim=True) + 1e-6)), ("layer_norm",),
    ),
    "rms norm by hand": (
        lambda: lambda x: F.relu(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), ("rms_norm",),
    ),
    "rms norm in double": (
        lambda: lambda x: F.relu((x.double() * torch.rsqrt(x.double().square().mean(-1, True) + 1e-6)).to(x.dtype)),
        ("rms_norm",),
    ),
    "unit vectors": (lambda: lambda x: F.relu(F.normalize(x, dim=-1)), ("rms_norm",)),
    "batch norm by hand": (
        lambda: lambda x: F.relu((x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)), ("layer_norm",),
    ),
    "residual": (lambda: lambda x: F.relu(x + x.roll(1, 0).detach().cos()), ("add",)),
    "bias of its own": (lambda: lambda x: F.relu(x + torch.arange(8.0)), ()),
    "scaled channels": (lambda: lambda x: F.relu(x * torch.linspace(0.5, 1, 8)), ("scale",)),
}  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_what_lies_between_a_weight_and_its_activation(name):
    make, path = PATHS[name]
    p = by_tensor(Calls(make()), torch.randn(6, 6))["first.weight"]
    assert ("relu", path) in fed(p)


def test_attention():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(8)
            return self.o(F.softmax(scores, -1) @ self.v(x))

    found = {k: fed(p) for k, p in by_tensor(Attention(), torch.randn(2, 5, 8)).items()}
    assert found == {
        **{f"{part}.weight": [("linear", ("attention",))] for part in "qkv"},
        "o.weight": [("linear", ("output",))],
    }


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7}])
def test_multihead_attention(batch_first, options):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)

        def forward(self, q, k, v):
            return self.attention(q, k, v)[0]

    shapes = [(3, 4, 8), (3, 4, options.get("kdim", 8)), (3, 4, options.get("vdim", 8))]
    pairs = pairs_of(Outer(), *(torch.randn(s) for s in shapes))
    fans = [(p.tensor.removeprefix("attention."), p.fan_in, p.fan_out) for p in pairs]
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if options else ["in_proj_weight"] * 3
    widths = [8, options.get("kdim", 8), options.get("vdim", 8)]
    assert fans == [*((n, w, 8) for n, w in zip(names, widths, strict=True)), ("out_proj.weight", 8, 8)]
    assert {f for p in pairs[:3] for f in fed(p)} == {("linear", ("attention",))}


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
