"""The help lines: real attribute paths, and lines that run and take the finding away."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from initaudit.auditing.run import gather
from initaudit.config import Config
from initaudit.load import from_module
from initaudit.repair.lines import NotALine, drawn_by, run_line
from initaudit.rules import all_rules
from initaudit.rules.remedy import attribute_path, each

# What a finding cannot be rid of by drawing a weight: a checkpoint has to be loaded again, trained on, or kept as it is.
NOT_A_DRAW = ("IA208", "IA209", "IA501", "IA502", "IA504", "IA505", "IA507", "IA508")
FAMILIES = ("IA1", "IA2", "IA4", "IA5", "IA6")
EXAMPLES = [
    (r, e) for r in all_rules() if r.code.startswith(FAMILIES) and r.code not in (*NOT_A_DRAW, "IA602") for e in r.invalid()
]


class Odd(nn.Module):
    """Containers of every kind."""

    def __init__(self):
        super().__init__()
        self.layer3 = nn.Sequential(nn.ModuleDict({"conv1": nn.Conv2d(2, 2, 1)}), nn.ReLU())
        self.heads = nn.ModuleDict({"0": nn.Linear(2, 2), "in": nn.Linear(2, 2), "a b": nn.Linear(2, 2)})
        self.stack = nn.ModuleList([nn.Linear(2, 2)])
        self.tables = nn.ParameterList([nn.Parameter(torch.zeros(2, 2))])
        self.named = nn.ParameterDict({"x": nn.Parameter(torch.zeros(2))})
        self.add_module("7", nn.Linear(2, 2))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))


def test_every_parameter_is_reached_by_its_path():
    model = Odd()
    for name, parameter in model.named_parameters():
        path = attribute_path(name, model)
        assert eval(path, {"model": model}) is parameter, path
    assert attribute_path("layer3.0.conv1.weight", model) == "model.layer3[0].conv1.weight"
    assert attribute_path("heads.0.weight", model) == 'model.heads["0"].weight'


@pytest.mark.parametrize(
    ("tensor", "node", "path"),
    [
        ("layer3.0.conv1.weight", "", "model.layer3[0].conv1.weight"),
        ("0.weight", "", "model[0].weight"),
        ("onnx::MatMul_12", "/layers/layers.3/fc/MatMul", "model.layers[3].fc.weight"),
        ("onnx::Conv_7", "/body/body.0/body.0.2/Conv", "model.body[0][2].weight"),
        ("onnx::MatMul_12", "node_matmul", 'tensors["onnx::MatMul_12"]'),
        ("W1", "", 'tensors["W1"]'),
        ('params/Dense_0/"k"', "", 'tensors["params/Dense_0/\\"k\\""]'),
    ],
)
def test_names_without_a_module(tensor, node, path):
    assert attribute_path(tensor, None, node) == path


def done(line, model):
    seen = []
    exec(line, {"model": model, "seen": seen})
    return seen


def test_one_line_for_many():
    model = [[f"{i}{j}" for j in range(4)] for i in range(3)]
    say = "seen.append({})"
    assert each(say, ["model[1][2]"]) == "seen.append(model[1][2])"
    assert each(say, [f"model[{i}][1]" for i in range(3)]) == "for i in range(3): seen.append(model[i][1])"
    assert "range(1, 4, 2)" in each(say, ["model[0][1]", "model[0][3]"])
    for chosen in (["model[0][0]", "model[2][1]"], [f"model[{i}][{j}]" for i in range(3) for j in (0, 3)], ["model[1][1]"]):
        expected = sorted(eval(c, {"model": model}) for c in chosen)
        assert sorted(done(each(say, chosen), model)) == expected
        halves = [half for text in expected for half in text]
        assert sorted(done(each(say, chosen, "list({})"), model)) == sorted(halves)


def understood_like_python(line, model):
    """Runs the line, after `initaudit fix` has run it on a copy: with one seed both draw the same numbers."""
    if re.fullmatch(r"[\w.]+ = [\w.]+", line):  # a tie is no draw
        with pytest.raises(NotALine):
            drawn_by(line, {})
        exec(line, {"model": model})
        return
    copy = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    by_expression = {attribute_path(name, model): name for name in copy}
    drawn = drawn_by(line, {text: tuple(copy[name].shape) for text, name in by_expression.items()})
    seed = torch.random.get_rng_state()
    run_line(line, {text: copy[by_expression[text]] for text in drawn})
    torch.random.set_rng_state(seed)
    exec(line, {"model": model, "torch": torch})
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), copy[name].nan_to_num()), (line, name)


@pytest.mark.parametrize(("rule", "example"), EXAMPLES, ids=[f"{r.code}-{e.name}" for r, e in EXAMPLES])
def test_the_line_runs_and_the_finding_is_gone(rule, example):
    """One finding may name several weights, and each line serves those it names: applied until nothing is left."""
    model, inputs = example.build()
    phase = "auto" if rule.phase == "trained" or rule.code == "IA601" else "init"
    applied = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for _ in range(4):
            found = list(rule.check(gather(from_module(model), Config(phase=phase), inputs=inputs)))
            found = [f for f in found if "GradScaler" not in f.help]
            if not found:
                break
            for finding in found:
                applied.append(finding.help)
                understood_like_python(finding.help, model)
    assert applied
    assert not found, applied
    assert len(set(applied)) <= 2, applied


def test_gains_of_the_lines_are_those_of_the_law():
    """What the line draws has the variance that the audit asks for."""
    torch.manual_seed(0)
    activations = (nn.ReLU(), nn.LeakyReLU(0.2), nn.SELU(), nn.Tanh(), nn.GELU(), nn.Hardswish())
    stack = [m for a in activations for m in (nn.Linear(256, 256), a)]
    convolutions = [nn.ConvTranspose2d(64, 48, 4, 2, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, groups=48), nn.SELU()]
    model = nn.Sequential(*stack, nn.Unflatten(1, (64, 2, 2)), *convolutions, nn.Flatten(), nn.LazyLinear(3))
    inputs = (torch.randn(4, 256),)
    model(*inputs)
    from initaudit.rules.remedy import init_line

    evidence = gather(from_module(model), Config(phase="init"), inputs=inputs)
    for layer in evidence.layers[:-1]:
        exec(init_line(layer), {"model": model, "torch": torch})
        drawn = model.get_parameter(layer.tensor).var().item()
        assert math.log(drawn / layer.expectation.exact) == pytest.approx(0, abs=0.12), init_line(layer)
