"""Runs a graph of either door, node by node."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from initaudit.errors import InitauditError, LimitExceeded
from initaudit.graph.calls import bind, role_for, role_of, signal_inputs
from initaudit.graph.graph import Constant, Graph
from initaudit.graph.stand_in import ALL_WORK, WORK, stand_in, tensors_in, without_numbers, work_of
from initaudit.onnx_ops import activation, registry

_SMALL = 64  # elements: as many numbers as steer an operator at most


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
        # The integers of an ONNX file may be shapes, which stay on the host; torch keeps shapes out of tensors.
        moves = value.is_floating_point() or self.source.source == "module"
        if self.device is not None and value.device != self.device and moves:
            value = value.to(self.device)
        return value.clone() if constant.kind == "buffer" else value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call, on the device asked for where the trace wrote the one that it ran on into it."""
        if self.device is not None and isinstance(target, torch._ops.OpOverload):
            args = tuple(self.device if isinstance(a, torch.device) else a for a in args)
            kwargs = {k: self.device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
            if target is torch.ops.aten.view.default:
                target = torch.ops.aten.reshape.default  # kernels of another device lay their results out in another order
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """The node's value; None for what lies downstream of an operator that is not known."""
        return None if n.meta.get("tainted") else super().run_node(n)


class MetaExecutor(Executor):
    """Runs on the meta device: floating-point data has a shape only, integers about shapes stay real and on the host."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph)
        self.host: dict[fx.Node, torch.Tensor] = {}
        self._work = 0.0  # of the runs on zeros so far
        self._steering = {str(n.target) for n in _steering(graph.fx) if n.op == "get_attr"}
        self._steering &= {key for key, c in graph.constants.items() if math.prod(c.shape) <= _SMALL}

    def get_attr(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        constant = self.source.constants[str(target)]
        if constant.dtype.is_floating_point and len(constant.shape) > 0 and target not in self._steering:
            return torch.empty(constant.shape, dtype=constant.dtype, device="meta")
        return constant.value()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(t.is_meta for t in tensors_in((args, kwargs))) or not callable(target):
            return super().call_function(target, args, kwargs)
        # torch's own rules for the shape of some activations import its compiler, which takes seconds.
        alone = len(args) == 1 and isinstance(args[0], torch.Tensor) and args[0].is_meta and args[0].is_floating_point()
        if alone and getattr(target, "__module__", "") == activation.__name__ and registry.role_of(target).kind == "pointwise":
            return without_numbers(args[0])
        work = work_of(role_for(target), bind(target, args, kwargs))
        if work <= WORK and self._work + work <= ALL_WORK:
            self._work += work
            made = stand_in(target, args, kwargs)
            if made is not None:
                return made
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        note_shape(n, result)
        if isinstance(result, torch.Tensor) and result.device.type == "cpu" and _on_host(result):
            self.host[n] = result
        return result


def _on_host(value: torch.Tensor) -> bool:
    """Integers, and single numbers such as the root of a size that a score is divided by."""
    return not value.is_floating_point() or value.numel() == 1


def note_shape(node: fx.Node, value: Any) -> None:
    """Records the shape and dtype of a node's value in its meta data; of a tuple, that of its first element."""
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if isinstance(value, torch.Tensor):
        node.meta["shape"], node.meta["dtype"] = tuple(value.shape), value.dtype


def _steering(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that only steer operators (scales of a resize, a pad value): these read them, so they stay real numbers."""
    found: set[fx.Node] = set()
    for node in reversed(list(graph.nodes)):
        calls = [u for u in node.users if u.op == "call_function"]
        steers = [u in found or (bool(role_of(u).data) and node not in signal_inputs(u)) for u in calls]
        if node.op in ("get_attr", "call_function") and steers and all(steers):
            found.add(node)
    return found


def specialise(graph: Graph, inputs: Sequence[torch.Tensor]) -> Graph:
    """`graph` for inputs of these shapes: the shape of every node filled in, integers about shapes written as constants.

    The run takes place on the meta device, which costs no arithmetic. Where it ends early, because a shape depends on data or
    an operator has no meta kernel, a note says so and the shapes downstream are left unknown.
    """
    runner = MetaExecutor(graph)
    flat = [i.to("meta") if i.is_floating_point() else i for i in inputs]
    notes, refused = graph.notes, ""
    with torch.no_grad():
        try:
            runner.run(*flat)
        except LimitExceeded as error:
            refused = str(error)
        except (InitauditError, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            first = " ".join(str(error).split("\n")[0].split())
            notes = (*notes, f"shapes are known only in part: {first[:200]}")
    constants = {**graph.constants, **_host_constants(graph.fx, runner.host)}
    return dataclasses.replace(graph, constants=constants, notes=notes, refused=refused, examples=tuple(inputs))


def _host_constants(graph: fx.Graph, values: Mapping[fx.Node, torch.Tensor]) -> dict[str, Constant]:
    """Replaces the nodes that compute integers from nothing but shapes and constants by those integers."""
    hosted: set[fx.Node] = set()
    made: dict[str, Constant] = {}
    for node in graph.nodes:
        is_call = node.op == "call_function"
        from_hosted = is_call and bool(node.all_input_nodes) and all(i in hosted for i in node.all_input_nodes)
        if node.op == "get_attr" or from_hosted or (is_call and role_of(node).kind == "shape"):
            hosted.add(node)
    for node in list(graph.nodes):
        value = values.get(node)
        if node not in hosted or value is None or node.op != "call_function":
            continue
        outside = any(user not in hosted or values.get(user) is None for user in node.users)
        if not outside or not _reads_shapes(node):
            continue
        key = f"shape of {node.name}"
        made[key] = Constant(key, "literal", tuple(value.shape), value.dtype, value.detach, trainable=False)
        with graph.inserting_before(node):
            constant = graph.create_node("get_attr", key)
        constant.meta.update(shape=tuple(value.shape), dtype=value.dtype, location=node.meta.get("location"))
        node.replace_all_uses_with(constant)
    for node in reversed(list(graph.nodes)):
        if not node.users and node in hosted:
            graph.erase_node(node)
    return made


def _reads_shapes(node: fx.Node) -> bool:
    """Whether a shape of something takes part in the value of `node`."""
    seen, stack = set[fx.Node](), [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "call_function" and role_of(current).kind == "shape":
            return True
        stack.extend(current.all_input_nodes)
    return False


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
