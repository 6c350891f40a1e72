"""IA402: numbers beyond the range of half precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, mlp
from initaudit.rules.health import GROWTH
from initaudit.rules.remedy import init_line, reset_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule, Threshold
from initaudit.rules.stream import what_grows
from initaudit.rules.structure import is_mask
from initaudit.rules.support import fields, names, off_scale, view

HALF = 65504.0  # the largest float16 (IEEE 754-2008, table 3.5)
# Weights of 1e6 exist in no trained or drawn network; the square of 1e19 overflows float32.
_ABSURD = 1e6


class HalfOverflow(Rule):
    """A weight, or an activation in the probe, exceeds the range of float16.

    What it does: compares the largest magnitude of every weight, and of what linear operators put out in the probe (which is
    computed in float32), with 65504. It is an error where the model is stored in float16, or is asked about with
    `--dtype float16`; weights beyond a million are one in any type.

    Why it is bad: what exceeds the range becomes infinite, and NaN one operator later.

    Example: T5's feed-forward blocks, whose hidden activations pass 65504 in float16.

    Instead: bfloat16, which has float32's range; or a scale that keeps activations small.

    Source: https://github.com/huggingface/transformers/issues/4586.
    """

    code = "IA402"
    name = "half-overflow"
    severity = "error"
    phase = "any"
    summary = "a weight or a probed activation exceeds the range of float16 (or of the dtype asked for)"
    thresholds = (Threshold("absurd", _ABSURD, "largest weight", "no draw and no training gives such weights"),)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for weights, one for activations."""
        half = _is_half(evidence)
        yield from self._weights(evidence, half)
        if evidence.trace is None:
            return
        # Masks add the lowest number there is on purpose: only what linear operators put out counts.
        outputs = {x.pair.node: x for x in evidence.layers if x.pair.role == "contraction"}
        over = [(s.peak, outputs[n]) for n, s in evidence.trace.signals.items() if n in outputs and s.peak and s.peak > HALF]
        over = [(peak, x) for peak, x in over if math.isfinite(peak)]
        if not over:
            return
        first = over[0][1]
        peak = max(p for p, _ in over)
        yield self.finding(
            f"outputs of {names([x for _, x in over])} reach {peak:.3g} in the probe, float16 ends at 65504: "
            + (
                "the model is in float16, so they become infinite, and NaN behind it" if half else "it cannot be run in float16"
            ),
            f"{_mend(evidence, first)}  # or run the model in bfloat16",
            severity="error" if half else "info",
            measured=peak,
            expected=HALF,
            law=EXACT + "the largest number of float16 (IEEE 754)",
            related=tuple(x.tensor for _, x in over[1:]),
            **fields(first),
        )

    def _weights(self, evidence: Evidence, half: bool) -> Iterator[Finding]:
        large = {
            n: max(abs(m.min), abs(m.max))
            for n, m in evidence.tensors.items()
            if m.count and max(abs(m.min), abs(m.max)) > HALF and _is_weight(evidence, n) and not is_mask(evidence, n)
        }
        if not large:
            return
        name, peak = max(large.items(), key=lambda item: item[1])
        layer = evidence.layer(name)
        where: dict[str, Any] = fields(layer) if layer is not None else {"tensor": name}
        yield self.finding(
            f"values reach {peak:.3g}, float16 ends at 65504"
            + (f"; the same in {names([n for n in large if n != name])}" if len(large) > 1 else "")
            + (
                ": no draw and no training gives such weights"
                if peak > self.limit(evidence, "absurd")
                else ": in float16 they are infinite, and in any type such a weight decides its unit alone"
            ),
            reset_line(evidence, name),
            severity="error" if half or peak > self.limit(evidence, "absurd") else "warning",
            measured=peak,
            expected=HALF,
            law=EXACT + "the largest number of float16 (IEEE 754)",
            related=tuple(n for n in large if n != name),
            **where,
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Numbers of usual size."""
        return (example("He", lambda: mlp(32, 64, 64, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A float16 block that overflows, and an absurd weight."""
        return (
            example("forty times He in float16", _half),
            example("a weight of 1e30", lambda: mlp(32, 64, 5, change=lambda m: m[2].weight.mul_(1e30))),
        )


def _mend(evidence: Evidence, layer: LayerEvidence) -> str:
    """The line that keeps a layer's output in range: what forward does to the signal where no weight is too large."""
    flow = view(evidence).flow
    growth = flow.growth.get(layer.pair.node) if flow is not None else None
    if growth is None or off_scale(evidence.layers, large=True):
        return init_line(layer)
    return what_grows(evidence, layer, growth, GROWTH[0])[1] or init_line(layer)


def _is_half(evidence: Evidence) -> bool:
    if evidence.config.dtype is not None:
        return evidence.config.dtype == "float16"
    used = [a.dtype for x in evidence.layers if (a := evidence.checkpoint.arrays.get(x.tensor)) is not None]
    return bool(used) and 2 * used.count("float16") > len(used)


def _is_weight(evidence: Evidence, name: str) -> bool:
    array = evidence.checkpoint.arrays.get(name)
    if array is None or not array.trainable or not array.shape:
        return False
    if evidence.graph is not None and name in evidence.graph.constants:
        return evidence.graph.constants[name].kind == "parameter"
    return True


def _half() -> Any:
    model, inputs = mlp(64, 128, 64, 5, gain=60.0)
    return model.half(), tuple(x.half() for x in inputs)
