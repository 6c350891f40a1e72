"""Small networks trained on scikit-learn's digits, and what is said of each of their tensors before and after."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from sklearn.datasets import load_digits
from torch import nn

from initaudit.expect.phase import Kind, TensorRecord, phase_of
from initaudit.expect.recognise import Recognition, recognise
from initaudit.expect.schemes import Site, site_of
from initaudit.measure.moments import measure
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
    hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
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


def weight_of(name: str, names: set[str]) -> str | None:
    """The weight that a bias belongs to."""
    weight = name.replace("bias", "weight")
    return weight if weight in names else None


def records(network: nn.Module) -> list[TensorRecord]:
    """Every parameter, as an audit would hand it over."""
    parameters = {n: p.detach() for n, p in network.named_parameters()}
    found = []
    for n, p in parameters.items():
        array = p.numpy()
        if p.ndim > 1:
            kind: Kind = "other" if n == "position" else "weight"
            found.append(TensorRecord(n, kind, measure(array), recognise(observe(array), site_for(p, n))))
            continue
        weight = weight_of(n, set(parameters)) if "bias" in n else None
        scale = weight is None or parameters[weight].ndim == 1
        if scale and "bias" not in n:
            found.append(TensorRecord(n, "scale", measure(array)))
            continue
        # A bias's law is that of its weight's fans.
        site = None if scale or weight is None else site_for(parameters[weight], weight)
        fans = (1, 1) if site is None else site.convention
        own = site_of(tuple(p.shape), ("o",), fans=fans)
        if site is not None and site.operator == "lstm":
            own = replace(own, operator="lstm", hidden=site.hidden)
        found.append(TensorRecord(n, "bias", measure(array), recognise(observe(array), own), weight))
    return found


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
        # Without it momentum takes the transformer to NaN, of which nothing can be said.
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
    return float(loss.detach())


@dataclass(frozen=True)
class Outcome:
    """What was said of one weight; `change` is the norm of what training did to it over its own."""

    network: str
    optimizer: str
    init: str
    tensor: str
    size: int
    change: float
    frozen: bool
    before: Recognition
    alone: Recognition
    in_company: str
    model: str
    model_before: str


def runs(seeds: int, steps: int = STEPS) -> Iterator[Outcome]:
    """Every weight of every run."""
    for kind, optimizer, init, seed in itertools.product(NETWORKS, OPTIMIZERS, INITS, range(seeds)):
        torch.manual_seed(seed)
        network = NETWORKS[kind]()
        parameters = dict(network.named_parameters())
        weights = {n: p for n, p in parameters.items() if p.ndim > 1}
        with torch.no_grad():
            for p in weights.values():
                INITS[init](p)
            for n, p in parameters.items():
                if "bias" in n and init != "default":
                    p.zero_()
        first = records(network)
        before = {r.name: r.recognition for r in first}
        start = {n: p.detach().clone() for n, p in weights.items()}
        # One large layer is left out of the training with its bias: the untrained layer to be found.
        large = [n for n, p in weights.items() if p.numel() >= 1000]
        frozen = large[seed % len(large)]
        train(
            network,
            OPTIMIZERS[optimizer]([p for n, p in parameters.items() if frozen not in (n, weight_of(n, set(weights)))]),
            steps,
        )
        after = records(network)
        phase = phase_of(after)
        alone = {r.name: r.recognition for r in after}
        for n, p in weights.items():
            old, new = before[n], alone[n]
            assert old is not None
            assert new is not None
            change = float((p.detach() - start[n]).norm() / start[n].norm().clamp_min(1e-30))
            said = phase.tensors[n]
            yield Outcome(
                kind, optimizer, init, n, p.numel(), change, n == frozen, old, new, said, phase.phase, phase_of(first).phase
            )


def table(seeds: int) -> Iterator[str]:
    """Lines of the table; a network is several tensors, so few seeds are enough."""
    torch.set_num_threads(1)
    counts: dict[tuple[str, str], collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for o in runs(max(1, seeds // 20)):
        for key in ((o.network, o.optimizer), ("all", "")):
            c = counts[key]
            c["fresh"] += 1
            c["fresh called trained"] += o.before.verdict == "trained"
            c["model"] += o.model_before == "init" and o.model in ("trained", "mixed")
            if o.frozen:
                c["frozen"] += 1
                c["found"] += o.in_company == "init"
            elif math.isfinite(o.change) and o.change > 0:
                c["trained"] += 1
                c["alone"] += o.alone.verdict == "init"
                c["company"] += o.in_company == "init"
    head = ("network", "optimizer", "trained", "init alone", "init in company", "frozen found", "fresh wrong", "model right")
    yield "  ".join(f"{h:>15}" for h in head)
    for (kind, optimizer), c in counts.items():
        rates = (c["alone"] / c["trained"], c["company"] / c["trained"], c["found"] / c["frozen"])
        more = (c["fresh called trained"] / c["fresh"], c["model"] / c["fresh"])
        cells = [kind, optimizer, str(c["trained"]), *(f"{r:.2%}" for r in (*rates, *more))]
        yield "  ".join(f"{cell:>15}" for cell in cells)
