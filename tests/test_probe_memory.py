"""What a probe holds beside the model. Judges: the system's account of a process, and a probe that holds all gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_own_backward import Sign
from torch import nn

from initaudit.graph.from_torch import from_module
from initaudit.graph.own_backward import own_backward
from initaudit.probe import lending, slopes
from initaudit.probe.run import probe

STATUS = Path("/proc/self/status")

# Each weight in float32 is a fourteenth of its module or less: it and its gradient are no more than a third.
WHOLE = """
import re, sys, torch, initaudit
from torch import nn
torch.set_num_threads(1)

def held(name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

class Gated(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.layer, self.gate = nn.Linear(n, n), nn.Parameter(torch.zeros(()))
    def forward(self, x):
        return x + self.gate * torch.relu(self.layer(x))

class Repeated(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body
    def forward(self, x):
        return self.body(torch.tanh(self.body(x)))

def made(kind, n, count):
    torch.set_default_dtype(torch.bfloat16 if "16" in kind else torch.float32)  # no float32 module comes first
    layers = [Gated(n) if "gated" in kind else nn.Sequential(nn.Linear(n, n), nn.ReLU()) for _ in range(count)]
    body = nn.Sequential(*layers)
    x = torch.randn(8, n)
    torch.set_default_dtype(torch.float32)
    return Repeated(body) if "repeated" in kind else body, x

kind = sys.argv[1]
initaudit.audit(*made(kind, 64, 2))
before = held("VmRSS")
module, x = made(kind, 2048, 28 if "16" in kind else 20)
assert initaudit.audit(module, x).risk, "no probe was run"
print((held("VmHWM") - before) / sum(p.nbytes for p in module.parameters()))
"""


@pytest.mark.skipif(not STATUS.exists() or "VmHWM" not in STATUS.read_text(), reason="the system keeps no account of memory")
@pytest.mark.parametrize("kind", ["plain", "repeated", "gated16"])
def test_an_audit_with_probe_holds_half_of_the_module_beside_it(kind):
    done = subprocess.run([sys.executable, "-c", WHOLE, kind], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) <= 1.5


class Shared(nn.Module):
    """A layer that is used five times, and a table that is used at both ends."""

    def __init__(self):
        super().__init__()
        self.table, self.layer, self.norm = nn.Embedding(40, 16), nn.Linear(16, 16), nn.LayerNorm(16)

    def forward(self, x):
        x = self.table(x)
        for _ in range(5):
            x = x + torch.tanh(self.layer(self.norm(x)))
        return x @ self.table.weight.T


class Gate(nn.Module):
    """A branch behind a gate of zero."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.gate * self.inner(x)


class Pair(nn.Module):
    """A product of two weights with a signal in one operator, the second one zero."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.zeros(6, 8)), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.einsum("bi,ij,jk->bk", x, self.a, self.b))


class Seen(nn.Module):
    """A weight whose view is a signal, and one that is written into a signal."""

    def __init__(self):
        super().__init__()
        self.a, self.layer, self.gate = nn.Parameter(torch.randn(1, 12)), nn.Linear(12, 12), nn.Parameter(torch.zeros(12))

    def forward(self, x):
        e = self.a.expand_as(x)
        return self.gate * self.layer(x * e).add_(self.a) * e.type_as(x)


class Last(nn.Module):
    """A recurrent layer read at its last state, with a head of zeros."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.LSTM(12, 8, batch_first=True), nn.Linear(8, 3)
        nn.init.zeros_(self.head.weight)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


def normed():
    made = nn.utils.parametrizations
    return nn.Sequential(
        made.weight_norm(nn.Linear(12, 16)), nn.ReLU(), made.spectral_norm(nn.Linear(16, 16)), nn.Linear(16, 3)
    )


def dead():
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))
    nn.init.constant_(net[0].bias, -100.0)
    return net


def convolutions():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(256, 3))
    return nn.Sequential(net, Gate(nn.Linear(3, 3))).to(memory_format=torch.channels_last)


NETS = {
    "shared": (Shared, lambda: torch.randint(40, (8, 5))),
    "gated": (lambda: nn.Sequential(Gate(nn.Linear(12, 12)), Gate(Gate(nn.Linear(12, 12)))), lambda: torch.randn(8, 12)),
    "pair": (Pair, lambda: torch.randn(8, 12)),
    "seen": (Seen, lambda: torch.randn(8, 12)),
    "recurrent": (Last, lambda: torch.randn(8, 6, 12)),
    "normed": (normed, lambda: torch.randn(8, 12)),
    "dead": (dead, lambda: torch.randn(8, 12)),
    "convolutions": (convolutions, lambda: torch.randn(8, 3, 12, 12)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_a_probe_that_holds_nothing_sees_the_same(name, dtype, monkeypatch):
    build, batch = NETS[name]
    torch.manual_seed(0)
    net, x = build().to(dtype), batch()
    x = x.to(dtype) if x.is_floating_point() else x
    graph = from_module(net, (x,))
    held = probe(graph, (x,))
    monkeypatch.setattr(lending, "LARGE", 0)
    monkeypatch.setattr(slopes, "RECALLED", 1)
    assert repr(probe(graph, (x,))) == repr(held)  # not a digit is another


def test_some_of_these_networks_take_virtual_steps_and_revive():
    revived = set()
    for build, batch in NETS.values():
        torch.manual_seed(0)
        net, x = build(), batch()
        revived |= {p.revived for p in probe(from_module(net, (x,)), (x,)).parameters.values()}
    assert revived == {0, 1, 2, None}


def test_the_modules_own_backward_pass_holds_one_gradient_at_a_time():
    class Net(nn.Sequential):
        def forward(self, x):
            return Sign.apply(super().forward(x))

    net = Net(*(nn.Linear(8, 8) for _ in range(4)))
    most = []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: most.append(sum(p.grad is not None for p in net.parameters())))
    found = own_backward(net, (torch.randn(4, 8),), {})
    assert found is not None
    assert found.fed == {n for n, _ in net.named_parameters()}
    assert most == [1] * 8
