"""IA206: values that are arbitrary bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.remedy import reset_line
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import initial

# Values of a drawn or trained weight lie within a few powers of ten of each other. Arbitrary bytes are spread evenly over the
# exponents: a fifth of float32 lies above 1e23, as much below 1e-23. One in fifty on either side at once is far from both.
_BOTH = 0.02
_LIMITS = {"float16": (512.0, 2e-3), "float32": (1e6, 1e-6), "float64": (1e6, 1e-6), "bfloat16": (1e6, 1e-6)}
_SAMPLE = 1 << 16
# The smallest standard deviation in use is 1e-10. Integers below two million are subnormal float32, 3e-39 at most; a bias or a
# scale that weight decay has worn down to this is left to the rules about trained networks.
_NOTHING = 1e-30


class UninitialisedMemory(Rule):
    """The exponents of the values are spread as arbitrary bytes are, not as any distribution is.

    What it does: counts values above a million and nonzero values below a millionth (above 512 and below 0.002 in float16)
    where both occur in one tensor, together with what is not finite; and reports tensors without one value above 1e-30, which
    is what integers and text look like when they are read as numbers.

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

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each tensor."""
        for name, moments in evidence.tensors.items():
            array = evidence.checkpoint.arrays.get(name)
            if array is None or array.dtype not in _LIMITS or moments.size < 16:
                continue
            large, small = _LIMITS[array.dtype]
            largest = max(abs(moments.min), abs(moments.max)) if moments.count else 0.0
            if 0 < largest < _NOTHING and moments.min != moments.max and initial(evidence):
                yield self._integers(evidence, name, largest)
                continue
            if not (moments.nan or moments.inf or largest > large):
                continue
            above, below = _shares(array.read(), large, small)
            if min(above, below) < _BOTH:
                continue
            layer = evidence.layer(name)
            yield self.finding(
                f"{100 * above:.0f} % of the values are above {large:g} or not finite, and {100 * below:.0f} % below "
                f"{small:g}: no "
                f"initialization and no training gives such numbers ({moments.min:.2g} to {moments.max:.2g}), arbitrary "
                "bytes do",
                reset_line(evidence, name),
                tensor=name,
                site=layer.pair.site if layer is not None else "",
                measured=above,
                expected=0.0,
            )

    def _integers(self, evidence: Evidence, name: str, largest: float) -> Finding:
        layer = evidence.layer(name)
        return self.finding(
            f"no value is larger than {largest:.2g}: no initialization gives such numbers, integers and text that are read as "
            "numbers do",
            reset_line(evidence, name),
            tensor=name,
            site=layer.pair.site if layer is not None else "",
            measured=largest,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Numbers of all sizes that a training may leave."""
        return (example("He", lambda: mlp(32, 64, 64, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Random bytes."""
        return (
            example("random bytes", lambda: mlp(32, 64, 64, change=_bytes)),
            example("indices", lambda: mlp(32, 64, 64, 5, change=_indices)),
        )


def _shares(values: np.ndarray[Any, Any], large: float, small: float) -> tuple[float, float]:
    flat = values.ravel()
    with np.errstate(invalid="ignore"):  # arbitrary bytes are also signalling NaNs
        size = np.abs(flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64))
    above = ~np.isfinite(size) | (size > large)
    return float(np.mean(above)), float(np.mean((size < small) & (size > 0)))


def _bytes(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight.copy_(torch.randint(-(2**31), 2**31, tuple(weight.shape)).to(torch.int32).view(torch.float32))


def _indices(model: Any) -> None:
    import torch

    weight = model[2].weight
    weight.copy_(torch.randint(0, 50_000, tuple(weight.shape)).to(torch.int32).view(torch.float32))
