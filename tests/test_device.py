"""A graph follows the device that it is asked to run on, and the probe there says what it says on the host.

Modules that lie on an accelerator are copied before they are traced. Without one the meta device plays its part.
"""

from __future__ import annotations

import copy

import pytest
import torch
from test_doors import through_torch
from torch import nn
from zoo import MODELS

import initaudit
from initaudit import cli
from initaudit.config import Config
from initaudit.graph.execute import Executor
from initaudit.load import host
from initaudit.load.host import device_of, on_host

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Last(nn.Module):
    """An LSTM read at its last step, whose first state is made on a device that is written into forward."""

    def __init__(self, device=None):
        super().__init__()
        self.lstm, self.head, self.where = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 5), device

    def forward(self, x):
        zeros = torch.zeros(1, x.shape[0], 32, device=self.where or x.device)
        return self.head(self.lstm(x, (zeros, zeros))[0][:, -1])


class Named(Last):
    def forward(self, x):
        zeros = torch.zeros(1, x.shape[0], 32, device="cuda")
        return self.head(self.lstm(x, (zeros, zeros))[0][:, -1])


def convolutional():
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2)


NETS = {
    "convolutional": (convolutional, (8, 3, 32, 32)),
    "encoder": (encoder, (4, 12, 64)),
    "recurrent": (Last, (8, 20, 16)),
    "gru": (lambda: nn.GRU(16, 32, num_layers=2), (10, 4, 16)),
    "embedding": (lambda: nn.Sequential(nn.Embedding(50, 16), nn.Flatten(), nn.Linear(80, 4)), None),
}


def made(name):
    torch.manual_seed(0)
    build, shape = NETS[name]
    return build(), torch.randint(0, 50, (6, 5)) if shape is None else torch.randn(shape)


def flat(risk):
    return {**{k: v for k, v in risk.items() if k != "untrainable"}, **risk["untrainable"]}


@needs_cuda
@pytest.mark.parametrize("name", NETS)
def test_verdicts_do_not_depend_on_the_device(name):
    module, x = made(name)
    there, away = copy.deepcopy(module).cuda(), {"device": "cuda"}
    state = {k: v.clone() for k, v in there.state_dict().items()}
    host_audit = initaudit.audit(module, x, config={"device": "cpu"})
    audits = [initaudit.audit(module, x, config=away), initaudit.audit(there, x.cuda()), initaudit.audit(there, x)]
    again = initaudit.audit(module, x, config=away)
    for found in audits:
        assert found.verdict == host_audit.verdict
        assert [(f.code, f.tensor) for f in found.findings] == [(f.code, f.tensor) for f in host_audit.findings]
        assert flat(found.risk) == pytest.approx(flat(host_audit.risk), abs=0.02)
    assert again.to_dict() == audits[0].to_dict()
    assert all(v.is_cuda and torch.equal(v, state[k]) for k, v in there.state_dict().items())


@needs_cuda
@pytest.mark.parametrize("build", [lambda: Last("cuda"), Named])
def test_a_device_written_into_forward_is_no_obstacle(build):
    torch.manual_seed(0)
    module = build().cuda()
    for inputs in (torch.randn(8, 20, 16), None):
        found = initaudit.audit(module, inputs)
        assert found.verdict == "pass"
        assert found.risk["untrainable"]["sgd"] < 0.5


@needs_cuda
def test_everything_that_runs_the_network_runs_there():
    module, x = made("recurrent")
    found = initaudit.audit(module, x, config=Config(device="cuda", rehearse=5, jvp=True, probe_seeds=2))
    assert any("rehearsal of 5 steps" in note for note in found.report.notes)


def test_a_module_on_the_host_is_not_copied():
    assert device_of(nn.Linear(2, 2)) is None
    with torch.device("meta"):
        assert device_of(nn.Linear(2, 2)) is None


def test_the_copy_shares_what_the_module_shares_and_names_the_host(monkeypatch):
    monkeypatch.setattr(host, "_HERE", ("meta",))  # the host itself plays the accelerator
    module = nn.Sequential(nn.Embedding(7, 5), nn.Linear(5, 7, bias=False), nn.Linear(5, 7))
    module[1].weight = module[0].weight
    module[2].weight = nn.Parameter(module[0].weight.detach()[:, :])
    module.where, module.place, module.kept = torch.device("cuda:1"), "cpu", {"scale": torch.ones(3)}
    moved = on_host(module)
    assert moved is not module
    assert moved[1].weight is moved[0].weight
    assert moved[2].weight.data_ptr() == moved[0].weight.data_ptr()
    assert moved.where == torch.device("cpu")
    assert moved.kept["scale"] is not module.kept["scale"]
    assert torch.equal(moved[0].weight, module[0].weight)


def test_what_cannot_be_copied_is_left_where_it_is(monkeypatch):
    monkeypatch.setattr(host, "_HERE", ("meta",))
    module = nn.Linear(2, 2)
    module.source = (n for n in range(3))
    assert on_host(module) is None


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_module_is_bound_to_the_device_of_its_trace(name):
    """Initial states, positions, masks and buffers of integers are made or moved there: the meta device mixes with no other."""
    graph, inputs = through_torch(name)
    with torch.no_grad():
        result, *_ = Executor(graph, device="meta").run(*[x.to("meta") for x in inputs])
    assert result.device.type == "meta"


def test_a_device_that_is_not_there_is_one_line(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "without.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Linear(3, 2)\n")
    missing = "xpu" if not torch.xpu.is_available() else "hpu"
    assert cli.run(["without:net", "--device", missing]) == 2
    text = capsys.readouterr().err.strip()
    assert f"--device {missing}" in text
    assert "\n" not in text
