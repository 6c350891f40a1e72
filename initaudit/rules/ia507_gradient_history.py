"""IA507: what the optimizer's state remembers of the gradients."""

from __future__ import annotations

from collections.abc import Iterator

from initaudit.measure.gradient_history import History
from initaudit.rules.evidence import Evidence
from initaudit.rules.rule import Finding, Rule, Threshold
from initaudit.rules.support import names, power

# As for the gradients of the probe: healthy networks keep 1e-3 of the squared norm down to the first layer, and the gradient
# grows 100-fold at most. Averages over training are rougher, so that a remark waits for six orders of magnitude.
_APART = 1e6
_LEAST = 6  # matrices that make a sequence of layers worth dividing into a beginning and an end
# Adam adds 1e-8 to the root of the average (Kingma & Ba 2015, algorithm 1): gradients below that no longer set their own step.
_EPSILON = 1e-8


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
    thresholds = (
        Threshold(
            "apart",
            _APART,
            "times between first and last layers",
            "healthy gradients grow 100-fold at most; averages over training are rougher",
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """At most one finding of each kind."""
        histories = list(evidence.histories)
        broken = [h for h in histories if h.moments.nan or h.moments.inf]
        sound = [h for h in histories if h not in broken and h.moments.count]
        if broken:
            yield self._finding(
                f"the mean squared gradients of {names([_name(h) for h in broken])} are not finite: a step overflowed, and "
                "these parameters get no finite update any more",
                "go back to a checkpoint before that step, and clip the gradient",
                broken,
            )
        silent = [h for h in sound if h.moments.min == h.moments.max == 0.0]
        if silent and len(silent) < len(sound):
            yield self._finding(
                f"{len(silent)} of {len(sound)} parameters have never had a gradient: their mean squares are exactly zero, "
                f"that of {_name(silent[0])} first",
                "look for units that died or a branch that is closed, or take these parameters out of the optimizer",
                silent,
                measured=float(len(silent)),
            )
        yield from self._depth([h for h in sound if len(h.shape) > 1 and h not in silent], self.limit(evidence, "apart"))

    def _depth(self, matrices: list[History], apart: float) -> Iterator[Finding]:
        if len(matrices) < _LEAST:
            return
        third = len(matrices) // 3
        first, last = _median(matrices[:third]), _median(matrices[-third:])
        ratio = first / last
        if not 1 / apart < ratio < apart:
            word = "vanish" if ratio < 1 else "explode"
            yield self._finding(
                f"gradients {word} towards the first layers: there their squared norm is {power(ratio)} of that in the last "
                f"ones ({power(first)} against {power(last)}, medians of {third} matrices each, averaged over training)",
                "initialise for the activations in use, or put normalization or skips between the layers",
                matrices,
                measured=ratio,
                expected=1.0,
            )
        small = [h for h in matrices if h.rms < _EPSILON]
        if 2 * len(small) > len(matrices):
            yield self._finding(
                f"the gradients of {len(small)} of {len(matrices)} matrices are below {_EPSILON:g} in size, Adam's epsilon: "
                "their steps shrink with them",
                "scale the loss up, or give Adam a smaller eps",
                small,
                measured=small[0].rms,
                expected=_EPSILON,
            )

    def _finding(
        self, message: str, help: str, histories: list[History], measured: float | None = None, expected: float | None = None
    ) -> Finding:
        related = tuple(_name(h) for h in histories[1:])
        return self.finding(message, help, tensor=_name(histories[0]), measured=measured, expected=expected, related=related)


def _median(histories: list[History]) -> float:
    values = sorted(h.norm2 for h in histories)
    return values[len(values) // 2]


def _name(history: History) -> str:
    return history.tensor or history.name
