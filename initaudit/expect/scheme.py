"""The records of the catalogue: a law that weights are drawn from, and what it may know of the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Distribution = Literal["normal", "uniform", "truncated", "constant"]


@dataclass(frozen=True)
class Scheme:
    """One law. `mean` and `variance` (centred) are those of the law as drawn, truncation included; `bound` is what no |value|
    exceeds. `meant_for` is the activation or place its author had in mind ("relu", "residual", "any")."""

    name: str
    mean: float
    variance: float
    distribution: Distribution
    bound: float
    meant_for: str
    source: str


@dataclass(frozen=True)
class Site:
    """What a scheme may know of a weight.

    `axes` names every axis of `shape` by the letters of `initaudit.roles`. `fan_in` and `fan_out` are the products that meet in
    one unit and the units that one input feeds. `convention` are the fans that torch.nn.init computes from the shape, which
    differ: it counts a transposed convolution's axes the other way round, ignores groups in fan_out, and takes a table's width
    for fan_in. `packed` matrices are stacked along the units (3 for Q, K and V; the gates of a recurrence), `hidden` is the
    width of a recurrence, `depth` the number of residual blocks of two branches each, and `block` which of them, from 0, this
    matrix returns from. A bias has the one axis `o` and the fans of its weight.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    fan_in: int
    fan_out: int
    convention: tuple[int, int]
    operator: str = "linear"
    groups: int = 1
    packed: int = 1
    hidden: int | None = None
    depth: int | None = None
    block: int | None = None

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    def letter(self, name: str) -> int:
        """The product of the axes of this letter."""
        return math.prod(n for n, a in zip(self.shape, self.axes, strict=True) if a == name)


def site_of(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    *,
    operator: str = "linear",
    groups: int = 1,
    packed: int = 1,
    hidden: int | None = None,
    depth: int | None = None,
    block: int | None = None,
    fans: tuple[int, int] | None = None,
) -> Site:
    """The site of a weight of `shape`; `fans` (fan_in, fan_out) where the caller knows better than the axes, as for a bias.

    Raises ValueError where `axes` does not name every axis.
    """
    if len(shape) != len(axes):
        raise ValueError(f"axes {axes} do not name every axis of shape {shape}")
    n = {a: math.prod(m for m, b in zip(shape, axes, strict=True) if a == b) for a in "oikvd"}
    if "v" in axes:
        ours, torchs = (1, n["d"]), (n["d"], n["v"])
    elif "i" in axes and axes.index("i") == 0 and "k" in axes:
        # A transposed convolution's `i` counts every group's inputs, its `o` one group's.
        ours, torchs = (n["i"] // groups * n["k"], n["o"] * n["k"]), (n["o"] * n["k"], n["i"] * n["k"])
    else:
        ours, torchs = (n["i"] * n["k"], n["o"] // packed // groups * n["k"]), (n["i"] * n["k"], n["o"] * n["k"])
    if fans is not None:
        ours = torchs = fans
    ours, torchs = (max(1, ours[0]), max(1, ours[1])), (max(1, torchs[0]), max(1, torchs[1]))
    return Site(shape, axes, *ours, torchs, operator, groups, packed, hidden, depth, block)


def truncated_moments(cut: float) -> tuple[float, float]:
    """(variance, kurtosis) of a standard normal variable cut off beyond +-`cut`."""
    # Integration by parts: E z^n = (n - 1) E z^(n-2) - 2 cut^(n-1) phi(cut) / P(|z| < cut).
    edge = 2 * math.exp(-cut * cut / 2) / math.sqrt(2 * math.pi) / math.erf(cut / math.sqrt(2))
    variance = 1 - cut * edge
    return variance, (3 * variance - cut**3 * edge) / variance**2


def normal(name: str, std: float, meant_for: str, source: str) -> Scheme:
    """N(0, std^2)."""
    return Scheme(name, 0.0, std * std, "normal", math.inf, meant_for, source)


def uniform(name: str, bound: float, meant_for: str, source: str) -> Scheme:
    """U(-bound, bound), of variance bound^2/3."""
    return Scheme(name, 0.0, bound * bound / 3, "uniform", bound, meant_for, source)


def truncated(name: str, std: float, cut: float, meant_for: str, source: str) -> Scheme:
    """N(0, std^2) cut off beyond `cut` times std; its own std is smaller."""
    return Scheme(name, 0.0, std * std * truncated_moments(cut)[0], "truncated", cut * std, meant_for, source)


def corrected(name: str, std: float, meant_for: str, source: str) -> Scheme:
    """N cut off beyond two standard deviations, widened so that `std` is what is left after the cut (JAX's form)."""
    return Scheme(name, 0.0, std * std, "truncated", 2 * std / math.sqrt(truncated_moments(2.0)[0]), meant_for, source)


Maker = Callable[[Site], Iterator[Scheme]]
