"""IA508: running statistics of a normalization that no data can have left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from initaudit.rules.evidence import Evidence
from initaudit.rules.examples import example, learnt
from initaudit.rules.norms import Norm, norms
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.support import names

# For each fault: its severity, and what stands behind the names
_FAULTS = {
    "negative": (
        "error",
        "negative: no average of squares is, and its root is NaN, so that in evaluation nothing behind the norm is a number",
    ),
    "zero": (
        "error",
        "zero in every channel: in evaluation the norm divides by the root of its epsilon alone, which makes its signal some "
        "hundred times too large",
    ),
    "reset": (
        "warning",
        "exactly as made (1, beside means of 0), although the network was trained: in evaluation the norm does not normalize, "
        "and the model answers otherwise than it did in training",
    ),
}


class BrokenStatistics(Rule):
    """Running statistics of a normalization are negative, zero, or as they were made in a network that was trained.

    What it does: finds what each normalization keeps of the batches it has seen, by what the graph computes, or in a file
    without a graph by the vectors of one shape that stand together with a count. Reported are variances below zero, variances
    that are zero in every channel, and statistics of exactly 0 and 1 where batches were counted or the norm's own scale was
    trained. A new norm, whose scale is as it was made too, is left alone, and so is a single channel that has died.

    Why it is bad: training does not use them and looks right; only in evaluation the model answers nonsense.

    Example: a checkpoint of parameters without buffers; statistics reset to be estimated again, and saved before they were;
    weights averaged over steps (SWA) without a pass of `update_bn`.

    Instead: `torch.optim.swa_utils.update_bn(loader, model)`, which estimates them from data.

    Source: Ioffe & Szegedy 2015, algorithm 2; Izmailov et al. 2018 (SWA), section 3.2.
    """

    code = "IA508"
    name = "broken-statistics"
    severity = "error"
    phase = "any"
    summary = "running statistics of a normalization are negative, zero, or as they were made in a trained network"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each kind of fault."""
        found: dict[str, list[Norm]] = {}
        for norm in norms(evidence):
            fault = _fault(evidence, norm)
            if fault:
                found.setdefault(fault, []).append(norm)
        for fault, (severity, says) in _FAULTS.items():
            if fault not in found:
                continue
            first = found[fault][0]
            kept = [n.variance for n in found[fault]]
            yield self.finding(
                f"{names(kept)} {'is' if len(kept) == 1 else 'are'} {says}",
                "torch.optim.swa_utils.update_bn(loader, model)  # estimates them again; or load the buffers too: strict=True",
                severity=severity,  # type: ignore[arg-type]
                tensor=first.variance,
                measured=float(len(kept)),
                expected=0.0,
                law=EXACT + "norms of this kind: a running variance is an average of squares, and its start of 1 fades",
                related=(*kept[1:], *(n.mean for n in found[fault] if fault == "reset")),
            )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Statistics of data, and a norm that is new."""
        return (
            example("statistics of the data", lambda: _trained(lambda m: None)),
            example("a new norm in a trained network", lambda: _trained(_added)),
            example("one channel that has died", lambda: _trained(_died)),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """Each of the three faults."""
        return (
            example("a variance below zero", lambda: _trained(lambda m: m[1].running_var.neg_())),
            example("variances of zero", lambda: _trained(lambda m: m[4].running_var.zero_())),
            example("reset and not estimated again", lambda: _trained(_reset)),
        )


def _fault(evidence: Evidence, norm: Norm) -> str:
    """Which of the faults a norm has, "" for none."""
    variance, mean = evidence.tensors.get(norm.variance), evidence.tensors.get(norm.mean)
    if variance is None or mean is None or not variance.count:
        return ""
    if variance.min < 0:
        return "negative"
    if variance.max == 0 and not variance.nan:
        return "zero"
    made = variance.min == variance.max == 1 and mean.zeros == mean.size
    return "reset" if made and (norm.batches or _moved(evidence, norm)) else ""


def _moved(evidence: Evidence, norm: Norm) -> bool:
    """Whether a step of training reached the norm's own scale or shift, in a network that is trained."""
    scale, shift = evidence.tensors.get(norm.scale), evidence.tensors.get(norm.shift)
    changed = (scale is not None and scale.m2 > 0) or (shift is not None and shift.m2 > 0)
    # In a fresh network scales may be drawn too; folded into their layers, they make it look half trained.
    return changed and evidence.phase == "trained"


def _trained(change: Callable[[Any], Any], steps: int = 80) -> Any:
    """A network with two norms that has learnt which of its first five inputs is the largest."""
    import torch
    from torch import nn

    model = nn.Sequential(
        nn.Linear(24, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)
    )
    return learnt(model, steps, change), (torch.randn(32, 24),)


def _added(model: Any) -> None:
    from torch import nn

    model.insert(6, nn.BatchNorm1d(64))


def _died(model: Any) -> None:
    for vector in (model[0].weight, model[0].bias, model[1].running_mean, model[1].running_var):
        vector[:1].zero_()


def _reset(model: Any) -> None:
    for norm in (model[1], model[4]):
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
