"""Numbers of a program that an ONNX file holds like weights: none is told to get no gradient."""

import pytest
import torch
from torch import nn

import initaudit


class Actor(nn.Module):
    """A policy: a mean, and a deviation that no input moves."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 4))
        self.log_deviation = nn.Parameter(torch.zeros(1, 4))

    def forward(self, x):
        mean = self.net(x)
        return mean, self.log_deviation.expand_as(mean).exp()


class Sampler(nn.Module):
    """The same with a draw in forward, as soft actor-critic has it."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, x):
        mean = self.net(x)
        noise = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)).rsample()
        return torch.tanh(mean + 0.1 * noise)


class Filled(nn.Module):
    """Scores that begin at a number far below all others, and end as whole numbers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 5)

    def forward(self, x):
        scores = self.net(x)
        start = torch.full_like(scores, -1e4)
        start[:, 0] = 0.0
        return scores, (scores + start).argmax(-1)


@pytest.mark.parametrize(("network", "dynamo"), [(Actor, False), (Actor, True), (Sampler, False), (Filled, False)])
@pytest.mark.filterwarnings("ignore")
def test_numbers_of_a_program_are_no_parameters(network, dynamo, tmp_path):
    torch.manual_seed(0)
    module, x = network().eval(), torch.randn(32, 16)
    torch.onnx.export(module, (x,), tmp_path / "x.onnx", dynamo=dynamo, verbose=False)
    for source, inputs in ((module, x), (tmp_path / "x.onnx", None)):
        assert [f.message for f in initaudit.audit(source, inputs).findings if f.severity != "info"] == []
