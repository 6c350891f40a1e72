"""What is said of networks that are drawn correctly, at random sizes down to three units: whatever it is, chance made it.

    python benchmarks/sampling_error.py --seeds 500

draws for each seed a kind (multilayer perceptron, convolutions, LSTM, GRU or RNN), its widths and depth, an activation and a
scheme that fits it, audits the whole, and prints every warning and error.
"""

from __future__ import annotations

import argparse
import collections
import random
from typing import Any

import torch
from torch import nn

import initaudit

WIDTHS = (3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 200)
SCHEMES = (
    *((nn.ReLU, "he normal"), (nn.ReLU, "he uniform"), (nn.GELU, "he normal"), (nn.ReLU, "orthogonal")),
    *((nn.Tanh, "xavier normal"), (nn.Tanh, "xavier uniform"), (nn.SELU, "lecun"), (nn.ReLU, "default"), (nn.Tanh, "default")),
)


def initialised(layer: Any, scheme: str) -> nn.Module:
    """The layer drawn by the scheme, with zero biases but for the framework's own."""
    w = layer.weight
    if scheme != "default":
        nn.init.zeros_(layer.bias)
    if scheme == "he normal":
        nn.init.kaiming_normal_(w, nonlinearity="relu")
    elif scheme == "he uniform":
        nn.init.kaiming_uniform_(w, nonlinearity="relu")
    elif scheme == "xavier normal":
        nn.init.xavier_normal_(w, 5 / 3)
    elif scheme == "xavier uniform":
        nn.init.xavier_uniform_(w, 5 / 3)
    elif scheme == "lecun":
        nn.init.normal_(w, 0, w[0].numel() ** -0.5)
    elif scheme == "orthogonal":
        nn.init.orthogonal_(w, 2**0.5)
    return layer  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    """A table of 50 words, a cell, a head on the last state."""

    def __init__(self, cell: Any, width: int) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(50, width), cell(width, width, batch_first=True), nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits for (batch, time)."""
        return self.head(self.cell(self.table(x))[0][:, -1])  # type: ignore[no-any-return]


def network(seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A network and a batch. The framework's default is made for few layers, and is given no narrower ones than of 8."""
    r = random.Random(seed)
    torch.manual_seed(seed)
    kind, depth, (act, scheme) = r.choice(["mlp", "mlp", "conv", "cell"]), r.choice([1, 2, 3, 4, 6]), r.choice(SCHEMES)
    least, depth = (8, min(depth, 3)) if scheme == "default" else (3, depth)
    layers: list[nn.Module] = []
    if kind == "cell":
        return Recurrent(r.choice([nn.LSTM, nn.GRU, nn.RNN]), max(4, min(64, r.choice(WIDTHS)))), torch.randint(0, 50, (16, 8))
    if kind == "mlp":
        first = i = r.choice(WIDTHS)
        for o in (max(least, r.choice(WIDTHS)) for _ in range(depth)):
            layers += [initialised(nn.Linear(i, o), scheme), act()]
            i = o
        return nn.Sequential(*layers, nn.Linear(i, r.choice([2, 3, 10]))), torch.randn(32, first)
    first = i = r.choice([1, 3, 4])
    for _ in range(depth):
        o, k = max(8, min(r.choice(WIDTHS), 48)), r.choice([1, 3, 3, 5])
        layers += [initialised(nn.Conv2d(i, o, k, padding=k // 2), scheme), act()]
        i = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 5)), torch.randn(16, first, 8, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    codes: collections.Counter[str] = collections.Counter()
    for seed in range(options.first, options.first + options.seeds):
        model, inputs = network(seed)
        for f in initaudit.audit(model, (inputs,)).findings:
            if f.severity != "info":
                codes[f.code] += 1
                shapes = [tuple(p.shape) for p in model.parameters() if p.dim() > 1]
                print(seed, f.code, f.severity, f.tensor, f.message[:100], shapes, flush=True)
    print(f"{options.seeds} networks", dict(codes))


if __name__ == "__main__":
    main()
