"""IA104: fan-in and fan-out have traded places."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example
from initaudit.rules.health import health
from initaudit.rules.remedy import each, expression_of
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import SIGMAS, error_of, fields, fresh_layers, initial, normalised, plain, sigmas

# Numerators of the classical laws: He, LeCun, PyTorch's default, He for tanh's gain 5/3.
_LAWS = {"He": 2.0, "LeCun": 1.0, "PyTorch's default": 1 / 3, "tanh's gain 5/3": 25 / 9}
# How each is drawn again through the transpose.
_AGAIN = {
    "He": "torch.nn.init.kaiming_normal_({}.T)",
    "LeCun": 'torch.nn.init.kaiming_normal_({}.T, nonlinearity="linear")',
    "PyTorch's default": "torch.nn.init.kaiming_uniform_({}.T, a=5**0.5)",
    "tanh's gain 5/3": 'torch.nn.init.kaiming_normal_({}.T, nonlinearity="tanh")',
}
# Fans closer than this make no difference worth a word.
_APART = 1.5


class FansSwapped(Rule):
    """The variance fits a scheme exactly once fan-in and fan-out trade places.

    What it does: `torch.nn.init` takes the second axis of a weight for fan-in. A weight that is stored (in, out), as for
    `x @ W`, is then scaled by the number of its outputs. Reported where the layout is (in, out), the scheme fits the wrong fan
    and not the right one, and no normalization follows. A recurrent cell draws the weights of its input by the width of its
    state, which is their fan-out: that is no fault.

    Why it is bad: a layer from 1024 to 256 gets four times the variance it needs, one from 256 to 1024 a quarter, and the
    factors of several layers multiply.

    Example: `W = nn.Parameter(torch.empty(1024, 256)); nn.init.kaiming_normal_(W)` used as `x @ W`.

    Instead: `nn.init.kaiming_normal_(W.T)`, which writes into W through its transpose.

    Source: https://github.com/pytorch/pytorch/issues/129834; He et al. 2015, eq. 10 and 14.
    """

    code = "IA104"
    name = "fans-swapped"
    severity = "warning"
    phase = "init"
    summary = "the variance fits the scheme exactly when fan-in and fan-out trade places"
    thresholds = (Threshold("fans", _APART, "larger / smaller fan", "fans closer than this make no difference worth a word"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all the weights of this kind."""
        if not initial(evidence):
            return
        # A weight that another place reads along its second axis, as of a tied autoencoder, is right for that one.
        both = {x.tensor for x in evidence.layers if tuple(x.pair.axes) != ("i", "o")}
        judged = [x for x in fresh_layers(evidence, "contraction") if x.tensor not in both]
        found = [(x, law) for x in judged if (law := _swapped(evidence, x, self.limit(evidence, "fans")))]
        found = [(x, law) for x, law in found if plain(x) and not normalised(x)]
        if not found:
            return
        first, law = found[0]
        pair = first.pair
        expected = _LAWS[law] / pair.fan_in
        yield self.finding(
            f"variance {first.moments.variance:.3g} is that of {law} with fan_out {pair.fan_out} in the place of fan_in "
            f"{pair.fan_in}: "
            f"{first.moments.variance / expected:.3g} times the {expected:.3g} meant, "
            f"{abs(sigmas(first, expected)):.0f} "
            "standard errors "
            f"off, because the weight is stored (in, out); each such layer rescales signal and gradient by that factor",
            each(_AGAIN[law], [expression_of(x) for x, _ in found]),
            severity="error" if health(evidence).exploding == "error" or health(evidence).vanishing == "error" else "warning",
            measured=first.moments.variance,
            expected=expected,
            law=f"{law} with the fans of the unit",
            standard_errors=sigmas(first, expected),
            related=tuple(x.tensor for x, _ in found[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """The same weights, initialised through their transpose or by a scheme that counts both fans alike."""
        return (
            example("x @ W, initialised through W.T", lambda: _products(transposed=True)),
            example("Xavier with ReLU's gain, as stored", lambda: _products(transposed=False, gain=math.sqrt(2))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Initialised as they are stored."""
        return (example("x @ W, initialised as stored", lambda: _products(transposed=False)),)


def _swapped(evidence: Evidence, layer: LayerEvidence, apart: float) -> str:
    """The law that fits with the fans swapped and not as they are, "" for none."""
    pair, error, variance = layer.pair, error_of(layer), layer.moments.variance
    if tuple(pair.axes) != ("i", "o") or not math.isfinite(error) or not variance > 0:
        return ""
    if abs(math.log(pair.fan_in / pair.fan_out)) < math.log(apart):
        return ""
    # Xavier, also with the gain of ReLU or tanh, counts both fans alike: what it fits needs no other explanation.
    known = [c / pair.fan_in for c in _LAWS.values()] + [2 * g / (pair.fan_in + pair.fan_out) for g in (1, 2, 25 / 9)]
    # A part of a packed matrix was drawn with the fans of the whole: Xavier over (d, 3d) is LeCun over 2d, keys and values.
    array = evidence.checkpoint.arrays.get(layer.tensor)
    if array is not None and not pair.stored and len(array.shape) == 2:
        known.append(2 / sum(array.shape))
    known += [1 / 3 / width for width in _recurrent_widths(evidence, layer)]
    if any(abs(variance / v - 1) < SIGMAS * error for v in known):
        return ""
    return next((name for name, c in _LAWS.items() if abs(variance * pair.fan_out / c - 1) < SIGMAS * error), "")


def _recurrent_widths(evidence: Evidence, layer: LayerEvidence) -> Iterator[int]:
    """The widths of states that an activation sums with what `layer` makes of the input.

    Recurrent cells draw all their weights within 1/sqrt(width of the state) (torch.nn.RNN), those of the input too. Such a
    cell, once its steps are unrolled, is two products in one sum, of which the square one follows that law.
    """
    places = _activations(layer)
    for other in evidence.layers:
        width = other.pair.fan_in
        square = other.tensor != layer.tensor and width == other.pair.fan_out == layer.pair.fan_out
        if square and places & _activations(other) and abs(sigmas(other, 1 / 3 / width)) < SIGMAS:
            yield width


def _activations(layer: LayerEvidence) -> set[str]:
    return {feed.node for pair in layer.pairs for feed in pair.feeds}


def _products(*, transposed: bool, gain: float = 0.0) -> Any:
    import torch
    from torch import nn

    class Product(nn.Module):
        def __init__(self, fan_in: int, fan_out: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(fan_in, fan_out))
            if gain:
                nn.init.xavier_uniform_(self.weight, gain)
            else:
                nn.init.kaiming_normal_(self.weight.T if transposed else self.weight)

        def forward(self, x: torch.Tensor) -> Any:
            return x @ self.weight

    return nn.Sequential(Product(256, 64), nn.ReLU(), Product(64, 16), nn.ReLU(), Product(16, 4)), (torch.randn(16, 256),)
