"""The constants of a quantised ONNX graph: integers and scales, replaced by arrays that dequantise when they are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from initaudit.load.checkpoint import Array
from initaudit.load.dequantize import Values, dequantized
from initaudit.load.onnx_rewrite import input_name

if TYPE_CHECKING:
    import onnx


class Unscaled(Exception):
    """The scales of an operator cannot be told: it stays as it is."""


class IntegerWeights:
    """Arrays by name, as given and as dequantised; `producers` are the nodes of the graph by what they make."""

    def __init__(self, given: Mapping[str, Array], producers: Mapping[str, onnx.NodeProto]) -> None:
        self.given, self.arrays, self.producers = given, dict(given), producers
        self.added: list[str] = []
        self.origin: dict[str, tuple[object, ...]] = {}  # of a dequantised weight: what it was made of
        self._before: list[tuple[str, Array | None]] = []

    def begin(self) -> None:
        """What is replaced from here on can be undone."""
        self._before = []

    def undo(self) -> None:
        """Puts back what was replaced since `begin`."""
        for name, array in reversed(self._before):
            if array is None:
                del self.arrays[name]
                self.added.remove(name)
            else:
                self.arrays[name] = array
            if array is None or not array.quantized:
                self.origin.pop(name, None)

    def constant(self, name: str) -> Array | None:
        """The array behind a name, seen through copies; None for "" and for what is no constant."""
        while name not in self.given and name in self.producers and self.producers[name].op_type == "Identity":
            name = self.producers[name].input[0]
        return self.given.get(name)

    def needed(self, name: str) -> Array:
        """The array behind a name; raises Unscaled where there is none."""
        found = self.constant(name)
        if found is None:
            raise Unscaled
        return found

    def optional(self, node: onnx.NodeProto, place: int) -> Array | None:
        """An input that may be left out; raises Unscaled for one that is computed."""
        name = input_name(node, place)
        return self.needed(name) if name else None

    def weight(self, q: Array, scale: Array, point: Array | None, axis: int, block_size: int = 0, factor: float = 1.0) -> str:
        """The name under which a dequantised weight can be read: its own, unless another scale is there already."""
        axis = 0 if scale.size == 1 and not block_size else axis  # one scale lies along no axis, whatever its users say

        def read() -> Values:
            held = None if point is None else np.asarray(point.read())
            return dequantized(q.read(), np.asarray(scale.read()) * np.float32(factor), held, axis, block_size)

        made_of = (q.name, scale.name, "" if point is None else point.name, axis, block_size, factor)
        return self.put(q, made_of, q.shape, q.dtype, read)

    def put(
        self, q: Array, made_of: tuple[object, ...], shape: tuple[int, ...], packing: str, read: Callable[[], Values]
    ) -> str:
        """Replaces the integers `q` by what `read` gives; one tensor with two scales becomes two."""
        name = q.name
        while self.origin.setdefault(name, made_of) != made_of:
            name += " again"
        if name not in self.arrays:
            self.added.append(name)
        self._before.append((name, self.arrays.get(name)))
        self.arrays[name] = Array(name, shape, "float32", read, quantized=packing)
        return name
