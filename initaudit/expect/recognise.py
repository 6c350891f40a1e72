"""Which schemes a tensor may have been drawn from, and whether training has moved it since.

Two questions are put to the values. Their *marginal* law: mean, variance, kurtosis, extremes and the distribution of a sample,
against each scheme of the catalogue and against normal, truncated and uniform laws of any scale. And their *independence*: sums
and sums of squares of rows, columns, input channels and kernel taps, correlations of neighbours, the largest singular value.
A fresh draw passes both. Training adds what is shared between entries (an update is a sum of few outer products), and pushes
values over the hard edge of a uniform law.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from initaudit.expect.laws import (
    NORMAL,
    Law,
    anderson_darling,
    chi_square,
    law_of,
    marchenko_pastur_edge,
    truncated_law,
    two_sided,
)
from initaudit.expect.schemes import Scheme, Site, catalogue
from initaudit.measure.moments import Moments
from initaudit.measure.observation import Observation

# A scheme whose p-value, corrected for the number of tests, is below this is not in the set.
LEVEL = 2e-4
# Below this many values a law of free scale is matched by too much to be evidence of anything.
ENOUGH = 1000
# From this many on a normal tensor does not stay one through training, and a law of free scale says something.
PLENTY = 50_000
# Standard deviations of a test of mean or variance beyond which a scheme of three tests or more is not in the set.
_BEYOND = 4.0
# A block of fewer rows or columns has no spectrum worth the asymptotic law.
LEAST_SIDE = 12
# Neither a draw nor a training gives values beyond this: memory that was never written does, and says nothing of either.
_NO_WEIGHT = 1e10
# Random bits behind a float32 draw of [0, 1): 23 to 25 by framework, device and half of the interval. Values that were moved
# meet the grid that these make with this probability at most, before they count as drawn.
_GRID, _BY_CHANCE = 2.0**-24, 1e-9


@dataclass(frozen=True)
class Fit:
    """A scheme that the values do not contradict: the p-value of all tests together and the variance it asks for."""

    name: str
    p_value: float
    variance: float


@dataclass(frozen=True)
class Recognition:
    """`schemes` in falling order of p-value; `free` tells that they fit no scheme of the catalogue, but a law of another scale.

    `verdict` is "init" where a fresh draw explains the values and few other things would, "trained" where no fresh draw does,
    "unknown" where there are too few values to say. `decisive` tells that training would have shown: a constant, an orthogonal
    matrix and a hard bound do not survive it, while a small normal tensor may be moved by a tenth of its norm unseen; whether
    it was, only its company can tell (`phase`). `evidence` is the p-value of the independence tests by name.
    """

    schemes: tuple[Fit, ...]
    verdict: Literal["init", "trained", "unknown"]
    free: bool = False
    decisive: bool = False
    evidence: tuple[tuple[str, float], ...] = ()


def recognise(seen: Observation, site: Site) -> Recognition:
    """What the values seen say about where they came from; `site` describes the same tensor."""
    m = seen.moments
    if m.count == 0 or m.nan or m.inf or max(abs(m.min), abs(m.max)) > _NO_WEIGHT:
        return Recognition((), "unknown")
    if m.m2 == 0:
        return _constant(m.mean, site)
    if seen.structure in ("identity", "dirac"):
        return Recognition((Fit(seen.structure, 1.0, m.variance),), "init", decisive=True)
    if seen.structure in ("orthogonal", "delta_orthogonal"):
        return Recognition((Fit(f"{seen.structure}({seen.gain:.4g})", 1.0, m.variance),), "init", decisive=True)
    if seen.sparsity:
        fits = _fits(seen, [_free_normal(seen, f"sparse({seen.sparsity:.3g}, {m.std:.4g})")], lambda law: {})
        return Recognition(tuple(fits), _verdict(seen, fits, False), True, bool(fits))
    known: dict[Law, dict[str, float]] = {}

    def independence(law: Law) -> dict[str, float]:
        if law not in known:
            known[law] = _independence(seen, site, law)
        return known[law]

    plausible = _plausible(seen, site)
    fits = _fits(seen, plausible, independence)
    few = {fit.name for fit in fits} if m.count < ENOUGH else set()
    gridded = any(s.name in few and s.distribution == "uniform" and _on_grid(seen, s.bound) for s in plausible)
    free = not fits
    if free:
        fits = _fits(seen, _free(seen), independence)
    fits.sort(key=lambda f: -f.p_value)
    independence(NORMAL)
    kindest = max(known.values(), key=lambda tests: min(tests.values(), default=1.0))
    verdict = "init" if gridded else _verdict(seen, fits, free)
    return Recognition(
        tuple(fits), verdict, free and bool(fits), gridded or _decisive(seen, fits, free), tuple(kindest.items())
    )


def moment_p_value(seen: Observation, scheme: Scheme) -> float:
    """The p-value of mean, variance, extremes and kurtosis under a scheme that is no constant; 0 for values that are one."""
    if seen.moments.count == 0 or seen.moments.nan or seen.moments.inf or seen.moments.m2 == 0:
        return 0.0
    tests = _moment_tests(seen, _law(scheme), scheme.variance)
    return min(1.0, min(tests) * len(tests))


def _constant(value: float, site: Site) -> Recognition:
    names = [s for s in catalogue(site) if s.distribution == "constant" and math.isclose(s.mean, value, rel_tol=4e-3)]
    # 16-bit types round by up to 0.4 %; the nearest name is meant.
    best = min(names, key=lambda s: abs(s.mean - value), default=None)
    return Recognition((Fit(best.name if best is not None else f"constant({value:.6g})", 1.0, 0.0),), "init", decisive=True)


def _verdict(seen: Observation, fits: list[Fit], free: bool) -> Literal["init", "trained", "unknown"]:
    n = seen.moments.count
    if fits:
        return "init" if n >= (PLENTY if free else ENOUGH) else "unknown"
    return "trained" if n >= 30 else "unknown"


def _decisive(seen: Observation, fits: list[Fit], free: bool) -> bool:
    bounded = any("uniform" in f.name or "default" in f.name for f in fits) and abs(seen.moments.kurtosis - 1.8) < 0.2
    return bool(fits) and not free and ((bounded and seen.moments.count >= ENOUGH) or seen.moments.count >= PLENTY)


def _on_grid(seen: Observation, bound: float) -> bool:
    """Whether float32 values still lie where a generator of uniform numbers put them, which no step of training leaves so.

    A framework draws `bound * (2u - 1)` from a u of some 24 random bits. Around zero float32 has far more digits than that, and
    a value that was moved, or scaled, shows them. The product and the sum are rounded once (a fused operation: the values are
    the grid's, to their own last digit) or twice (then they have no digits below those of the bound).
    """
    b = np.float32(bound)
    inner = seen.sample[(np.abs(seen.sample) < b / 2) & (seen.sample != 0)]
    if seen.spacing or not inner.size:
        return False
    places, size = inner / (_GRID * float(b)), np.abs(inner) / float(b)
    off = np.abs(places - np.round(places))
    # Half a last digit, half of one more where the bound was rounded, and where the grid's own half step was put.
    once = bool(np.all(off <= 1.5 * size + 1 / 128))
    step = float(np.spacing(b)) / 2
    twice = bool(np.all(inner % step == 0))
    chances = 3 * size + 1 / 64, np.spacing(np.abs(inner).astype(np.float32)).astype(np.float64) / step
    return any(
        fits and float(np.log(np.minimum(1.0, chance)).sum()) < math.log(_BY_CHANCE)
        for fits, chance in zip((once, twice), chances, strict=True)
    )


def _free_normal(seen: Observation, name: str) -> Scheme:
    m = seen.moments
    return Scheme(name, 0.0, m.moment2, "normal", math.inf, "any", "")


def _free(seen: Observation) -> list[Scheme]:
    """Laws whose scale is taken from the values."""
    m = seen.moments
    largest, variance = _largest(m), m.moment2
    law = truncated_law(2.0)
    # A uniform law's bound is just above the largest value, as far as this is known after rounding.
    low, high = largest * (1 - seen.spacing), largest * (1 + seen.spacing + 1 / m.count)
    bound = min(max(math.sqrt(3 * variance), low), high)
    return [
        _free_normal(seen, f"normal({m.std:.4g})"),
        Scheme(f"uniform({bound:.4g})", 0.0, bound * bound / 3, "uniform", bound, "any", ""),
        Scheme(f"trunc_normal({m.std:.4g}, 2 std)", 0.0, variance, "truncated", law.cut * math.sqrt(variance), "any", ""),
    ]


@lru_cache(maxsize=64)
def _drawn(site: Site) -> tuple[tuple[Scheme, ...], tuple[np.ndarray[Any, Any], ...]]:
    """The schemes of a site that are no constants, and as vectors their variances and their laws' fourth moments and cuts."""
    schemes = tuple(s for s in catalogue(site) if s.distribution != "constant")
    table = [(s.variance, _law(s).moment4, _law(s).cut) for s in schemes]
    return schemes, tuple(np.array(table, np.float64).reshape(-1, 3).T.copy())


def _plausible(seen: Observation, site: Site) -> list[Scheme]:
    """The schemes of a site that mean, variance and largest value leave: `_moment_tests` says the same of one at a time."""
    schemes, (variances, fourth, cuts) = _drawn(site)
    m, largest = seen.moments, _largest(seen.moments) * (1 - _slack(seen))
    with np.errstate(over="ignore"):
        spread2 = (fourth - 1) / (9 * m.count)  # 2/9 of the degrees of freedom's inverse
        off = np.abs(np.cbrt(m.moment2 / variances) - (1 - spread2)) > _BEYOND * np.sqrt(spread2)
        off |= m.mean * m.mean * m.count > _BEYOND**2 * variances
        off |= largest > cuts * np.sqrt(variances) * (1 + 1e-9)
    return [schemes[i] for i in np.flatnonzero(~off).tolist()]


def _fits(seen: Observation, schemes: list[Scheme], independence: Callable[[Law], dict[str, float]]) -> list[Fit]:
    """The schemes whose p-value is not below LEVEL; of those that are one law under several names the values are asked once."""
    known: dict[tuple[Law, str], float | None] = {}
    found = []
    for scheme in schemes:
        law, variance = _law(scheme), scheme.variance
        key = law, f"{variance:.12g}"
        if key not in known:
            known[key] = _p_value(seen, law, variance, independence)
        if (p := known[key]) is not None:
            found.append(Fit(scheme.name, p, variance))
    return found


def _p_value(seen: Observation, law: Law, variance: float, independence: Callable[[Law], dict[str, float]]) -> float | None:
    """The p-value of all tests together, or None where it is below LEVEL. Cheap tests first."""
    tests = _moment_tests(seen, law, variance)
    if min(tests) * len(tests) < LEVEL:
        return None
    tests += list(independence(law).values())
    count = len(tests) + 1
    if min(tests) * count < LEVEL:
        return None
    if seen.sample.size >= 8:
        tests.append(anderson_darling(_within(seen.sample / math.sqrt(variance), law, seen.spacing), law))
    p = min(1.0, min(tests) * count)
    return p if p >= LEVEL else None


def _within(ordered: np.ndarray[Any, Any], law: Law, spacing: float) -> np.ndarray[Any, Any]:
    """The sample with what spreading rounded values put beyond the law's cut reflected at it, from where it was rounded up."""
    beyond = np.abs(ordered) > law.cut
    if not spacing or not beyond.any():
        return ordered
    reflected = np.sign(ordered) * np.maximum(2 * law.cut - np.abs(ordered), law.cut * (1 - spacing))
    return np.sort(np.where(beyond & (np.abs(ordered) <= law.cut * (1 + spacing)), reflected, ordered))


def _law(scheme: Scheme) -> Law:
    return law_of(scheme.distribution, scheme.bound, scheme.variance)


def _moment_tests(seen: Observation, law: Law, variance: float) -> list[float]:
    """p-values of the mean, the variance, the extremes and the kurtosis under a law of mean 0."""
    m, n, v = seen.moments, seen.moments.count, variance
    k = law.moment4
    ratio = m.moment2 / v
    # Wilson & Hilferty's cube root for n x^2/v, whose variance is (k - 1) n instead of 2 n.
    degrees = 2 * n / (k - 1)
    tests = [two_sided(m.mean * math.sqrt(n / v)), chi_square(ratio * degrees, degrees)]
    largest, slack = _largest(m) / math.sqrt(v), _slack(seen)
    if largest * (1 - slack) > law.cut:
        tests.append(0.0)
    else:
        # The largest of n values lies below x with probability P(|z| < x)^n.
        too_small = math.exp(max(-700.0, n * law.log_within(largest * (1 + slack))))
        too_large = -math.expm1(max(-700.0, n * law.log_within(largest * (1 - slack))))
        tests.append(min(1.0, 2 * min(too_small, too_large)))
    if n >= 5000:
        tests.append(two_sided((m.kurtosis - k) / math.sqrt(law.kurtosis_variance / n + seen.spacing**4)))
    return tests


def _largest(moments: Moments) -> float:
    return max(abs(moments.min), abs(moments.max))


def _slack(seen: Observation) -> float:
    """How far the largest value may have been rounded, as a share of it."""
    return seen.spacing / 2 + 1e-6


def _independence(seen: Observation, site: Site, law: Law) -> dict[str, float]:
    """p-values of what entries that are drawn independently do not share, whatever their scale."""
    tests: dict[str, float] = {}
    if seen.sums is None:
        return tests
    v, sums = seen.moments.moment2, seen.sums
    rows, columns = sums.shape
    families = [("row", sums.row_sums, sums.row_squares, columns), ("column", sums.column_sums, sums.column_squares, rows)]
    taps = math.prod(site.shape[2:])
    if "k" in site.axes[2:] and taps * site.shape[1] == columns and min(taps, site.shape[1]) > 1:
        by_tap = sums.column_sums.reshape(-1, taps), sums.column_squares.reshape(-1, taps)
        families += [
            ("channel", by_tap[0].sum(1), by_tap[1].sum(1), rows * taps),
            ("tap", by_tap[0].sum(0), by_tap[1].sum(0), rows * site.shape[1]),
        ]
    for name, first, second, length in families:
        tests[f"{name} sums"] = chi_square(float(first @ first) / (length * v), first.size)
        if first.size > 2:
            tests[f"{name} norms"] = _dispersion(second / v, length, law)
    for name, (correlation, count) in zip(("along rows", "along columns"), seen.spectrum.lags, strict=False):
        if count > 100:
            tests[f"neighbours {name}"] = two_sided(correlation * math.sqrt(count))
    if min(seen.spectrum.shape) >= LEAST_SIDE:
        tests["largest singular value"] = marchenko_pastur_edge(seen.spectrum.largest, *sorted(seen.spectrum.shape))
    return tests


def _dispersion(squares: np.ndarray[Any, Any], length: int, law: Law) -> float:
    """The p-value of the spread of sums of `length` squares of independent values of variance 1."""
    n = squares.size
    off = squares - np.add.reduce(squares) / n
    ratio = float(off @ off) / (n - 1) / (length * (law.moment4 - 1))
    # The variance of a sample variance: (kurtosis - 1)/n of its square, nearly; that of a sum shrinks with its length.
    kurtosis = 3 + (law.square_kurtosis - 3) / length
    degrees = 2 * (n - 1) / (kurtosis - 1)
    return chi_square(ratio * degrees, degrees)
