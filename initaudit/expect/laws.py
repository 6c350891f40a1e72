"""Standardised laws (mean 0, variance 1) and the tests of a sample against one, in numpy alone.

Every test returns a p-value. The normal approximations used are good to a few per cent of p down to about 1e-5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from initaudit.expect.scheme import Distribution, truncated_moments

Vector = np.ndarray[Any, Any]


def log_below(x: Vector) -> Vector:
    """ln P(z < x) for a standard normal z."""
    return np.interp(x, *_log_below_grid())


@lru_cache(maxsize=1)
def _log_below_grid() -> tuple[Vector, Vector]:
    """(x, ln P(z < x)) on a grid so fine that linear interpolation is good to 1e-6 of the probability.

    numpy has no error function and Python's takes its time: between every tenth place, cubics that have the slope of the
    logarithm at both ends (the density over the probability) are good to 1e-11.
    """
    grid = np.linspace(-37.0, 9.0, 46_001)
    nodes, width = grid[::10], 0.01
    value = np.log([math.erfc(-x / math.sqrt(2)) / 2 for x in nodes.tolist()])
    slope = width * np.exp(-(nodes**2) / 2 - value) / math.sqrt(2 * math.pi)
    t = np.arange(10) / 10
    # Hermite's four cubics on (0, 1).
    cubics = np.stack([(1 + 2 * t) * (1 - t) ** 2, t * (1 - t) ** 2, t**2 * (3 - 2 * t), t**2 * (t - 1)])
    ends = np.stack([value[:-1], slope[:-1], value[1:], slope[1:]], axis=1)
    return grid, np.append(ends @ cubics, value[-1])


def two_sided(z: float) -> float:
    """P(|z'| > |z|) for a standard normal z'."""
    return math.erfc(abs(z) / math.sqrt(2))


def upper(z: float) -> float:
    """P(z' > z) for a standard normal z'."""
    return math.erfc(z / math.sqrt(2)) / 2


def chi_square(total: float, degrees: float, sides: int = 2) -> float:
    """The p-value of a chi-square `total`, by the cube root of Wilson & Hilferty 1931."""
    z = ((max(total, 0.0) / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return two_sided(z) if sides == 2 else upper(z)


@dataclass(frozen=True)
class Law:
    """A symmetric law of variance 1: its moments, and its cut in standard deviations (infinite for the normal law)."""

    distribution: Distribution
    cut: float
    moment4: float
    moment6: float
    moment8: float

    @property
    def square_kurtosis(self) -> float:
        """The kurtosis of x^2."""
        m4, m6, m8 = self.moment4, self.moment6, self.moment8
        return (m8 - 4 * m6 + 6 * m4 - 3) / (m4 - 1) ** 2

    @property
    def kurtosis_variance(self) -> float:
        """n times the variance of the kurtosis of n values (delta method; Cramér 1946, 27.7.8: 24 for a normal law)."""
        m4, m6, m8 = self.moment4, self.moment6, self.moment8
        return m8 - 4 * m4 * m6 + 4 * m4**3 - m4**2

    def log_tails(self, x: Vector) -> tuple[Vector, Vector]:
        """(ln P(z < x), ln P(z > x)); beyond the cut the smaller is that of a millionth of the scale inside."""
        if self.distribution == "uniform":
            share = np.clip((x / self.cut + 1) / 2, 1e-12, 1 - 1e-12)
            return np.log(share), np.log1p(-share)
        if self.distribution == "normal":
            return log_below(x), log_below(-x)
        scale = self.cut / _parent_cut(self.cut)
        inside, tail = np.clip(x, -self.cut, self.cut) / scale, math.erfc(_parent_cut(self.cut) / math.sqrt(2)) / 2
        below = (np.exp(log_below(inside)) - tail) / (1 - 2 * tail)
        below = np.clip(below, 1e-12, 1 - 1e-12)
        return np.log(below), np.log1p(-below)

    def log_within(self, x: float) -> float:
        """ln P(|z| < x)."""
        if x >= self.cut:
            return 0.0
        if self.distribution == "uniform":
            return math.log(max(x, 1e-300) / self.cut)
        parent = x if self.distribution == "normal" else x * _parent_cut(self.cut) / self.cut
        outside = math.erfc(parent / math.sqrt(2))
        if self.distribution == "truncated":
            tail = math.erfc(_parent_cut(self.cut) / math.sqrt(2))
            outside = (outside - tail) / (1 - tail)
        # Values of 1e-40 under a law of 0.02 leave nothing within; 2^-53 is the nearest to that which has a logarithm.
        return math.log1p(-min(max(outside, 0.0), 1 - 2.0**-53))


@lru_cache(maxsize=64)
def _parent_cut(cut: float) -> float:
    """The cut in standard deviations of the normal law, from that in standard deviations of what is left: by bisection."""
    low, high = 0.01, 40.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if middle / math.sqrt(truncated_moments(middle)[0]) < cut else (low, middle)
    return (low + high) / 2


NORMAL = Law("normal", math.inf, 3.0, 15.0, 105.0)
UNIFORM = Law("uniform", math.sqrt(3), 9 / 5, 27 / 7, 9.0)


@lru_cache(maxsize=64)
def truncated_law(cut: float) -> Law:
    """The normal law cut beyond +-`cut` of its standard deviations and scaled to variance 1."""
    edge = 2 * math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi) / math.erf(cut / math.sqrt(2))
    moments = [1.0]
    for n in (2, 4, 6, 8):
        moments.append((n - 1) * moments[-1] - cut ** (n - 1) * edge)
    v = moments[1]
    return Law("truncated", cut / math.sqrt(v), moments[2] / v**2, moments[3] / v**3, moments[4] / v**4)


def law_of(distribution: Distribution, bound: float, variance: float) -> Law:
    """The standardised form of a law of this bound and variance."""
    if distribution == "normal":
        return NORMAL
    if distribution == "uniform":
        return UNIFORM
    return truncated_law(round(_parent_cut(round(bound / math.sqrt(variance), 9)), 6))


def anderson_darling(ordered: Vector, law: Law) -> float:
    """The p-value of Anderson & Darling's statistic for an ascending standardised sample and a fully specified law.

    The distribution of the statistic is that of Marsaglia & Marsaglia 2004, "Evaluating the Anderson-Darling distribution".
    """
    n = ordered.size
    below, above = law.log_tails(ordered)
    ranks = 2 * np.arange(1, n + 1) - 1
    statistic = float(-n - np.dot(ranks, below + above[::-1]) / n)
    return _anderson_darling_tail(max(statistic, 1e-3))


def _anderson_darling_tail(a: float) -> float:
    if a < 2:
        series = 2.00012 + (0.247105 - (0.0649821 - (0.0347962 - (0.011672 - 0.00168691 * a) * a) * a) * a) * a
        return 1 - math.exp(-1.2337141 / a) / math.sqrt(a) * series
    if a > 8:
        # The polynomial was fitted below; beyond it the tail is exponential.
        return _anderson_darling_tail(8.0) * math.exp(max(-(a - 8), -700.0))
    series = 1.0776 - (2.30695 - (0.43424 - (0.082433 - (0.008056 - 0.0003146 * a) * a) * a) * a) * a
    return -math.expm1(-math.exp(series))


def marchenko_pastur_edge(largest: float, rows: int, columns: int) -> float:
    """The p-value of the largest eigenvalue of X X^T for a `rows` by `columns` matrix of independent values of variance 1.

    Johnstone 2001, theorem 1.1, with the gamma law of Chiani 2014, table 1, for Tracy & Widom's.
    """
    a, b = math.sqrt(rows - 0.5), math.sqrt(columns - 0.5)
    mean, spread = (a + b) ** 2, (a + b) * (1 / a + 1 / b) ** (1 / 3)
    s = (largest - mean) / spread
    shape, scale, shift = 46.446, 0.186054, 9.84801
    return chi_square(2 * (s + shift) / scale, 2 * shape, sides=1)
