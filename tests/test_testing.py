"""What test suites are given: assert_trainable, expect_init, and the fixture of the pytest plugin, run by a real pytest."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from initaudit.errors import UnreadableModel, UsageError
from initaudit.expect.recipes import RECIPES
from initaudit.testing import assert_trainable, expect_init

ROOT = Path(__file__).parent.parent


def mlp(activation=nn.ReLU, depth=4, init=None, width=64) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    model = nn.Sequential(*layers, nn.Linear(width, 10))
    for layer in model if init is not None else ():
        if isinstance(layer, nn.Linear):
            init(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def gpt2(layers=3):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=layers, n_embd=64, n_head=4, vocab_size=300, n_positions=32, bos_token_id=0, eos_token_id=0
        )
    )


def test_a_healthy_network_passes_and_its_audit_comes_back():
    assert assert_trainable(mlp(init=nn.init.kaiming_normal_), torch.randn(16, 64)).verdict == "pass"


def test_a_network_that_cannot_learn_fails_with_the_report():
    with pytest.raises(AssertionError) as caught:
        assert_trainable(mlp(nn.Sigmoid, 20), torch.randn(16, 64))
    text = str(caught.value)
    assert "is not fit for training: 1 error; risk: symmetry" in text
    assert "torch.nn.init." in text.partition("help: ")[2]
    assert max(map(len, text.splitlines())) <= 96


def test_configuration_decides_what_fails():
    model = mlp(nn.Sigmoid, 20)
    assert assert_trainable(model, config={"fail_on": "never"}).verdict == "fail"
    with pytest.raises(UsageError, match="did you mean 'fail_on'"):
        assert_trainable(model, config={"fail_one": "never"})


def test_what_could_not_be_probed_is_not_passed(tmp_path):
    torch.save(mlp().state_dict(), tmp_path / "net.pt")
    with pytest.raises(AssertionError, match="could not be shown to train: no probe was run"):
        assert_trainable(tmp_path / "net.pt")


SCHEMES = [
    (nn.init.kaiming_normal_, "he", "lecun"),
    (nn.init.kaiming_uniform_, "kaiming_uniform(fan_in, relu)", "kaiming_normal"),
    (nn.init.xavier_uniform_, "xavier", "he"),
    (nn.init.orthogonal_, "orthogonal", "xavier"),
    (lambda w: nn.init.orthogonal_(w, 2.0), "orthogonal(2)", "orthogonal(1)"),
    (lambda w: nn.init.normal_(w, std=0.05), "normal(0.05)", "uniform(0.0866)"),
    (lambda w: nn.init.normal_(w, std=0.05), 0.05, 0.045),
    (lambda w: nn.init.uniform_(w, -0.1, 0.1), "uniform(1/sqrt(100))", "normal(0.1/sqrt(3))"),
    (lambda w: nn.init.uniform_(w, -0.1, 0.1), 0.1 / 3**0.5, "uniform(0.09)"),
    (nn.init.zeros_, 0, 1e-3),
    (nn.init.ones_, "ones", "constant(0.5)"),
    (lambda w: nn.init.trunc_normal_(w, std=0.5, a=-1, b=1), "trunc_normal(0.5)", "normal(0.5)"),
    (None, "pytorch", "he"),
]


@pytest.mark.parametrize(("init", "right", "wrong"), SCHEMES, ids=[str(case[1]) for case in SCHEMES])
def test_schemes_are_told_from_each_other(init, right, wrong):
    model = mlp(init=init)
    expect_init(model, right)
    with pytest.raises(AssertionError, match=r"[45] of \d+ tensors are not initialised as"):
        expect_init(model, wrong)


def test_sampling_error_never_fails_the_test():
    for seed in range(12):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 300), nn.Tanh(), nn.Linear(300, 2))
        expect_init(model, "pytorch")
        expect_init(model, {"*": "pytorch_default"})


def test_gpt2_is_told_from_a_gpt2_without_its_scaling():
    model = gpt2()
    expect_init(model, "gpt2")
    for block in model.transformer.h:
        block.mlp.c_proj.weight.data.normal_(0, 0.02)
    with pytest.raises(AssertionError) as caught:
        expect_init(model, "gpt2")
    text = str(caught.value)
    assert "3 of" in text
    assert "transformer.h.0.mlp.c_proj.weight  expected normal(0.02/sqrt(6)), std 0.008165; found" in text
    assert "as normal(0.02) gives" in text


def test_globs_take_the_first_that_matches():
    model = mlp(init=nn.init.kaiming_normal_)
    expect_init(model, {"0.weight": None, "*.bias": 0, "*": "kaiming_normal(fan_in, relu)"})
    model[2].bias.data.fill_(1e-3)
    with pytest.raises(AssertionError, match=r"1 of 9 tensors .*\n  2\.bias  expected zeros; found mean 0\.001"):
        expect_init(model, {"0.weight": None, "*.bias": 0, "*": "kaiming_normal(fan_in, relu)"})


def test_a_module_that_cannot_be_traced_is_judged_by_names_and_shapes():
    class Stubborn(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            raise RuntimeError("not today")

    expect_init(Stubborn(), {"fc.weight": "pytorch_default"})
    with pytest.raises(UnreadableModel):
        expect_init(Stubborn(), "gpt2")


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ("kaimin_normal", "did you mean 'kaiming_normal'"),
        ("kaiming_normal(fan_inn, relu)", "is not known for this weight"),
        ("normal(__import__('os'))", "is not known for this weight"),
        ({"*.wieght": 0.02}, "no tensor is named '\\*.wieght'"),
        ({"*": -1}, "a standard deviation or the name of a scheme"),
        ({"*": True}, "a standard deviation or the name of a scheme"),
    ],
)
def test_mistakes_are_named(expected, message):
    with pytest.raises(UsageError, match=message):
        expect_init(mlp(), expected)


def test_every_recipe_is_made_of_schemes_that_exist():
    model = mlp(depth=1)
    for name in RECIPES:
        with contextlib.suppress(AssertionError):
            expect_init(model, name)


SUITE = """
import torch
from torch import nn

def net(activation, depth):
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(32, 32), activation())]
    return nn.Sequential(*layers, nn.Linear(32, 4))

def test_good(initaudit):
    initaudit.assert_trainable(net(nn.Tanh, 2), torch.randn(8, 32))
    initaudit.expect_init(net(nn.Tanh, 2), "pytorch")
    assert initaudit(net(nn.Tanh, 2)).verdict == "pass"

def test_ignored(initaudit):
    initaudit.assert_trainable(net(nn.Sigmoid, 12), ignore=("IA",))

def test_bad(initaudit):
    initaudit.assert_trainable(net(nn.Sigmoid, 12), torch.randn(8, 32))

def test_configured(initaudit):
    assert initaudit._config({}).seed == 7
"""


def test_the_plugin_fails_readably(tmp_path):
    (tmp_path / "test_net.py").write_text(SUITE)
    (tmp_path / "pyproject.toml").write_text("[tool.initaudit]\nseed = 7\n[tool.pytest.ini_options]\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "initaudit.pytest_plugin", "-q"],
        cwd=tmp_path,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout
    assert "1 failed, 3 passed" in done.stdout
    assert "E       AssertionError: Sequential is not fit for training: 1 error" in done.stdout
    assert "initaudit/testing.py" not in done.stdout, "the user's own line is where the traceback ends"
    # The plugin comes with the package, found by pytest itself.
    assert 'initaudit = "initaudit.pytest_plugin"' in (ROOT / "pyproject.toml").read_text()


def test_the_plugin_costs_other_suites_nothing():
    code = "import initaudit.pytest_plugin, sys; print(sorted({'torch', 'numpy', 'onnx', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
