"""The training that both benchmarks of fresh networks hold the verdict against."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def loss_of(out: Tensor, y: Tensor) -> Tensor:
    """Squared error for numbers, cross-entropy for labels (of every position, where there are several)."""
    return F.mse_loss(out, y) if y.is_floating_point() else F.cross_entropy(out.reshape(-1, out.shape[-1]), y.reshape(-1))


def score_after(
    model: nn.Module, x: Tensor, y: Tensor, *, optimizer: str, rate: float, steps: int, batch: int, seed: int
) -> float:
    """The score after `steps` steps: 1 perfect, 0.1 for chance and where something is not finite.

    Of labels it is the accuracy, of numbers the share of the variance explained, from chance up.
    """
    parameters = model.parameters()
    opt: Any = torch.optim.SGD(parameters, rate, momentum=0.9) if optimizer == "sgd" else torch.optim.Adam(parameters, rate)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        i = torch.randint(len(x), (batch,), generator=order)
        loss = loss_of(model(x[i]), y[i])
        if not torch.isfinite(loss):
            return 0.1
        opt.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        opt.step()
    with torch.no_grad():
        out = model(x)
    if not bool(torch.isfinite(out).all()):
        return 0.1
    if y.is_floating_point():
        chance, right = 0.0, float(1 - (out - y).square().mean() / y.var())
    else:
        chance, right = 1 / (int(y.max()) + 1), float((out.argmax(-1) == y).float().mean())
    return 0.1 + 0.9 * max(0.0, (right - chance) / (1 - chance))
