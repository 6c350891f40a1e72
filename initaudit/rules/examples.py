"""Small networks out of which the rules' examples are made; torch is imported when one is built."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from initaudit.rules.rule import Example

if TYPE_CHECKING:
    import torch
    from torch import nn

# What an example changes about a module before it is judged.
Change = Callable[[Any], Any]


def example(name: str, build: Callable[[], Any], seed: int = 0) -> Example:
    """An example drawn from `seed`; the caller's random state is left alone."""

    def seeded() -> Any:
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build()

    return Example(name, seeded)


def mlp(*sizes: int, act: str = "ReLU", change: Change | None = None, gain: float = math.sqrt(2)) -> Any:
    """Linear layers of these sizes, N(0, gain²/fan_in) with zero biases, an activation between each two; 32 inputs N(0, 1)."""
    import torch
    from torch import nn

    stack: list[nn.Module] = []
    for i, o in itertools.pairwise(sizes):
        layer = nn.Linear(i, o)
        nn.init.normal_(layer.weight, 0, gain / math.sqrt(i))
        nn.init.zeros_(layer.bias)
        stack += [layer, getattr(nn, act)()]
    model = nn.Sequential(*stack[:-1])
    if change is not None:
        with torch.no_grad():
            change(model)
    return model, (torch.randn(32, sizes[0]),)


def linear(model: nn.Module) -> list[nn.Linear]:
    """The linear layers in order."""
    from torch import nn

    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def convs(*, norm: bool, change: Change | None = None, depth: int = 4, width: int = 16) -> Any:
    """3x3 convolutions under He, with or without BatchNorm, before ReLU; a pooled linear head; 8 images of 12x12."""
    import torch
    from torch import nn

    stack: list[nn.Module] = []
    for i in range(depth):
        conv = nn.Conv2d(3 if i == 0 else width, width, 3, padding=1, bias=not norm)
        nn.init.kaiming_normal_(conv.weight)
        stack += [conv, *([nn.BatchNorm2d(width)] if norm else []), nn.ReLU()]
    model = nn.Sequential(*stack, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5))
    if change is not None:
        with torch.no_grad():
            change(model)
    return model, (torch.randn(8, 3, 12, 12),)


def residual(depth: int, width: int = 48, *, gate: float | None = None, change: Change | None = None) -> Any:
    """Pre-norm blocks x + gate * f(norm(x)) with N(0, 0.02) weights, an embedding before and a linear head behind."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.gate = None if gate is None else nn.Parameter(torch.full((width,), gate))

        def forward(self, x: torch.Tensor) -> Any:
            y = self.down(nn.functional.gelu(self.up(self.norm(x))))
            return x + (y if self.gate is None else self.gate * y)

    model = nn.Sequential(nn.Embedding(64, width), *(Block() for _ in range(depth)), nn.LayerNorm(width), nn.Linear(width, 64))
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0, 0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    if change is not None:
        with torch.no_grad():
            change(model)
    return model, (torch.randint(0, 64, (8, 12)),)


def trained(change: Change | None = None, steps: int = 150) -> Any:
    """An MLP that has learnt to tell which of its first five inputs is the largest; Adam, a second on one core."""
    model, inputs = mlp(24, 64, 64, 64, 64, 5)
    return learnt(model, steps, change), inputs


def learnt(model: Any, steps: int, change: Change | None = None) -> Any:
    """A network of 24 inputs and 5 outputs, trained to tell which of the first five inputs is the largest, then changed."""
    import torch
    from torch import nn

    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    with torch.enable_grad():
        for _ in range(steps):
            x = torch.randn(64, 24)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    if change is not None:
        with torch.no_grad():
            change(model)
    return model.eval()
