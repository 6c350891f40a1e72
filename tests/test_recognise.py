"""A smaller cut of benchmarks/recognition.py: fresh draws are recognised, other scales are not, training is seen."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from initaudit import audit
from initaudit.expect.recognise import recognise
from initaudit.expect.schemes import catalogue, site_of
from initaudit.measure import observation
from initaudit.measure.observation import observe, orthogonal_gain
from initaudit.measure.units import measure_units

LINEAR, KERNEL = ("o", "i"), ("o", "i", "k", "k")
SITES = {
    "small": site_of((10, 16), LINEAR),
    "conv": site_of((32, 16, 3, 3), KERNEL),
    "depthwise": site_of((256, 1, 5, 5), KERNEL, groups=256),
    "packed": site_of((288, 96), LINEAR, packed=3, depth=12),
    "table": site_of((3000, 64), ("v", "d"), operator="embedding"),
}
DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16)


def draw(scheme, shape, rng):
    std = math.sqrt(scheme.variance)
    if scheme.distribution == "uniform":
        return rng.uniform(-scheme.bound, scheme.bound, shape)
    if scheme.distribution == "normal":
        return rng.normal(0, std, shape)
    # Rejection from the parent, whose std is the one of five that gives this variance.
    parent = scheme.bound / (3.0 if scheme.bound / std > 2.7 else 2.0)
    x = rng.normal(0, parent, shape)
    while (bad := np.abs(x) > scheme.bound).any():
        x[bad] = rng.normal(0, parent, int(bad.sum()))
    return x


@pytest.mark.parametrize("label", SITES)
def test_the_true_scheme_is_in_the_set_and_no_distant_one(label):
    site = SITES[label]
    missed = tried = 0
    for seed, scheme in enumerate(s for s in catalogue(site) if s.distribution != "constant" and s.variance > 1e-7):
        values = draw(scheme, site.shape, np.random.default_rng(seed)).astype(DTYPES[seed % len(DTYPES)])
        result = recognise(observe(values), site)
        names = {f.name: f.variance for f in result.schemes}
        missed, tried = missed + (scheme.name not in names), tried + 1
        assert result.verdict in (("unknown",) if site.size < 1000 else ("init", "trained"))
        if site.size >= 4096:
            assert all(0.5 < v / scheme.variance < 2 for v in names.values())
    assert missed <= 0.02 * tried


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
def test_ten_per_cent_of_variance_at_a_million_weights(distribution):
    site = site_of((1000, 1000), LINEAR)
    true = next(s for s in catalogue(site) if s.name == ("normal(0.02)" if distribution == "normal" else "pytorch_default"))
    values = (draw(true, site.shape, np.random.default_rng(0)) * math.sqrt(1.1)).astype(np.float32)
    result = recognise(observe(values), site)
    assert true.name not in {f.name for f in result.schemes}
    # No scheme of the catalogue has it: a law of free scale is named instead, and says that it is.
    assert result.free
    assert result.verdict == "init"
    assert result.schemes[0].name.startswith(distribution)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda w: nn.init.orthogonal_(w, gain=1.5), "orthogonal(1.5)"),
        (nn.init.zeros_, "zeros"),
        (nn.init.ones_, "ones"),
        (lambda w: nn.init.constant_(w, 1e-5), "constant(1e-05)"),
        (lambda w: nn.init.constant_(w, 0.3), "constant(0.3)"),
        (nn.init.eye_, "identity"),
        (lambda w: nn.init.sparse_(w, 0.25, std=0.01), "sparse(0.25"),
    ],
)
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_structures(make, name, shape):
    torch.manual_seed(0)
    weight = make(torch.empty(shape))
    result = recognise(observe(weight.numpy()), site_of(shape, LINEAR))
    assert result.schemes[0].name.startswith(name)
    assert result.verdict == "init"


def test_kernels_with_one_tap():
    dirac = nn.init.dirac_(torch.empty(16, 4, 3, 3), groups=4)
    assert recognise(observe(dirac.numpy()), site_of((16, 4, 3, 3), KERNEL, groups=4)).schemes[0].name == "dirac"
    delta = np.zeros((32, 16, 3, 3), np.float32)
    delta[:, :, 1, 1] = nn.init.orthogonal_(torch.empty(32, 16)).numpy()
    assert recognise(observe(delta), site_of(delta.shape, KERNEL)).schemes[0].name == "delta_orthogonal(1)"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(128, 128), (40, 400), (300, 50)])
def test_orthogonal_survives_rounding_and_nothing_else_passes(dtype, shape):
    torch.manual_seed(0)
    weight = nn.init.orthogonal_(torch.empty(shape)).numpy().astype(dtype)
    assert observe(weight).structure == "orthogonal"
    fresh = np.random.default_rng(0).normal(0, 1, shape).astype(dtype)
    spacing = observe(fresh).spacing
    assert math.isnan(orthogonal_gain(fresh, measure_units(fresh)[1], spacing))
    unit_rows = fresh.astype(np.float64) / np.linalg.norm(fresh.astype(np.float64), axis=1, keepdims=True)
    assert observe(unit_rows.astype(dtype)).structure == ""


@pytest.mark.parametrize("noise", [0.0, 1e-3])
def test_columns_of_a_tall_matrix_are_compared_band_by_band(noise, monkeypatch):
    monkeypatch.setattr(observation, "PIECE", 1000)
    tall = np.linalg.qr(np.random.default_rng(0).normal(size=(700, 30)))[0] * 1.5
    tall += noise * np.random.default_rng(1).normal(size=tall.shape)
    gram = observation._gram(tall, np.arange(0, 30, 7), False)
    np.testing.assert_allclose(gram, tall[:, ::7].T @ tall[:, ::7], atol=1e-12)
    assert observe(tall.astype(np.float32)).structure == ("" if noise else "orthogonal")


def test_a_padding_row_changes_nothing():
    torch.manual_seed(0)
    weight = nn.Embedding(500, 64, padding_idx=0).weight.detach().numpy()
    result = recognise(observe(weight), site_of((500, 64), ("v", "d")))
    assert "pytorch_default" in {f.name for f in result.schemes}


def test_what_cannot_be_judged():
    site = site_of((40, 40), LINEAR)
    assert recognise(observe(np.full((40, 40), np.nan, np.float32)), site).verdict == "unknown"
    assert recognise(observe(np.zeros((0, 40), np.float32)), site_of((0, 40), LINEAR)).verdict == "unknown"
    bias = recognise(
        observe(np.random.default_rng(0).uniform(-0.1, 0.1, 300).astype(np.float32)), site_of((300,), ("o",), fans=(100, 300))
    )
    assert "pytorch_default" in {f.name for f in bias.schemes}


def moved(values, rng, kind):
    rows, columns = values.shape
    size = np.linalg.norm(values)
    change = {
        "rank one": lambda: np.outer(rng.normal(size=rows), rng.normal(size=columns)),
        "common input": lambda: np.outer(rng.normal(size=rows), np.abs(rng.normal(size=columns))),
        "smooth": lambda: np.cumsum(rng.normal(size=values.shape), axis=1),
        "some rows": lambda: rng.normal(size=values.shape) * (np.arange(rows) < rows // 8)[:, None],
        "heavy tails": lambda: rng.standard_cauchy(values.shape).clip(-50, 50),
    }[kind]()
    return values + 0.3 * size * change / np.linalg.norm(change)


@pytest.mark.parametrize("kind", ["rank one", "common input", "smooth", "some rows", "heavy tails"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_weights_are_called_trained(kind, dtype):
    rng = np.random.default_rng(0)
    values = moved(rng.normal(0, 0.02, (256, 200)), rng, kind).astype(dtype)
    result = recognise(observe(values), site_of((256, 200), LINEAR))
    assert result.verdict == "trained"
    assert result.schemes == ()


def test_a_uniform_bound_overstepped_by_a_hair_is_seen():
    values = np.random.default_rng(0).uniform(-1 / 16, 1 / 16, (64, 256)).astype(np.float32)
    site = site_of((64, 256), LINEAR)
    assert recognise(observe(values), site).decisive
    result = recognise(observe((values * np.float32(1.002)).astype(np.float32)), site)
    assert "pytorch_default" not in {f.name for f in result.schemes}


@pytest.mark.parametrize("dtype", [*DTYPES[1:], ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
@pytest.mark.parametrize("held_by", ["itself", "float32"])
def test_values_that_were_rounded_keep_their_law_whatever_type_holds_them(dtype, held_by):
    """A bound is overstepped by rounding, of which float32 shows no more than the zeros at the end of every fraction."""
    rng = np.random.default_rng(0)
    site = site_of((300, 169), LINEAR)
    for true, values in (
        ("pytorch_default", rng.uniform(-1 / 13, 1 / 13, site.shape)),
        ("normal(1)", rng.normal(size=site.shape)),
    ):
        stored = values.astype(np.float32).astype(dtype)
        result = recognise(observe(stored if held_by == "itself" else stored.astype(np.float32)), site)
        assert true in {f.name for f in result.schemes}
    overstepped = (rng.uniform(-1.3 / 13, 1.3 / 13, site.shape)).astype(np.float32).astype(dtype)
    assert "pytorch_default" not in {f.name for f in recognise(observe(overstepped), site).schemes}


def test_subnormal_float16():
    rng = np.random.default_rng(0)
    site = site_of((256, 300), LINEAR)
    values = rng.normal(0, 2e-5, site.shape).astype(np.float16)
    result = recognise(observe(values), site)
    assert result.schemes
    assert all(f.name.startswith("normal") for f in result.schemes)


def hadamard(n):
    h = np.ones((1, 1))
    while len(h) < n:
        h = np.block([[h, h], [h, -h]])
    return h


RNG = np.random.default_rng(0)
# What docs/methods/README.md says of schemes that the catalogue does not name.
UNNAMED = {
    "SIREN, w0 = 10": (RNG.uniform(-1, 1, (256, 256)) * math.sqrt(6 / 256) / 10, "init", "uniform("),
    "DeepNorm, encoder": (RNG.normal(0, 0.87 * (6**4 * 6) ** (-1 / 16) / math.sqrt(512), (512, 512)), "init", "normal("),
    "T5, positions": (RNG.normal(0, 512**-0.5, (32, 8)), "unknown", ""),
    "Mamba, A_log": (np.log(np.tile(np.arange(1, 17), (128, 1))), "trained", None),
    "ZerO, wider": (2**-3.5 * hadamard(128)[:, :64], "init", "orthogonal(1)"),
    "ZerO, narrower": (np.eye(64, 128), "init", "identity"),
}


@pytest.mark.parametrize("name", UNNAMED)
def test_schemes_that_the_catalogue_does_not_name(name):
    values, verdict, first = UNNAMED[name]
    found = recognise(observe(values.astype(np.float32)), site_of(values.shape, LINEAR))
    assert found.verdict == verdict
    assert bool(found.schemes) == (first is not None)
    assert not first or found.schemes[0].name.startswith(first)


SMALL = [((48, 8), LINEAR), ((8, 32), LINEAR), ((10, 64), LINEAR), ((16, 4), LINEAR), ((16, 3, 3, 3), KERNEL)]


@pytest.mark.parametrize(("shape", "axes"), SMALL, ids=str)
def test_few_uniform_values_are_known_by_the_grid_of_their_generator(shape, axes):
    site = site_of(shape, axes)
    weight, bound = torch.empty(shape), 1 / math.sqrt(math.prod(shape[1:]))
    for seed in range(10):
        torch.manual_seed(seed)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        drawn = recognise(observe(weight.numpy()), site)
        assert (drawn.verdict, drawn.decisive) == ("init", True)
        # One step of 1e-5 of the bound, and one of weight decay: the law is as good as before, the digits are not.
        step = (weight + 1e-5 * bound * torch.randn(shape)).clamp(-bound, bound)
        for later in (step, weight * (1 - 1e-5)):
            assert recognise(observe(later.numpy()), site).verdict != "init"
        # A generator of 53 bits leaves no grid in float32, and nothing is claimed.
        double = np.random.default_rng(seed).uniform(-bound, bound, shape).astype(np.float32)
        assert recognise(observe(double), site).verdict == "unknown"


def test_values_of_no_more_digits_than_their_bound_are_on_the_grid():
    # The sum is rounded apart from the product, as without a fused operation.
    site = site_of((24, 12), LINEAR)
    bound = np.float32(1 / math.sqrt(12))
    u = np.random.default_rng(0).integers(0, 2**24, site.shape).astype(np.float32) * np.float32(2**-24)
    apart = u * (2 * bound) - bound
    assert recognise(observe(apart), site).verdict == "init"
    assert recognise(observe(apart.astype(np.float16)), site).verdict == "unknown"


def test_a_small_layer_made_again_in_a_trained_network_is_found_and_none_else():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x.argmax(1)
    module = nn.Sequential(
        nn.Linear(8, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 8)
    )
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        optimizer.step()
    assert [f.code for f in audit(module, (x,)).findings if f.code == "IA501"] == []
    module[2].reset_parameters()
    assert [f.tensor for f in audit(module, (x,)).findings if f.code == "IA501"] == ["2.weight"]
