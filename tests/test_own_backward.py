"""What the module's own autograd says beside the graph. Judge: gradients after a real backward pass, and SGD."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import initaudit
from initaudit.auditing import program
from initaudit.config import Config
from initaudit.graph.own_backward import own_backward


class Net(nn.Module):
    """An encoder that is called by `call`, and a head."""

    def __init__(self, call):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
        self.head, self.call = nn.Linear(32, 4), call

    def forward(self, x):
        return self.head(self.call(self.encoder, x))


def under(mode):
    def call(encoder, x):
        with mode():
            y = encoder(x)
        return y.clone()

    return call


class Sign(torch.autograd.Function):
    """A straight-through estimator: the sign forward, the gradient as it comes backward."""

    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Twice(torch.autograd.Function):
    """A function with the backward pass that its operators have too."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


CUT = {
    "no_grad": under(torch.no_grad),
    "inference_mode": under(torch.inference_mode),
    "data": lambda encoder, x: encoder(x).data,
    "detach": lambda encoder, x: encoder(x).detach(),
    "a copy": lambda encoder, x: torch.tensor(encoder(x).tolist()),
}
FED = {
    "plain": lambda encoder, x: encoder(x),
    "computed again": lambda encoder, x: checkpoint(encoder, x, use_reentrant=False),
    "computed again, reentrant": lambda encoder, x: checkpoint(encoder, x.requires_grad_(), use_reentrant=True),
    "a function": lambda encoder, x: Twice.apply(encoder(x)),
    "some of it": lambda encoder, x: encoder(x) + encoder(x).detach(),
}


def inputs():
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(1))


def without_gradient(net):
    net.zero_grad()
    net(inputs()).square().sum().backward()
    return {n for n, p in net.named_parameters() if p.grad is None}


def alarms(found):
    return [(f.code, f.severity) for f in found.findings if f.severity != "info"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [*CUT, *FED])
def test_it_is_what_a_backward_pass_reaches(name):
    net = Net({**CUT, **FED}[name])
    expected = without_gradient(net)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    grads = {n: p.grad for n, p in net.named_parameters()}
    found = own_backward(net, (inputs(),), {})
    assert found.missed == expected
    assert (expected != set()) == (name in CUT)
    assert {"head.weight", "encoder.0.weight"} <= found.called
    assert net.training
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    assert all(p.grad is grads[n] for n, p in net.named_parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CUT)
def test_what_is_cut_is_an_error_at_its_first_layer(name):
    found = initaudit.audit(Net(CUT[name]), inputs())
    assert alarms(found) == [("IA311", "error")]
    (finding,) = [f for f in found.findings if f.severity == "error"]
    assert {finding.tensor, *finding.related} == {n for n, _ in Net(CUT[name]).named_parameters() if "encoder" in n}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FED)
def test_what_is_fed_is_left_alone(name):
    assert alarms(initaudit.audit(Net(FED[name]), inputs())) == []


def test_what_is_frozen_may_be_cut():
    net = Net(CUT["no_grad"])
    net.encoder.requires_grad_(False)
    assert alarms(initaudit.audit(net, inputs())) == []


def test_a_backward_pass_of_its_own_is_believed():
    """SGD is the judge: what the operators give no gradient learns."""
    net, x = Net(lambda encoder, x: Sign.apply(encoder(x) - 0.5)), inputs()
    found = initaudit.audit(net, x)
    assert alarms(found) == []
    assert any("backward pass of its own" in f.message for f in found.findings)
    before, optimizer, y = net.encoder[0].weight.detach().clone(), torch.optim.SGD(net.parameters(), 0.1), torch.arange(16) % 4
    losses = []
    for _ in range(200):
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert not torch.equal(before, net.encoder[0].weight)


def test_a_path_that_falls_out_at_random_is_no_cut():
    class Dropped(nn.Module):
        """Layers are left out at random in training."""

        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList(nn.Linear(12, 12) for _ in range(6)), nn.Linear(12, 4)

        def forward(self, x):
            for layer in self.layers:
                if not self.training or float(torch.rand(())) < 0.5:
                    x = x + torch.relu(layer(x))
            return self.head(x)

    assert own_backward(Dropped(), (inputs(),), {}).missed == frozenset()


def test_a_forward_that_cannot_be_run_says_nothing():
    assert own_backward(Net(FED["plain"]), (torch.randn(3, 5),), {}) is None


def test_a_network_that_is_frozen_as_drawn_is_told():
    net = Net(FED["plain"]).requires_grad_(False)
    assert alarms(initaudit.audit(net, inputs())) == [("IA311", "warning")]


def test_outputs_may_be_distributions():
    class Actor(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.mean, self.log_std = nn.Linear(12, 32), nn.Linear(32, 2), nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return torch.distributions.Normal(self.mean(torch.tanh(self.body(x))), self.log_std.exp())

    found = initaudit.audit(Actor(), inputs())
    assert alarms(found) == []
    assert {layer.tensor for layer in found.layers} == {"body.weight", "mean.weight"}


@pytest.mark.parametrize("config", [Config(probe=False), Config()])
def test_what_is_too_large_or_not_to_be_probed_is_not_run(config, monkeypatch):
    monkeypatch.setattr(program, "PROBED", 10)
    seen = []

    class Large(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 4)

        def forward(self, x):
            seen.append(type(x))
            return self.layer(x)

    initaudit.audit(Large(), inputs(), config=config)
    assert seen
    assert torch.Tensor not in seen
