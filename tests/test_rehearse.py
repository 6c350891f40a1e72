"""The rehearsal against torch.optim on the module itself, and what the command line says of it."""

import copy
import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import initaudit
from initaudit import cli
from initaudit.auditing import program
from initaudit.config import Config
from initaudit.graph.from_torch import from_module
from initaudit.probe import response
from initaudit.probe.rehearse import rehearse

OPTIMIZERS = {
    "sgd": lambda p, rate: torch.optim.SGD(p, rate, momentum=0.9),
    "adam": lambda p, rate: torch.optim.Adam(p, rate),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)
    )


def steps_of_torch(module, x, labels, optimizer, rate, steps):
    module = copy.deepcopy(module).train()
    moved = OPTIMIZERS[optimizer](module.parameters(), rate)
    losses = []
    for _ in range(steps + 1):
        loss = F.cross_entropy(module(x), labels)
        losses.append(loss.item())
        moved.zero_grad()
        loss.backward()
        moved.step()
    return losses


def test_every_run_is_that_of_torch_optim_and_the_module_is_left_alone():
    module, x = network(), torch.randn(8, 2, 6, 6)
    before, generator = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    found = rehearse(from_module(module, (x,)), (x,), 12, seed=3)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert module.training
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    labels = (torch.arange(8) % 5)[order]
    assert len(found.runs) == 4
    for run in found.runs:
        losses = steps_of_torch(module, x, labels, run.optimizer, run.rate, 12)
        assert run.first_loss == pytest.approx(losses[0], rel=1e-5)
        assert run.last_loss == pytest.approx(losses[-1], rel=2e-2)
    assert rehearse(from_module(module, (x,)), (x,), 12, seed=3) == found


def test_what_learns_and_what_does_not():
    torch.manual_seed(0)
    x = torch.randn(8, 12)
    good = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 8))
    bad = nn.Sequential(nn.Linear(12, 64), *[f for _ in range(25) for f in (nn.Sigmoid(), nn.Linear(64, 64))])
    assert rehearse(from_module(good, (x,)), (x,), 40).learned("adam")
    found = rehearse(from_module(bad, (x,)), (x,), 40)
    assert found.learned("sgd") is False
    assert found.learned("adam") is False


def test_what_breaks_is_named():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(8, 12)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e4)
    broken = [r for r in rehearse(from_module(model, (x,)), (x,), 10).runs if r.optimizer == "sgd"]
    assert all(r.broke_at is not None and not r.learned for r in broken)
    assert {r.broke_in for r in broken} <= {"0", "1", "2", "3", "4"}


def test_a_loss_of_its_own_is_lowered():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            return (self.layer(x) - 1).square().mean()

    torch.manual_seed(0)
    model, x = WithLoss(), torch.randn(8, 6)
    found = rehearse(from_module(model, (x,)), (x,), 40, loss=True)
    assert found.learned("sgd")
    assert all(r.remembered is None for r in found.runs)
    assert "no examples" in rehearse(from_module(model, (x,)), (x,), 40).why_not


def test_the_report_says_what_a_rehearsal_came_to_and_how_risks_scatter():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 8))
    found = initaudit.audit(model, (torch.randn(8, 12),), config=Config(rehearse=20, probe_seeds=2)).to_dict()
    assert any("rehearsal of 20 steps" in note and "adam learned" in note for note in found["notes"])
    assert any("over 2 seeds" in note for note in found["notes"])
    assert found["probe"]["rehearsal"]["steps"] == 20
    assert len(found["probe"]["rehearsal"]["runs"]) == 4
    assert set(found["probe"]["risk_spread"]) >= {"untrainable_sgd", "vanishing"}
    plain = initaudit.audit(model, (torch.randn(8, 12),)).to_dict()
    assert plain["probe"]["rehearsal"] is None
    assert plain["probe"]["risk_spread"] == {}


def test_a_model_too_large_to_probe_gets_predicted_moments(monkeypatch):
    monkeypatch.setattr(program, "PROBED", 100)
    torch.manual_seed(0)
    model = nn.Sequential(*[f for _ in range(8) for f in (nn.Linear(32, 32), nn.Sigmoid())], nn.Linear(32, 4))
    found = initaudit.audit(model, (torch.randn(8, 32),)).to_dict()
    (skipped,) = [f for f in found["findings"] if f["code"] == "IA004"]
    assert "mean-field theory predicts second moments between" in skipped["message"]
    assert found["probe"]["predicted"] is True
    assert all(point["signal_moment2"] is not None for point in found["depth"])


@pytest.mark.parametrize("option", [("--seed", "3"), ("--probe-batch", "5"), ("--probe-seeds", "2")])
def test_options_reach_the_probe_and_give_the_same_bytes_twice(option, tmp_path, monkeypatch, capsys):
    (tmp_path / "twice_the_same.py").write_text(
        "import torch\nfrom torch import nn\n\n\ndef net():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))\n"
    )
    monkeypatch.chdir(tmp_path)
    texts = []
    for _ in range(2):
        assert cli.run(["twice_the_same:net", "--format", "json", *option]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    probe = json.loads(texts[0])["models"][0]["probe"]
    assert probe["batch"] == (5 if option[0] == "--probe-batch" else 8)
    assert probe["seeds"] == (2 if option[0] == "--probe-seeds" else 1)


class Frozen(nn.Module):
    """A frozen layer, a norm with statistics, a gradient that stands already, a part in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)
        self.drop = nn.Dropout(0.5).eval()
        self.first.weight.requires_grad_(False)
        self.last.weight.grad = torch.ones(3, 16)

    def forward(self, x):
        return self.last(self.drop(torch.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("training", [True, False])
def test_an_audit_leaves_module_and_random_state_as_they_were(training):
    torch.manual_seed(0)
    model = Frozen().train(training)
    model.drop.eval()
    values = {k: v.clone() for k, v in model.state_dict().items()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    generator, grad_mode = torch.get_rng_state(), torch.is_grad_enabled()
    initaudit.audit(model, config=Config(rehearse=3, probe_seeds=2))
    assert {k for k, v in model.state_dict().items() if not torch.equal(v, values[k])} == set()
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert [n for n, p in model.named_parameters() if p.grad is not None] == ["last.weight"]
    assert torch.equal(model.last.weight.grad, torch.ones(3, 16))
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.is_grad_enabled() == grad_mode


def undone_by_one_step():
    """A layer of zeros behind which a BatchNorm stands: nothing seems to reach the layers before it until it has moved."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 8),
    )
    nn.init.zeros_(model[2].weight)
    return model


def sigmoids():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), *[f for _ in range(12) for f in (nn.Sigmoid(), nn.Linear(64, 64))])


@pytest.mark.parametrize(("make", "learns"), [(undone_by_one_step, True), (sigmoids, False)])
def test_the_verdict_relies_on_a_rehearsal_and_says_so(make, learns, monkeypatch):
    """In a network that is too large for virtual steps, the rehearsal clears what was foreseen, or bears it out."""
    monkeypatch.setattr(response, "AFFORDED", 0.0)
    inputs = (torch.randn(16, 24),)
    plain = initaudit.audit(make(), inputs).to_dict()
    found = initaudit.audit(make(), inputs, config=Config(rehearse=40)).to_dict()
    before, after = (r["risk"]["untrainable"] for r in (plain, found))
    assert sum("the risk relies on it" in note for note in found["notes"]) == 2
    assert not any("relies" in note for note in plain["notes"])
    if learns:
        assert before["sgd"] > 0.5
        assert all(after[o] < 0.1 < before[o] for o in after)
    else:
        assert all(after[o] >= max(before[o], 0.9) for o in after)
        assert re.search(r"relies on the rehearsal of 40 steps, in which sgd left \S+ of the loss of guessing", found["cause"])


def test_a_rehearsal_that_breaks_says_where():
    torch.manual_seed(0)
    model = nn.Sequential(*[f for _ in range(6) for f in (nn.Linear(12, 12), nn.ReLU())], nn.Linear(12, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(40.0)
    found = initaudit.audit(model, (torch.randn(8, 12),), config=Config(rehearse=25)).to_dict()
    assert found["risk"]["untrainable"]["sgd"] > 0.8
    assert found["probe"]["rehearsal"]["runs"][0]["broke_at"] is not None


def test_a_few_steps_that_learn_nothing_prove_nothing():
    model, inputs = undone_by_one_step(), (torch.randn(16, 24),)
    plain = initaudit.audit(model, inputs).risk
    assert initaudit.audit(model, inputs, config=Config(rehearse=1)).risk == plain
