"""A checkpoint against the one that it was made from: which tensors came along, which were trained on, which are others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from initaudit.errors import InitauditError
from initaudit.load.checkpoint import Array
from initaudit.load.names import matched

Kind = Literal["identical", "trained on", "newly initialised", "missing", "unexpected", "reshaped", "untied", "tied again"]
KINDS: tuple[Kind, ...] = (
    "identical", "trained on", "newly initialised", "missing", "unexpected", "reshaped", "untied", "tied again",
)  # fmt: skip
BLOCK = 1 << 20
# Standard errors of the correlation of two independent tensors, 1/sqrt(n): what is below them shares nothing with the base.
SIGMAS = 6.0
LEAST = 64  # elements that a correlation is worth asking of


@dataclass(frozen=True)
class Change:
    """What became of one tensor; `base` is its name there and `shapes` are (base, new) of a reshaped one.

    `correlation` and `relative`, the norm of the difference over that of the base, are NaN where the two cannot be compared.
    """

    tensor: str
    kind: Kind
    base: str = ""
    correlation: float = math.nan
    relative: float = math.nan
    shapes: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Against:
    """Every tensor of the two checkpoints, in the order of the new one and then of the base."""

    source: str
    changes: tuple[Change, ...] = ()
    prefix: str = ""
    by_tensor: Mapping[str, Change] = field(default_factory=dict, repr=False)

    def of(self, *kinds: Kind) -> tuple[Change, ...]:
        """The changes of these kinds."""
        return tuple(change for change in self.changes if change.kind in kinds)


def against(new: Mapping[str, Array], base: Mapping[str, Array], source: str) -> Against:
    """Compares the floating-point arrays of `new` with those of `base`, by name; a prefix before all names is seen through.

    A name that `new` lacks is not missing where the base ties it to one that is there. Arrays that cannot be read are left out:
    other findings say so.
    """
    mine, theirs = _floating(new), _floating(base)
    names, prefix = matched(mine, theirs)
    changes = [_change(name, mine[name], names.get(name), theirs) for name in mine]
    ties = _ties(theirs)
    there = {id_ for other in names.values() for id_ in (ties.get(other),) if id_ is not None}
    own_ties = _ties(mine)
    tied_here = {own_ties.get(name) for name in names}
    made: list[Change] = []
    for change in changes:
        if change is None or (change.kind == "unexpected" and own_ties.get(change.tensor) in tied_here - {None}):
            continue
        made.append(change)
    gone = [name for name in theirs if name not in set(names.values()) and ties.get(name) not in there]
    made += [Change(name, "missing", name) for name in gone]
    made += _tie_changes(names, mine, theirs)
    return Against(source, tuple(made), prefix, {change.tensor: change for change in made})


def _floating(arrays: Mapping[str, Array]) -> dict[str, Array]:
    return {n: a for n, a in arrays.items() if a.dtype.startswith(("float", "bfloat")) and a.size}


def _ties(arrays: Mapping[str, Array]) -> dict[str, str]:
    """The storage of every array that shares it with another."""
    owners: dict[str, list[str]] = {}
    for name, array in arrays.items():
        if array.storage:
            owners.setdefault(array.storage, []).append(name)
    return {name: storage for storage, group in owners.items() if len(group) > 1 for name in group}


def _tie_changes(names: Mapping[str, str], mine: Mapping[str, Array], theirs: Mapping[str, Array]) -> Iterable[Change]:
    """Names that are one parameter on one side and two that differ on the other."""
    for kind, (first, second) in (("untied", (theirs, mine)), ("tied again", (mine, theirs))):
        groups: dict[str, list[str]] = {}
        for own, other in names.items():
            array = first[other if kind == "untied" else own]
            if array.storage:
                groups.setdefault(array.storage, []).append(own)
        for group in groups.values():
            for own in group[1:]:
                a, b = (second[x if kind == "untied" else names[x]] for x in (group[0], own))
                if not (a.storage and a.storage == b.storage) and _compared(b, a)[0] is False:
                    yield Change(own, kind, names[own])  # type: ignore[arg-type]


def _change(name: str, array: Array, other: str | None, theirs: Mapping[str, Array]) -> Change | None:
    if other is None:
        return Change(name, "unexpected")
    base = theirs[other]
    if base.shape != array.shape:
        return Change(name, "reshaped", other, shapes=(base.shape, array.shape))
    try:
        equal, correlation, relative = _compared(array, base)
    except InitauditError:
        return None
    if equal:
        return Change(name, "identical", other, 1.0, 0.0)
    unrelated = array.size >= LEAST and abs(correlation) < SIGMAS / math.sqrt(array.size)
    return Change(name, "newly initialised" if unrelated else "trained on", other, correlation, relative)


def _compared(new: Array, base: Array) -> tuple[bool, float, float]:
    """(equal up to rounding to the narrower type, correlation, norm of the difference over that of the base)."""
    a, b = new.read().reshape(-1), base.read().reshape(-1)
    narrow = a.dtype if a.dtype.itemsize <= b.dtype.itemsize else b.dtype
    equal, sums = True, np.zeros(6)
    for start in range(0, a.size, BLOCK):
        x, y = a[start : start + BLOCK], b[start : start + BLOCK]
        with np.errstate(all="ignore"):
            equal = equal and bool(np.array_equal(x.astype(narrow), y.astype(narrow)))
            wide_x, wide_y = x.astype(np.float64), y.astype(np.float64)
            good = np.isfinite(wide_x) & np.isfinite(wide_y)
            if not good.all():
                wide_x, wide_y = wide_x[good], wide_y[good]
            sums += _sums(wide_x, wide_y)
    return equal, *_statistics(sums)


def _sums(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.array([x.size, x.sum(), y.sum(), x @ x, y @ y, x @ y])


def _statistics(sums: np.ndarray[Any, Any]) -> tuple[float, float]:
    n, sx, sy, xx, yy, xy = (float(value) for value in sums)
    if n == 0:
        return math.nan, math.nan
    vx, vy = xx - sx * sx / n, yy - sy * sy / n
    # A constant has no correlation with anything; a norm's ones that were trained are ones that were trained
    correlation = (xy - sx * sy / n) / math.sqrt(vx * vy) if vx > 0 and vy > 0 else 1.0
    relative = math.sqrt(max(0.0, xx - 2 * xy + yy) / yy) if yy > 0 else math.inf
    return correlation, relative
