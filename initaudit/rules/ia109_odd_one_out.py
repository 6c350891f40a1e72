"""IA109: a layer whose spread differs from that of its siblings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.remedy import normal_line
from initaudit.rules.rule import Example, Finding, Rule, Threshold
from initaudit.rules.structure import last_layers, reading_inputs
from initaudit.rules.support import (
    NORMS,
    SIGMAS,
    activation_of,
    apart,
    error_of,
    fields,
    initial,
    is_fresh,
    normalised,
    path_of,
)

# Siblings that make a consensus, the share that may stand apart, and how far (in standard deviation) counts as apart.
_SIBLINGS = 4
_APART = 0.15
_FACTOR = 1.4
# A residual branch that is so many times as large as its siblings outweighs them a hundred to one in power: the norm behind the
# sum keeps the stream's size, and makes all other branches a hundredth of it.
_DROWNS = 10.0
# Fewer siblings than this have to agree as closely as drawn tensors do.
_MANY = 5
_WHOLE = 8  # layers of a model that make a consensus whatever their roles: twice as many as siblings
# What drawn tensors of one law may differ by beyond sampling: a truncation, a rounding.
_ROUNDING = 0.05


@dataclass(frozen=True)
class _Consensus:
    """What makes one, and what stands apart from it: the rule's thresholds."""

    siblings: float
    apart: float
    factor: float
    rounding: float


class OddOneOut(Rule):
    """One layer's spread differs from that of all its siblings in the same role.

    What it does: groups weights by operator, activation and path. Where at least four siblings agree within sampling error, in
    their spread or in its ratio to the fans, and at most a seventh of them stand apart by a factor of 1.4 or more, these are
    named; and so is, in a model that has one spread in all its matrices, a matrix that differs from its like in other blocks.
    The first and the last layers have roles of their own and are siblings of none but those of their shape. Trained
    weights, which differ for good reasons, are not compared.

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
    thresholds = (
        Threshold("siblings", _SIBLINGS, "layers that agree, at least", "fewer are no consensus"),
        Threshold("apart", _APART, "of the siblings at most", "more that stand apart are a design"),
        Threshold("factor", _FACTOR, "in standard deviation", "twice the variance, as He's is of Xavier's"),
        Threshold(
            "rounding",
            _ROUNDING,
            "of the variance beyond sampling",
            "what drawn tensors of one law may differ by: a truncation, a rounding",
        ),
    )

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for each group of siblings, and each factor by which some stand apart."""
        layers = {
            x.tensor: x
            for x in evidence.layers
            if x.pair.role in ("contraction", "recurrent") and x.moments.m2 > 0 and x.pair.trainable and x.pair.stored
        }
        shapes: dict[tuple[object, ...], list[LayerEvidence]] = {}
        roles: dict[tuple[object, ...], list[LayerEvidence]] = {}
        ends = reading_inputs(evidence) | last_layers(evidence)
        for layer in layers.values():
            role = _role(layer)
            shapes.setdefault((*role, layer.pair.shape, layer.pair.groups), []).append(layer)
            if layer.tensor not in ends and evidence.graph is not None:
                roles.setdefault(role, []).append(layer)
        consensus = _Consensus(
            self.limit(evidence, "siblings"),
            self.limit(evidence, "apart"),
            self.limit(evidence, "factor"),
            self.limit(evidence, "rounding"),
        )
        named: set[str] = set()
        for siblings in (*shapes.values(), *roles.values()):
            if len(siblings) <= consensus.siblings or not all(is_fresh(evidence, x) for x in siblings):
                continue
            for finding in self._judge(evidence, _odd(siblings, consensus)):
                if not named & {finding.tensor, *finding.related}:
                    named |= {finding.tensor, *finding.related}
                    yield finding
        whole = [x for members in roles.values() for x in members]
        if not named and all(is_fresh(evidence, x) for x in whole):
            yield from self._judge(evidence, _odd_of_all(whole, consensus))

    def _judge(self, evidence: Evidence, found: _Split | None) -> Iterator[Finding]:
        if found is None:
            return
        odd, agree, middle, law = found
        for part in _by_factor(odd, law):
            yield self._told(evidence, part, agree, middle, law)

    def _told(
        self, evidence: Evidence, odd: list[LayerEvidence], agree: list[LayerEvidence], middle: LayerEvidence, law: _Law
    ) -> Finding:
        first = odd[0]
        usual = middle.moments.std * math.sqrt(law(middle) / law(first))
        drowns = _joins(first) and first.moments.std > _DROWNS * usual
        quiet = (normalised(first) and not drowns) or not initial(evidence)
        errors = apart(first.moments.variance, usual**2, math.hypot(error_of(middle), error_of(first)))
        return self.finding(
            f"standard deviation {first.moments.std:.3g}, {first.moments.std / usual:.2g} of the {usual:.3g} of its "
            f"{len(agree)} siblings"
            f"{'' if activation_of(first) in ('linear', 'unknown') else ' before the same ' + activation_of(first)}, "
            f"{abs(errors):.0f} standard errors apart: "
            "it was probably left out by the initializer, and changes signal and gradient by that factor",
            normal_line([(x, middle.moments.std * math.sqrt(law(middle) / law(x))) for x in odd]),
            severity="info" if quiet else "warning",
            measured=first.moments.std,
            expected=usual,
            law="siblings of one role are drawn by one law",
            standard_errors=errors,
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
        return (
            example("one default among He", lambda: mlp(64, *[64] * 8, 5, change=_forget)),
            example("one default among layers of other widths", lambda: mlp(64, 256, 192, 128, 96, 64, 48, 5, change=_forget)),
        )


def _joins(layer: LayerEvidence) -> bool:
    """Whether the output is added to a stream before a norm sees it: the norm takes away the sum's size, not its share."""
    path = path_of(layer)
    norm = next((i for i, name in enumerate(path) if name in NORMS), len(path))
    return "add" in path[:norm]


_Law = Callable[[LayerEvidence], float]
# What a variance may be inversely proportional to: nothing, the fans as counted from the axes or from the shape, and, of
# orthonormal rows or columns, the longer side.
_LAWS: tuple[_Law, ...] = (
    lambda x: 1.0,
    lambda x: float(x.pair.fan_in),
    lambda x: float(x.pair.fan_out),
    lambda x: float(x.pair.fan_in + x.pair.fan_out),
    lambda x: x.moments.count / x.pair.shape[0],
    lambda x: x.moments.count / x.pair.shape[1] if len(x.pair.shape) > 1 else 1.0,
    lambda x: max(x.pair.shape[0], x.moments.count / x.pair.shape[0]),
)


def _role(layer: LayerEvidence) -> tuple[object, ...]:
    pair = layer.pair
    return (pair.operator, pair.axes, pair.groups > 1, activation_of(layer), path_of(layer))


# (those apart, those that agree, the one in the middle, the law by which they agree)
_Split = tuple[list[LayerEvidence], list[LayerEvidence], LayerEvidence, _Law]


def _odd_of_all(layers: list[LayerEvidence], consensus: _Consensus) -> _Split | None:
    """The layers apart where all of a model have one spread whatever their fans, as N(0, 0.02) throughout gives.

    A shallow model has few layers of each role. A role that has a law of its own (a gate, a router) has no member that agrees.
    """
    if len(layers) < _WHOLE or len({x.pair.fan_in for x in layers}) < 2:
        return None
    found = _odd(layers, consensus, _LAWS[:1])
    if found is None:
        return None
    roles = {_like(x) for x in found[1]}
    odd = [x for x in found[0] if _like(x) in roles]
    return (odd, *found[1:]) if odd else None


def _like(layer: LayerEvidence) -> tuple[object, ...]:
    """The role as the other blocks know it: what stands behind the stream differs in the last of them."""
    return (*_role(layer)[:-1], path_of(layer)[:1], layer.pair.shape)


def _odd(siblings: list[LayerEvidence], consensus: _Consensus, laws: tuple[_Law, ...] = _LAWS) -> _Split | None:
    """Those apart from all others; None where there is no law that most follow.

    Under the first law that most follow; whoever is apart has to be so under every such law.
    """
    first: _Split | None = None
    one_shape = len({x.pair.shape for x in siblings}) == 1
    for law in laws[:1] if one_shape else laws:
        ordered = sorted(siblings, key=lambda x: x.moments.variance * law(x))
        middle = ordered[len(ordered) // 2]
        odd: list[LayerEvidence] = []
        agree: list[LayerEvidence] = []
        for x in siblings:
            (odd if _distance(x, middle, law) > consensus.factor else agree).append(x)
        if len(odd) > max(1, consensus.apart * len(siblings)) or len(agree) < consensus.siblings:
            continue
        close = all(_distance(x, middle, law, slack=consensus.rounding) == 1 for x in agree)
        loose = (
            one_shape and len(agree) >= _MANY and max(_distance(x, middle, law) for x in agree) <= math.sqrt(consensus.factor)
        )
        if not (close or loose):
            continue
        if not odd:
            return None  # all of them follow this law
        if first is None:
            first = odd, agree, middle, law
        elif {x.tensor for x in odd} != {x.tensor for x in first[0]}:
            return None
    return first


def _by_factor(odd: list[LayerEvidence], law: _Law) -> list[list[LayerEvidence]]:
    """Those apart by about one factor together; who stand ten times further away, or on the other side, have another cause."""
    parts: list[list[LayerEvidence]] = []
    for x in odd:
        near = (p for p in parts if abs(math.log10(x.moments.variance * law(x) / (p[0].moments.variance * law(p[0])))) < 2)
        part = next(near, None)
        if part is None:
            parts.append([x])
        else:
            part.append(x)
    return parts


def _distance(layer: LayerEvidence, middle: LayerEvidence, law: _Law, *, slack: float = 0.0) -> float:
    """The factor between two standard deviations, at least 1; exactly 1 where sampling (and rounding) may have made it."""
    apart = abs(math.log(layer.moments.variance * law(layer) / (middle.moments.variance * law(middle))))
    error = math.hypot(error_of(layer), error_of(middle))
    return 1.0 if apart <= SIGMAS * error + slack else math.exp(apart / 2)


def _forget(model: Any) -> None:
    linear(model)[4].reset_parameters()
