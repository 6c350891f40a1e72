"""What a trained checkpoint must not hold, by both doors: matrices and scales of zeros, statistics that no data have left."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import initaudit

# The exporter says that it is old, and that BatchNorm is exported as for training
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "UserWarning", "torch.jit.TracerWarning")
]
Spoil = Callable[[nn.Module], object]


class Net(nn.Module):
    """Convolutions with norms, then matrices with a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.again = nn.Conv2d(12, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.into, self.branch, self.back = nn.Linear(16 * 16, 48), nn.Linear(48, 32), nn.Linear(32, 48)
        self.out = nn.Linear(48, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = nn.functional.max_pool2d(self.again(self.second(x)).relu(), 2)
        x = self.into(x.flatten(1)).relu()
        x = x + self.back(self.branch(x).relu())
        return self.out(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRU(8, 40, batch_first=True), nn.Linear(40, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.cell(x)[0][:, -1])


def fit(model: nn.Module, shape: tuple[int, ...], classes: int, steps: int) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(steps):
        x = torch.randn(64, *shape)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x.flatten(1)[:, :classes].argmax(1)).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "net": (fit(Net(), (1, 8, 8), 5, 60), torch.randn(4, 1, 8, 8)),
            "recurrent": (fit(Recurrent(), (6, 8), 8, 150), torch.randn(4, 6, 8)),
        }


def found(source: Path) -> list[tuple[str, str]]:
    return sorted({(f.code, str(f.severity)) for f in initaudit.audit(source).findings if f.severity != "info"})


def both(model: nn.Module, inputs: torch.Tensor, folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """What is found in the state dict, and in the graph with its norms kept."""
    torch.save(model.state_dict(), folder / "x.pt")
    torch.onnx.export(model, (inputs,), folder / "x.onnx", dynamo=False, training=torch.onnx.TrainingMode.PRESERVE)
    return found(folder / "x.pt"), found(folder / "x.onnx")


def test_healthy_ones_pass_by_both_doors(networks: dict[str, tuple[nn.Module, torch.Tensor]], tmp_path: Path) -> None:
    for model, inputs in networks.values():
        assert both(model, inputs, tmp_path) == ([], [])


def zero(name: str) -> Spoil:
    return lambda m: m.get_parameter(name).zero_()


def fill(name: str, value: float) -> Spoil:
    return lambda m: m.get_parameter(name).fill_(value)


def reset(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()


CASES: dict[str, tuple[str, Spoil, str, str]] = {
    "a matrix of zeros": ("net", zero("into.weight"), "IA501 warning", "IA501 error"),
    "the end of a branch of zeros": ("net", zero("back.weight"), "IA501 warning", "IA501 error"),
    "a matrix of one number": ("net", fill("into.weight", 0.05), "IA501 error", "IA501 error"),
    "kernels of one number": ("net", fill("branch.weight", -0.02), "IA501 error", "IA501 error"),
    "a head of one number": ("net", fill("out.weight", 0.05), "IA501 warning", "IA501 warning"),
    "half a matrix of zeros": ("net", lambda m: m.into.weight[24:].zero_(), "IA204 warning", "IA204 warning"),
    "rows pruned here and there": ("net", lambda m: m.into.weight[::4].zero_(), "", ""),
    "a norm's scale of zeros": ("net", zero("again.weight"), "IA504 warning", "IA504 warning"),
    "variances of zero": ("net", lambda m: m.again.running_var.zero_(), "IA508 error", "IA508 error"),
    "variances below zero": ("net", lambda m: m.again.running_var.neg_(), "IA508 error", "IA508 error"),
    "statistics as they were made": ("net", reset, "IA508 warning", "IA508 warning"),
    "one layer drawn again": ("net", lambda m: m.branch.reset_parameters(), "IA501 error", "IA501 error"),
    "a recurrent matrix drawn again": (
        "recurrent", lambda m: nn.init.uniform_(m.cell.weight_hh_l0, -(40**-0.5), 40**-0.5), "IA501 error", "IA501 error",
    ),
    "a head drawn again": ("net", lambda m: m.out.reset_parameters(), "", ""),
    "shifts of zeros": ("net", lambda m: [zero(n)(m) for n in ("again.bias", "into.bias", "back.bias")], "", ""),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_both_doors_say_so(case: str, networks: dict[str, tuple[nn.Module, torch.Tensor]], tmp_path: Path) -> None:
    which, spoil, file, graph = CASES[case]
    model, inputs = networks[which]
    spoiled = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        spoil(spoiled)
    seen = both(spoiled, inputs, tmp_path)
    for expected, codes in zip((file, graph), seen, strict=True):
        if expected:
            assert tuple(expected.split()) in codes
        else:
            assert codes == []


def test_adapters_before_they_learn_are_left_alone(networks: dict[str, tuple[nn.Module, torch.Tensor]], tmp_path: Path) -> None:
    model, _ = networks["net"]
    state = dict(model.state_dict())
    state["into.adapt_a.weight"] = nn.Linear(256, 4).weight.data
    state["into.adapt_b.weight"] = torch.zeros(48, 4)
    torch.save(state, tmp_path / "x.pt")
    assert found(tmp_path / "x.pt") == []
    state["into.adapt_a.weight"] = torch.zeros(4, 256)
    torch.save(state, tmp_path / "x.pt")
    assert found(tmp_path / "x.pt") == [("IA501", "warning")]


def test_a_new_norm_is_no_reset_one(networks: dict[str, tuple[nn.Module, torch.Tensor]], tmp_path: Path) -> None:
    state = dict(networks["net"][0].state_dict())
    torch.save(
        {**state, **{f"new.{name}": value for name, value in nn.BatchNorm2d(16).state_dict().items()}}, tmp_path / "x.pt"
    )
    assert found(tmp_path / "x.pt") == []


def test_what_a_shard_took_with_it_is_not_called_untrained(
    networks: dict[str, tuple[nn.Module, torch.Tensor]], tmp_path: Path
) -> None:
    """One cause, one finding: the module's own values stand where the lost ones should, and the finding says so."""
    state = networks["net"][0].state_dict()
    gone = {name: "b-00002-of-00002.bin" for name in state if name.startswith(("branch", "back"))}
    kept = {name: value for name, value in state.items() if name not in gone}
    torch.save(kept, tmp_path / "b-00001-of-00002.bin")
    index = {"weight_map": {**dict.fromkeys(kept, "b-00001-of-00002.bin"), **gone}}
    (tmp_path / "b.bin.index.json").write_text(json.dumps(index))
    report = initaudit.audit(tmp_path, torch.randn(4, 1, 8, 8), config={"arch": f"{__name__}:Net"})
    assert [f.code for f in report.findings if f.severity != "info"] == ["IA502"]
    message = report.findings[0].message
    assert "b-00002-of-00002.bin is missing: 4 tensors with it" in message
    assert "leaves 4 of them as drawn" in message


@pytest.mark.parametrize(
    ("shape", "value"), [((16, 1, 3, 3), 0.2), ((16, 16), 1.0), ((16, 16), 1 / 16), ((1, 16), 0.3)], ids=str
)
def test_fixed_sums_and_averages_are_left_alone(
    networks: dict[str, tuple[nn.Module, torch.Tensor]], tmp_path: Path, shape: tuple[int, ...], value: float
) -> None:
    state = dict(networks["net"][0].state_dict())
    torch.save({**state, "smooth.weight": torch.full(shape, value)}, tmp_path / "x.pt")
    assert found(tmp_path / "x.pt") == []


def test_an_emptied_head_is_told_where_only_one_other_layer_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)), (1, 8, 8), 5, 200)
    with torch.no_grad():
        model[3].weight.zero_()
    assert both(model, torch.randn(4, 1, 8, 8), tmp_path) == ([], [("IA501", "warning")])
    told = [(f.tensor, f.severity) for f in initaudit.audit(tmp_path / "x.pt").findings if f.code == "IA501"]
    assert told == [("3.weight", "info")]
