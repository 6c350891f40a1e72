"""A checkpoint against its base: what became of each tensor, and what the rules and `initaudit compare` make of it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import initaudit
from initaudit.cli import run
from initaudit.load import load
from initaudit.load.names import matched
from initaudit.measure.against import Against, against
from initaudit.rules.examples import trained


@pytest.fixture(scope="module")
def base() -> nn.Module:
    """A trained MLP of five layers, 0, 2, 4, 6 and 8."""
    torch.manual_seed(0)
    model: nn.Module = trained()[0]
    return model


def tuned(model: nn.Module) -> nn.Module:
    """The same after a few steps."""
    torch.manual_seed(1)
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(20):
        x = torch.randn(64, 24)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), x[:, :5].argmax(1)).backward()
        optimizer.step()
    return model


def compared(new: object, old: object, folder: Path) -> Against:
    torch.save(new, folder / "new.pt")
    torch.save(old, folder / "old.pt")
    return against(load(folder / "new.pt").arrays, load(folder / "old.pt").arrays, "old.pt")


def kinds(found: Against) -> dict[str, str]:
    return {change.tensor: change.kind for change in found.changes}


def test_tuning_is_told_from_a_copy_and_from_a_new_draw(base: nn.Module, tmp_path: Path) -> None:
    new = tuned(base)
    new.get_submodule("2").reset_parameters()
    state = {**new.state_dict(), "4.weight": base.state_dict()["4.weight"]}
    found = compared({"model": {f"module.{k}": v for k, v in state.items()}}, base.state_dict(), tmp_path)
    expected = dict.fromkeys(state, "trained on") | {
        "2.weight": "newly initialised",
        "2.bias": "newly initialised",
        "4.weight": "identical",
    }
    assert kinds(found) == expected
    values = {c.tensor: c for c in found.changes}
    a, b = (s["6.weight"].double().flatten() for s in (state, base.state_dict()))
    assert values["6.weight"].correlation == pytest.approx(float(torch.corrcoef(torch.stack([a, b]))[0, 1]), abs=1e-9)
    assert values["6.weight"].relative == pytest.approx(float((a - b).norm() / b.norm()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_precision_is_the_same_tensor(dtype: torch.dtype, base: nn.Module, tmp_path: Path) -> None:
    found = compared({k: v.to(dtype) for k, v in base.state_dict().items()}, base.state_dict(), tmp_path)
    assert set(kinds(found).values()) == {"identical"}


def test_names_and_shapes_that_differ(base: nn.Module, tmp_path: Path) -> None:
    state = dict(base.state_dict())
    del state["4.weight"]
    state |= {"8.weight": torch.randn(9, 64), "adapter.weight": torch.randn(3, 3)}
    found = compared(state, base.state_dict(), tmp_path)
    assert kinds(found)["4.weight"] == "missing"
    assert kinds(found)["8.weight"] == "reshaped"
    assert kinds(found)["adapter.weight"] == "unexpected"


def test_ties_lost_made_and_left_out(tmp_path: Path) -> None:
    table = torch.randn(20, 8)
    tied, apart = {"table": table, "head": table}, {"table": table, "head": table + torch.randn(20, 8) / 10}
    assert kinds(compared(apart, tied, tmp_path))["head"] == "untied"
    assert [c.kind for c in compared(tied, apart, tmp_path).changes][-1] == "tied again"
    assert kinds(compared({"table": table}, tied, tmp_path)) == {"table": "identical"}
    assert kinds(compared(tied, {"table": table.clone()}, tmp_path)) == {"table": "identical"}


def test_independent_draws_are_not_taken_for_training() -> None:
    """Of 2,000 pairs of independent tensors none has a correlation of six standard errors; one of 64 values can be told."""
    from initaudit.measure.against import _statistics, _sums

    rng = np.random.default_rng(0)
    for _ in range(2000):
        n = int(rng.integers(64, 4096))
        correlation, _relative = _statistics(_sums(rng.standard_normal(n), rng.standard_normal(n)))
        assert abs(correlation) < 6 / np.sqrt(n)


def test_a_prefix_on_either_side_is_seen_through() -> None:
    plain = ["a.weight", "b.weight", "c.bias"]
    longer = [f"base_model.model.{name}" for name in plain]
    assert matched(plain, longer) == (dict(zip(plain, longer, strict=True)), "base_model.model.")
    assert matched(longer, plain) == (dict(zip(longer, plain, strict=True)), "base_model.model.")
    assert matched(plain, ["x"]) == ({}, "")


def _forget(layer: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        torch.manual_seed(5)
        model.get_submodule(layer).reset_parameters()

    return change


@pytest.mark.parametrize(
    ("change", "code", "severity"),
    [
        (_forget("2"), "IA602", "warning"),
        (lambda model: None, None, None),
        (lambda model: model.append(nn.Linear(5, 5)), "IA502", "info"),
        (lambda model: model.pop(4), "IA502", "error"),
    ],
    ids=["forgotten", "tuned", "added", "removed"],
)
def test_rules_against_a_base(
    change: Callable[[nn.Module], None], code: str | None, severity: str | None, base: nn.Module, tmp_path: Path
) -> None:
    torch.save(base.state_dict(), tmp_path / "old.pt")
    new = tuned(base)
    names = list(new.state_dict())
    change(new)
    state = new.state_dict()
    if code == "IA502" and severity == "error":  # a removed layer would shift the numbers of those behind it
        state = {name: value for name, value in tuned(base).state_dict().items() if name != names[4]}
    torch.save(state, tmp_path / "new.pt")
    findings = initaudit.audit(tmp_path / "new.pt", config={"base": str(tmp_path / "old.pt")}).findings
    found = {f.code: f.severity for f in findings if f.code in ("IA502", "IA503", "IA602")}
    assert found == ({} if code is None else {code: severity})


def test_a_copy_in_which_nothing_was_trained_is_a_remark(base: nn.Module, tmp_path: Path) -> None:
    torch.save(base.state_dict(), tmp_path / "x.pt")
    findings = initaudit.audit(tmp_path / "x.pt", config={"base": str(tmp_path / "x.pt")}).findings
    assert [(f.severity, "nothing was trained on" in f.message) for f in findings if f.code == "IA602"] == [("info", True)]


def test_compare_lists_the_tensors(base: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = tuned(base)
    _forget("2")(new)
    torch.save(base.state_dict(), tmp_path / "old.pt")
    torch.save({**new.state_dict(), "e\x1b[2Jvil": torch.randn(9)}, tmp_path / "new.pt")
    assert run(["compare", str(tmp_path / "old.pt"), str(tmp_path / "new.pt")]) == 1
    text = capsys.readouterr().out
    assert "8 tensors trained on" in text
    assert "2.weight, 2.bias" in text
    assert "\x1b" not in text
    run(["compare", str(tmp_path / "old.pt"), str(tmp_path / "new.pt"), "--format", "json"])
    assert json.loads(capsys.readouterr().out)["tensors"]["newly initialised"] == ["2.weight", "2.bias"]
