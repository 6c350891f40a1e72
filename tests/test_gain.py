"""Gains against closed forms, a table printed elsewhere, mpmath's quadrature and Monte Carlo."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy.special import expit, ndtr

from initaudit.expect.expectation import calls_for, expected_variances, standard_error
from initaudit.expect.gain import correlation_map, gain_of

SELU = (1.0507009873554804934193349852946, 1.6732632423543772848170429916717)
ACTIVATIONS = {
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "leaky_relu(0.2)": lambda x: np.where(x > 0, x, 0.2 * x),
    "leaky_relu(-0.5)": lambda x: np.where(x > 0, x, -0.5 * x),
    "relu6": lambda x: np.clip(x, 0, 6),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "celu(2)": lambda x: np.where(x > 0, x, 2 * np.expm1(x / 2)),
    "selu": lambda x: SELU[0] * np.where(x > 0, x, SELU[1] * np.expm1(np.minimum(x, 0))),
    "gelu": lambda x: x * ndtr(x),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x * expit(1.702 * x),
    "silu": lambda x: x * expit(x),
    "sigmoid": expit,
    "hardsigmoid": lambda x: np.clip(x / 6 + 0.5, 0, 1),
    "tanh": np.tanh,
    "hardtanh": lambda x: np.clip(x, -1, 1),
    "softplus": lambda x: np.logaddexp(0, x),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
    "hardswish": lambda x: x * np.clip(x + 3, 0, 6) / 6,
    "sin": np.sin,
    "sin(30x)": lambda x: np.sin(30 * x),
    "relu^2": lambda x: np.maximum(x, 0) ** 2,
    "exp": np.exp,
    "abs": np.abs,
    "shrink": lambda x: np.where(np.abs(x) > 0.7, x, 0),
    "step": lambda x: np.where(x > 0.123, 1.0, 0.0),
}

# (gain, chi1, c0) as printed in the literature's tables, to their digits.
TABLE = {
    "relu": ("1.4142", "1.000", "0.318"),
    "leaky_relu(0.2)": ("1.3868", "1.000", "0.196"),
    "gelu": ("1.5335", "1.072", "0.187"),
    "silu": ("1.6765", "1.067", "0.120"),
    "mish": ("1.4868", "1.059", "0.128"),
    "elu": ("1.2452", "1.036", "0.040"),
    "selu": ("1.0000", "1.072", "0.000"),
    "tanh": ("1.5925", "1.178", "0.000"),
    "sigmoid": ("1.8462", "0.153", "0.852"),
    "softplus": ("1.0419", "0.319", "0.705"),
    "hardswish": ("1.7367", "1.081", "0.083"),
    "relu^2": ("0.8165", "1.333", "0.167"),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    g = gain_of(ACTIVATIONS[name])
    printed = (f"{g.gain:.4f}", f"{g.chi1:.3f}", f"{g.c0:.3f}")
    # The table rounds .3185 and its like upward or downward: one unit of the last digit is allowed.
    for ours, theirs in zip(printed, TABLE[name], strict=True):
        assert abs(float(ours) - float(theirs)) <= 1.01 * 10 ** -len(theirs.partition(".")[2])
    assert printed[0] == TABLE[name][0]


def normal(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def within(a):
    """P(|z| < a)."""
    return math.erf(a / math.sqrt(2))


CLOSED_FORMS = {  # (E phi^2, E phi'^2, E phi)
    "identity": (1, 1, 0),
    "relu": (0.5, 0.5, 1 / math.sqrt(2 * math.pi)),
    "leaky_relu(-0.5)": (0.625, 0.625, 1.5 / math.sqrt(2 * math.pi)),
    "relu^2": (1.5, 2, 0.5),
    "exp": (math.exp(2), math.exp(2), math.exp(0.5)),
    "abs": (1, 1, math.sqrt(2 / math.pi)),
    "sin": ((1 - math.exp(-2)) / 2, (1 + math.exp(-2)) / 2, 0),
    "sin(30x)": (0.5, 450, 0),
    "hardtanh": (within(1) - 2 * normal(1) + 1 - within(1), within(1), 0),
    "shrink": (1 - within(0.7) + 1.4 * normal(0.7), 1 - within(0.7), 0),
    "step": (ndtr(-0.123), 0, ndtr(-0.123)),
    "selu": (1, None, 0),
}


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_closed_forms(name):
    g = gain_of(ACTIVATIONS[name])
    for ours, exact in zip((g.moment2, g.slope2, g.mean), CLOSED_FORMS[name], strict=True):
        if exact is not None:
            assert ours == pytest.approx(exact, rel=1e-9, abs=1e-10)
    assert g.gain == pytest.approx(1 / math.sqrt(g.moment2), rel=1e-12)
    assert g.chi1 == pytest.approx(g.slope2 / g.moment2, rel=1e-12)


MPMATH = {
    "gelu": (lambda x: x * mpmath.ncdf(x), [0]),
    "silu": (lambda x: x / (1 + mpmath.exp(-x)), [0]),
    "elu": (lambda x: x if x > 0 else mpmath.expm1(x), [0]),
    "celu(2)": (lambda x: x if x > 0 else 2 * mpmath.expm1(x / 2), [0]),
    "mish": (lambda x: x * mpmath.tanh(mpmath.log1p(mpmath.exp(x))), [0]),
    "softplus": (lambda x: mpmath.log1p(mpmath.exp(x)), [0]),
    "softsign": (lambda x: x / (1 + abs(x)), [0]),
    "hardswish": (lambda x: x * min(max(x + 3, 0), 6) / 6, [-3, 0, 3]),
    "hardsigmoid": (lambda x: min(max(x / 6 + 0.5, 0), 1), [-3, 0, 3]),
    "relu6": (lambda x: min(max(x, 0), 6), [0, 6]),
    "tanh": (mpmath.tanh, [0]),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), [0]),
}


@pytest.mark.parametrize("q", [0.25, 1.0, 4.0])
@pytest.mark.parametrize("name", MPMATH)
def test_mpmath(name, q):
    phi, kinks = MPMATH[name]
    std = mpmath.sqrt(q)
    nodes = [-12, *(k / std for k in kinks), 12]
    nodes = sorted({*nodes, -2, 2, -5, 5})
    moment2 = mpmath.quad(lambda z: phi(std * z) ** 2 * mpmath.npdf(z), nodes)
    mean = mpmath.quad(lambda z: phi(std * z) * mpmath.npdf(z), nodes)
    g = gain_of(ACTIVATIONS[name], q)
    assert g.moment2 == pytest.approx(float(moment2), rel=1e-8)
    assert g.mean == pytest.approx(float(mean), rel=1e-8, abs=1e-10)
    assert g.gain == pytest.approx(math.sqrt(q / float(moment2)), rel=1e-8)
    # Stein's lemma, E[x phi(x)] = q E[phi'(x)], joins values to slopes; the square of the slope by mpmath's derivative.
    if name in ("tanh", "sigmoid", "silu", "gelu"):
        slope2 = mpmath.quad(lambda z: mpmath.diff(phi, std * z) ** 2 * mpmath.npdf(z), [-8, -2, 2, 8])
        assert g.slope2 == pytest.approx(float(slope2), rel=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_monte_carlo(name):
    z = np.random.default_rng(0).normal(size=400_000)
    y = ACTIVATIONS[name](z)
    g = gain_of(ACTIVATIONS[name])
    assert g.moment2 == pytest.approx(np.mean(y**2), abs=6 * np.std(y**2) / math.sqrt(z.size) + 1e-12)
    h = 1e-6
    slope = (ACTIVATIONS[name](z + h) - ACTIVATIONS[name](z - h)) / (2 * h)
    away = np.abs(slope) < 1e3  # not across a jump
    assert g.slope2 == pytest.approx(np.mean(slope[away] ** 2), abs=6 * np.std(slope[away] ** 2) / math.sqrt(z.size) + 1e-6)


@pytest.mark.parametrize("phi", [lambda x: x * 0 + 2, lambda x: np.float64(2.0), lambda x: np.zeros_like(x)])
def test_a_constant_has_no_gain(phi):
    g = gain_of(phi)
    assert g.gain is None
    assert math.isnan(g.chi1)
    assert g.slope2 == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("phi", [lambda x: 1 / x, lambda x: np.exp(x * x)])
def test_an_infinite_moment_has_no_gain(phi):
    g = gain_of(phi)
    assert (g.moment2, g.gain) == (math.inf, None)
    assert correlation_map(phi, 0.5) is None


@pytest.mark.parametrize("phi", [np.log, np.sqrt, lambda x: np.where(x < -4, np.nan, x)])
def test_nan_on_a_part_of_the_line(phi):
    assert gain_of(phi) is None
    assert correlation_map(phi, 0.5) is None


@pytest.mark.parametrize("name", ["relu", "gelu", "tanh", "hardswish", "sigmoid"])
def test_single_precision_is_good_enough(name):
    exact = gain_of(ACTIVATIONS[name])
    single = gain_of(lambda x: ACTIVATIONS[name](x.astype(np.float32)))
    assert single.gain == pytest.approx(exact.gain, rel=1e-4)
    assert single.chi1 == pytest.approx(exact.chi1, rel=3e-3)


@pytest.mark.parametrize("c", [-1, -0.9999, -0.7, 0, 0.2, 0.9, 0.999, 0.9999, 1])
@pytest.mark.parametrize("q", [1.0, 3.0])
def test_correlation_map_of_relu_is_the_arc_cosine_kernel(c, q):
    # Cho & Saul 2009, eq. 3 and 6 with n = 1.
    exact = q * (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / (2 * math.pi)
    assert correlation_map(ACTIVATIONS["relu"], c, q) == pytest.approx(exact, abs=1e-6)


@pytest.mark.parametrize("c", [-0.95, -0.3, 0.5, 0.99])
def test_correlation_map_of_other_functions(c):
    # Williams 1997, eq. 11 for erf; E[sin u sin v] = exp(-1) sinh(c); E[exp u exp v] = exp(1 + c).
    erf = correlation_map(lambda x: 2 * ndtr(math.sqrt(2) * x) - 1, c)
    assert erf == pytest.approx(2 / math.pi * math.asin(2 * c / 3), abs=1e-9)
    assert correlation_map(np.sin, c) == pytest.approx(math.exp(-1) * math.sinh(c), abs=1e-9)
    assert correlation_map(np.exp, c) == pytest.approx(math.exp(1 + c), rel=1e-9)


def test_slope_of_the_correlation_map_is_slope2():
    """C'(1) = q E[phi'^2] (Poole et al. 2016): the two functions check each other."""
    for name in ("tanh", "gelu", "silu"):
        g = gain_of(ACTIVATIONS[name])
        near = correlation_map(ACTIVATIONS[name], 1 - 1e-3)
        assert (g.moment2 - near) / 1e-3 == pytest.approx(g.slope2, rel=3e-3)


def test_out_of_range():
    with pytest.raises(ValueError, match="positive"):
        gain_of(np.tanh, 0)
    with pytest.raises(ValueError, match="between -1 and 1"):
        correlation_map(np.tanh, 1.5)
    with pytest.raises(ValueError, match="fans"):
        expected_variances(0, 3, 1.0)
    with pytest.raises(ValueError, match="overlap"):
        expected_variances(1, 3, 1.0, 0)


def test_expected_variances():
    e = expected_variances(100, 300, math.sqrt(2), 0.25)
    assert (e.xavier, e.he, e.lecun) == (0.005, 0.02, 0.01)
    assert e.exact == pytest.approx(0.08)
    assert expected_variances(1, 1, None).exact is None
    names = {"relu": "he", "leaky_relu(0.2)": "he", "selu": "lecun", "linear": "lecun", "tanh": "xavier", "softmax": "xavier"}
    assert {name: calls_for(name) for name in names} == names
    assert calls_for("custom") == "exact"


@pytest.mark.parametrize("draw", ["normal", "uniform", "laplace"])
def test_standard_error_by_monte_carlo(draw):
    samples = getattr(np.random.default_rng(0), draw)(size=(20_000, 200))
    kurtosis = {"normal": 3.0, "uniform": 1.8, "laplace": 6.0}[draw]
    variance = {"normal": 1.0, "uniform": 1 / 12, "laplace": 2.0}[draw]
    assert standard_error(variance, kurtosis, 200) == pytest.approx(samples.var(axis=1).std(), rel=0.03)
    assert math.isnan(standard_error(1.0, 3.0, 1))


@pytest.mark.parametrize(("overlap", "stride"), [(1.0, 1), (0.25, 2)])
def test_overlap_of_a_transposed_convolution(overlap, stride):
    """The judge is the framework's layer: unit-variance input gives unit-variance output at the exact variance."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.ConvTranspose2d(32, 64, 4, stride=stride, bias=False)
    variance = expected_variances(32 * 16, 64 * 16, 1.0, overlap).exact
    with torch.no_grad():
        layer.weight.normal_(0, math.sqrt(variance), generator=generator)
        out = layer(torch.randn(4, 32, 24, 24, generator=generator))[..., 4:-4, 4:-4]
    assert out.square().mean().item() == pytest.approx(1, rel=0.05)
