"""Mean-field formulas: what an operator does to the moments of a signal when its weights are independent draws.

A signal is described by a few numbers (`Field`). Sums over many independent weights are close to normal, so what a linear
operator puts out is taken as normal with a mean of its own for each unit (Poole et al. 2016, eq. 2 to 5; Schoenholz et al.
2017, eq. 3 to 6); everything downstream is integrated over that law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Points of the trapezoidal rule over eight standard deviations: a kink costs the square of the step, 0.3 %.
_OUTER, _INNER, _REACH = 65, 161, 8.0


@dataclass(frozen=True)
class Field:
    """The law of a signal's elements, examples and positions drawn independently.

    `mean` is E[x], `moment2` E[x²]. `across` is E[x x'] for one unit at one position of two examples, `along` for one unit at
    two positions of one example: what all examples (positions) share. `approximate` marks a formula with an assumption that
    the network may not meet (fused attention, pooling of neighbours, group statistics). `keys` is 1 over the number of entries
    that a row of a softmax looks at, where a mask has been added.
    """

    mean: float
    moment2: float
    across: float
    along: float
    approximate: bool = False
    keys: float | None = None

    @property
    def variance(self) -> float:
        """E[x²] - E[x]²."""
        return max(self.moment2 - self.mean**2, 0.0)

    def scaled(self, factor: float, square: float | None = None) -> Field:
        """The field times independent numbers of mean `factor` and second moment `square`."""
        q = factor**2 if square is None else square
        return replace(self, mean=self.mean * factor, moment2=self.moment2 * q, across=self.across * q, along=self.along * q)


@dataclass(frozen=True)
class Draws:
    """The mean, the variance and the second moment of a tensor of weights, and how many numbers it holds."""

    mean: float
    variance: float
    count: int

    @property
    def moment2(self) -> float:
        """E[w²]."""
        return self.variance + self.mean**2


# Elements that are copied to float64 at a time: a weight may have gigabytes.
_PIECE = 1 << 20


def draws(value: Tensor) -> Draws:
    """The moments of a tensor, in float64; those of its pieces are merged (Chan et al. 1979, eq. 2.1)."""
    count, mean, squares = 0, 0.0, 0.0
    if not value.numel():
        return Draws(math.nan, math.nan, 0)
    rows = value.detach().reshape(1) if value.dim() == 0 else value.detach()
    for part in torch.split(rows, max(1, _PIECE * len(rows) // rows.numel())):
        x = part.double()
        n, own = x.numel(), float(x.mean())
        squares += float(x.var(correction=0)) * n + (own - mean) ** 2 * count * n / (count + n)
        mean += (own - mean) * n / (count + n)
        count += n
    return Draws(mean, squares / count, count)


NONE = Draws(0.0, 0.0, 0)


def contraction(x: Field, fan_in: float, weight: Draws, bias: Draws, share: float = 1.0) -> Field:
    """Sums of `fan_in` products, of which `share` fall inside the signal (the rest meet padding)."""
    n = fan_in * share
    # Weights of one sign add the inputs up: E[(Σ x)²] = n E[x²] + n (n - 1) E[x]².
    together = n * (n - 1) * x.mean**2 * weight.mean**2

    def moved(q: float) -> float:
        return n * weight.moment2 * q + together + bias.moment2

    mean = n * weight.mean * x.mean + bias.mean
    return Field(mean, moved(x.moment2), moved(x.across), moved(x.along), x.approximate)


def pointwise(x: Field, phi: Callable[[Tensor], Tensor]) -> Field | None:
    """The field of phi(x) by quadrature over the units' means and over examples (Schoenholz et al. 2017, eq. 3 and 4).

    None where phi is not finite over the law.
    """
    ends, inner = _grid(_OUTER), _grid(_INNER)

    def shared(k: float) -> tuple[float, float, float]:
        centre = math.sqrt(max(min(k, x.moment2) - x.mean**2, 0.0))
        apart = math.sqrt(max(x.moment2 - max(k, x.mean**2), 0.0))
        z = x.mean + centre * ends[0].unsqueeze(1) + apart * inner[0].unsqueeze(0)
        value = phi(z.reshape(-1)).reshape(z.shape).double()
        of_unit = value @ inner[1]
        return (
            float(ends[1] @ of_unit),
            float(ends[1] @ (value.square() @ inner[1])),
            float(ends[1] @ of_unit.square()),
        )

    mean, moment2, across = shared(x.across)
    along = across if x.along == x.across else shared(x.along)[2]
    if not all(math.isfinite(v) for v in (mean, moment2, across, along)):
        return None
    return Field(mean, moment2, across, along, x.approximate)


def _grid(points: int) -> tuple[Tensor, Tensor]:
    z = torch.linspace(-_REACH, _REACH, points, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    return z, weight / weight.sum()


def plus(a: Field, b: Field, sign: float = 1.0) -> Field:
    """a ± b of signals that different weights have made, so that only their means meet."""
    cross = 2 * sign * a.mean * b.mean
    return Field(
        a.mean + sign * b.mean,
        a.moment2 + b.moment2 + cross,
        a.across + b.across + cross,
        a.along + b.along + cross,
        a.approximate or b.approximate,
    )


def times(a: Field, b: Field) -> Field:
    """a · b of signals that different weights have made."""
    made = (a.mean * b.mean, a.moment2 * b.moment2, a.across * b.across, a.along * b.along)
    return Field(*made, a.approximate or b.approximate)


def affine(x: Field, weight: Draws | None, bias: Draws | None) -> Field:
    """A weight and a bias for each unit."""
    if weight is not None:
        x = x.scaled(weight.mean, weight.moment2)
    return x if bias is None else plus(x, Field(bias.mean, bias.moment2, bias.moment2, bias.moment2))


def per_unit_norm(x: Field, eps: float) -> Field:
    """Each unit over examples and positions (batch norm, training): what a unit always has is taken away."""
    base = min(x.across, x.along)
    variance = max(x.moment2 - base, 0.0)
    scale = 1 / (variance + eps)
    return Field(0.0, variance * scale, (x.across - base) * scale, (x.along - base) * scale, x.approximate)


def per_place_norm(x: Field, eps: float, *, centred: bool = True) -> Field:
    """Each place over its units (layer norm; RMS norm with `centred` false)."""
    taken = x.mean**2 if centred else 0.0
    scale = 1 / (max(x.moment2 - taken, 0.0) + eps)
    mean = 0.0 if centred else x.mean * math.sqrt(scale)
    made = ((k - taken) * scale for k in (x.moment2, x.across, x.along))
    return _field(mean, made, x.approximate)


def group_norm(x: Field, eps: float, units: float) -> Field:
    """Each example over `units` units and all positions; the group's mean holds what its units share along positions."""
    taken = x.mean**2 + max(x.along - x.mean**2, 0.0) / units
    scale = 1 / (max(x.moment2 - taken, 0.0) + eps)
    return _field(0.0, ((k - taken) * scale for k in (x.moment2, x.across, x.along)), True)


def _field(mean: float, made: Iterable[float], approximate: bool) -> Field:
    moment2, across, along = made
    return Field(mean, moment2, across, along, approximate)


def averaged(x: Field, count: float) -> Field:
    """The mean of `count` positions, which share `along`."""
    count = max(count, 1.0)
    joint = min(x.across, x.along)
    return Field(
        x.mean,
        x.along + (x.moment2 - x.along) / count,
        joint + (x.across - joint) / count,
        x.along,
        x.approximate or count > 1,
    )


def largest(x: Field, count: int, draw: Callable[[Tensor], Tensor] | None, root: Field | None) -> Field:
    """The largest of `count` positions, by 4096 draws: of phi(root) where x is an activation of it, else of a normal x."""
    law, phi = (root, draw) if root is not None and draw is not None else (x, lambda z: z)
    generator = torch.Generator().manual_seed(0)
    centre = math.sqrt(max(min(law.along, law.moment2) - law.mean**2, 0.0))
    apart = math.sqrt(max(law.moment2 - max(law.along, law.mean**2), 0.0))
    units = torch.randn(4096, 1, 1, generator=generator, dtype=torch.float64)
    places = torch.randn(4096, 2, count, generator=generator, dtype=torch.float64)
    z = law.mean + centre * units + apart * places
    top = phi(z.reshape(-1)).reshape(z.shape).double().amax(2)
    shared = float((top[:, 0] * top[:, 1]).mean())
    return Field(float(top.mean()), float(top.square().mean()), shared, shared, True)


def attention(q: Field, k: Field, v: Field, width: int, scale: float, keys: float, pairs: float) -> Field:
    """softmax(scale · q kᵀ) v for small scores; `keys` is the mean of Σp² of a uniform row, `pairs` that of two rows' overlap.

    Scores are normal with variance s², so a row's Σp² grows by e^{s²} (the second moment of a log-normal) up to 1.
    """
    spread = scale**2 * width * q.moment2 * max(k.moment2 - k.along, 0.0)
    own = min(1.0, keys * math.exp(min(spread, 50.0)))
    joint = min(v.across, v.along)
    return Field(
        v.mean,
        v.along + (v.moment2 - v.along) * own,
        joint + (v.across - joint) * own,
        v.along + (v.moment2 - v.along) * min(pairs, own),
        True,
    )
