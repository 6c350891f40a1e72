"""Runs a graph of either door, node by node."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from initaudit.graph.graph import Graph


class Executor(fx.Interpreter):
    """torch.fx's interpreter over a `Graph`: constants are read by name, and each one as often as it is asked for.

    Buffers that the graph writes to are handed out as copies, so that the caller's module is left as it was.
    """

    def __init__(self, graph: Graph, *, garbage_collect: bool = True, device: torch.device | str | None = None) -> None:
        super().__init__(torch.nn.Module(), garbage_collect_values=garbage_collect, graph=graph.fx)
        self.source = graph
        self.device = None if device is None else torch.device(device)

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """The value of a constant."""
        constant = self.source.constants[str(target)]
        value = constant.value()
        if self.device is not None and value.device != self.device and value.is_floating_point():
            value = value.to(self.device)
        return value.clone() if constant.kind == "buffer" else value


class _MetaExecutor(Executor):
    """Runs on the meta device: floating-point data has a shape only, integers about shapes stay real and on the host."""

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        constant = self.source.constants[str(target)]
        if constant.dtype.is_floating_point and len(constant.shape) > 0:
            return torch.empty(constant.shape, dtype=constant.dtype, device="meta")
        return constant.value()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        note_shape(n, result)
        return result


def note_shape(node: fx.Node, value: Any) -> None:
    """Records the shape and dtype of a node's value in its meta data; of a tuple, that of its first element."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, torch.Tensor):
        node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype


def infer_shapes(graph: Graph, inputs: Sequence[torch.Tensor]) -> str | None:
    """Fills in the shape of every node by a run on the meta device, which costs no arithmetic.

    Returns None, or why the shapes downstream of some node depend on data (they are then left unknown).
    """
    runner = _MetaExecutor(graph)
    flat = [i.to("meta") if i.is_floating_point() else i for i in inputs]
    with torch.no_grad(), contextlib.suppress(StopIteration):
        try:
            runner.run(*flat)
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            # Operators without a meta kernel and data-dependent shapes end the run; nothing is guessed downstream of them.
            return " ".join(str(error).split("\n")[0].split())
    return None


@contextlib.contextmanager
def quiet_threads(count: int | None) -> Iterator[None]:
    """Runs torch with `count` intra-operator threads and restores the number after."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
