"""IA507: what the optimizer's state remembers of the gradients."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

from initaudit.load.checkpoint import Array
from initaudit.measure.moments import Moments, measure
from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule
from initaudit.rules.support import names, power

# What torch.optim calls its running mean of squared gradients: Adam and its kin, AMSGrad's maximum aside; RMSprop and Adadelta.
_SECOND = ("exp_avg_sq", "square_avg")
# As for the gradients of the probe: healthy networks keep 1e-3 of the squared norm down to the first layer, and the gradient
# grows 100-fold at most. Averages over training are rougher, so that a remark waits for six orders of magnitude.
_APART = 1e6
_LEAST = 6  # matrices that make a sequence of layers worth dividing into a beginning and an end
# Adam adds 1e-8 to the root of the average (Kingma & Ba 2015, algorithm 1): gradients below that no longer set their own step.
_EPSILON = 1e-8


@dataclass(frozen=True)
class _History:
    """The running mean of squared gradients of one parameter; `norm2` is its sum, the mean squared norm of the gradient."""

    name: str
    shape: tuple[int, ...]
    moments: Moments

    @property
    def norm2(self) -> float:
        return self.moments.mean * self.moments.count


class GradientHistory(Rule):
    """The optimizer's state in the checkpoint shows gradients that vanished, exploded or never came.

    What it does: reads the running means of squared gradients that Adam, RMSprop and Adadelta keep for every parameter, and
    reports those that are not finite, those that are exactly zero while others are not, a squared norm that changes a
    million-fold between the first and the last matrices, and means so small that Adam's epsilon outweighs them.

    Why it is bad: they are averages over the last thousand steps. A parameter whose mean is zero has never been trained, one
    whose mean is not finite will never be again, and layers a million apart train at one learning rate only in Adam's eyes.

    Example: a ReLU network whose first layers died: their `exp_avg_sq` are all zeros.

    Instead: look at the same network before training: `initaudit package.module:build`.

    Source: Kingma & Ba 2015, algorithm 1; torch.optim.Adam's state.
    """

    code = "IA507"
    name = "gradient-history"
    severity = "warning"
    phase = "trained"
    summary = "the optimizer state in the checkpoint (Adam's second moments) shows vanishing or exploding gradients"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding of each kind."""
        histories = list(_histories(evidence))
        broken = [h for h in histories if h.moments.nan or h.moments.inf]
        sound = [h for h in histories if h not in broken and h.moments.count]
        if broken:
            yield self._finding(
                f"the mean squared gradients of {names([h.name for h in broken])} are not finite: a step overflowed, and these "
                "parameters get no finite update any more",
                "go back to a checkpoint before that step, and clip the gradient",
                broken,
            )
        silent = [h for h in sound if h.moments.min == h.moments.max == 0.0]
        if silent and len(silent) < len(sound):
            yield self._finding(
                f"{len(silent)} of {len(sound)} parameters have never had a gradient: their mean squares are exactly zero, "
                f"that of {silent[0].name} first",
                "look for units that died or a branch that is closed, or take these parameters out of the optimizer",
                silent,
                measured=float(len(silent)),
            )
        yield from self._depth([h for h in sound if len(h.shape) > 1 and h not in silent])

    def _depth(self, matrices: list[_History]) -> Iterator[Finding]:
        if len(matrices) < _LEAST:
            return
        third = len(matrices) // 3
        first, last = _median(matrices[:third]), _median(matrices[-third:])
        ratio = first / last
        if not 1 / _APART < ratio < _APART:
            word = "vanish" if ratio < 1 else "explode"
            yield self._finding(
                f"gradients {word} towards the first layers: there their squared norm is {power(ratio)} of that in the last "
                f"ones ({power(first)} against {power(last)}, medians of {third} matrices each, averaged over training)",
                "initialise for the activations in use, or put normalization or skips between the layers",
                matrices,
                measured=ratio,
                expected=1.0,
            )
        small = [h for h in matrices if math.sqrt(max(h.moments.mean, 0.0)) < _EPSILON]
        if 2 * len(small) > len(matrices):
            yield self._finding(
                f"the gradients of {len(small)} of {len(matrices)} matrices are below {_EPSILON:g} in size, Adam's epsilon: "
                "their steps shrink with them",
                "scale the loss up, or give Adam a smaller eps",
                small,
                measured=math.sqrt(small[0].moments.mean),
                expected=_EPSILON,
            )

    def _finding(
        self, message: str, help: str, histories: list[_History], measured: float | None = None, expected: float | None = None
    ) -> Finding:
        related = tuple(h.name for h in histories[1:])
        return self.finding(message, help, tensor=histories[0].name, measured=measured, expected=expected, related=related)


def _histories(evidence: Evidence) -> Iterator[_History]:
    """The running means of squared gradients in the order of the parameters; one that cannot be read says nothing."""
    from initaudit.errors import InitauditError

    found: list[tuple[list[int | str], str, Array]] = []
    for name, array in evidence.checkpoint.optimizer.items():
        owner, _, kind = name.rpartition(".")
        if kind in _SECOND and array.size:
            # torch.optim counts its parameters: 10 comes after 9.
            order: list[int | str] = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", owner)]
            found.append((order, owner, array))
    for _, owner, array in sorted(found, key=lambda item: [(isinstance(p, str), p) for p in item[0]]):
        try:
            yield _History(owner, array.shape, measure(array.read()))
        except InitauditError:
            continue


def _median(histories: list[_History]) -> float:
    values = sorted(h.norm2 for h in histories)
    return values[len(values) // 2]
