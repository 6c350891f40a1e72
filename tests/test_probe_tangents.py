"""Directions pushed forward through the graph, against torch's Jacobian and the backward pass of the same network."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad as forward

import initaudit
from initaudit.graph.constness import constant_nodes
from initaudit.graph.from_torch import from_module
from initaudit.probe.run import probe
from initaudit.probe.tangents import _SEED, Tangents, duals, forward_gains


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.packed, self.head = nn.Linear(width, 3 * width), nn.Linear(width, 3)

    def forward(self, x):
        q, k, v = self.packed(x).chunk(3, -1)
        return self.head(x + F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(4, 6, 2, batch_first=True), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Sampled(nn.Module):
    """torch has no forward mode for grid_sample, and no second backward pass for cdist."""

    def __init__(self, apart):
        super().__init__()
        self.apart, self.layer, self.head = apart, nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.layer(x)
        if self.apart:
            return self.head(torch.cdist(x, x.flip(0) + 1))
        grid = torch.tanh(x).view(-1, 4, 1, 2)
        return self.head(F.grid_sample(x.view(-1, 2, 2, 2), grid, align_corners=False).flatten(1))


NETWORKS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 4)), (6, 5)),
    "conv": (
        lambda: nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)),
        ),
        (4, 2, 8, 8),
    ),
    "residual": (lambda: nn.Sequential(nn.Linear(5, 8), Block(8), Block(8), nn.Linear(8, 2)), (4, 5)),
    "attention": (lambda: Attention(8), (3, 5, 8)),
    "heads": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (3, 5, 8)),
    "lstm": (lambda: Recurrent(nn.LSTM), (3, 5, 4)),
    "gru": (lambda: Recurrent(nn.GRU), (3, 5, 4)),
    "sampled": (lambda: Sampled(apart=False), (4, 8)),
}


def made(name):
    torch.manual_seed(0)
    build, shape = NETWORKS[name]
    return build(), torch.randn(shape)


def pushed(module, x, seed=0):
    graph = from_module(module, (x,))
    trace = probe(graph, graph.examples, seed=seed)
    return graph, trace, forward_gains(graph, graph.examples, trace, seed=seed)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_direction_arrives_as_the_jacobian_says_and_agrees_with_the_backward_pass(name):
    module, x = made(name)
    graph, trace, found = pushed(module, x)
    assert found.missing == {}
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(_SEED))
    y = module(x)
    jacobian = torch.autograd.functional.jacobian(module, x).reshape(y.numel(), x.numel())
    expected = jacobian @ v.flatten()
    assert found.moment2[trace.outputs[0]] == pytest.approx(expected.square().mean().item(), rel=1e-4)
    with duals(0, graph):
        run = Tangents(graph, constant_nodes(graph.fx), frozenset(), 0, None)
        kept = {}
        run._look = lambda n, value, look=run._look: kept.setdefault(n.name, look(n, value))
        run.run(*graph.examples)
        t = forward.unpack_dual(kept[trace.outputs[0]]).tangent
    torch.testing.assert_close(t.flatten(), expected, rtol=1e-4, atol=1e-5)
    u = torch.randn(y.shape)
    leaf = x.clone().requires_grad_(True)
    (back,) = torch.autograd.grad(module(leaf), leaf, u)
    assert (u * t).sum().item() == pytest.approx((back * v).sum().item(), rel=1e-4, abs=1e-5)  # <u, Jv> = <Jᵀu, v>


def test_every_edge_and_block_of_a_chain_is_that_of_its_own_jacobian():
    module, x = made("residual")
    _, trace, found = pushed(module, x)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(_SEED))
    moved = [torch.autograd.functional.jvp(module[:end], x, v)[1] for end in range(1, len(module) + 1)]
    sizes = [t.square().sum() for t in (v, *moved)]
    expected = [(after / before).item() for before, after in itertools.pairwise(sizes)]
    assert len(trace.measures.blocks) == len(expected)
    assert list(found.blocks) == pytest.approx(expected, rel=1e-4)
    assert found.gain == pytest.approx((sizes[-1] / sizes[0]).item(), rel=1e-4)


def test_both_modes_see_the_norm_of_one_jacobian():
    module, x = made("mlp")
    graph = from_module(module, (x,))
    jacobian = torch.autograd.functional.jacobian(module, x)
    norm2, inputs, outputs = jacobian.square().sum().item(), x.numel(), module(x).numel()
    trace = probe(graph, graph.examples, seed=0)
    ahead = [forward_gains(graph, graph.examples, trace, seed=s).gain * inputs for s in range(200)]
    assert sum(ahead) / len(ahead) == pytest.approx(norm2, rel=0.05)
    u = torch.randn(200, outputs) @ jacobian.reshape(outputs, inputs)
    assert u.square().sum(1).mean().item() == pytest.approx(norm2, rel=0.05)
    assert trace.measures.jacobian_gain * outputs == pytest.approx(norm2, rel=0.6)  # one draw


def test_what_has_no_derivative_in_forward_mode_is_named_and_never_given():
    torch.manual_seed(0)
    _, trace, found = pushed(Sampled(apart=True), torch.randn(8, 8))
    assert found.gain is None
    assert "cdist" in next(iter(found.missing))
    assert "NotImplementedError" in next(iter(found.missing.values()))
    assert trace.outputs[0] not in found.moment2
    assert found.moment2  # what stands before it is


def test_integers_start_at_the_rows_that_are_looked_up():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(10, 8), Block(8), nn.Linear(8, 3))
    _, trace, found = pushed(module, torch.randint(10, (64, 5)))
    first = trace.measures.blocks[0].start
    assert found.moment2[first] == pytest.approx(1, rel=0.1)
    assert found.gain is not None


def test_the_report_has_them_where_they_are_asked_for():
    module, x = made("residual")
    before = {k: v.clone() for k, v in module.state_dict().items()}
    state = torch.get_rng_state()
    plain = initaudit.audit(module, x).to_dict()["probe"]
    asked = initaudit.audit(module, x, config={"jvp": True}).to_dict()["probe"]
    assert "jvp" not in plain
    seen = asked.pop("jvp")
    assert asked == plain
    assert [(b["start"], b["end"]) for b in seen["blocks"]] == [(b["start"], b["end"]) for b in plain["blocks"]]
    assert len(seen["edges"]) >= len(seen["blocks"])
    assert seen["missing"] == {}
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
