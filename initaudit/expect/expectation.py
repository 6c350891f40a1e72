"""The variances that the laws of Xavier, He and LeCun and the exact gain ask of a weight, and what sampling makes of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Law = Literal["he", "lecun", "xavier", "exact"]


@dataclass(frozen=True)
class Expectation:
    """Variances (centred) that a weight should have by each law; `exact` is None where the activation has no gain.

    `xavier` and `lecun` are None, as `he` is, where the fans are not known. `standard_error` is that of the observed variance.
    """

    xavier: float | None
    he: float | None
    lecun: float | None
    exact: float | None
    standard_error: float = math.nan


def expected_variances(
    fan_in: int, fan_out: int, gain: float | None, overlap: float = 1.0, standard_error: float = math.nan
) -> Expectation:
    """The variances for a weight whose unit sums `fan_in` products and whose input feeds `fan_out` units.

    `overlap` is the share of kernel taps that meet in one output element: 1 but for strided transposed convolutions. Only the
    exact law knows of it; the classical three are given as their authors wrote them. `gain` = 1/sqrt(E phi^2) for unit input.
    Raises ValueError for fans below 1 and an overlap outside (0, 1].
    """
    if fan_in < 1 or fan_out < 1:
        raise ValueError(f"fans must be at least 1, not {fan_in} and {fan_out}")
    if not 0 < overlap <= 1:
        raise ValueError(f"overlap is a share of the kernel and lies in (0, 1], not {overlap}")
    return Expectation(
        xavier=2 / (fan_in + fan_out),  # Glorot & Bengio 2010, eq. 12
        he=2 / fan_in,  # He et al. 2015, eq. 10
        lecun=1 / fan_in,  # LeCun et al. 1998, "Efficient BackProp", eq. 16
        exact=None if gain is None else gain * gain / (fan_in * overlap),
        standard_error=standard_error,
    )


def standard_error(variance: float, kurtosis: float, n: int) -> float:
    """Of the variance of `n` independent values of this variance and (Pearson's) kurtosis; NaN for fewer than two.

    var sqrt((k - 1)/n), the leading term of the exact var sqrt((k - (n - 3)/(n - 1))/n) (Mood, Graybill & Boes 1974, VI.2.3);
    the two differ by less than 1 % from 100 values on. It is an error of the variance, not of its logarithm: below some 50
    values the variance itself is skewed, and a normal interval of two errors is too short above.
    """
    if n < 2:
        return math.nan
    return variance * math.sqrt(max(kurtosis - 1, 0.0) / n)


# What each activation was published with or is conventionally given.
_CALLS: dict[str, Law] = {
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "rrelu", "relu6", "elu", "celu", "crelu", "threshold"), "he"),
    **dict.fromkeys(("gelu", "gelu_tanh", "quick_gelu", "silu", "swish", "mish", "hardswish", "relu_squared"), "he"),
    **dict.fromkeys(("selu",), "lecun"),
    **dict.fromkeys(
        ("tanh", "sigmoid", "hardtanh", "hardsigmoid", "softsign", "softmax", "hard_tanh", "hard_sigmoid"), "xavier"
    ),
    **dict.fromkeys(("linear", "identity", "none"), "lecun"),
}


def calls_for(activation: str) -> Law:
    """The law that convention pairs with an activation named as `pair` names it; "exact" where convention has none.

    He et al. 2015 for rectifiers and what was made to replace them, Glorot & Bengio 2010 for saturating units, Klambauer et al.
    2017 (LeCun's variance) for SELU, and LeCun's for linear units, whose gain is 1. A parameter in brackets is ignored:
    "leaky_relu(0.2)".
    """
    return _CALLS.get(activation.partition("(")[0].strip(), "exact")
