"""The catalogue against torch.nn.init, torch's own layers, and draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from initaudit.expect.laws import NORMAL, UNIFORM, anderson_darling, chi_square, law_of, log_below, truncated_law
from initaudit.expect.scheme import truncated_moments
from initaudit.expect.schemes import FIRST_WORDS, Site, catalogue, site_of

LINEAR, KERNEL, TRANSPOSED = ("o", "i"), ("o", "i", "k", "k"), ("i", "o", "k", "k")

SITES = {
    "linear": site_of((300, 200), LINEAR, depth=12),
    "conv": site_of((96, 32, 5, 3), KERNEL),
    "grouped conv": site_of((96, 8, 3, 3), KERNEL, groups=4),
    "depthwise": site_of((512, 1, 7, 7), KERNEL, groups=512),
    "transposed": site_of((64, 48, 4, 4), TRANSPOSED, operator="conv_transpose"),
    "grouped transposed": site_of((64, 24, 4, 4), TRANSPOSED, operator="conv_transpose", groups=2),
    "embedding": site_of((500, 64), ("v", "d"), operator="embedding"),
    "packed": site_of((384, 128), LINEAR, packed=3, depth=6),
    "lstm": site_of((256, 40), LINEAR, operator="lstm", packed=4, hidden=64),
    "bilinear": site_of((50, 20, 30), ("o", "i", "i"), operator="bilinear"),
    "bias": site_of((300,), ("o",), fans=(200, 300)),
}
# Layers whose parameter, as torch makes it, must be what the catalogue says.
LAYERS = {
    "linear": (lambda: nn.Linear(200, 300).weight, "pytorch_default"),
    "conv": (lambda: nn.Conv2d(32, 96, (5, 3)).weight, "pytorch_default"),
    "grouped conv": (lambda: nn.Conv2d(32, 96, 3, groups=4).weight, "pytorch_default"),
    "depthwise": (lambda: nn.Conv2d(512, 512, 7, groups=512).weight, "pytorch_default"),
    "transposed": (lambda: nn.ConvTranspose2d(64, 48, 4).weight, "pytorch_default"),
    "grouped transposed": (lambda: nn.ConvTranspose2d(64, 48, 4, groups=2).weight, "pytorch_default"),
    "embedding": (lambda: nn.Embedding(500, 64).weight, "pytorch_default"),
    "packed": (lambda: nn.MultiheadAttention(128, 4).in_proj_weight, "pytorch_default(in_proj)"),
    "lstm": (lambda: nn.LSTM(40, 64).weight_ih_l0, "pytorch_default"),
    "bilinear": (lambda: nn.Bilinear(20, 30, 50).weight, "pytorch_default"),
    "bias": (lambda: nn.Linear(200, 300).bias, "pytorch_default"),
}
INITS = {
    "kaiming_normal(fan_in, relu)": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "kaiming_normal(fan_out, relu)": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "kaiming_normal(fan_in, tanh)": lambda w: nn.init.kaiming_normal_(w, nonlinearity="tanh"),
    "kaiming_normal(fan_in, selu)": lambda w: nn.init.kaiming_normal_(w, nonlinearity="selu"),
    "kaiming_normal(fan_in, leaky_relu(0.2))": lambda w: nn.init.kaiming_normal_(w, a=0.2),
    "kaiming_uniform(fan_in, relu)": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "kaiming_uniform(fan_out, linear)": lambda w: nn.init.kaiming_uniform_(w, mode="fan_out", nonlinearity="linear"),
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_uniform(tanh)": lambda w: nn.init.xavier_uniform_(w, gain=nn.init.calculate_gain("tanh")),
    "xavier_normal(relu)": lambda w: nn.init.xavier_normal_(w, gain=nn.init.calculate_gain("relu")),
    "normal(0.02)": lambda w: nn.init.normal_(w, 0, 0.02),
    "trunc_normal(0.02, 2 std)": lambda w: nn.init.trunc_normal_(w, 0, 0.02, -0.04, 0.04),
    "trunc_normal(1, -2, 2)": lambda w: nn.init.trunc_normal_(w, 0, 1),
    "trunc_normal(0.02, 3 std)": lambda w: nn.init.trunc_normal_(w, 0, 0.02, -0.06, 0.06),
    "uniform(0.1)": lambda w: nn.init.uniform_(w, -0.1, 0.1),
}


def named(site: Site, name: str):
    return next(s for s in catalogue(site) if s.name == name)


def check(values, scheme):
    """The variance within five standard errors and nothing beyond the bound, which is nearly reached."""
    x = values.detach().double().numpy().ravel()
    kurtosis = law_of(scheme.distribution, scheme.bound, scheme.variance).moment4
    assert np.mean(x**2) == pytest.approx(scheme.variance, rel=5 * math.sqrt((kurtosis - 1) / x.size))
    if math.isfinite(scheme.bound):
        assert (
            scheme.bound * (1 - 60 / x.size) <= np.abs(x).max() <= scheme.bound * (1 + 1e-6)
            or scheme.distribution == "truncated"
        )
        assert np.abs(x).max() <= scheme.bound * (1 + 1e-6)


@pytest.mark.parametrize("label", LAYERS)
def test_what_torch_makes(label):
    torch.manual_seed(0)
    make, name = LAYERS[label]
    parameter = make()
    assert tuple(parameter.shape) == SITES[label].shape
    check(parameter, named(SITES[label], name))


@pytest.mark.parametrize("name", INITS)
@pytest.mark.parametrize("label", ["linear", "conv", "grouped conv", "transposed", "packed", "embedding"])
def test_what_torch_nn_init_draws(label, name):
    torch.manual_seed(0)
    weight = torch.empty(SITES[label].shape)
    INITS[name](weight)
    check(weight, named(SITES[label], name))


@pytest.mark.parametrize("label", SITES)
def test_laws_of_the_catalogue(label):
    schemes = catalogue(SITES[label])
    assert len({s.name for s in schemes}) == len(schemes)
    for s in schemes:
        assert s.name.partition("(")[0] in FIRST_WORDS
        assert s.source
        assert s.meant_for
        if s.distribution == "constant":
            assert s.variance == 0
        elif s.distribution == "uniform":
            assert s.variance == pytest.approx(s.bound**2 / 3)
        elif s.distribution == "truncated":
            assert law_of("truncated", s.bound, s.variance).cut == pytest.approx(s.bound / math.sqrt(s.variance), rel=1e-6)
        else:
            assert s.bound == math.inf


@pytest.mark.parametrize("cut", [1.0, 2.0, 3.0])
def test_truncated_moments_against_scipy(cut):
    law = stats.truncnorm(-cut, cut)
    variance, kurtosis = truncated_moments(cut)
    assert variance == pytest.approx(law.var())
    assert kurtosis == pytest.approx(law.stats(moments="k") + 3)
    ours = truncated_law(cut)
    x = np.linspace(-0.95, 0.95, 7) * ours.cut
    below, above = ours.log_tails(x)
    np.testing.assert_allclose(below, law.logcdf(x * law.std()), rtol=1e-5)
    np.testing.assert_allclose(above, law.logsf(x * law.std()), rtol=1e-5)
    assert ours.log_within(1.0) == pytest.approx(math.log(law.cdf(law.std()) - law.cdf(-law.std())), rel=1e-6)


@pytest.mark.parametrize("law", [NORMAL, UNIFORM, truncated_law(2.0)])
def test_higher_moments_by_quadrature(law):
    density = {
        "normal": stats.norm.pdf,
        "uniform": lambda x: 1 / (2 * law.cut),
        "truncated": lambda x: stats.truncnorm(-2, 2).pdf(x * 2 / law.cut) * 2 / law.cut,
    }[law.distribution]
    reach = min(law.cut, 12)
    for power, ours in ((2, 1), (4, law.moment4), (6, law.moment6), (8, law.moment8)):
        assert ours == pytest.approx(integrate.quad(lambda x, p=power: x**p * density(x), -reach, reach)[0], rel=1e-6)


def test_approximations_of_the_tests():
    x = np.linspace(-30, 8, 500)
    np.testing.assert_allclose(log_below(x), stats.norm.logcdf(x), rtol=1e-6, atol=1e-9)
    for degrees in (5, 50, 5000):
        for p in (1e-4, 1e-2, 0.5):
            assert chi_square(stats.chi2.isf(p, degrees), degrees, sides=1) == pytest.approx(
                p, rel=0.3 if degrees < 10 else 0.08
            )
    rng = np.random.default_rng(0)
    p = np.array([anderson_darling(np.sort(rng.normal(size=200)), NORMAL) for _ in range(2000)])
    assert stats.kstest(p, "uniform").pvalue > 1e-3


def test_depth_and_place_are_used_where_they_are_known():
    site = site_of((768, 768), LINEAR, depth=7, block=4)
    names = {s.name for s in catalogue(site)}
    new = names - {s.name for s in catalogue(site_of((768, 768), LINEAR))}
    assert {"normal(0.02/sqrt(2*7))", "normal(0.02/sqrt(2*5))", "pytorch_default(7^-1/2)"} <= new
    assert named(site, "normal(0.02/sqrt(2*5))").variance == pytest.approx(0.02**2 / 10)
    with pytest.raises(ValueError, match="axes"):
        site_of((3, 4), ("o",))
