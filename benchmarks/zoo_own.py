"""Architectures that no package holds in a small form, initialised as their papers or their reference code do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_generative import GENERATIVE
from zoo_models import Built, Model, ids, image


class Lambda(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU, norm: bool = False) -> nn.Sequential:
    """Linear layers of these widths, an activation between each two."""
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise(widths):
        layers += [nn.Linear(i, o), *([nn.LayerNorm(o)] if norm else []), act()]
    return nn.Sequential(*layers[: -2 if norm else -1])


@torch.no_grad()
def he(module: nn.Module, gain: float = math.sqrt(2.0)) -> nn.Module:
    """Normal weights of variance gain²/fan_in, zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d):
            nn.init.normal_(m.weight, 0, gain / math.sqrt(m.weight[0].numel()))
            if m.bias is not None:
                nn.init.zeros_(m.bias)
    return module


def orthogonal(module: nn.Module, gain: float) -> nn.Module:
    """As reinforcement learning initialises: orthogonal, zero biases, a small last layer."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for m in layers:
        nn.init.orthogonal_(m.weight, gain if m is not layers[-1] else 0.01)
        nn.init.zeros_(m.bias)
    return module


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Mixed(nn.Module):
    """MLP-Mixer's block: over patches, then over channels (Tolstikhin et al. 2021)."""

    def __init__(self, patches: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = mlp(patches, 32, patches, act=nn.GELU), mlp(width, 4 * width, width, act=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 64, 8, 8), nn.Sequential(*(Mixed(16, 64) for _ in range(4)))
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).transpose(1, 2))).mean(1))


class Words(nn.Module):
    """A recurrent language model: next word, its table tied to the head on request."""

    def __init__(self, kind: str, tied: bool = False, **options: object) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 64)
        self.rnn = getattr(nn, kind)(64, 64, batch_first=True, **options)
        self.head = nn.Linear(128 if options.get("bidirectional") else 64, 200)
        if tied:
            nn.init.uniform_(self.table.weight, -0.1, 0.1)
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.table(x))[0])


class Cell(nn.Module):
    """A recurrence written as a loop over a cell."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.cell, self.head = getattr(nn, kind)(12, 48), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape[0], 48)
        c = h
        for t in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                h, c = self.cell(x[:, t], (h, c))
            else:
                h = self.cell(x[:, t], h)
        return self.head(h)


class Temporal(nn.Module):
    """A temporal convolutional network with weight norm and dilations (Bai et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        wn = nn.utils.parametrizations.weight_norm
        self.first = nn.ModuleList(wn(nn.Conv1d(6 if i == 0 else 32, 32, 3, dilation=2**i)) for i in range(4))
        self.second = nn.ModuleList(wn(nn.Conv1d(32, 32, 3, dilation=2**i)) for i in range(4))
        self.skip, self.head = nn.Conv1d(6, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i, (a, b) in enumerate(zip(self.first, self.second, strict=True)):
            y = F.relu(a(F.pad(x, (2 << i, 0))))
            y = F.relu(b(F.pad(y, (2 << i, 0))))
            x = F.relu(y + (self.skip(x) if i == 0 else x))
        return self.head(x[..., -1])


class Graph(nn.Module):
    """Graph convolutions over a dense, normalised adjacency (Kipf & Welling 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16 if i == 0 else 32, 32, bias=False) for i in range(2))
        self.out = nn.Linear(32, 4)
        for layer in self.layers:
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(adjacency @ layer(x))
        return self.out(x)


class Point(nn.Module):
    """PointNet: shared layers over points, then their maximum (Qi et al. 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(
            nn.Conv1d(3, 64, 1), nn.BatchNorm1d(64), nn.ReLU(), nn.Conv1d(64, 128, 1), nn.BatchNorm1d(128), nn.ReLU()
        )
        self.head = mlp(128, 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.points(x).amax(-1))


class Radiance(nn.Module):
    """NeRF: a position encoding, eight layers of 128, the input again half-way (Mildenhall et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = mlp(39, *[128] * 4), mlp(128 + 39, *[128] * 3)
        self.density, self.colour = nn.Linear(128, 1), mlp(128, 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        encoded = torch.cat([x, *(f(2**k * x) for k in range(6) for f in (torch.sin, torch.cos))], -1)
        h = F.relu(self.before(encoded))
        h = F.relu(self.after(torch.cat([h, encoded], -1)))
        return torch.cat([self.density(h), torch.sigmoid(self.colour(h))], -1)


class Recommender(nn.Module):
    """DLRM: tables and numbers, their products, two stacks of layers (Naumov et al. 2019)."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(100, 16, mode="sum") for _ in range(4))
        self.bottom, self.top = mlp(13, 64, 16), mlp(16 + 10, 64, 32, 1)
        for t in self.tables:
            nn.init.uniform_(t.weight, -0.1, 0.1)
        for m in (*self.bottom, *self.top):
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, 0, math.sqrt(2 / (m.in_features + m.out_features)))
                nn.init.normal_(m.bias, 0, math.sqrt(1 / m.out_features))

    def forward(self, numbers: Tensor, words: Tensor) -> Tensor:
        x = F.relu(self.bottom(numbers))
        each = torch.stack([x, *(t(words[:, i : i + 1]) for i, t in enumerate(self.tables))], 1)
        rows, columns = torch.triu_indices(5, 5, 1)
        return torch.sigmoid(self.top(torch.cat([x, (each @ each.transpose(1, 2))[:, rows, columns]], 1)))


class Seq2Seq(nn.Module):
    """nn.Transformer between two tables."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(200, 64)
        self.body = nn.Transformer(64, 4, 2, 2, 128, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 200)
        nn.init.uniform_(self.table.weight, -0.1, 0.1)  # N(0, 1), torch's default, would make its attention one-hot

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(8.0 * self.table(source), 8.0 * self.table(target)))


class Actor(nn.Module):
    """An agent's two heads on one body, orthogonal (Andrychowicz et al. 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp(11, 64, 64, 64, act=nn.Tanh)
        self.policy, self.value = nn.Linear(64, 4), nn.Linear(64, 1)
        orthogonal(nn.Sequential(self.body, nn.Tanh(), self.policy), math.sqrt(2))
        nn.init.orthogonal_(self.value.weight, 1.0)
        nn.init.zeros_(self.value.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.body(x))
        return self.policy(h), self.value(h)


class Highway(nn.Module):
    """y = t h(x) + (1 - t) x, the gate's bias at -1 (Srivastava et al. 2015)."""

    def __init__(self, depth: int = 8, width: int = 64) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.t = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.stem, self.head = nn.Linear(20, width), nn.Linear(width, 6)
        for m in self.t:
            nn.init.constant_(m.bias, -1.0)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for h, t in zip(self.h, self.t, strict=True):
            gate = torch.sigmoid(t(x))
            x = gate * F.relu(h(x)) + (1 - gate) * x
        return self.head(x)


def siren() -> nn.Module:
    """sin(30 (Wx + b)) with the bounds of Sitzmann et al. 2020."""
    module = mlp(2, 128, 128, 128, 3, act=lambda: Lambda(lambda x: torch.sin(30 * x)))
    for i, m in enumerate(m for m in module if isinstance(m, nn.Linear)):
        bound = math.sqrt(6 / m.in_features) / 30 if i else 1 / m.in_features
        nn.init.uniform_(m.weight, -bound, bound)
    return module


def tokens_encoder() -> nn.Module:
    """nn.TransformerEncoder with its layers drawn one by one: as it comes, they are copies of one layer."""
    layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    for p in stack.parameters():
        if p.dim() > 1:
            nn.init.xavier_uniform_(p)
    return nn.Sequential(nn.Linear(12, 64), stack, nn.Linear(64, 5))


def resnet_tabular() -> nn.Module:
    """Residual blocks of LayerNorm and two layers (Gorishniy et al. 2021)."""
    blocks = (Residual(nn.Sequential(nn.LayerNorm(64), *mlp(64, 128, 64))) for _ in range(4))
    return nn.Sequential(nn.Linear(20, 64), *blocks, nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 3))


def _series() -> tuple[Tensor]:
    return (torch.randn(8, 10, 12),)


def _adjacency() -> Tensor:
    links = (torch.rand(8, 20, 20) < 0.2).float() + torch.eye(20)
    return links / links.sum(-1, keepdim=True)


def _dqn() -> nn.Module:
    convs = [nn.Conv2d(4, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU(), nn.Conv2d(64, 64, 3, 1), nn.ReLU()]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 6))


# name: (family, build)
OWN: dict[str, tuple[str, Callable[[], Built]]] = {
    "mlp-default": ("plain", lambda: (mlp(64, 128, 64, 10), (torch.randn(32, 64),))),
    "mlp-he-20": ("plain", lambda: (he(mlp(64, *[128] * 20, 10)), (torch.randn(32, 64),))),
    "mlp-selu-12": ("plain", lambda: (he(mlp(64, *[128] * 12, 10, act=nn.SELU), 1.0), (torch.randn(32, 64),))),
    "mlp-tanh-8": ("plain", lambda: (orthogonal(mlp(64, *[96] * 8, 10, act=nn.Tanh), 1.1), (torch.randn(32, 64),))),
    "mlp-layernorm": ("plain", lambda: (mlp(32, *[64] * 6, 5, norm=True), (torch.randn(32, 32),))),
    "dqn": ("plain", lambda: (_dqn(), (image(84, 8, 4),))),
    "actor-critic": ("plain", lambda: (Actor(), (torch.randn(32, 11),))),
    "nerf": ("plain", lambda: (Radiance(), (2 * torch.rand(32, 3) - 1,))),
    "siren": ("plain", lambda: (siren(), (2 * torch.rand(32, 2) - 1,))),
    "highway": ("residual", lambda: (Highway(), (torch.randn(32, 20),))),
    "tabular-resnet": ("residual", lambda: (resnet_tabular(), (torch.randn(32, 20),))),
    "mixer": ("mixer", lambda: (Mixer(), (image(32),))),
    "lstm-words": ("recurrent", lambda: (Words("LSTM", num_layers=2), (ids(),))),
    "lstm-words-tied": ("recurrent", lambda: (Words("LSTM", tied=True), (ids(),))),
    "gru-words": ("recurrent", lambda: (Words("GRU", bidirectional=True), (ids(),))),
    "rnn-words": ("recurrent", lambda: (Words("RNN"), (ids(),))),
    "lstm-cell": ("recurrent", lambda: (Cell("LSTMCell"), _series())),
    "gru-cell": ("recurrent", lambda: (Cell("GRUCell"), _series())),
    "rnn-cell": ("recurrent", lambda: (Cell("RNNCell"), _series())),
    "tcn": ("recurrent", lambda: (Temporal(), (torch.randn(8, 6, 32),))),
    "gcn": ("plain", lambda: (Graph(), (torch.randn(8, 20, 16), _adjacency()))),
    "pointnet": ("plain", lambda: (Point(), (torch.randn(8, 3, 64),))),
    "dlrm": ("plain", lambda: (Recommender(), (torch.randn(32, 13), torch.randint(0, 100, (32, 4))))),
    "torch-encoder": ("encoder", lambda: (tokens_encoder(), _series())),
    "torch-transformer": ("encoder-decoder", lambda: (Seq2Seq(), (ids(), ids(8)))),
}


def models() -> Iterator[Model]:
    """Every own architecture."""
    for name, (family, build) in {**OWN, **GENERATIVE}.items():
        yield Model(f"own:{name}", family, build)
