"""IA203: layers that hold the same values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from initaudit.measure.blocks import distinct
from initaudit.measure.copies import same_units
from initaudit.measure.symmetry import duplicate_rows
from initaudit.rules.evidence import Evidence, LayerEvidence
from initaudit.rules.examples import example, linear, mlp
from initaudit.rules.gates import choosers
from initaudit.rules.remedy import init_line
from initaudit.rules.rule import EXACT, Example, Finding, Rule
from initaudit.rules.structure import is_tie
from initaudit.rules.support import fields, fresh_layers, initial, names

# A drawn weight of this many elements has nearly as many different values; tables of a formula and identities have few.
_LEAST = 64
_FEW = 16  # of smaller weights all values have to differ
_VARIED = 0.1
# A draw of 4 bits or more has more different values than the tables of one (one-hot, filters for upsampling, +-1).
_LEVELS = 14
# Copies that were rounded, or went through a file of another type, differ by this share of their norm. Then the fourth moments
# differ by 4 sqrt(m6)/m4 = 5 times as much (normal law), heavy tails more.
_NEAR = 1e-6
_FOURTH = 2e-5
_SIGMAS = 6.0
# Of 48 independent numbers the cosine is 0.14 in size. Two draws reach 0.999 once in 10^60 pairs; rounding to 8 bits keeps
# 1 - 1e-5. Formulas make smooth rows that are alike, so laws are compared where the values are drawn.
_START = 48
_ALIKE = 0.999


class IdenticalLayers(Rule):
    """Two layers hold the same values without being the same parameter.

    What it does: compares all weights of one shape that are not tied, their units in whatever order and with whatever signs,
    within a millionth, and the first values of weights of any shape up to a factor: a generator that starts from the same seed
    gives them the same numbers. Constants, identities and formulas are left out, as are copies that are not trained (the
    teacher of a student): they are equal on purpose. Copies between which a router of zeros chooses are an error.

    Why it is bad: the layers start as one layer applied several times. They learn apart, but begin with a fraction of the
    random features that were paid for, and every run repeats the same draw. Copied experts that weigh the same get the same
    gradient, so that they stay one expert, and their router gets none.

    Example: `nn.TransformerEncoder` deep-copies the layer that it is given; a generator seeded inside the initializer.

    Instead: initialise every layer after it was copied: `for layer in encoder.layers: layer.apply(init)`.

    Source: https://github.com/pytorch/pytorch/issues/72253.
    """

    code = "IA203"
    name = "identical-layers"
    severity = "warning"
    phase = "init"
    summary = "two layers hold the same values without being the same parameter"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """One finding for all the groups."""
        if not initial(evidence):
            return
        drawn = [x for x in fresh_layers(evidence, "contraction", "recurrent", "embedding") if _drawn(x)]
        yield from self._stacked(evidence, list(fresh_layers(evidence)))
        groups = [g for g in self._groups(evidence, drawn) if len({x.tensor for x in g}) > 1 and not is_tie(g)]
        if not groups:
            yield from self._same_seed(evidence, drawn)
            return
        first = groups[0][0]
        others = [x for g in groups for x in g if x is not first]
        idle = choosers(evidence, [x for g in groups for x in g])
        more = f"; so do {len(groups) - 1} other groups of weights" if len(groups) > 1 else ""
        yield self.finding(
            f"{names(groups[0])} hold the same {first.moments.count:,} values without being one parameter{more}: the "
            "layers were copied, or "
            f"drawn from the same seed, and start as one layer repeated{_stays(idle)}",
            init_line(*_again(groups)),
            severity="error" if idle else "warning",
            measured=float(len(groups)),
            expected=float(len({x.tensor for g in groups for x in g})),
            law=EXACT + "two drawn weights are never equal",
            related=tuple(dict.fromkeys([*(x.tensor for x in others), *idle])),
            **fields(first),
        )

    def _stacked(self, evidence: Evidence, drawn: list[LayerEvidence]) -> Iterator[Finding]:
        """Matrices stacked in one tensor, as those of experts, that are one matrix several times."""
        for layer in drawn:
            if layer.pair.axes[0] != "n" or layer.pair.shape[0] < 2 or not layer.pair.trainable or _blank(layer):
                continue
            values, array = layer.read(), evidence.checkpoint.arrays.get(layer.tensor)
            if array is not None and values.size > array.size:
                continue  # the program itself repeats it, for every example
            flat = values.reshape(values.shape[0], -1)
            # A few values tell most draws apart before all are compared.
            if not duplicate_rows(flat[:, :: max(1, flat.shape[1] // _START)]):
                continue
            copies = sum(len(group) - 1 for group in duplicate_rows(flat))
            if copies:
                idle = choosers(evidence, [layer])
                yield self.finding(
                    f"{copies} of the {len(flat)} matrices stacked in this tensor are copies of others: they were filled from "
                    f"one draw, and start as one matrix repeated{_stays(idle)}",
                    init_line(layer),
                    severity="error" if idle else "warning",
                    related=tuple(idle),
                    measured=float(len(flat) - copies),
                    expected=float(len(flat)),
                    law=EXACT + "two drawn matrices are never equal",
                    **fields(layer),
                )

    def _same_seed(self, evidence: Evidence, drawn: list[LayerEvidence]) -> Iterator[Finding]:
        """Weights of several shapes or scales that one and the same sequence of random numbers was poured into."""
        arrays = evidence.checkpoint.arrays
        # One storage under several names, or seen through several views, is one weight.
        large = [x for x in drawn if x.tensor in arrays and x.moments.zeros == 0 and x.moments.count >= _LEAST]
        single = {arrays[x.tensor].storage or x.tensor: x for x in large}
        starts = {x.tensor: (x, start) for x in single.values() if (start := _start(x)) is not None}
        if len(starts) < 2:
            return
        layers = [x for x, _ in starts.values()]
        group = [layers[i] for i in _most_alike(np.stack([start for _, start in starts.values()]))]
        if len(group) < 2 or is_tie(group):
            return
        yield self.finding(
            f"{names(group)} begin with the same {_START} numbers up to a factor: they were drawn from the same seed, and "
            "start as parts of one weight",
            init_line(*group[1:]),
            measured=1.0,
            expected=float(len(group)),
            law=EXACT + "two sequences of random numbers are never equal",
            related=tuple(x.tensor for x in group[1:]),
            **fields(group[0]),
        )

    def _groups(self, evidence: Evidence, drawn: list[LayerEvidence]) -> Iterator[list[LayerEvidence]]:
        """Groups of layers with the same units, in whatever order and with whatever signs."""
        groups: dict[str, list[LayerEvidence]] = {}
        for first, second in _candidates(drawn):
            mine, theirs = groups.get(first.tensor), groups.get(second.tensor)
            if (mine is not None and mine is theirs) or _one_storage(evidence, first, second):
                continue
            a, b = _matrix(first), _matrix(second)
            if _few_values(a):
                continue
            # A permuted hidden layer has its rows in another order, and the layer behind it its columns.
            if same_units(a, b, 0, _NEAR) or same_units(a, b, 1, _NEAR):
                joined = [*(mine or [first]), *(theirs or [second])]
                groups.update(dict.fromkeys((x.tensor for x in joined), joined))
        place = {x.tensor: i for i, x in enumerate(drawn)}
        for group in {id(g): g for g in groups.values()}.values():
            yield sorted(group, key=lambda x: place[x.tensor])

    @classmethod
    def valid(cls) -> tuple[Example, ...]:
        """Layers of one shape, and one layer used twice."""
        return (
            example("drawn one by one", lambda: mlp(32, 32, 32, 32, 5)),
            example("one layer used twice", _shared),
            example("a teacher that is not trained", _teacher),
        )

    @classmethod
    def invalid(cls) -> tuple[Example, ...]:
        """A copy."""
        return (
            example("a copied layer", lambda: mlp(32, 32, 32, 32, 5, change=_copy)),
            example("a copy with its units permuted and some turned round", lambda: mlp(32, 32, 32, 32, 5, change=_shuffled)),
            example("experts filled from one draw", _experts),
            example("copied experts behind a router of zeros", lambda: _experts(router=0.0)),
            example("one seed for layers of all widths", lambda: mlp(32, 64, 48, 5, change=_seeded)),
        )


def _stays(idle: list[str]) -> str:
    """What follows for copies between which zeros choose."""
    if not idle:
        return ""
    return f"; {names(idle)} is to choose between them, gets no gradient as they are equal, and leaves them so for ever"


def _again(groups: list[list[LayerEvidence]]) -> list[LayerEvidence]:
    """Those that have to be drawn again: of each group all but the first."""
    return list({x.tensor: x for g in groups for x in g if x.tensor != g[0].tensor}.values())


def _blank(layer: LayerEvidence) -> bool:
    """Whether there is nothing to compare: one value throughout, or values that are no numbers."""
    return not layer.moments.m2 > 0 or bool(layer.moments.nan or layer.moments.inf)


def _drawn(layer: LayerEvidence) -> bool:
    m, pair = layer.moments, layer.pair
    # What no law drew is a formula (sines, filters for upsampling), the same wherever it is used.
    formula = layer.recognition is not None and layer.recognition.verdict == "trained"
    sound = not _blank(layer) and m.count >= _FEW and m.zeros < m.count / 2
    return sound and pair.stored and pair.trainable and not formula and not _is_table(layer)


def _is_table(layer: LayerEvidence) -> bool:
    """Whether an orthogonal matrix is that of a transform (cosines, Walsh and Hadamard): a drawn one of n columns has the
    marginal law of a coordinate on the sphere, whose kurtosis is 3n/(n + 2)."""
    fits = layer.recognition.schemes if layer.recognition is not None else ()
    if not any("orthogonal" in fit.name for fit in fits):
        return False
    n = max(layer.pair.shape[0], layer.moments.count // layer.pair.shape[0])
    return abs(layer.moments.kurtosis - 3 * n / (n + 2)) > _SIGMAS * math.sqrt(24 / layer.moments.count)


def _candidates(drawn: list[LayerEvidence]) -> Iterator[tuple[LayerEvidence, LayerEvidence]]:
    """Pairs of layers of one shape whose moments of even order are those of copies: only these are read again.

    Neither the order of values nor their signs change them. Of independent draws of a million values one pair in a
    thousand agrees in the second, and one in a hundred of these in the fourth.
    """
    by_shape: dict[tuple[object, ...], list[LayerEvidence]] = {}
    for layer in drawn:
        by_shape.setdefault((layer.pair.shape, layer.moments.zeros), []).append(layer)
    for group in by_shape.values():
        ordered = sorted(group, key=lambda x: x.moments.moment2)
        for i, first in enumerate(ordered):
            for second in ordered[i + 1 :]:
                if second.moments.moment2 > first.moments.moment2 * (1 + 4 * _NEAR):
                    break
                size = _NEAR * math.sqrt(first.moments.moment2 * first.moments.count)
                fourth = _moment4(second) / _moment4(first)
                if abs(_largest(first) - _largest(second)) <= size and abs(fourth - 1) < _FOURTH:
                    yield first, second


def _largest(layer: LayerEvidence) -> float:
    return max(abs(layer.moments.min), abs(layer.moments.max))


def _moment4(layer: LayerEvidence) -> float:
    """The mean fourth power, not centred, over the square of the second: signs that turn round change the mean."""
    m = layer.moments
    raw = m.m4 / m.count + 4 * m.mean * m.m3 / m.count + 6 * m.mean**2 * m.variance + m.mean**4
    return raw / m.moment2 / m.moment2


def _one_storage(evidence: Evidence, first: LayerEvidence, second: LayerEvidence) -> bool:
    """Whether two names, or two places of use, are one parameter."""
    arrays = evidence.checkpoint.arrays
    a, b = arrays.get(first.tensor), arrays.get(second.tensor)
    return first.tensor == second.tensor or (a is not None and b is not None and bool(a.storage) and a.storage == b.storage)


def _matrix(layer: LayerEvidence) -> np.ndarray[Any, Any]:
    values = layer.read()
    return values.reshape(values.shape[0], -1)


def _few_values(values: np.ndarray[Any, Any]) -> bool:
    """Whether the values are those of a table and not of a draw, which has many different ones, of however few bits it is."""
    head = values.ravel()[:4096]
    different = len(set(head.tolist()))
    return different < head.size if head.size < _LEAST else different < min(_VARIED * head.size, _LEVELS)


def _start(layer: LayerEvidence) -> np.ndarray[Any, Any] | None:
    """The first values of a weight, in the order of its memory, as a vector of norm 1; None where they are not varied."""
    with np.errstate(invalid="ignore"):  # arbitrary bytes are signalling NaNs too
        start = layer.read().reshape(-1)[:_START].astype(np.float64)
    norm = float(np.linalg.norm(start))
    if not norm > 0 or not np.isfinite(norm) or distinct(start) < _START / 2:
        return None
    unit: np.ndarray[Any, Any] = start / norm
    return unit


def _most_alike(starts: np.ndarray[Any, Any]) -> list[int]:
    """The largest group of rows of `starts` (rows of norm 1) that are alike up to sign, in order.

    Comparing all pairs would cost the square of their number. Rows that are alike lie on the same side of their medians in
    nearly all places, so only those are compared that do in all places of one of two halves.
    """
    best: list[int] = []
    above = starts > np.median(starts, axis=1, keepdims=True)
    for half in (above[:, ::2], above[:, 1::2]):
        buckets: dict[bytes, list[int]] = {}
        for place, key in enumerate(np.packbits(half ^ half[:, :1], axis=1)):
            buckets.setdefault(key.tobytes(), []).append(place)
        for bucket in buckets.values():
            left = np.array(bucket)
            while len(left) > max(1, len(best)):
                alike = np.abs(starts[left] @ starts[left[0]]) > _ALIKE
                best = left[alike].tolist() if np.count_nonzero(alike) > len(best) else best
                left = left[~alike]
    return best


def _copy(model: Any) -> None:
    layers = linear(model)
    layers[1].weight.copy_(layers[0].weight)


def _shuffled(model: Any) -> None:
    import torch

    layers = linear(model)
    signs = torch.where(torch.arange(32) % 3 == 0, -1.0, 1.0)
    layers[1].weight.copy_(layers[0].weight[torch.randperm(32)] * signs[:, None])


def _experts(router: float = 1.0) -> Any:
    import torch
    from torch import nn

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.head = nn.Linear(16, 4), nn.Linear(16, 3)
            self.experts = nn.Parameter(torch.randn(1, 16, 16).repeat(4, 1, 1) / 4)
            for parameter in self.router.parameters():
                parameter.detach().mul_(router)

        def forward(self, x: torch.Tensor) -> Any:
            hidden = (x.expand(4, -1, -1) @ self.experts).relu()
            return self.head((hidden * self.router(x).softmax(-1).T.unsqueeze(-1)).sum(0))

    return Mixture(), (torch.randn(32, 16),)


def _seeded(model: Any) -> None:
    import torch

    for layer in linear(model):
        torch.nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(42))


def _teacher() -> Any:
    import copy

    import torch
    from torch import nn

    class Distilled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student = nn.Linear(32, 16)
            self.teacher = copy.deepcopy(self.student).requires_grad_(False)
            self.head = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> Any:
            return self.head(self.student(x).relu()) - self.teacher(x).relu()

    return Distilled(), (torch.randn(16, 32),)


def _shared() -> Any:
    import torch
    from torch import nn

    layer = nn.Linear(32, 32)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(32, 4)), (torch.randn(16, 32),)
