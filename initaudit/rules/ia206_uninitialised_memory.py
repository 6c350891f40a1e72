"""IA206: values that are arbitrary bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.load.checkpoint import Array
from initaudit.measure.blocks import distinct
from initaudit.measure.moments import Moments
from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.remedy import reset_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.support import initial

# Values of a drawn or trained weight lie within a few powers of ten of each other. Arbitrary bytes are spread evenly over the
# exponents: a fifth of float32 lies above 1e23, as much below 1e-23; of float16 a sixth above 4096, a tenth below 2.4e-4, which
# are 7 decades apart. One in fifty on either side at once is far from both.
_BOTH = 0.02
_TYPES = ("float16", "float32", "float64", "bfloat16")
_LIMITS, _LIMITS_OF_HALF = (1e6, 1e-6), (4096.0, 2.4e-4)
_SAMPLE = 1 << 16
# Bits 6 to 15 of a float32 that was drawn or trained are ones half of the time, or less often where values were rounded. Those
# below may repeat the bound's where a uniform law is made of 24 random bits: bit b in a share of 2^-b of the values.
# Of 4096 different values, a bit is one this much more often with a probability of exp(-2 * 4096 * 0.125^2) = 1e-56 (Hoeffding
# 1963), and of the 1024 mantissas that a rescaled float16 has, 1e-14; a share of 2^-6 makes 1e-43 and 1e-11 of these.
_BITS = np.arange(6, 16, dtype=np.uint32)
_OFTEN = 0.5 + 0.125
_FEWEST = 4096
_DIFFERENT = 0.9
# bfloat16 bits that are read as float16 lose half of their exponent to the fraction: what was spread around zero, by a
# draw of whatever scale, comes to lie between 1/4 and 4, on both sides of a gap. A law that is no thinner
# at zero than a uniform one leaves 1/32 of the mean size free of 4096 values with a probability of (1 - 0.018)^4096 = 1e-32.
_GAP = 1 / 32
_SIDES = 0.25  # of the values, on either side at least
# The smallest standard deviation in use is 1e-10. Integers below two million are subnormal float32, 3e-39 at most; a bias or a
# scale that weight decay has worn down to this is left to the rules about trained networks.
_NOTHING = 1e-30
# Of one parity nearly all, of the other nearly none; by chance, of so many values, never.
_EVERY, _ADDRESSES = 0.8, 64


class UninitialisedMemory(Rule):
    """The exponents of the values are spread as arbitrary bytes are, not as any distribution is.

    What it does: counts values above a million and nonzero values below a millionth (above 4096 and below 0.00024 in float16)
    where both occur in one tensor, together with what is not finite; reports tensors without one value above 1e-30, which is
    what integers look like when they are read as numbers, and fresh ones of which a fiftieth is so small, or where every second
    value is, as of addresses; and looks at bits 6 to 15 of float32 values, which are ones
    in half of the values of any draw and any training, and have a pattern in text and in numbers of another type. Where float16
    values lie on both sides of zero and none comes near it, they are the bits of bfloat16.

    Why it is bad: the tensor was allocated and never written. It holds what lay in memory, which differs from run to run, and
    some of it is 1e34 or NaN.

    Example: a head made by `torch.empty` whose initializer was skipped because the module was built on the meta device.

    Instead: initialise every tensor that a checkpoint does not bring.

    Source: https://github.com/huggingface/transformers/issues/28968, /46002 and /44575.
    """

    code = "IA206"
    name = "uninitialised-memory"
    severity = "error"
    phase = "any"
    summary = "the exponents of the values are spread as arbitrary bytes are, not as any distribution is"
    thresholds = (
        Threshold(
            "share", _BOTH, "of the values, on either side", "arbitrary bytes have a fifth on either, a draw or a training none"
        ),
        Threshold("large", _LIMITS[0], "value", "of float32, bfloat16 and float64: no draw and no training gives such weights"),
        Threshold(
            "small",
            _LIMITS[1],
            "value",
            "of float32, bfloat16 and float64: values of one tensor lie within a few powers of ten",
        ),
        Threshold("large-half", _LIMITS_OF_HALF[0], "value", "of float16, which ends at 65504"),
        Threshold("small-half", _LIMITS_OF_HALF[1], "value", "of float16, which begins at 6e-8"),
        Threshold(
            "bit",
            _OFTEN,
            "of the values",
            "of a drawn or trained float32, a lower bit is one in half; an eighth more has a probability of 1e-56",
        ),
        Threshold("gap", _GAP, "of the root mean square", "a draw leaves no such gap around zero with a probability of 1e-32"),
        Threshold(
            "least",
            _NOTHING,
            "largest value",
            "the smallest standard deviation in use is 1e-10, integers read as float32 end at 3e-39",
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each tensor."""
        for name, moments in evidence.tensors.items():
            array = evidence.checkpoint.arrays.get(name)
            if array is None or array.dtype not in _TYPES or moments.size < 16:
                continue
            yield from itertools.islice(self._one(evidence, name, array, moments), 1)

    def _one(self, evidence: Evidence, name: str, array: Array, moments: Moments) -> Iterator[Finding]:
        """What speaks for arbitrary bytes, in the order of cost."""
        large, small = self.limit(evidence, "large"), self.limit(evidence, "small")
        if array.dtype == "float16":
            large, small = self.limit(evidence, "large-half"), self.limit(evidence, "small-half")
        least = self.limit(evidence, "least")
        largest = max(abs(moments.min), abs(moments.max)) if moments.count else 0.0
        if 0 < largest < least and moments.min != moments.max and initial(evidence):
            yield self._integers(evidence, name, largest)
        far = bool(moments.nan or moments.inf) or largest > large
        if far:
            yield from self._spread(evidence, name, array, large, small)
        if array.dtype != "float16" and largest >= least:
            yield from self._tiny(evidence, name, array)
        if moments.count < _FEWEST or not (far or abs(moments.mean) < moments.std):
            return
        if array.dtype == "float32":
            yield from self._patterns(evidence, name, _low_bits(array.read(), self.limit(evidence, "bit")))
        elif array.dtype == "float16" and not far:
            gap = self.limit(evidence, "gap")
            yield from self._gap(evidence, name, _free_of_zero(array.read(), gap), gap)

    def _spread(self, evidence: Evidence, name: str, array: Array, large: float, small: float) -> Iterator[Finding]:
        above, below = _shares(array.read(), large, small)
        if min(above, below) >= self.limit(evidence, "share"):
            moments = evidence.tensors[name]
            yield self._about(
                evidence,
                name,
                f"{100 * above:.0f} % of the values are above {large:g} or not finite, and {100 * below:.0f} % below "
                f"{small:g}: no "
                f"initialization and no training gives such numbers ({moments.min:.2g} to {moments.max:.2g}), arbitrary "
                "bytes do",
                measured=above,
                expected=0.0,
                law=EXACT + "a law of one scale has such values on one side at most",
            )

    def _tiny(self, evidence: Evidence, name: str, array: Array) -> Iterator[Finding]:
        least = self.limit(evidence, "least")
        share, alternate = _below(array.read(), least)
        if alternate or (share >= self.limit(evidence, "share") and initial(evidence)):
            yield self._about(
                evidence,
                name,
                f"{100 * share:.0f} % of the values are below {least:.2g} and not zero"
                + (", every second one" if alternate else "")
                + ": no initialization gives such numbers, integers and addresses that are read as numbers do, so the layer "
                "computes with noise of an arbitrary scale",
                measured=share,
                expected=0.0,
                law=EXACT + "the smallest size of a value that any scheme draws",
            )

    def _about(self, evidence: Evidence, name: str, message: str, **facts: Any) -> Finding:
        layer = evidence.layer(name)
        site = layer.pair.site if layer is not None else ""
        return self.finding(message, reset_line(evidence, name), tensor=name, site=site, **facts)

    def _patterns(self, evidence: Evidence, name: str, found: tuple[int, float] | None) -> Iterator[Finding]:
        if found is None:
            return
        bit, share = found
        errors = (share - 0.5) / (0.5 / math.sqrt(_FEWEST))
        yield self._about(
            evidence,
            name,
            f"bit {bit} of the values is one in {100 * share:.0f} % of them, {errors:.0f} standard errors from the half that a "
            "draw or a training leaves in the lower bits of a float32: these are numbers of another type, or text, that are "
            "read as float32, so the layer computes with noise of an arbitrary scale",
            measured=share,
            expected=0.5,
            law="the lower bits of a draw, or of a trained weight, are fair coins",
            standard_errors=errors,
        )

    def _gap(self, evidence: Evidence, name: str, least: float | None, gap: float) -> Iterator[Finding]:
        if least is None:
            return
        # Of _FEWEST values of a uniform law those within `gap` root mean squares of zero.
        expected = _FEWEST * min(gap, 1.0) / math.sqrt(3)
        yield self._about(
            evidence,
            name,
            f"of {_FEWEST} values on both sides of zero none is smaller than {least:.2g} of their root mean square; of a draw, "
            f"or after training, at least {expected:.0f} are below {gap:.2g} of it, and none at all is "
            f"{math.sqrt(expected):.0f} standard errors fewer: these are bfloat16 numbers that are read as float16, all "
            "of one size, so the layer computes with signs alone",
            measured=least,
            expected=gap,
            law="no law is thinner at zero than a uniform one",
            standard_errors=math.sqrt(expected),
        )

    def _integers(self, evidence: Evidence, name: str, largest: float) -> Finding:
        return self._about(
            evidence,
            name,
            f"no value is larger than {largest:.2g}: no initialization gives such numbers, integers and text that are read as "
            "numbers do",
            measured=largest,
            expected=self.limit(evidence, "least"),
            law=EXACT + "the smallest size of a value that any scheme draws",
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Numbers of all sizes that a training may leave."""
        return (
            example("He", lambda: mlp(32, 64, 64, 5)),
            example("values that float16 held and a factor moved", lambda: mlp(64, 96, 64, change=_rescaled)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Random bytes."""
        return (
            example("random bytes", lambda: mlp(32, 64, 64, change=_bytes)),
            example("float16 numbers read as float32", lambda: mlp(64, 96, 64, change=_halves)),
            example("text", lambda: mlp(64, 96, 64, change=_text)),
            example("bfloat16 bits read as float16", _other_half),
            example("indices", lambda: mlp(32, 64, 64, 5, change=_indices)),
            example("written by half, the rest indices", lambda: mlp(32, 64, 64, 5, change=_half_written)),
            example("addresses", lambda: mlp(32, 64, 64, 5, change=_addresses)),
        )


def _shares(values: np.ndarray[Any, Any], large: float, small: float) -> tuple[float, float]:
    flat = values.ravel()
    with np.errstate(invalid="ignore"):  # arbitrary bytes are also signalling NaNs
        size = np.abs(flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64))
    above = ~np.isfinite(size) | (size > large)
    return float(np.mean(above)), float(np.mean((size < small) & (size > 0)))


def _low_bits(values: np.ndarray[Any, Any], often: float) -> tuple[int, float] | None:
    """(a bit that is one too often, how often), None where every lower bit is as a draw leaves it.

    Looks at runs of values from all over the tensor. Values of which many are equal were quantised and may have any bits.
    """
    picked = _picked(values)
    bits = picked[picked != 0].view(np.uint32)
    if bits.size < _FEWEST // 2 or distinct(bits) < _DIFFERENT * bits.size:
        return None
    shares = ((bits[:, None] >> _BITS) & 1).mean(axis=0)
    most = int(np.argmax(shares))
    return (int(_BITS[most]), float(shares[most])) if shares[most] > often else None


def _below(values: np.ndarray[Any, Any], least: float) -> tuple[float, bool]:
    """The share of nonzero values below `least`, and whether they are every second one.

    The upper halves of 64-bit addresses are; what decays to nothing in training does so by units or by inputs.
    """
    picked = _picked(values) if values.size >= _FEWEST else values.reshape(-1)
    with np.errstate(invalid="ignore"):  # arbitrary bytes are also signalling NaNs
        size = np.abs(picked.astype(np.float64))
    tiny = (size < least) & (size > 0)
    odd, even = float(tiny[1::2].mean()), float(tiny[::2].mean())
    return float(tiny.mean()), max(odd, even) > _EVERY and min(odd, even) < 1 - _EVERY and picked.size >= _ADDRESSES


def _picked(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """_FEWEST values in runs from all over the tensor."""
    flat = values.reshape(-1)
    starts = np.linspace(0, flat.size - _FEWEST // 16, 16).astype(np.int64) // 2 * 2
    return np.concatenate([flat[s : s + _FEWEST // 16] for s in starts])


def _free_of_zero(values: np.ndarray[Any, Any], gap: float) -> float | None:
    """The smallest size over the root mean square where the values lie on both sides of a gap around zero, else None.

    Values of which many are equal (signs, a few levels) have gaps by design, and zeros are no gap.
    """
    x = _picked(values).astype(np.float64)
    size = np.abs(x)
    positive = np.count_nonzero(x > 0) / x.size
    if not _SIDES < positive < 1 - _SIDES or distinct(size) < 64:
        return None
    least = float(size.min() / math.sqrt(float(np.mean(size**2))))
    return least if least > gap else None


def _bytes(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight.copy_(torch.randint(-(2**31), 2**31, tuple(weight.shape)).to(torch.int32).view(torch.float32))


def _rescaled(model: Any) -> None:
    weight = model[2].weight
    weight.copy_(weight.half().float() * 0.3)


def _halves(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight.copy_((torch.randn(weight.shape[0], 2 * weight.shape[1]) / 10).half().view(torch.float32))


def _other_half() -> Any:
    import torch

    model, inputs = mlp(64, 96, 64)
    model = model.half()
    weight = model[2].weight
    weight.data = weight.data.bfloat16().view(torch.float16)
    return model, tuple(x.half() for x in inputs)


def _text(model: Any) -> None:
    import torch

    weight = model[2].weight
    letters = torch.randint(97, 123, (weight.numel() * 4,)).to(torch.uint8)
    weight.copy_(letters.view(torch.float32).view_as(weight))


def _indices(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight.copy_(torch.randint(0, 50_000, tuple(weight.shape)).to(torch.int32).view(torch.float32))


def _half_written(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight[32:] = torch.randint(0, 50_000, (32, weight.shape[1])).to(torch.int32).view(torch.float32)


def _addresses(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight.copy_((0x7F2A_3B00_0000 + 16 * torch.randint(0, 2**20, (weight.numel() // 2,))).view(torch.float32).view_as(weight))
