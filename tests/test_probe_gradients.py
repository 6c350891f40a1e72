"""Gradients against autograd's: at the inputs, and the sketched Gram matrix of those of single examples."""

import pytest
import torch
from torch import nn

from initaudit.graph.from_torch import from_module
from initaudit.probe.gradients import kernel
from initaudit.probe.passes import batch_of, cotangents
from initaudit.probe.run import probe


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attend(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(4, 16), nn.Linear(16, 3)
        self.layer = nn.TransformerEncoderLayer(16, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.head(self.layer(self.embed(x)).mean(1))


MODULES = {
    "mlp": (lambda: nn.Sequential(nn.Linear(12, 128), nn.ReLU(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)), (12,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 64, 3),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, groups=64),
            nn.GroupNorm(4, 64),
            nn.Flatten(),
            nn.Linear(256, 8),
        ),
        (2, 6, 6),
    ),
    "transformer": (Attend, (5, 4)),
    "lstm": (Reader, (5, 4)),
}


def judge(module, x):
    """The Gram matrix of the gradients of <c, output> for one c shared by all examples, by one backward pass each."""
    (shared,) = cotangents([module(x)], len(x), torch.Generator().manual_seed(0), shared=True)
    rows = []
    for i in range(len(x)):
        module.zero_grad()
        (module(x[i : i + 1]) * shared[i : i + 1]).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    gradients = torch.stack(rows).double()
    return gradients @ gradients.T


@pytest.mark.parametrize("name", MODULES)
def test_trace_and_centred_share(name):
    build, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = build(), torch.randn(12, *shape) + 0.5
    graph, expected = from_module(module, (x,)), kernel(judge(module, x))
    found = [probe(graph, (x,), seed=0).gram.sgd]
    assert found[0].trace == pytest.approx(expected.trace, rel=0.35)
    assert found[0].centred_share == pytest.approx(expected.centred_share, rel=0.35)
    assert found[0].eigenvalues[0] == pytest.approx(expected.eigenvalues[0], rel=0.35)
    assert found[0].effective_rank == pytest.approx(expected.effective_rank, rel=0.25)


def test_equal_examples_share_one_gradient():
    torch.manual_seed(0)
    module, x = MODULES["mlp"][0](), torch.randn(1, 12).expand(8, 12).contiguous()
    gram = probe(from_module(module, (x,)), (x,)).gram
    assert gram.sgd.centred_share < 1e-10
    assert gram.adam.centred_share < 1e-10


def test_the_kernel_of_adam_does_not_see_the_scale_of_a_layer():
    torch.manual_seed(0)
    module, x = MODULES["mlp"][0](), torch.randn(16, 12)
    before = probe(from_module(module, (x,)), (x,)).gram
    with torch.no_grad():  # a ReLU layer and the next trade a factor: the function is the same, the gradients are not
        module[0].weight.mul_(100)
        module[0].bias.mul_(100)
        module[2].weight.div_(100)
    after = probe(from_module(module, (x,)), (x,)).gram
    assert after.adam.centred_share == pytest.approx(before.adam.centred_share, rel=0.2)
    assert after.sgd.trace > 100 * before.sgd.trace


@pytest.mark.parametrize("layer", [nn.LSTM(5, 7, 2, bidirectional=True), nn.GRU(5, 7), nn.RNN(5, 7)], ids=str)
def test_kernels_without_a_forward_mode_are_differentiated_backwards(layer, monkeypatch):
    x = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0))
    graph = from_module(layer, (x,))
    usual = probe(graph, (x,)).gram

    def lacking(*_):
        raise NotImplementedError("no forward mode")

    monkeypatch.setattr(torch.func, "jvp", lacking)
    backwards = probe(graph, (x,)).gram
    assert backwards.sgd.eigenvalues == pytest.approx(usual.sgd.eigenvalues, rel=1e-4, abs=1e-9)
    assert backwards.adam.eigenvalues == pytest.approx(usual.adam.eigenvalues, rel=1e-4, abs=1e-9)


class PastWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(x + self.a(x).relu_())


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv1d(3, 6, 3), nn.Linear(5, 6), nn.Linear(6, 2)

    def forward(self, x, y):
        return self.c(torch.relu_(self.a((x - 0.5) / 0.2)).mean(2) * self.b(y)), self.b(y)


@pytest.mark.parametrize(
    ("build", "shapes"),
    [
        (PastWeights, [(6, 8)]),
        (TwoInputs, [(6, 3, 9), (6, 5)]),
        (lambda: nn.GRU(5, 6), [(7, 3, 5)]),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)), [(4, 3, 8, 8)]),
    ],
    ids=["past the weights", "two inputs", "two results", "in place"],
)
def test_the_gradient_at_the_inputs_is_that_of_autograd(build, shapes):
    """It is taken on from the first weights, but where a way leads past them."""
    torch.manual_seed(0)
    module, inputs = build(), [torch.randn(shape) for shape in shapes]
    trace = probe(from_module(module, tuple(inputs)), inputs)
    leaves = [x.clone().requires_grad_(True) for x in inputs]
    ends = module(*leaves)
    ends = list(ends) if isinstance(ends, tuple) else [ends]
    torch.autograd.backward(ends, cotangents(ends, batch_of(inputs), torch.Generator().manual_seed(0)))
    seen = [s.gradient_moment2 for s in trace.signals.values() if s.kind == "input"]
    assert seen == pytest.approx([x.grad.square().mean().item() for x in leaves], rel=1e-4)
