"""IA310: logits so large that the first loss is far above chance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import expression_of
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.support import fields, initial, is_fresh, to_output

if TYPE_CHECKING:
    from initaudit.probe.trace import Trace, WeightRecord

# Library heads drawn as U(±1/sqrt(classes)) start at 2 to 4 times ln C with ten classes and train: the first tens of steps
# bring them down. Beyond both limits more is undone than learnt at first.
_TIMES = 4.0
_NATS = 8.0
_CLASSES = (2, 1 << 18)
# Cosines times 64 (Deng et al. 2019, ArcFace) start at 64 nats at most; no known head of a classifier goes further.
_BEYOND = 100.0
_DRAWS = 256


class LargeInitialLogits(Rule):
    """The loss that a classifier starts with is far above that of guessing, ln(classes).

    What it does: takes the variance of the model's output, where a linear layer makes it, and computes the cross-entropy
    that logits of this size give against labels they know nothing of. Reported beyond four times ln(classes) and eight nats
    above it. For a regression the same number says that the output starts that far from its targets' scale. Where a factor
    behind the layer does it, this is a remark: it may bring predictions to the scale of their targets.

    Why it is bad: the first steps go into shrinking the head, with gradients as large as the error; they shake everything
    below, and pretrained features first.

    Example: a head tied to `nn.Embedding`, which is drawn from N(0, 1).

    Instead: `nn.init.normal_(head.weight, std=0.02)`, or zeros.

    Source: Karpathy 2019, "A recipe for training neural networks" (verify the loss at init).
    """

    code = "IA310"
    name = "large-initial-logits"
    severity = "warning"
    phase = "init"
    summary = "the expected initial loss is far above ln(classes)"
    thresholds = (
        Threshold("times", _TIMES, "times ln(classes)", "library heads start at 2 to 4 times and train"),
        Threshold("nats", _NATS, "nats above ln(classes)", "more is then undone than learnt at first"),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each head."""
        if evidence.trace is None or not (initial(evidence) or evidence.phase == "mixed"):
            return
        for layer in evidence.layers:
            if layer.pair.role != "contraction" or not to_output(layer) or not is_fresh(evidence, layer) or not layer.records:
                continue
            moment2, classes = _spread(evidence.trace, layer.records[0]), _classes(layer.pair.shape, layer.pair.axes)
            if moment2 is None or not math.isfinite(moment2) or not _CLASSES[0] <= classes <= _CLASSES[1]:
                continue
            if evidence.synthetic and not initial(evidence):
                # Of a trained body made-up inputs may come out many times as strong as its data.
                moment2 /= max(1.0, layer.records[0].input_moment2 or 1.0)
            loss = expected_loss(math.sqrt(moment2), classes)
            chance = math.log(classes)
            if loss > self.limit(evidence, "times") * chance and loss > chance + self.limit(evidence, "nats"):
                inputs = layer.records[0].input_moment2 or 1.0
                std = 1 / math.sqrt(layer.pair.fan_in * inputs)
                yield self.finding(
                    f"{classes} outputs of standard deviation {math.sqrt(moment2):.3g}: a cross-entropy would start at "
                    f"{loss:.3g}, where "
                    f"guessing has ln({classes}) = {chance:.3g}; the first steps go into shrinking them, with gradients "
                    "that shake every "
                    "layer below",
                    f"torch.nn.init.normal_({expression_of(layer)}, std={min(std, 0.02):.3g})",
                    measured=loss,
                    expected=chance,
                    **fields(layer),
                )
            elif (scaled := _scaled(evidence, layer)) is not None:
                node, times = scaled
                std = times * math.sqrt(moment2)
                loss = expected_loss(std, classes)
                if loss > chance + _BEYOND:
                    yield self._of_factor(evidence, layer, node, times, (classes, std, loss))

    def _of_factor(
        self, evidence: Evidence, layer: LayerEvidence, name: str, times: float, logits: tuple[int, float, float]
    ) -> Finding:
        from initaudit.graph.graph import location_of

        assert evidence.graph is not None
        location = next(location_of(n) for n in evidence.graph.fx.nodes if n.name == name)
        classes, std, loss = logits
        place = location.source_line or location.site or name
        return self.finding(
            f"{classes} outputs of standard deviation {std:.3g}: a cross-entropy would start at {loss:.3g}, where guessing has "
            f"ln({classes}) = {math.log(classes):.3g}; {layer.tensor} is not what makes them so large, a factor of {times:.3g} "
            f"behind it is ({place})",
            f"right where {place} brings a regression to the scale of its targets; before a softmax, let it be 100 at most",
            severity="info",
            measured=loss,
            expected=math.log(classes),
            **{**fields(layer), "location": location},
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """A default head, and one that starts at twice ln(classes)."""
        return (
            example("He", lambda: mlp(32, 64, 10)),
            example("U(±1/sqrt(10))", lambda: mlp(32, 64, 10, change=lambda m: linear(m)[-1].weight.uniform_(-0.32, 0.32))),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A head of N(0, 1)."""
        return (example("N(0, 1) on 400 features", lambda: mlp(32, 400, 50, change=lambda m: linear(m)[-1].weight.normal_())),)


def _scaled(evidence: Evidence, layer: LayerEvidence) -> tuple[str, float] | None:
    """(the operator, the factor of all) where what makes the output of a layer's results does nothing but make them larger."""
    from initaudit.graph.calls import role_of

    assert evidence.graph is not None
    assert evidence.trace is not None
    signals = evidence.trace.signals
    node = next((n for n in evidence.graph.fx.nodes if n.name == layer.records[0].output), None)
    first, steps = signals.get(layer.records[0].output), list[tuple[float, str]]()
    before = first
    while node is not None and node.name not in evidence.trace.outputs and len(node.users) == 1:
        node = next(iter(node.users))
        here = signals.get(node.name)
        if role_of(node).kind not in ("pointwise", "passthrough"):
            return None
        if here is None or not here.moment2 or before is None or not before.moment2:
            continue
        steps.append((math.sqrt(here.moment2 / before.moment2), node.name))
        before = here
    if first is None or before is None or not steps or not first.moment2 or not before.moment2:
        return None
    return max(steps)[1], math.sqrt(before.moment2 / first.moment2)


def _spread(trace: Trace, record: WeightRecord) -> float | None:
    """The second moment of the logits without what they have in common, which a softmax does not see."""
    signal = trace.signals.get(record.output)
    if signal is None or signal.mean is None or record.output_moment2 is None:
        return record.output_moment2
    return max(record.output_moment2 - signal.mean**2, 0.0)


def expected_loss(std: float, classes: int) -> float:
    """The mean cross-entropy of logits N(0, std²) against labels independent of them, E[ln sum exp z]."""
    draws = np.random.default_rng(0).standard_normal((_DRAWS, min(classes, 4096))) * std
    peak = draws.max(1)
    found = float(np.mean(peak + np.log(np.exp(draws - peak[:, None]).sum(1))))
    if classes > 4096:
        # Below std = sqrt(2 ln n) the sum of exponentials grows as n, above it as their maximum (Derrida 1981, eq. 8).
        edge, wider = math.sqrt(2 * math.log(4096)), math.sqrt(2 * math.log(classes))
        found += math.log(classes / 4096) if std < edge else std * (wider - edge)
    return found


def _classes(shape: tuple[int, ...], axes: tuple[str, ...]) -> int:
    return math.prod(n for n, a in zip(shape, axes, strict=True) if a == "o")
