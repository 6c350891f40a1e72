"""The layers of the networks of other_networks.py."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Norm(nn.Module):
    """x / rms(x) times a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Residual(nn.Module):
    """x + f(x), a norm before f or behind the sum."""

    def __init__(self, branch: nn.Module, before: nn.Module | None = None, behind: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.before, self.behind = branch, before or nn.Identity(), behind or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.behind(x + self.branch(self.before(x)))
        return y


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(2, (4, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y: Tensor = self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return y


class Gated(nn.Module):
    def __init__(self, width: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.act = (
            nn.Linear(width, 2 * width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
            act(),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.act(self.gate(x)) * self.up(x))
        return y


class Transposed(nn.Module):
    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inside(x.transpose(1, 2)).transpose(1, 2)
        return y


class Recurrent(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.cell(x)[0][:, -1]
        return y


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Dense(nn.Module):
    """Every layer reads all layers before it (DenseNet)."""

    def __init__(self, inside: int, width: int, depth: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(inside + i * width, width) for i in range(depth))
        self.act, self.out = act(), inside + depth * width

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, self.act(layer(x))], 1)
        return x


class Highway(nn.Module):
    def __init__(self, width: int, act: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.h, self.t, self.act = nn.Linear(width, width), nn.Linear(width, width), act()

    def forward(self, x: Tensor) -> Tensor:
        t = torch.sigmoid(self.t(x) - 1)
        y: Tensor = t * self.act(self.h(x)) + (1 - t) * x
        return y
