"""Modules and inputs out of the ordinary: TorchScript, objects as batches, complex weights, vmap, lazy layers, exports."""

import copy
import dataclasses
from collections import UserDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import initaudit
from initaudit.errors import UnreadableModel
from initaudit.graph.from_torch import from_module
from initaudit.graph.parcels import closed, opened
from initaudit.measure.moments import measure
from initaudit.probe.gradients import kernel
from initaudit.probe.passes import cotangents
from initaudit.probe.run import probe


def net(width=16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, 32), nn.ReLU(), nn.Linear(32, 3))


def loud(found):
    return [(f.code, f.message) for f in found.findings if f.severity != "info"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is (deprecated|not supported):DeprecationWarning")
def test_a_scripted_module_is_judged_after_its_training_as_before():
    """Its optimizer then runs a plan that takes gradients by itself."""
    module, x = torch.jit.script(net()), torch.randn(16, 16)
    before = initaudit.audit(module, x)
    for _ in range(4):
        module(x).sum().backward()
    after = initaudit.audit(module, x)
    plain = initaudit.audit(copy.deepcopy(net()), x)
    assert loud(before) == loud(after) == loud(plain) == []
    assert after.risk == before.risk
    assert after.risk["untrainable"] == plain.risk["untrainable"]


@dataclasses.dataclass(frozen=True)
class Batch:
    x: torch.Tensor
    mask: torch.Tensor
    name: str = ""


@dataclasses.dataclass(slots=True)
class Slots:
    x: torch.Tensor
    mask: torch.Tensor


class Plain:
    def __init__(self, x, mask):
        self.x, self.rest = x, {"mask": [mask]}

    @property
    def mask(self):
        return self.rest["mask"][0]


class Outer:
    def __init__(self, x, mask):
        self.inner, self.count = Plain(x, mask), 3

    x, mask = property(lambda self: self.inner.x), property(lambda self: self.inner.mask)


class OfObject(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, batch):
        x, mask = (batch["x"], batch["mask"]) if isinstance(batch, UserDict) else (batch.x, batch.mask)
        return self.net(x * mask)


def by_name(x, mask):
    return UserDict(x=x, mask=mask)


@pytest.mark.parametrize("kind", [Batch, Slots, Plain, Outer, by_name])
def test_tensors_in_an_object_are_inputs(kind):
    x, mask = torch.randn(16, 16), torch.ones(16, 16)
    batch = kind(x, mask)
    graph = from_module(OfObject(), (batch,))
    assert [tuple(i.shape) for i in graph.inputs] == [(16, 16), (16, 16)]
    found = initaudit.audit(OfObject(), (batch,))
    assert loud(found) == []
    plain = initaudit.audit(nn.Sequential(net()), x)
    assert found.risk["untrainable"] == plain.risk["untrainable"]
    if not isinstance(batch, UserDict):  # a mapping names the arguments of forward
        assert initaudit.audit(OfObject(), batch).risk == found.risk


def test_objects_are_copied_and_not_changed():
    batch = Outer(torch.zeros(2), torch.ones(2))
    again = closed(torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t + 5, opened([batch, 7])))
    assert again[1] == 7
    assert again[0].x.tolist() == [5, 5]
    assert again[0].count == 3
    assert batch.x.tolist() == [0, 0]
    module = net()
    assert opened(module) is module


class Spectral(nn.Module):
    """A Fourier layer; its weights are complex numbers, or pairs of real ones that are seen as such."""

    def __init__(self, pairs):
        super().__init__()
        torch.manual_seed(1)
        weight = torch.randn(8, 8, 5, dtype=torch.cfloat) / 8
        self.pairs = pairs
        self.w = nn.Parameter(torch.view_as_real(weight).clone() if pairs else weight)
        self.into, self.out = nn.Linear(16, 128), nn.Linear(128, 3)

    def forward(self, x):
        signal = self.into(x).view(-1, 8, 16)
        weight = torch.view_as_complex(self.w) if self.pairs else self.w
        waves = torch.fft.rfft(signal)
        kept = torch.einsum("bik,iok->bok", waves[..., :5], weight)
        whole = torch.cat([kept, torch.zeros_like(waves[..., 5:])], -1)
        return self.out(torch.tanh(torch.fft.irfft(whole, n=16) + signal).flatten(1))


def test_complex_weights_are_probed_as_pairs_of_real_ones():
    x = torch.randn(16, 16)
    one, other = initaudit.audit(Spectral(False), x), initaudit.audit(Spectral(True), x)
    assert loud(one) == loud(other) == []
    assert one.risk == other.risk
    assert [layer.tensor for layer in one.layers] == [layer.tensor for layer in other.layers] == ["into.weight", "out.weight"]
    assert any("complex tensors (w)" in note for note in one.report.notes)


def test_gradients_of_complex_weights_are_those_of_autograd():
    """In each example, of <c, output> for one c that all examples share."""
    module, x = Spectral(False), torch.randn(12, 16) + 0.5
    (shared,) = cotangents([module(x)], len(x), torch.Generator().manual_seed(0), shared=True)
    rows = []
    for i in range(len(x)):
        module.zero_grad()
        (module(x[i : i + 1]) * shared[i : i + 1]).sum().backward()
        grads = [torch.view_as_real(p.grad) if p.is_complex() else p.grad for p in module.parameters()]
        rows.append(torch.cat([g.flatten() for g in grads]))
    gradients = torch.stack(rows).double()
    expected, found = kernel(gradients @ gradients.T), probe(from_module(module, (x,)), (x,), seed=0).gram.sgd
    assert found.trace == pytest.approx(expected.trace, rel=0.35)
    assert found.centred_share == pytest.approx(expected.centred_share, rel=0.35)
    assert found.eigenvalues[0] == pytest.approx(expected.eigenvalues[0], rel=0.35)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_complex_weight_that_is_not_finite_is_told(tmp_path, value):
    module = Spectral(False)
    with torch.no_grad():
        module.w[0, 0, 0] = value
    torch.save(module.state_dict(), tmp_path / "w.pt")
    for found in (initaudit.audit(module, torch.randn(8, 16)), initaudit.audit(tmp_path / "w.pt")):
        assert ("IA401", "w") in [(f.code, f.tensor) for f in found.findings]


def test_moments_of_complex_numbers_are_of_both_parts():
    values = (np.random.default_rng(0).normal(1, 2, (7, 30)) * (1 + 0.5j)).astype(np.complex64)
    assert measure(values) == measure(np.stack([values.real, values.imag], -1))
    assert measure(values.T).count == 420


class Ensemble(nn.Module):
    """Several networks as one, as PyTorch's tutorial has it."""

    def __init__(self, count=4):
        super().__init__()
        parts = [nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)) for _ in range(count)]
        stacked, _ = torch.func.stack_module_state(parts)
        self.held = nn.ParameterDict({k.replace(".", "_"): nn.Parameter(v.detach().clone()) for k, v in stacked.items()})
        self.__dict__["base"] = copy.deepcopy(parts[0]).to("meta")

    def forward(self, x):
        state = {k.replace("_", "."): v for k, v in self.held.items()}
        return torch.vmap(lambda own: torch.func.functional_call(self.base, own, (x,)))(state).mean(0)


class Divergence(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 6))

    def forward(self, x):
        jacobian = torch.vmap(torch.func.jacrev(self.net))(x)
        return jacobian.diagonal(dim1=-2, dim2=-1).sum(-1, keepdim=True) + self.net(x)


@pytest.mark.parametrize(("module", "width"), [(Ensemble, 16), (Divergence, 6)])
def test_transforms_are_followed_to_the_operators_they_come_to(module, width):
    torch.manual_seed(0)
    made, x = module(), torch.randn(16, width)
    graph = from_module(made, (x,))
    assert graph.unused == ()
    assert {p for p in graph.constants if graph.constants[p].kind == "parameter"} == dict(made.named_parameters()).keys()
    assert loud(initaudit.audit(made, x)) == []


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_layers_take_their_sizes_from_the_inputs_and_the_module_stays_lazy():
    module = nn.Sequential(nn.Conv2d(1, 8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    found = initaudit.audit(module, torch.randn(16, 1, 8, 8))
    assert loud(found) == []
    assert [layer.tensor for layer in found.layers] == ["0.weight", "4.weight"]
    assert torch.nn.parameter.is_lazy(module[4].weight)
    for inputs, says in ((None, "give example inputs"), (torch.randn(3), "forward, which gives its lazy layers")):
        with pytest.raises(UnreadableModel, match=says):
            initaudit.audit(module, inputs)


def test_an_exported_program_is_a_module_too():
    x = torch.randn(16, 16)
    found = initaudit.audit(torch.export.export(net(), (x,)).module(), x)
    assert loud(found) == []
    assert len(found.layers) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_inputs_are_made_up_in_the_type_of_the_weights(dtype):
    found = initaudit.audit(net().to(dtype))
    assert loud(found) == []
    assert found.risk


class Correlated(nn.Module):
    """Returns the loss of two views of a batch, which is near zero where they are alike (Zbontar et al. 2021)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32, bias=False))
        self.norm = nn.BatchNorm1d(32, affine=False)

    def forward(self, one, other):
        c = self.norm(self.net(one)).T @ self.norm(self.net(other)) / one.shape[0]
        on = torch.diagonal(c)
        return (on - 1).pow(2).sum() + 0.005 * (c - torch.diag(on)).pow(2).sum()


def test_what_is_left_in_a_loss_is_no_signal():
    x = torch.randn(32, 16)
    one, other = x + 0.1 * torch.randn_like(x), x + 0.1 * torch.randn_like(x)
    assert loud(initaudit.audit(Correlated(), (one, other))) == []
    broken = Correlated()
    with torch.no_grad():
        broken.net[0].weight.zero_()
    assert loud(initaudit.audit(broken, (one, other)))


class Standardised(nn.Module):
    """Divides by the spread of each feature, which is zero for a constant one."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x):
        return self.net((x - x.mean(0)) / x.std(0))


@pytest.mark.parametrize(("bad", "says"), [(1.0, "forward does so with the inputs"), (float("nan"), "hold such values")])
def test_given_inputs_that_forward_makes_no_numbers_of_are_an_error(bad, says):
    x = torch.randn(16, 16)
    assert loud(initaudit.audit(Standardised(), x)) == []
    x[:, 3] = bad
    (found,) = loud(initaudit.audit(Standardised(), x))
    assert found[0] == "IA401"
    assert says in found[1]


class Tempered(nn.Module):
    def __init__(self, temperature):
        super().__init__()
        self.net, self.temperature = net(), temperature

    def forward(self, x):
        return self.net(x) / self.temperature


@pytest.mark.parametrize(("temperature", "told"), [(1e-4, True), (0.01, False), (1.0, False)])
def test_a_factor_behind_the_head_is_named_and_not_the_head(temperature, told):
    remarks = [f for f in initaudit.audit(Tempered(temperature), torch.randn(16, 16)).findings if f.code == "IA310"]
    assert bool(remarks) == told
    for found in remarks:
        assert found.severity == "info"
        assert "a factor of 1e+04" in found.message
        assert f"{Path(__file__).name}:" in found.message


class Forces(nn.Module):
    """The gradient of an energy, as Hamiltonian networks and force fields have it."""

    def __init__(self, cut=False):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(4, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        self.cut = cut

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_(True)
            hidden = torch.tanh(self.first(x))
            hidden = torch.tanh(self.second(hidden.detach() + 0 * x.sum(1, keepdim=True) if self.cut else hidden))
            return torch.autograd.grad(self.last(hidden).sum() + (x**2).sum(), x, create_graph=True)[0]


def test_gradients_that_forward_takes_are_followed():
    """All but the last bias, which no gradient of the energy depends on."""
    x = torch.randn(16, 4)
    found = initaudit.audit(Forces(), x)
    assert loud(found) == []
    assert [f.tensor for f in found.findings if f.code == "IA311"] == ["last.bias"]
    module = Forces()
    module(x).square().sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()] == ["last.bias"]


def test_what_the_user_detaches_stays_detached():
    assert "IA311" in [code for code, _ in loud(initaudit.audit(Forces(cut=True), torch.randn(16, 4)))]


class Numbers(nn.Module):
    """Computes with the numbers of its first layer only."""

    def __init__(self):
        super().__init__()
        self.first, self.net = nn.Linear(16, 16), net()

    def forward(self, x):
        return self.net(torch.relu(nn.functional.linear(x, self.first.weight.data, self.first.bias.data)))


def test_parameters_taken_by_their_data_get_no_gradient():
    (found,) = loud(initaudit.audit(Numbers(), torch.randn(16, 16)))
    assert found[0] == "IA311"
    assert "although forward computes with them: first.weight, first.bias" in found[1]


class Partial(nn.Module):
    """Turns a part of its features and leaves the rest, of which there is none."""

    def __init__(self, part):
        super().__init__()
        self.first, self.net, self.part = nn.Linear(16, 16), net(), part

    def forward(self, x):
        x = self.first(x)
        return self.net(torch.cat([torch.cos(x[:, : self.part]), x[:, self.part :]], -1))


@pytest.mark.parametrize("part", [8, 16])
def test_an_empty_rest_ends_no_probe(part):
    found = initaudit.audit(Partial(part), torch.randn(16, 16))
    assert loud(found) == []
    assert found.risk


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize("name", ["input", "anything"])
def test_lazy_layers_take_their_sizes_from_data_by_name_or_in_order(tmp_path, name):
    np.savez(tmp_path / "batch.npz", **{name: np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)})
    found = initaudit.audit(
        nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(3)), config={"data": tmp_path / "batch.npz"}
    )
    assert loud(found) == []
    assert [layer.shape for layer in found.layers] == [(32, 8), (3, 32)]
