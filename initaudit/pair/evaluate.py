"""Values of parts of a graph: constants, and what a cluster of nodes makes of a given value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from initaudit.graph.graph import Graph


class ConstantReader:
    """Evaluates constant nodes when they are asked for; keeps small values only."""

    _KEEP = 65536  # elements: scalars, scales and index tables are read again and again, weights once

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._kept: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        """The value of a constant node; its ancestors are evaluated in order, not by recursion."""
        if node in self._kept:
            return self._kept[node]
        needed, stack = set[fx.Node](), [node]
        while stack:
            current = stack.pop()
            if current not in needed and current not in self._kept:
                needed.add(current)
                stack.extend(current.all_input_nodes)
        values: dict[fx.Node, Any] = {}
        for current in sorted(needed):
            value = self._one(current, values)
            values[current] = value
            if not isinstance(value, torch.Tensor) or value.numel() <= self._KEEP:
                self._kept[current] = value
        return values[node]

    def _one(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.graph.constants[str(node.target)].value()
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else self._kept[n])
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def trainable(self, node: fx.Node) -> bool:
        """Whether a constant node is made of something that training changes."""
        stack, seen = [node], {node}
        while stack:
            current = stack.pop()
            if current.op == "get_attr" and self.graph.constants[str(current.target)].kind == "parameter":
                return True
            fresh = [i for i in current.all_input_nodes if i not in seen]
            seen.update(fresh)
            stack.extend(fresh)
        return False

    def size(self, node: fx.Node) -> int | None:
        """The number of elements of a constant node, from its recorded shape where there is one."""
        shape = node.meta.get("shape")
        if shape is None:
            value = self.value(node)
            return int(value.numel()) if isinstance(value, torch.Tensor) else None
        return int(torch.Size(shape).numel())


_CASTS = frozenset(("_to_copy", "to", "type_as", "Cast", "CastLike"))


def run(nodes: Iterable[fx.Node], start: fx.Node, value: torch.Tensor, constants: ConstantReader) -> dict[fx.Node, Any]:
    """The values that `nodes`, in graph order, make of `value` in place of `start`.

    Every other input must be constant. In-place operators write to a copy. Everything is computed in the precision of `value`:
    a cast to fewer digits is passed by, since what is asked is which function a graph means. Raises what the operators raise.
    """
    values: dict[fx.Node, Any] = {start: value}

    def read(node: fx.Node) -> Any:
        found = values[node] if node in values else constants.value(node)
        return found.to(value.dtype) if isinstance(found, torch.Tensor) and found.is_floating_point() else found

    with torch.no_grad():
        for node in nodes:
            name = getattr(node.target, "__name__", "").partition(".")[0]
            if name in _CASTS and _floats(node) and isinstance(node.args[0], fx.Node):
                cast = read(node.args[0])
                if cast.is_floating_point():
                    values[node] = cast
                    continue
            args: Any
            args, kwargs = fx.map_arg((node.args, node.kwargs), read)
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable and args:
                args = (args[0].clone(), *args[1:])
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values


def _floats(node: fx.Node) -> bool:
    dtype = node.meta.get("dtype")
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point
