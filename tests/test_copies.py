"""Layers and units that are copies are found whatever their order, signs and rounding, and what only looks alike is not."""

from __future__ import annotations

import copy
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from initaudit import audit
from initaudit.measure.copies import same_units

COPIES = {"IA202", "IA203"}


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 60),
    st.integers(0, 1),
    st.sampled_from([np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]),
    st.integers(0, 2**32 - 1),
)
def test_units_in_another_order_and_turned_round_are_the_same(rows, columns, axis, dtype, seed):
    rng = np.random.default_rng(seed)
    a = rng.normal(0, 1, (rows, columns)).astype(dtype)
    order, signs = rng.permutation(a.shape[axis]), rng.choice([-1, 1], a.shape[axis])
    b = np.take(a, order, axis) * (signs[:, None] if axis == 0 else signs).astype(dtype)
    assert same_units(a, b, axis, 0.0)
    far = b.astype(np.float64)
    far[rng.integers(rows), rng.integers(columns)] += 0.456789  # what no other value of these dtypes is away
    assert not same_units(a, far, axis, 1e-6)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(3000, 700), (64, 5000)])
def test_near_copies_of_many_blocks(axis, shape):
    """Units so many that the projections of some are nearly the same and change places."""
    rng = np.random.default_rng(0)
    a = rng.normal(0, 0.02, shape)
    noise = rng.normal(0, 1, shape)
    noise *= np.linalg.norm(a, axis=1 - axis, keepdims=True) / np.linalg.norm(noise, axis=1 - axis, keepdims=True)
    order = rng.permutation(shape[axis])
    assert same_units(a, np.take(a + 0.9e-6 * noise, order, axis), axis, 1e-6)
    assert not same_units(a, np.take(a + 3e-6 * noise, order, axis), axis, 1e-6)
    assert not same_units(a, rng.normal(0, 0.02, shape), axis, 1e-6)


def test_what_is_not_finite_is_like_nothing():
    a = np.full((3, 4), np.nan, np.float32)
    assert not same_units(a, a, 0, 1e-6)


class Blocks(nn.Module):
    """Residual blocks of two matrices and a head."""

    def __init__(self, width=48, blocks=4, act=F.gelu):
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(blocks))
        self.head, self.act = nn.Linear(width, 10), act

    def forward(self, x):
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(self.act(up(x)))
        return self.head(x)


def codes(model, *inputs):
    return {f.code for f in audit(model, inputs).findings if f.severity != "info"} & COPIES


def layers_of(change):
    model = Blocks()
    with torch.no_grad():
        change(model)
    return model, torch.randn(16, 48)


def whole(m):
    m.up[2].weight.copy_(m.up[0].weight)


def rounded(m):
    m.up[2].weight.copy_(m.up[0].weight * (1 + 5e-7 * torch.randn(96, 48)))


def rounded_and_permuted(m):
    m.up[3].weight.copy_((m.up[1].weight * (1 + 5e-7 * torch.randn(96, 48)))[torch.randperm(96)])


def columns_turned(m):
    m.down[3].weight.copy_(m.down[1].weight[:, torch.randperm(96)] * torch.tensor([1.0, -1.0]).repeat(48))


def all_blocks(m):
    for layers in (m.up, m.down):
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())


def half_precision(m):
    whole(m)
    for p in m.parameters():
        p.copy_(p.bfloat16())


@pytest.mark.parametrize(
    "change", [whole, rounded, rounded_and_permuted, columns_turned, all_blocks, half_precision], ids=lambda f: f.__name__
)
def test_copied_layers_are_found(change):
    torch.manual_seed(0)
    assert "IA203" in codes(*layers_of(change))


def scaled_by_a_little(m):
    m.up[2].weight.copy_(torch.randn(96, 48) / math.sqrt(48))
    m.up[0].weight.copy_(torch.randn(96, 48) / math.sqrt(48))


def cosines(m):
    n = torch.arange(48.0)
    table = torch.cos(math.pi / 48 * (n[:, None] + 0.5) * n) / math.sqrt(24)
    for layer in m.up:
        layer.weight.copy_(torch.cat([table.T, torch.randn(48, 48) / math.sqrt(48)]))


def identities(m):
    for layer in m.up:
        nn.init.eye_(layer.weight)


def signs(m):
    for layer in (*m.up, *m.down):
        layer.weight.copy_(torch.randn_like(layer.weight).sign() / math.sqrt(layer.in_features))


def few_bits(m):
    for layer in (*m.up, *m.down):
        layer.weight.copy_((layer.weight * 40).round().clamp(-7, 7) / 40)


def eight_bits(m):
    for layer in (*m.up, *m.down):
        layer.weight.copy_(layer.weight.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("change", [scaled_by_a_little, identities, signs, few_bits, eight_bits], ids=lambda f: f.__name__)
def test_layers_that_only_look_alike(change):
    torch.manual_seed(0)
    assert codes(*layers_of(change)) == set()


def test_transforms_are_equal_on_purpose():
    """Two trainable layers that begin as one transform of cosines, and as one of Walsh and Hadamard."""
    n = torch.arange(32.0)
    table = torch.cos(math.pi / 32 * (n + 0.5) * n[:, None]) / 4
    table[0] /= math.sqrt(2)
    hadamard = torch.ones(1, 1)
    for _ in range(5):
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)]) / math.sqrt(2)
    for weight in (table, hadamard):
        torch.manual_seed(0)
        mix = [nn.Linear(32, 32, bias=False) for _ in range(2)]
        for layer in mix:
            layer.weight.data.copy_(weight)
        model = nn.Sequential(mix[0], nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), mix[1], nn.Linear(32, 4))
        assert codes(model, torch.randn(16, 32)) == set()


def test_drawn_orthogonal_matrices_that_are_copies_are_found():
    torch.manual_seed(0)
    model = Blocks()
    for layer in model.up:
        nn.init.orthogonal_(layer.weight)
    assert codes(model, torch.randn(16, 48)) == set()
    model.up[1].weight.data.copy_(model.up[0].weight)
    assert codes(model, torch.randn(16, 48)) == {"IA203"}


class Tied(nn.Module):
    """An embedding whose rows repeat (a vocabulary padded by its last word), tied to the head, and a table of distances."""

    def __init__(self):
        super().__init__()
        self.words, self.distance = nn.Embedding(96, 32), nn.Embedding(32, 4)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        with torch.no_grad():
            self.words.weight.mul_(32**-0.5)
            self.words.weight[80:] = self.words.weight[80]
            self.distance.weight[16:] = self.distance.weight[15]

    def forward(self, ids):
        x = F.layer_norm(self.words(ids), (32,))
        q, k, v = (m(x).unflatten(-1, (4, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
        place = torch.arange(ids.shape[1])
        bias = self.distance((place[:, None] - place).abs().clamp(max=31)).permute(2, 0, 1)
        x = x + self.o((((q @ k.transpose(-1, -2)) * 8**-0.5 + bias).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return F.linear(x, self.words.weight)


def test_rows_of_a_table_may_repeat():
    torch.manual_seed(0)
    assert codes(Tied(), torch.randint(0, 96, (4, 24))) == set()


def test_depthwise_kernels_of_few_values():
    """Ternary kernels of nine taps: rows collide by chance, but what they read differs."""
    torch.manual_seed(0)
    depthwise = nn.Conv2d(256, 256, 3, padding=1, groups=256)
    depthwise.weight.data = torch.randint(-1, 2, (256, 1, 3, 3)) / 2.45
    model = nn.Sequential(nn.Conv2d(3, 256, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(256, 8, 1))
    assert codes(model, torch.randn(4, 3, 12, 12)) == set()


def units(act, change, probe=True):
    model = nn.Sequential(nn.Linear(24, 60), act, nn.Linear(60, 40), act, nn.Linear(40, 6))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            nn.init.zeros_(layer.bias)
        change(model[0], model[2])
    return codes(model, torch.randn(32, 24))


def mirrored(first, second, share=0.5):
    n = round(60 * share)
    first.weight[60 - n :], second.weight[:, 60 - n :] = -first.weight[:n], -second.weight[:, :n]


def repeated(first, second, share=0.5):
    n = round(60 * share)
    first.weight[60 - n :], second.weight[:, 60 - n :] = first.weight[:n], second.weight[:, :n]


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Softsign(), nn.Hardtanh(), nn.Identity(), nn.Sigmoid()], ids=repr)
def test_a_unit_and_its_negative_behind_an_odd_activation(act):
    """Odd but for a constant is enough: the slope of a sigmoid is even, so that the two get opposite gradients."""
    torch.manual_seed(0)
    assert units(act, mirrored) == {"IA202"}


@pytest.mark.parametrize("act", [nn.ReLU(), nn.GELU(), nn.SELU()], ids=repr)
def test_a_unit_and_its_negative_are_two_behind_others(act):
    torch.manual_seed(0)
    assert units(act, mirrored) == set()


@pytest.mark.parametrize("share", [1 / 30, 0.2, 0.5])
def test_a_share_of_copies_is_told(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 60), nn.ReLU(), nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 6))
    with torch.no_grad():
        repeated(model[0], model[2], share)
    model[0].bias.data.zero_()
    found = next(f for f in audit(model, (torch.randn(32, 24),)).findings if f.code == "IA202")
    assert (found.measured, found.expected) == (60 - round(60 * share), 60)
    assert found.severity == ("error" if share > 0.1 else "warning")


def test_a_teacher_beside_its_student_and_two_names_of_one_weight():
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.student = nn.Linear(48, 48)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.again = nn.Linear(48, 48)
            self.again.weight = self.student.weight

        def forward(self, x):
            return self.again(self.student(x).relu()) - self.teacher(x).relu()

    torch.manual_seed(0)
    assert codes(Siblings(), torch.randn(8, 48)) == set()
