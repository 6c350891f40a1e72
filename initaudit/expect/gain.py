"""The moments of a scalar activation under a normal input, and from them the exact gain of its weights.

Gauss-Hermite quadrature across a kink is wrong by 9 % on E[relu'^2], so the line is cut into panels that are halved until a
Gauss-Legendre rule on a panel agrees with the rule on its halves: kinks and jumps end in panels too narrow to matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Vector = np.ndarray[Any, Any]
Activation = Callable[[Vector], Vector]

REACH = 14.0  # standard deviations integrated over: the mass beyond is 1e-44
WIDTH = 0.4375  # of a panel at the start, so that 0 lies between two of them
NODES = 12
NARROWEST = 1e-11  # standard deviations; a panel halved so often holds a kink, a jump or a pole
MOST_PANELS = 200_000
TOLERANCE = 1e-12
# Rounding of the values above which an activation counts as computed in less than double precision, and how narrow panels then
# get: a derivative across a narrower one is made of rounding errors.
NOISE = 1e-11
NARROWEST_NOISY = 0.004


@dataclass(frozen=True)
class Gain:
    """Moments of phi(x) for x ~ N(0, q), and what follows from them.

    `moment2` is E[phi^2], `slope2` E[phi'^2] (the derivative between jumps) and `mean` E[phi]. `gain` = sqrt(q / E[phi^2]) is
    the factor on weights of variance 1/fan_in that keeps the second moment at q (He et al. 2015, eq. 10, for any activation);
    None for a constant and where E[phi^2] is infinite (or made beyond 13 standard deviations, and given as infinite). `chi1` =
    gain^2 E[phi'^2] is what a backward pass multiplies the second moment of gradients by at that gain (Schoenholz et al. 2017,
    eq. 5). `c0` = E[phi]^2 / E[phi^2] is the correlation of the outputs for independent inputs. Both are NaN without a gain.
    """

    moment2: float
    slope2: float
    mean: float
    gain: float | None
    chi1: float
    c0: float


_X, _W = np.polynomial.legendre.leggauss(NODES)


def _differentiation() -> Vector:
    """The matrix that takes values at the nodes of [-1, 1] to the derivative there of the polynomial through them."""
    # Berrut & Trefethen 2004, "Barycentric Lagrange interpolation", eq. 9.4; the weights of Legendre points from eq. 3.2.
    gaps = _X[:, None] - _X[None, :] + np.eye(NODES)
    weights = 1 / np.prod(gaps, axis=1)
    matrix = weights[None, :] / weights[:, None] / gaps
    np.fill_diagonal(matrix, 0)
    diagonal = -matrix.sum(axis=1)
    return np.asarray(matrix + np.diag(diagonal))


_D = _differentiation()
# A jump between the last node and the end of a panel is seen by its nodes in no way: phi just inside both ends is compared with
# the polynomial through the nodes.
_ENDS = np.array([-1 + 1e-7, 1 - 1e-7])
_TO_ENDS = np.polynomial.legendre.legvander(_ENDS, NODES - 1) @ np.linalg.inv(np.polynomial.legendre.legvander(_X, NODES - 1))


@dataclass(frozen=True)
class _Panels:
    """Panels [left, right] in standard deviations, values (panels, NODES) there, and their shares of the three moments.

    `misses` is how far phi at the ends of each panel is from its polynomial, relative to its largest value there; `most` is the
    square of that value times the mass of the panel.
    """

    left: Vector
    right: Vector
    values: Vector
    shares: Vector  # (panels, 3): of E[phi^2], E[phi], E[phi'^2]
    misses: Vector
    most: Vector

    def take(self, which: Vector) -> _Panels:
        return _Panels(
            self.left[which], self.right[which], self.values[which], self.shares[which], self.misses[which], self.most[which]
        )


def _nodes(left: Vector, right: Vector, where: Vector = _X) -> Vector:
    return (right + left)[:, None] / 2 + (right - left)[:, None] / 2 * where


def _weights(left: Vector, right: Vector) -> Vector:
    """Quadrature weights times the standard normal density at the nodes."""
    nodes = _nodes(left, right)
    density: Vector = np.exp(-nodes * nodes / 2) / math.sqrt(2 * math.pi)
    return (right - left)[:, None] / 2 * _W * density


def _evaluate(phi: Activation, left: Vector, right: Vector, std: float) -> _Panels:
    with np.errstate(all="ignore"):
        points = _nodes(left, right, np.concatenate([_X, _ENDS]))
        # A constant may come back as a scalar.
        found = np.broadcast_to(np.asarray(phi(points.reshape(-1) * std), np.float64), (points.size,)).reshape(points.shape)
        values, ends = found[:, :NODES], found[:, NODES:]
        largest = np.max(np.abs(found), axis=1)
        misses = np.max(np.abs(values @ _TO_ENDS.T - ends), axis=1) / (largest + 1e-300)
        slopes = values @ _D.T / ((right - left)[:, None] / 2 * std)
        weights = _weights(left, right)
        shares = np.stack([np.sum(weights * f, axis=1) for f in (values * values, values, slopes * slopes)], axis=1)
    return _Panels(left, right, values, shares, misses, largest * largest * weights.sum(axis=1))


def _noise(phi: Activation, std: float) -> float:
    """How far values jump between arguments so close that a smooth function is a cubic, relative to their size."""
    x = (np.linspace(-3, 3, 40) + 0.0123456789) * std
    step = 1e-6 * std
    with np.errstate(all="ignore"):
        points = (x[:, None] + step * np.arange(8)).reshape(-1)
        values = np.broadcast_to(np.asarray(phi(points), np.float64), points.shape).reshape(40, 8)
        size = float(np.max(np.abs(values), initial=0.0))
        bends = np.max(np.abs(np.diff(values, 4, axis=1)), axis=1)
    # Not the largest, which may belong to a jump.
    return float(np.quantile(bends, 0.75)) / size if 0 < size < math.inf else 0.0


def _subdivide(phi: Activation, std: float, width: float = WIDTH) -> tuple[_Panels, _Panels]:
    """(panels on which phi is smooth, the narrowest ones, where it is not)."""
    noise = _noise(phi, std)
    exact = noise < NOISE
    narrowest = NARROWEST if exact else NARROWEST_NOISY
    count = 2 * math.ceil(REACH / width)
    edges = np.linspace(-REACH, REACH, count + 1)
    todo = _evaluate(phi, edges[:-1], edges[1:], std)
    scale2 = float(np.nansum(np.where(np.isfinite(todo.shares[:, 0]), todo.shares[:, 0], 0)))
    slope2 = float(np.nansum(np.where(np.isfinite(todo.shares[:, 2]), todo.shares[:, 2], 0)))
    # The derivative of a constant is a sum of rounding errors, which no subdivision makes agree.
    allowed = np.array([scale2, math.sqrt(scale2), slope2 + 1e-6 * scale2 / std**2]) * (TOLERANCE if exact else 100 * noise)
    if not exact:
        allowed[2] = math.inf
    none = todo.take(np.zeros(0, np.intp))
    smooth, rough = [none], [none]
    total = count
    while todo.left.size and total < MOST_PANELS and not np.isnan(todo.values).any():
        middle = (todo.left + todo.right) / 2
        left = np.stack([todo.left, middle], axis=1).reshape(-1)
        right = np.stack([middle, todo.right], axis=1).reshape(-1)
        halves = _evaluate(phi, left, right, std)
        with np.errstate(all="ignore"):
            change = np.abs(halves.shares.reshape(-1, 2, 3).sum(axis=1) - todo.shares)
            met = np.all(halves.misses.reshape(-1, 2) <= (1e-8 if exact else 1e-4), axis=1)
            slight = np.all(halves.most.reshape(-1, 2) <= 1e-3 * allowed[0], axis=1)
            agreed = np.repeat(np.all(change <= allowed, axis=1) & (met | slight), 2)
        narrow = ~agreed & (right - left < narrowest)
        smooth.append(halves.take(agreed))
        rough.append(halves.take(narrow))
        todo = halves.take(~agreed & ~narrow)
        total += left.size
    return _join(smooth), _join([*rough, todo])


_FIELDS = ("left", "right", "values", "shares", "misses", "most")


def _join(parts: list[_Panels]) -> _Panels:
    return _Panels(*(np.concatenate([getattr(p, name) for p in parts]) for name in _FIELDS))


def gain_of(phi: Activation, q: float = 1.0) -> Gain | None:
    """The moments of `phi` under N(0, q), good to 1e-9 for a phi that is computed in double precision.

    `phi` takes and returns a one-dimensional float64 array. None where phi is NaN on a part of the line (log, sqrt) or too
    irregular to integrate. Raises ValueError for a q that is not positive.
    """
    if not 0 < q < math.inf:
        raise ValueError(f"q is the variance of the input and must be positive, not {q}")
    std = math.sqrt(q)
    smooth, rough = _subdivide(phi, std)
    if np.isnan(smooth.values).any() or np.isnan(rough.values).any():
        return None
    with np.errstate(all="ignore"):
        moment2, mean, slope2 = smooth.shares.sum(axis=0).tolist()
        left_over = float(rough.shares[:, 0].sum())
        outermost = float(smooth.shares[np.abs(smooth.left + smooth.right) > 2 * REACH - 2, 0].sum())
    if outermost > 1e-6 * moment2:
        return Gain(math.inf, math.nan, math.nan, None, math.nan, math.nan)
    if not math.isfinite(moment2) or left_over > 1e-3 * moment2 + 1e-300:
        wide = np.any(rough.right - rough.left > 2 * NARROWEST_NOISY)
        return None if wide else Gain(math.inf, math.nan, math.nan, None, math.nan, math.nan)
    # The slope across a jump is that of the panel's width and not of phi, so the roughest panels count for nothing there.
    moment2, mean = moment2 + left_over, mean + float(rough.shares[:, 1].sum())
    if moment2 <= 0 or moment2 - mean * mean <= 1e-13 * moment2:
        return Gain(moment2, slope2, mean, None, math.nan, math.nan)
    return Gain(moment2, slope2, mean, math.sqrt(q / moment2), slope2 * q / moment2, mean * mean / moment2)


# Correlations beyond this are interpolated: the density of nearly equal inputs is narrower than any grid.
CLOSEST = 0.9998


def correlation_map(phi: Activation, c: float, q: float = 1.0) -> float | None:
    """E[phi(u) phi(v)] for normal u, v of variance q and correlation `c`, within [-1, 1] (Poole et al. 2016, eq. 4).

    Good to 1e-6 of E[phi^2] for a continuous phi. None where `gain_of` is None or infinite. Raises ValueError for a
    correlation out of range.
    """
    if not -1 <= c <= 1:
        raise ValueError(f"a correlation lies between -1 and 1, {c} does not")
    gain = gain_of(phi, q)
    if gain is None or not math.isfinite(gain.moment2):
        return None
    std = math.sqrt(q)
    if abs(c) <= CLOSEST:
        return _correlated(phi, c, std)
    sign = math.copysign(1.0, c)
    near, far = _correlated(phi, sign * CLOSEST, std), gain.moment2
    if sign < 0:
        reflected = gain_of(lambda x: np.asarray(phi(x)) + np.asarray(phi(-x)), q)
        # E[(phi(z) + phi(-z))^2] = 2 E[phi^2] + 2 E[phi(z) phi(-z)].
        far = math.nan if reflected is None else reflected.moment2 / 2 - gain.moment2
    return near + (far - near) * (abs(c) - CLOSEST) / (1 - CLOSEST)


def _correlated(phi: Activation, c: float, std: float) -> float:
    """The double integral over the panels of phi in both directions, with the bivariate normal density between them."""
    root = math.sqrt(1 - c * c)
    smooth, rough = _subdivide(phi, std, min(WIDTH, 4 * root))
    panels = _join([smooth, rough])
    x, weights = _nodes(panels.left, panels.right).reshape(-1), _weights(panels.left, panels.right).reshape(-1)
    values = panels.values.reshape(-1)
    kept = weights * values * values > 1e-22 * float(np.sum(weights * values * values))
    x, f = x[kept], (weights * values)[kept]
    total = 0.0
    for start in range(0, x.size, 256):
        rows = slice(start, start + 256)
        # p(x, y) / (p(x) p(y)), the density relative to that of independent inputs.
        exponent = -(c * c * (x[rows, None] ** 2 + x[None, :] ** 2) - 2 * c * x[rows, None] * x[None, :]) / (2 * root * root)
        total += float(f[rows] @ (np.exp(exponent) @ f))
    return total / root
