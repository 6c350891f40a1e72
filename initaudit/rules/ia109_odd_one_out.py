"""IA109: a layer whose spread differs from that of its siblings."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.rule import Example, Finding, Rule
from initaudit.rules.support import (
    SIGMAS,
    activation_of,
    error_of,
    fields,
    initial,
    is_fresh,
    normalised,
    parameter,
    path_of,
)

# Siblings that make a consensus, the share that may stand apart, and how far (in standard deviation) counts as apart.
_SIBLINGS = 5
_APART = 0.15
_FACTOR = 1.4


class OddOneOut(Rule):
    """One layer's spread differs from that of all its siblings in the same role.

    What it does: groups weights by operator, shape, activation and path. Where at least five siblings agree within sampling
    error and one or two stand apart by a factor of 1.4 or more, these are named. In a trained network, where layers differ for
    good reasons, this is a remark.

    Why it is bad: an initializer that looks for a type by name or by exact class skipped a layer. It keeps the framework's
    default, and signal and gradient change by that factor there.

    Example: `if type(m) is nn.Linear` in a function for `apply`, and one layer is a subclass.

    Instead: `if isinstance(m, nn.Linear)`.

    Source: the same mistake in https://github.com/huggingface/transformers/issues/44575.
    """

    code = "IA109"
    name = "odd-one-out"
    severity = "warning"
    phase = "any"
    summary = "a layer's spread differs from that of its siblings in the same role"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each group of siblings."""
        groups: dict[tuple[object, ...], list[LayerEvidence]] = {}
        for layer in evidence.layers:
            p = layer.pair
            if p.role in ("contraction", "recurrent") and layer.moments.m2 > 0 and p.trainable and p.stored:
                key = (p.operator, p.shape, p.axes, p.groups, activation_of(layer), path_of(layer))
                groups.setdefault(key, []).append(layer)
        for siblings in groups.values():
            unique = list({x.tensor: x for x in siblings}.values())
            if len(unique) > _SIBLINGS and all(is_fresh(evidence, x) for x in unique):
                yield from self._judge(evidence, unique)

    def _judge(self, evidence: Evidence, siblings: list[LayerEvidence]) -> Iterator[Finding]:
        ordered = sorted(siblings, key=lambda x: x.moments.variance)
        middle = ordered[len(ordered) // 2]
        odd = [x for x in siblings if _apart(x, middle)]
        agree = [x for x in siblings if x not in odd]
        agreed = max(x.moments.std for x in agree) / min(x.moments.std for x in agree)
        if not odd or len(odd) > max(1, _APART * len(siblings)) or len(agree) < _SIBLINGS or agreed > _FACTOR:
            return
        first = odd[0]
        usual = middle.moments.std
        quiet = normalised(first) or not initial(evidence)
        yield self.finding(
            f"standard deviation {first.moments.std:.3g}, {first.moments.std / usual:.2g} of the {usual:.3g} of its "
            f"{len(agree)} siblings of "
            f"the same shape before the same {activation_of(first)}, "
            f"{abs(first.moments.variance / middle.moments.variance - 1) / (error_of(middle) * math.sqrt(2)):.0f} standard "
            "errors apart: "
            "it was probably left out by the initializer, and changes signal and gradient by that factor",
            f"torch.nn.init.normal_({parameter(first.tensor)}, std={usual:.4g})  # as its siblings",
            severity="info" if quiet else "warning",
            measured=first.moments.std,
            expected=usual,
            related=tuple(x.tensor for x in odd[1:]),
            **fields(first),
        )

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Siblings that agree."""
        return (example("He throughout", lambda: mlp(64, *[64] * 8, 5)),)

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """One that was left out."""
        return (example("one default among He", lambda: mlp(64, *[64] * 8, 5, change=_forget)),)


def _apart(layer: LayerEvidence, middle: LayerEvidence) -> bool:
    factor = layer.moments.std / middle.moments.std
    if 1 / _FACTOR < factor < _FACTOR:
        return False
    error = math.hypot(error_of(layer), error_of(middle))
    return abs(math.log(factor * factor)) > SIGMAS * error


def _forget(model: Any) -> None:
    linear(model)[4].reset_parameters()
