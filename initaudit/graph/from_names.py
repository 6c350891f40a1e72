"""Weights without a program: what shapes, and the tensors beside them, tell about axes and roles. Free of torch.

Everything here is inferred: a bias as long as one axis says which axis counts the units; only where shapes say nothing, words
in the name are a hint. What is inferred is marked so, and no activation is ever claimed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from initaudit.load.checkpoint import Array
from initaudit.roles import WeightUse

Confidence = Literal["shape", "name"]

_TABLE = re.compile(r"embed|(^|[._])(wte|wpe|tok|pos|vocab|lookup)([._]|$)", re.IGNORECASE)
_RECURRENT = re.compile(r"weight_(ih|hh)_l\d+|(^|[._])(kernel_)?recurrent")
_GATES = {4: ("i", "f", "g", "o"), 3: ("r", "z", "n"), 1: ("h",)}


@dataclass(frozen=True)
class NamedWeight:
    """A tensor taken for a weight: `use` holds its axes and operator, `confidence` what the inference rests on."""

    name: str
    use: WeightUse
    shape: tuple[int, ...]
    confidence: Confidence
    bias: str | None = None


def infer(arrays: Mapping[str, Array]) -> tuple[NamedWeight, ...]:
    """The weights among `arrays`, in their order: floating-point tensors of two axes and more that look like a layer's."""
    found = []
    for name, array in arrays.items():
        if array.dtype.startswith(("float", "bfloat")) and len(array.shape) in (2, 3, 4, 5) and array.size > 0:
            found.append(_weight(name, array, arrays))
    return tuple(found)


def _bias_of(name: str, arrays: Mapping[str, Array]) -> Array | None:
    """The one-axis tensor that stands beside a weight under the same parent and shares all but the last word's kind."""
    parent, _, last = name.rpartition(".")
    candidates = (last.replace("weight", "bias"), "bias")
    for candidate in candidates:
        other = arrays.get(f"{parent}.{candidate}" if parent else candidate)
        if candidate != last and other is not None and len(other.shape) == 1:
            return other
    return None


def _weight(name: str, array: Array, arrays: Mapping[str, Array]) -> NamedWeight:
    shape = array.shape
    bias = _bias_of(name, arrays)
    known = bias.name if bias is not None else None
    if _RECURRENT.search(name) and len(shape) == 2:
        gates = next(
            (g for n, g in _GATES.items() if shape[0] % n == 0 and shape[0] // n == _hidden(name, arrays, shape)), ("h",)
        )
        operator = {4: "lstm", 3: "gru"}.get(len(gates), "rnn")
        return NamedWeight(name, WeightUse("", ("o", "i"), operator, gates=gates), shape, "name", known)
    if len(shape) == 2:
        return _matrix(name, shape, bias)
    taps = "k" * (len(shape) - 2)
    turned = bias is not None and bias.shape[0] == shape[1] != shape[0]
    if turned:
        return NamedWeight(name, WeightUse("", ("i", "o", *taps), "conv_transpose", unit_axis=1), shape, "shape", known)
    depthwise = shape[1] == 1 and shape[0] > 1 and max(shape[2:]) > 1
    use = WeightUse("", ("o", "i", *taps), "conv", groups=shape[0] if depthwise else 1, unit_axis=1)
    return NamedWeight(name, use, shape, "shape" if known else "name", known)


def _hidden(name: str, arrays: Mapping[str, Array], shape: tuple[int, ...]) -> int:
    """The hidden size: the inner axis of the recurrent matrix beside an input matrix."""
    other = arrays.get(name.replace("_ih_", "_hh_"))
    return other.shape[1] if other is not None and len(other.shape) == 2 else shape[1]


def _matrix(name: str, shape: tuple[int, ...], bias: Array | None) -> NamedWeight:
    known = bias.name if bias is not None else None
    if bias is not None and shape[0] != shape[1]:
        axes = ("i", "o") if bias.shape[0] == shape[1] else ("o", "i")
        return NamedWeight(name, WeightUse("", axes, "linear"), shape, "shape", known)
    if bias is None and _TABLE.search(name):
        return NamedWeight(name, WeightUse("", ("v", "d"), "embedding"), shape, "name")
    return NamedWeight(name, WeightUse("", ("o", "i"), "linear"), shape, "name", known)
