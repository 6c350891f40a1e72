"""The networks of fresh_networks.py, with weights as their papers or the framework draw them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Maxout(nn.Module):
    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.pieces = nn.Linear(inside, 3 * out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pieces(x).unflatten(-1, (3, -1)).amax(-2)
        return y


class FixedPoint(nn.Module):
    """Eight steps towards the fixed point of z = tanh(W z + U x), one W for all."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(32, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        u = self.outer(x)
        z = torch.zeros_like(u)
        for _ in range(8):
            z = torch.tanh(self.inner(z) + u)
        y: Tensor = self.head(z)
        return y


class Siamese(nn.Module):
    """One tower for both of a pair, classes from the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(10, 48), nn.ReLU(), nn.Linear(48, 24))
        self.head = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 2))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((self.tower(x[:, 0]) - self.tower(x[:, 1])).abs())
        return y


class Experts(nn.Module):
    """A soft mixture of four MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 4)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        shares = self.gate(x).softmax(-1)
        return torch.stack([e(x) for e in self.experts], -1).mul(shares[:, None]).sum(-1)


class Dilated(nn.Module):
    """Causal convolutions with doubling dilations, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(4, 24, 1)
        self.layers = nn.ModuleList(nn.Conv1d(24, 24, 2, dilation=2**i) for i in range(4))
        self.head = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.transpose(1, 2))
        for i, layer in enumerate(self.layers):
            x = x + torch.relu(layer(F.pad(x, (2**i, 0))))
        y: Tensor = self.head(x[..., -1])
        return y


class Sine(nn.Module):
    """sin(w0 (W x + b)), Sitzmann et al. 2020."""

    def __init__(self, inside: int, out: int, first: bool, w0: float = 10.0) -> None:
        super().__init__()
        self.w0, self.layer = w0, nn.Linear(inside, out)
        bound = 1 / inside if first else math.sqrt(6 / inside) / w0
        nn.init.uniform_(self.layer.weight, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(self.w0 * self.layer(x))


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRU(6, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.cell(x)[0])
        return y


class Attend(nn.Module):
    """x plus single-headed attention and an MLP; no norm anywhere."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / math.sqrt(x.shape[-1])
        x = x + self.o(scores.softmax(-1) @ self.v(x))
        y: Tensor = x + self.mlp(x)
        return y


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Pool(nn.Module):
    """Attention from one learnt query to a set (Lee et al. 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seed, self.attend = nn.Parameter(torch.randn(1, 1, width)), nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attend(self.seed.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0][:, 0]
        return y


class Mix(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.along = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.across = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.along(self.one(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.across(self.two(x))
        return y


class Capsules(nn.Module):
    """Vectors squashed to a length below 1 and routed once; a class is the length of its vector, times 4."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.vote = nn.Linear(16, 48), nn.Linear(6, 32)

    def forward(self, x: Tensor) -> Tensor:
        low = self.squashed(self.low(x).unflatten(1, (8, 6)))
        high = self.squashed(self.vote(low).unflatten(2, (4, 8)).sum(1))
        return 4 * (high.square().sum(-1) + 1e-6).sqrt()

    def squashed(self, v: Tensor) -> Tensor:
        size = v.square().sum(-1, keepdim=True)
        return v * size / (1 + size) / (size + 1e-6).sqrt()


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.low = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up, self.join = nn.ConvTranspose2d(32, 16, 2, 2), nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.down(x))
        b = torch.relu(self.low(F.max_pool2d(a, 2)))
        y: Tensor = self.head(torch.relu(self.join(torch.cat([a, self.up(b)], 1))).mean((2, 3)))
        return y


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * x.square()


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(40, 24), nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.table(x).mean(1))
        return y


def stack(depth: int, width: int, act: Callable[[], nn.Module], init: Callable[[Tensor], object] | None = None) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(16, width), act()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), act()]
    for layer in layers:
        if isinstance(layer, nn.Linear) and init is not None:
            init(layer.weight)
    return nn.Sequential(*layers, nn.Linear(width, 4))


def lecun(w: Tensor) -> object:
    return nn.init.normal_(w, 0, w.shape[1] ** -0.5)


def gated() -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(16, 32)]
    for _ in range(3):
        layers += [nn.Linear(32, 64), nn.GLU(), nn.LayerNorm(32)]
    return nn.Sequential(*layers, nn.Linear(32, 4))


def critic() -> nn.Module:
    convs = [nn.Conv2d(3, 16, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.LeakyReLU(0.2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 4))


def depthwise() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1), nn.PReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1), nn.PReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 4))


def coder() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 12), nn.Tanh()), *(nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 16))
    )


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "maxout": lambda: nn.Sequential(Maxout(16, 32), Maxout(32, 32), nn.Linear(32, 4)),
    "fixed_point": FixedPoint,
    "siamese": Siamese,
    "autoencoder": coder,
    "discriminator": critic,
    "experts": Experts,
    "dilated": Dilated,
    "selu": lambda: stack(10, 32, nn.SELU, lecun),
    "siren": lambda: nn.Sequential(Sine(2, 48, True), Sine(48, 48, False), Sine(48, 48, False), nn.Linear(48, 1)),
    "gru_tagger": Tagger,
    "bare_attention": lambda: nn.Sequential(nn.Linear(4, 24), Attend(24), Attend(24), Mean(), nn.Linear(24, 4)),
    "set_attention": lambda: nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 24), Pool(24), nn.Linear(24, 4)),
    "token_mixer": lambda: nn.Sequential(nn.Linear(4, 24), Mix(20, 24), Mix(20, 24), Mean(), nn.Linear(24, 4)),
    "capsule": Capsules,
    "unet": UNet,
    "glu": gated,
    "bag": Bag,
    "linear": lambda: stack(4, 24, nn.Identity),
    "quadratic": lambda: stack(2, 24, Square),
    "prelu_depthwise": depthwise,
}
