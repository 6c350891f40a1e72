"""Small networks trained on scikit-learn's digits, and what is said of each of their tensors before and after."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator

import torch
from sklearn.datasets import load_digits
from torch import nn

from initaudit.expect.recognise import Recognition, recognise
from initaudit.expect.schemes import Site, site_of
from initaudit.measure.observation import observe

STEPS = 300


class Transformer(nn.Module):
    """The eight rows of an image as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 64)
        self.position = nn.Parameter(torch.zeros(8, 64))
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits for (batch, 1, 8, 8)."""
        return self.head(self.body(self.embed(x.squeeze(1)) + self.position).mean(1))


class Recurrent(nn.Module):
    """The rows of an image in time."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 64, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits for (batch, 1, 8, 8)."""
        return self.head(self.lstm(x.squeeze(1))[0][:, -1])


def mlp() -> nn.Module:
    """Three hidden layers."""
    widths = (64, 128, 128, 64)
    hidden = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(64, 10))


def cnn() -> nn.Module:
    """Convolutions with batch normalization."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 10)),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "cnn": cnn, "transformer": Transformer, "lstm": Recurrent}
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd slow": lambda p: torch.optim.SGD(p, lr=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
}
INITS: dict[str, Callable[[torch.Tensor], object]] = {
    "default": lambda w: w,
    "normal(0.02)": lambda w: nn.init.normal_(w, 0, 0.02),
    "kaiming_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "xavier_uniform": nn.init.xavier_uniform_,
    "orthogonal": nn.init.orthogonal_,
}


def site_for(weight: torch.Tensor, name: str) -> Site:
    """The site as a graph would give it."""
    axes = {1: ("o",), 2: ("o", "i"), 4: ("o", "i", "k", "k")}[weight.ndim]
    if "lstm" in name:
        return site_of(tuple(weight.shape), axes, operator="lstm", packed=4, hidden=weight.shape[0] // 4)
    return site_of(tuple(weight.shape), axes, packed=3 if "in_proj" in name else 1)


def verdicts(network: nn.Module) -> dict[str, Recognition]:
    """What is said of each weight of two axes or more."""
    weights = {n: p.detach() for n, p in network.named_parameters() if p.ndim > 1}
    return {n: recognise(observe(p.numpy()), site_for(p, n)) for n, p in weights.items()}


def train(network: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> float:
    """The loss at the end; full classification of the digits in batches of 64."""
    digits = load_digits()
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(digits.target)
    loss = torch.zeros(())
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        loss = nn.functional.cross_entropy(network(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(loss.detach())


def runs(seeds: int, steps: int = STEPS) -> Iterator[tuple[str, str, str, int, str, float, Recognition, Recognition, bool]]:
    """(network, optimizer, init, size, tensor, relative change, before, after, frozen) of every tensor of every run."""
    for kind, make in NETWORKS.items():
        for optimizer, build in OPTIMIZERS.items():
            for init, apply in INITS.items():
                for seed in range(seeds):
                    torch.manual_seed(seed)
                    network = make()
                    weights = [(n, p) for n, p in network.named_parameters() if p.ndim > 1]
                    with torch.no_grad():
                        for _, p in weights:
                            apply(p)
                    before, start = verdicts(network), {n: p.detach().clone() for n, p in weights}
                    # One large layer is left out of the training: the untrained layer to be found.
                    large = [n for n, p in weights if p.numel() >= 1000]
                    frozen = large[seed % len(large)]
                    train(network, build([p for n, p in network.named_parameters() if n != frozen]), steps)
                    after = verdicts(network)
                    for n, p in weights:
                        change = float((p - start[n]).norm() / start[n].norm().clamp_min(1e-30))
                        yield kind, optimizer, init, p.numel(), n, change, before[n], after[n], n == frozen


def table(seeds: int) -> Iterator[str]:
    """Lines of the table; a run for each seed, so few seeds are enough."""
    torch.set_num_threads(1)
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for kind, optimizer, _, size, _, change, before, after, frozen in runs(max(1, seeds // 7)):
        for key in ((kind, optimizer), ("all", "")):
            c = counts[key]
            c["fresh"] += 1
            c["fresh called trained"] += before.verdict == "trained"
            if frozen:
                c["frozen"] += 1
                c["found"] += after.verdict == "init"
            elif math.isfinite(change) and change > 0:
                c["trained"] += 1
                c["called untrained"] += after.verdict == "init"
                if size >= 1000:
                    c["large"] += 1
                    c["seen"] += after.verdict == "trained"
    yield f"{'network':14}{'optimizer':12}{'trained':>9}{'called untrained':>18}{'seen (>=1000)':>15}{'frozen found':>14}{'fresh wrong':>13}"
    for (kind, optimizer), c in counts.items():
        yield (
            f"{kind:14}{optimizer:12}{c['trained']:9}{c['called untrained'] / c['trained']:18.2%}{c['seen'] / c['large']:15.2%}"
            f"{c['found'] / c['frozen']:14.2%}{c['fresh called trained'] / c['fresh']:13.2%}"
        )
