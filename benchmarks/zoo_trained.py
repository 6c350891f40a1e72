"""Small networks that are trained here on scikit-learn's digits: silent as they are, and with a layer made again."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_models import quiet
from zoo_own import Mixed, Residual, mlp
from zoo_silence import summary

from initaudit import audit

_STEPS = 300


class Rows(nn.Module):
    """Reads an image as eight tokens, one a row."""

    def __init__(self, body: Callable[[], nn.Module], width: int = 48) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Linear(8, width), body(), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(self.embed(x.squeeze(1)))
        return self.head((y[0] if isinstance(y, tuple) else y).mean(1))


def _convs() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((1, 24), (24, 24), (24, 32), (32, 32)):
        layers += [nn.Conv2d(i, o, 3, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def _residual() -> nn.Module:
    blocks = (
        Residual(
            nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.GroupNorm(4, 24), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1))
        )
        for _ in range(3)
    )
    return nn.Sequential(
        nn.Conv2d(1, 24, 3, padding=1), *blocks, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)
    )


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(48, 4, 96, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Flatten(), mlp(64, 128, 128, 128, 10)),
    "tanh": lambda: nn.Sequential(nn.Flatten(), mlp(64, 96, 96, 96, 10, act=nn.Tanh)),
    "cnn": _convs,
    "residual": _residual,
    "transformer": lambda: Rows(_encoder),
    "lstm": lambda: Rows(lambda: nn.LSTM(48, 48, batch_first=True)),
    "mixer": lambda: Rows(lambda: nn.Sequential(Mixed(8, 48), Mixed(8, 48))),
}


@functools.cache
def digits() -> tuple[Tensor, Tensor]:
    """1797 images (N, 1, 8, 8) of mean 0 and variance 1, and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1)
    return (x - x.mean()) / x.std(), torch.tensor(data.target)


def trained(name: str) -> nn.Module:
    """The network after 300 steps of AdamW."""
    x, y = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TRAINED[name]()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.02)
        for _ in range(_STEPS):
            i = torch.randint(len(x), (96,))
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model.eval()


def _layers(module: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """What forward calls and can be made again, each with the names of its matrices, in order, once, and without the last.

    Layers of fewer than 256 weights are left out.
    """
    found: dict[nn.Module, list[str]] = {}
    names = {m: n for n, m in module.named_modules()}

    def called(m: nn.Module, *_: Any) -> None:
        found[m] = [f"{names[m]}.{n}" for n, p in m.named_parameters(recurse=False) if p.ndim > 1 and p.numel() >= 256]

    hooks = [m.register_forward_hook(called) for m in names if hasattr(m, "reset_parameters")]
    with torch.no_grad():
        module(digits()[0][:2])
    for hook in hooks:
        hook.remove()
    return [(matrices, m) for m, matrices in found.items() if matrices][:-1]


def _picked(module: nn.Module) -> list[int]:
    """The layers at the beginnings of the thirds of a network; one that is in two of them counts once."""
    count = len(_layers(module))
    return list(dict.fromkeys(p * count // 3 for p in range(3)))


def tasks() -> list[str]:
    """Each network as trained, and with a layer made again at up to three depths."""
    return [f"trained|{n}|{p}" for n in TRAINED for p in ("", *range(len(_picked(TRAINED[n]().eval()))))]


def row(task: str) -> dict[str, Any]:
    """The audit of a trained network, whole or with one fresh layer."""
    _, name, place = task.split("|")
    module, inputs = trained(name), (digits()[0][:32],)
    found: dict[str, Any] = {"family": "trained", "model": name, "fault": "untrained layer" if place else "", "place": place}
    if place:
        matrices, layer = _layers(module)[_picked(module)[int(place)]]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            layer.reset_parameters()
        found.update(changed=matrices, codes=("IA501",))
    began = time.process_time()
    with quiet():
        said = audit(module, inputs)
    return {**found, **summary(said, began)}
