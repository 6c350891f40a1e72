"""The activations that a weight feeds, as modules and written by hand, and what lies between. Judge: what was written."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_pair import by_tensor, fed, pairs_of
from torch import nn


class Calls(nn.Module):
    """A linear layer, some function, a linear layer."""

    def __init__(self, function, width=8, out=8):
        super().__init__()
        self.first, self.second = nn.Linear(6, width), nn.Linear(out, 3)
        self.function = function if isinstance(function, nn.Module) else None
        self.call = function

    def forward(self, x):
        return self.second(self.call(self.first(x)))


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
