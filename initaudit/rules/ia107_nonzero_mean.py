"""IA107: weights whose mean outweighs their spread."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import convs, example, linear, mlp
from initaudit.rules.health import health, worst
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import SIGMAS, fields, fresh_layers, is_head, power

# Of the power that a unit receives from fan_in inputs with a common mean, mean²·fan_in comes from the mean of the weights and
# var from their spread (per unit of input power). Above 1 all units see mostly one number; identities with noise and small
# kernels reach 2 by themselves, torch.rand over 64 inputs 190.
_SHARE = 10.0


class NonzeroMean(Rule):
    """The mean of the weights is far from zero for their size.

    What it does: compares the mean of each weight with its standard error, and mean² times fan_in with the variance: the part
    of a unit's input that is the same for all units against the part that tells them apart.

    Why it is bad: all units of the layer react to one direction, the average of their inputs. Different inputs become one, the
    largest eigenvalue grows with the width, and the next layer sees a constant that grows from layer to layer.

    Example: `torch.rand(n, m)` where `torch.randn(n, m)` was meant.

    Instead: a scheme with mean zero; `torch.nn.init.kaiming_normal_(w)`.

    Source: LeCun et al. 1998, section 4.3 (mean of the inputs and of the weights); Saxe et al. 2014.
    """

    code = "IA107"
    name = "nonzero-mean"
    severity = "error"
    phase = "init"
    summary = "the mean of the weights is far from zero for their size"
    thresholds = (
        Threshold(
            "share",
            _SHARE,
            "times the power of the spread",
            "identities with noise and small kernels reach 2 by themselves, torch.rand over 64 inputs 190",
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all layers of this kind."""
        off = [x for x in fresh_layers(evidence) if _off(x, self.limit(evidence, "share")) and not is_head(evidence, x)]
        if not off:
            return
        state = health(evidence)
        level = worst(state.exploding, state.vanishing)
        absorbed = all(_absorbed(evidence, x) for x in off)
        first = off[0]
        moments = first.moments
        error = moments.std / math.sqrt(moments.count)
        share = moments.mean**2 * first.pair.fan_in / moments.variance
        yield self.finding(
            f"the mean is {moments.mean:.3g} at a standard deviation of {moments.std:.3g}: {abs(moments.mean) / error:.0f} "
            "standard errors "
            f"from zero; over {first.pair.fan_in} inputs the mean contributes {power(share)} times the power of the "
            "spread, so all "
            "units answer to one direction and inputs become alike",
            init_line(*off),
            severity="error" if level == "error" else "info" if absorbed and not level else "warning",
            measured=moments.mean,
            expected=0.0,
            law="every initialization of a weight is centred on zero",
            standard_errors=moments.mean / error,
            related=tuple(x.tensor for x in off[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Means that are sampling error."""
        return (
            example("He", lambda: mlp(32, 64, 64, 5)),
            example("small kernels", lambda: convs(norm=True, width=8)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """torch.rand instead of torch.randn."""
        return (
            example(
                "uniform in [0, 1)", lambda: mlp(32, 64, 64, 5, change=lambda m: [x.weight.uniform_(0, 1) for x in linear(m)])
            ),
        )


def _absorbed(evidence: Evidence, layer: LayerEvidence) -> bool:
    """Whether a norm over the units takes away what all of them have in common.

    One over the batch, over positions as well as units, or by root mean square does not. Small networks on scikit-learn's
    digits, weights shifted by two standard deviations: after 60 steps of SGD the loss was 2.31 in place of 1.82 before
    GroupNorm of images, 2.13 in place of 0.79 before BatchNorm, 2.51 in place of 0.06 before RMSNorm, and 0.08 as without the
    shift before LayerNorm and before GroupNorm of vectors, which have no positions.
    """
    signal = evidence.trace.signals.get(layer.pair.node) if evidence.trace is not None else None
    vectors = signal is not None and len(signal.shape) == 2
    over_units = ("layer_norm", "group_norm") if vectors else ("layer_norm",)
    return bool(layer.feeds) and all(any(name in over_units for name in feed.path) for feed in layer.feeds)


def _positive(model: Any) -> None:
    for layer in linear(model):
        layer.weight.uniform_(0, 1)


def _off(layer: LayerEvidence, share: float) -> bool:
    moments = layer.moments
    if not moments.m2 > 0 or not layer.pair.trainable or moments.count < 64:
        return False
    # A depthwise kernel averages over its own channel: no two channels become alike by it.
    inputs = math.prod(n for n, a in zip(layer.pair.shape, layer.pair.axes, strict=True) if a == "i")
    if inputs == (layer.pair.groups if layer.pair.axes[0] == "i" else 1):
        return False
    # Weights that are mostly exact zeros hold a pattern (identity, Dirac, masks), not a draw.
    if moments.zeros > moments.count / 2:
        return False
    significant = abs(moments.mean) * math.sqrt(moments.count) > SIGMAS * moments.std
    return significant and moments.mean**2 * layer.pair.fan_in > share * moments.variance
