"""IA507: what the state of an optimizer remembers of the gradients, compared with the gradients themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from initaudit import audit
from initaudit.load import load
from initaudit.measure.gradient_history import histories


def network(depth: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(i, o), nn.ReLU()) for i, o in itertools.pairwise([10, *[12] * depth, 4])]
    return nn.Sequential(*layers)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, steps: int) -> dict[str, float]:
    """Steps on random data; returns the weighted root mean square of each gradient: weights (1 - b) b^(t - s) / (1 - b^t)."""
    means: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        x, y = torch.randn(16, 10, generator=generator), torch.randint(0, 4, (16,), generator=generator)
        nn.functional.cross_entropy(model(x), y).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                means[name] = rate * means.get(name, torch.zeros_like(p)) + (1 - rate) * p.grad.detach() ** 2
        optimizer.step()
    return {name: math.sqrt(float(mean.mean()) / (1 - rate**steps)) for name, mean in means.items()}


Make = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, tuple[Make, float]] = {
    "Adam": (lambda p: torch.optim.Adam(p, 1e-3), 0.999),
    "Adam with other rates": (lambda p: torch.optim.Adam(p, 1e-3, betas=(0.8, 0.95)), 0.95),
    "AdamW": (lambda p: torch.optim.AdamW(p, 1e-3), 0.999),
    "NAdam": (lambda p: torch.optim.NAdam(p, 1e-3), 0.999),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, 1e-3), 0.99),
    "Adadelta": (lambda p: torch.optim.Adadelta(p), 0.9),
}


@pytest.mark.parametrize("steps", [1, 40])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_root_mean_square_of_the_gradient(name: str, steps: int, tmp_path: Path) -> None:
    make, rate = OPTIMIZERS[name]
    model = network()
    optimizer = make(model.parameters())
    expected = train(model, optimizer, rate, steps)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "x.pt")
    found = {history.tensor: history.rms for history in histories(load(tmp_path / "x.pt"))}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("named", [True, False])
def test_groups_of_parameters_are_not_mixed_up(named: bool, tmp_path: Path) -> None:
    """Weight decay for matrices only: the optimizer counts its parameters in another order than the model."""
    model = network()
    parameters = [*model.named_parameters()] if named else [("", p) for p in model.parameters()]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) if named else p for n, p in parameters if (p.dim() > 1) is matrix], "weight_decay": 0.1 * matrix}
        for matrix in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, 1e-3)
    expected = train(model, optimizer, 0.999, 5)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    found = {history.tensor: history.rms for history in histories(load(tmp_path / "x.pt")) if history.tensor}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-4)
    assert set(found) == (set(expected) if named else {"0.0.weight", "6.0.weight", "6.0.bias"})


def test_the_report_says_it_of_every_weight(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    expected = train(model, optimizer, 0.999, 3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "x.pt")
    layers = audit(tmp_path / "x.pt").layers
    assert len(layers) == 7
    for layer in layers:
        assert layer.observed["gradient_rms"] == pytest.approx(expected[layer.tensor], rel=1e-4)
    torch.save(model.state_dict(), tmp_path / "y.pt")
    assert all("gradient_rms" not in layer.observed for layer in audit(tmp_path / "y.pt").layers)


def _saved(change: Callable[[dict[str, Any]], None], tmp_path: Path, depth: int = 6) -> list[str]:
    """The messages of IA507 for a checkpoint whose Adam state was changed after ten steps."""
    model = network(depth)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    train(model, optimizer, 0.999, 10)
    state = optimizer.state_dict()
    change(state["state"])
    torch.save({"model": model.state_dict(), "optimizer": state}, tmp_path / "x.pt")
    return [f.message for f in audit(tmp_path / "x.pt").findings if f.code == "IA507"]


def _silence(state: dict[str, Any]) -> None:
    state[0]["exp_avg_sq"].zero_()


def _overflow(state: dict[str, Any]) -> None:
    state[2]["exp_avg_sq"][0, 0] = math.inf


def _vanish(state: dict[str, Any]) -> None:
    for index, entry in state.items():
        entry["exp_avg_sq"] *= 1e-3 ** (7 - index // 2)


def _explode(state: dict[str, Any]) -> None:
    for index, entry in state.items():
        entry["exp_avg_sq"] *= 1e3 ** (7 - index // 2)


def _shrink(state: dict[str, Any]) -> None:
    for entry in state.values():
        entry["exp_avg_sq"] *= 1e-16


INVALID = {
    "a parameter without a gradient": (_silence, "1 of 14 parameters have never had a gradient"),
    "an overflow": (_overflow, "mean squared gradients of 1.0.weight are not finite"),
    "vanishing": (_vanish, "gradients vanish towards the first layers"),
    "exploding": (_explode, "gradients explode towards the first layers"),
    "below epsilon": (_shrink, "Adam's epsilon"),
}


@pytest.mark.parametrize("kind", INVALID)
def test_a_sick_history_is_found(kind: str, tmp_path: Path) -> None:
    change, says = INVALID[kind]
    assert any(says in message for message in _saved(change, tmp_path))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_healthy_history_is_left_alone(scale: float, tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        for entry in state.values():
            entry["exp_avg_sq"] *= scale

    assert _saved(change, tmp_path) == []


def test_a_state_of_nothing_but_zeros_says_nothing(tmp_path: Path) -> None:
    def change(state: dict[str, Any]) -> None:
        for entry in state.values():
            entry["exp_avg_sq"].zero_()

    assert not any("never had a gradient" in message for message in _saved(change, tmp_path))
