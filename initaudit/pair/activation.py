"""Names a scalar function by what it computes: sampled on a grid, it is held against the activations of the field."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Scalar = Callable[[Array], Array]

# Dense where activations bend, and far enough out to tell relu from relu6 and hardtanh from the identity.
# (np.unique would import numpy.ma, a tenth of the start of a short audit.)
_GRID = np.array(sorted({*np.linspace(-4, 4, 161).tolist(), *np.linspace(-12, 12, 97).tolist()}))
# The two forms of GELU differ by 4.7e-4 and bear one name; the next two neighbours of the catalogue differ by 0.02.
_TOLERANCE = 2e-3
_EXACT = 1e-5


@dataclass(frozen=True)
class Activation:
    """A recognised scalar function: `function` evaluates it on float64 arrays of any shape.

    `scale` is the positive factor between the function and its namesake (relu(x)·2 is relu with scale 2).
    """

    name: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    scale: float = 1.0
    function: Scalar | None = field(default=None, repr=False, compare=False)


LINEAR = Activation("linear", function=lambda z: z)


def _sigmoid(z: Array) -> Array:
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


def _erf(z: Array) -> Array:
    return np.asarray(np.vectorize(math.erf)(z), dtype=np.float64)


def _softplus(z: Array) -> Array:
    return np.asarray(np.logaddexp(0.0, z))


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805

CATALOGUE: Mapping[str, Scalar] = {
    "gelu": lambda z: 0.5 * z * (1 + _erf(z / math.sqrt(2))),
    "quick_gelu": lambda z: z * _sigmoid(1.702 * z),
    "silu": lambda z: z * _sigmoid(z),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "hardtanh": lambda z: np.clip(z, -1, 1),
    "relu6": lambda z: np.clip(z, 0, 6),
    "hardsigmoid": lambda z: np.clip(z / 6 + 0.5, 0, 1),
    "hardswish": lambda z: z * np.clip(z / 6 + 0.5, 0, 1),
    "softplus": _softplus,
    "softsign": lambda z: z / (1 + np.abs(z)),
    "mish": lambda z: z * np.tanh(_softplus(z)),
    "squared_relu": lambda z: np.maximum(z, 0) ** 2,
    "square": lambda z: z**2,
    "abs": np.abs,
    "exp": np.exp,
    "log_sigmoid": lambda z: -_softplus(-z),
    "tanhshrink": lambda z: z - np.tanh(z),
    "softshrink": lambda z: np.sign(z) * np.maximum(np.abs(z) - 0.5, 0),
    "hardshrink": lambda z: np.where(np.abs(z) > 0.5, z, 0),
    "erf": _erf,
    "sin": np.sin,
    "cos": np.cos,
    "atan": np.arctan,
    "gaussian": lambda z: np.exp(-(z**2)),
}


def recognise(function: Scalar) -> Activation:
    """The activation that `function` computes: a name of the catalogue, "linear", "constant", or "custom".

    A positive factor in front is kept as `scale`. The identity up to an affine map is "linear".
    """
    with np.errstate(all="ignore"):
        y = np.asarray(function(_GRID), dtype=np.float64)
    if y.shape != _GRID.shape or not np.isfinite(y).all():
        return Activation("custom", function=function)
    size = float(np.abs(y).max())
    if np.ptp(y) <= _EXACT * max(size, 1e-30):
        return Activation("constant", function=function)
    slope, offset = np.polyfit(_GRID, y, 1)
    if np.abs(y - slope * _GRID - offset).max() <= _EXACT * size:
        return Activation("linear", scale=abs(float(slope)), function=function)
    found = _piecewise(y) or _named(y, size) or _fitted(y, size) or _rescaled(function, y, size)
    if found is None:
        return Activation("custom", function=function)
    name, parameters, scale = found
    return Activation(name, parameters, scale, function)


Found = tuple[str, dict[str, float], float]


def _named(y: Array, size: float) -> Found | None:
    """The nearest function of the catalogue up to a positive factor."""
    best: tuple[float, Found] | None = None
    with np.errstate(all="ignore"):
        for name, reference in CATALOGUE.items():
            f = reference(_GRID)
            scale = float(y @ f / (f @ f))
            error = float(np.abs(y - scale * f).max()) / size
            if scale > 0 and error < _TOLERANCE and (best is None or error < best[0]):
                best = error, (name, {}, scale)
    return None if best is None else best[1]


def _piecewise(y: Array) -> Found | None:
    """Functions that are a straight line through 0 on either side, or on the right with an exponential on the left."""
    left, right = _GRID < -1e-9, _GRID > 1e-9
    up = y[right] / _GRID[right]
    gain = float(up.mean())
    if gain <= 0 or np.ptp(up) > _EXACT * gain:
        return None
    down = y[left] / _GRID[left]
    if np.ptp(down) <= _EXACT * max(gain, float(np.abs(down).max())):
        slope = float(down.mean()) / gain
        if abs(slope) < _EXACT:
            return "relu", {}, gain
        if abs(slope + 1) < _EXACT:
            return "abs", {}, gain
        return "leaky_relu", {"negative_slope": round(slope, 7)}, gain
    return _exponential_left(y, gain, left)


def _exponential_left(y: Array, gain: float, left: Array) -> Found | None:
    """ELU, SELU and CELU: the identity on the right, a saturating exponential on the left."""
    z, v = _GRID[left], y[left] / gain
    ratio = v / np.expm1(z)
    if np.ptp(ratio) <= 1e-4 * abs(float(ratio.mean())):
        alpha = float(ratio.mean())
        if abs(alpha - _SELU_ALPHA) < 1e-3 and abs(gain - _SELU_SCALE) < 1e-3:
            return "selu", {}, 1.0
        return "elu", {"alpha": round(alpha, 6)}, gain
    floor = -float(v.min())
    if floor > 0:
        for alpha in (floor, floor / -math.expm1(-12 / floor)):
            if np.abs(v - alpha * np.expm1(z / alpha)).max() < 1e-3 * alpha:
                return "celu", {"alpha": round(alpha, 4)}, gain
    return None


def _fitted(y: Array, size: float) -> Found | None:
    """Families with one parameter that can be read off a point: clip, swish, sine, softplus, hard sigmoid, scaled tanh."""
    lower, upper = float(y.min()), float(y.max())
    middle = int(np.argmin(np.abs(_GRID)))
    slope = float((y[middle + 1] - y[middle - 1]) / (_GRID[middle + 1] - _GRID[middle - 1]))
    candidates: list[tuple[str, dict[str, float], Array]] = []
    if lower > _GRID[0] + 1e-3 and upper < _GRID[-1] - 1e-3:  # else it is the grid that ends there
        candidates.append(("clip", {"min": round(lower, 6), "max": round(upper, 6)}, np.clip(_GRID, lower, upper)))
    if slope != 0 and upper > lower:
        alpha = slope / (upper - lower)
        candidates.append(
            ("hardsigmoid", {"alpha": round(alpha, 5)}, lower + (upper - lower) * np.clip(alpha * _GRID + 0.5, 0, 1))
        )
        if slope > 0 and abs(upper + lower) < 1e-3 * upper:
            candidates.append(("tanh", {"slope": round(slope / upper, 5)}, upper * np.tanh(slope / upper * _GRID)))
    one = float(np.interp(1.0, _GRID, y))
    if 0 < one < 1:
        beta = math.log(one / (1 - one))
        candidates.append(("swish", {"beta": round(beta, 4)}, _GRID * _sigmoid(beta * _GRID)))
    zero = float(y[middle])
    if zero > 0:
        beta = math.log(2) / zero
        candidates.append(("softplus", {"beta": round(beta, 4)}, _softplus(beta * _GRID) / beta))
    fits = [(float(np.abs(y - f).max()) / size, name, p) for name, p, f in candidates]
    error, name, parameters = min(fits, key=lambda fit: fit[0], default=(math.inf, "", {}))
    return (name, parameters, 1.0) if error < _TOLERANCE else None


def _rescaled(function: Scalar, y: Array, size: float) -> Found | None:
    """a·sin(wz) of any frequency and a·tanh(z/a) of any width, from the slope at 0 and one point further out."""
    h = 1e-4
    with np.errstate(all="ignore"):
        slope = float(np.diff(np.asarray(function(np.array([-h, h])), dtype=np.float64))[0] / (2 * h))
    if slope <= 0 or np.abs(y + y[::-1]).max() > _TOLERANCE * size:
        return None
    candidates: list[tuple[str, Scalar, float, float]] = [
        ("sin", np.sin, slope / size, 1.1),
        ("tanh", np.tanh, slope / size, 0.05),
    ]
    for name, shape, rate, least in candidates:
        # f(z) = (slope/w)·shape(wz) falls with w at z = 1/rate: halving finds w.
        z = 1 / rate if name == "sin" else float(_GRID[-1])
        target = float(np.asarray(function(np.array([z, 0.0])), dtype=np.float64)[0])
        low, high = rate * min(least, 0.9), rate * 1.1
        for _ in range(80):
            w = (low + high) / 2
            low, high = (w, high) if slope / w * float(shape(np.array(w * z))) > target else (low, w)
        if np.abs(y - slope / w * shape(w * _GRID)).max() < _TOLERANCE * size:
            return name, {"omega" if name == "sin" else "slope": round(w, 4)}, 1.0
    return None
